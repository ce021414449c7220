"""The training loss of clients whose samples stand one after the other in one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fed.data.tables import IGNORED


def client_losses(model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int]) -> Tensor:
    """Return every client's mean cross-entropy in nats, (C,) in the logits' dtype, in fp32 for half precision.

    Client c owns `sizes[c]` samples of the batch, in order. `labels` (b,) are classes, of which the mean goes over the
    client's samples; labels (b, L) are the tokens of a causal language model, and it goes over those that count. A
    client without samples or tokens has loss 0. Nothing is read from the device.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits: Tensor = model(**inputs).logits
    if labels.dim() == 2:  # each position is followed by the label to its right
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).view(labels.shape[0], -1).sum(1)
    return sums(losses.view(labels.shape[0], -1).sum(1), sizes) / sums(counted, sizes).clamp_min(1)


def sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return every client's sum of its values (b,), (C,): what is not finite stays with its client."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(list(sizes))])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
