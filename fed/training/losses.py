"""The training losses of several clients that share one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fed.data.tables import IGNORED


def client_losses(model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int]) -> Tensor:
    """Return each client's mean cross-entropy in nats, (C,), in the logits' dtype, or fp32 for half precision.

    Client c owns `sizes[c]` consecutive samples of the batch. If `labels` are classes, (b,), the mean is over the
    client's samples; if they are the tokens of a causal language model, (b, L), it is over the client's tokens. Labels
    that are IGNORED do not count; a client without any other label has loss 0. Nothing is read from the device.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    logits: Tensor = model(**inputs).logits
    if labels.dim() == 2:  # the logits at each position predict the next token
        logits, labels = logits[:, :-1], labels[:, 1:]
    losses = cross_entropy(_wide(logits).flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).view(labels.shape[0], -1).sum(1)
    return sums(losses.view(labels.shape[0], -1).sum(1), sizes) / sums(counted, sizes).clamp_min(1)


def sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of each client's values, (b,) to (C,); NaN and infinity affect only the client that has them."""
    if len(set(sizes)) == 1:
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(list(sizes))])


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype.itemsize >= 4 else logits.float()
