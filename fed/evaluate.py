"""What a model reaches on held-out samples."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fed.data import FederatedData
from fed.samples import Split

MOST_ROWS, MOST_TOKENS = 256, 16_384  # of one batch


def evaluate_held_out(model: nn.Module, data: FederatedData) -> dict[str, float]:
    """Return the metrics of the test set, and those of the validation set, if there is one, as `validation_…`."""
    metrics = evaluate(model, data.test)
    if data.validation is not None:
        metrics |= {f"validation_{name}": value for name, value in evaluate(model, data.validation).items()}
    return metrics


def evaluate(model: nn.Module, split: Split) -> dict[str, float]:
    """Return `accuracy` (0 … 1) and `loss`, the mean cross-entropy in nats, over every sample of `split`.

    The model runs in evaluation mode without gradients; the sums are fp64, read from the device once.
    """
    model.eval()
    device = split.table.device
    correct = torch.zeros((), dtype=torch.int64, device=device)
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            batch = split.batch(rows)
            labels: Tensor = batch.pop("labels")  # (b,)
            logits: Tensor = model(**batch).logits.double()  # (b, classes)
            correct += (logits.argmax(-1) == labels).sum()
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return {"accuracy": correct.item() / len(split), "loss": loss.item() / len(split)}
