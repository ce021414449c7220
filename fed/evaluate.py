"""Accuracy and loss of a model on held-out samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fed.data import Split

BATCH_SIZE = 256


def evaluate(model: nn.Module, split: Split) -> tuple[float, float]:
    """Return (accuracy in 0 … 1, mean cross-entropy in nats) over every sample of `split`.

    The model runs in evaluation mode without gradients; the sums are fp64, read from the device once.
    """
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=split.labels.device)
    loss = torch.zeros((), dtype=torch.float64, device=split.labels.device)
    with torch.no_grad():
        for rows in torch.arange(len(split), device=split.labels.device).split(BATCH_SIZE):
            batch = split.batch(rows)
            labels: Tensor = batch.pop("labels")  # (b,)
            logits: Tensor = model(**batch).logits.double()  # (b, classes)
            correct += (logits.argmax(-1) == labels).sum()
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return correct.item() / len(split), loss.item() / len(split)
