"""The training losses of several clients that share one batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fed.data.tables import IGNORED
from fed.training.token_losses import counted_positions, token_losses


def client_losses(
    model: nn.Module, batch: dict[str, Tensor], sizes: Sequence[int], counted: Tensor | None = None
) -> Tensor:
    """Return each client's mean cross-entropy in nats, (C,), in the logits' dtype, or fp32 for half precision.

    Client c owns `sizes[c]` consecutive samples of the batch. If `labels` are classes, (b,), the mean is over the
    client's samples; if they are the tokens of a causal language model, (b, L), it is over the client's tokens. Labels
    that are IGNORED do not count; a client without any other label has loss 0. Nothing is read from the device if
    tokens come with the positions that are `counted` (see `fed.data.tables.Table.counted`). If all rows are packed in
    one, (1, T), `sizes` are the clients' numbers of tokens.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    if labels.dim() == 2:
        places = counted_positions(labels) if counted is None else counted
        return _means(token_losses(model, inputs, labels, places), places, labels, sizes)
    logits: Tensor = model(**inputs).logits
    wide = logits if logits.dtype.itemsize >= 4 else logits.float()
    losses = cross_entropy(wide, labels, ignore_index=IGNORED, reduction="none")
    return sums(losses, sizes) / sums(labels != IGNORED, sizes).clamp_min(1)


def sums(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the sum of each client's values, (b,) to (C,); NaN and infinity affect only the client that has them."""
    if len(set(sizes)) == 1 and sizes[0]:
        return values.view(len(sizes), -1).sum(1)
    return torch.stack([part.sum() for part in values.split(list(sizes))])


@torch.compiler.disable
def _means(losses: Tensor, counted: Tensor, labels: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the clients' mean losses (C,) from those of the `counted` positions (T,) in a batch with these labels."""
    samples = sum(sizes)
    of_samples = torch.bincount(counted // (labels.numel() // samples), minlength=samples)
    counts = [int(own.sum()) for own in of_samples.split(list(sizes))]
    return sums(losses, counts) / torch.tensor(counts).clamp_min(1).to(losses.device, non_blocking=True)
