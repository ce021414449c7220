"""What a model reaches on held-out samples."""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor, nn

from fed.data import FederatedData
from fed.generate import answer
from fed.rouge import is_exact, rouge_1, rouge_l
from fed.samples import IGNORED, InstructionTable, Split

MOST_ROWS, MOST_TOKENS = 256, 16_384  # of one batch


def evaluate_held_out(model: nn.Module, data: FederatedData, right: Tensor | None = None) -> dict[str, float]:
    """Return the metrics of the test set, and those of the validation set, if there is one, as `validation_…`.

    `right` is filled as by `evaluate` over the test set.
    """
    metrics = evaluate(model, data.test, right)
    if data.validation is not None:
        metrics |= {f"validation_{name}": value for name, value in evaluate(model, data.validation).items()}
    return metrics


def evaluate(model: nn.Module, split: Split, right: Tensor | None = None) -> dict[str, float]:
    """Return what a model reaches on `split`, in evaluation mode: `accuracy`, `loss` and, for instructions, ROUGE.

    Classification: accuracy (0 … 1) and mean cross-entropy in nats over every sample. Instructions: `loss` is the
    mean cross-entropy of the answers' tokens, each token alike; `accuracy` the share of generated answers that are
    exactly right, `rouge_1` and `rouge_l` their mean ROUGE, each with the right answer it is nearest to. Sums are fp64.
    `right`, (n,) bool on the rows' device, is filled with which rows are classified rightly; instructions leave it.
    """
    model.eval()
    if isinstance(split.table, InstructionTable):
        return _answering(model, split, split.table) | {"loss": _token_loss(model, split)}
    return _classification(model, split, right)


def _classification(model: nn.Module, split: Split, right: Tensor | None) -> dict[str, float]:
    device = split.table.device
    right = torch.zeros(len(split), dtype=torch.bool, device=device) if right is None else right
    loss = torch.zeros((), dtype=torch.float64, device=device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            batch = split.batch(rows)
            labels: Tensor = batch.pop("labels")  # (b,)
            logits: Tensor = model(**batch).logits.double()  # (b, classes)
            right[rows.to(device, non_blocking=True)] = logits.argmax(-1) == labels
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    return {"accuracy": right.sum().item() / len(split), "loss": loss.item() / len(split)}


def _token_loss(model: nn.Module, split: Split) -> float:
    """Mean cross-entropy in nats over every token of the answers and their ends."""
    loss = torch.zeros((), dtype=torch.float64, device=split.table.device)
    count = torch.zeros((), dtype=torch.int64, device=split.table.device)
    with torch.no_grad():
        for rows in split.batches(MOST_ROWS, MOST_TOKENS):
            batch = split.batch(rows)
            labels = batch.pop("labels")[:, 1:]  # (b, L - 1): the token each position is followed by
            answered = labels != IGNORED
            # The vocabulary is wide: only the rows of logits that count leave the working dtype.
            logits: Tensor = model(**batch).logits[:, :-1][answered].float()  # (tokens, vocabulary)
            losses = torch.nn.functional.cross_entropy(logits, labels[answered], reduction="none")
            loss += losses.sum(dtype=torch.float64)
            count += answered.sum()
    return loss.item() / count.item()


def _answering(model: nn.Module, split: Split, table: InstructionTable) -> dict[str, float]:
    """Exact match and ROUGE over rows at even distances, `most_generated` of them."""
    most = table.most_generated or len(split)
    chosen = torch.arange(min(most, len(split))) * len(split) // min(most, len(split))
    part = Split(table, split.rows[chosen])
    measures = {"accuracy": is_exact, "rouge_1": rouge_1, "rouge_l": rouge_l}
    found: dict[str, list[float]] = {name: [] for name in measures}
    for rows in part.batches(MOST_ROWS, MOST_TOKENS):
        numbers = part.rows[rows]
        for text, row in zip(answer(model, table, numbers), numbers.tolist(), strict=True):
            for name, measure in measures.items():
                found[name].append(max(float(measure(text, right)) for right in table.answers[row]))
    return {name: fmean(values) for name, values in found.items()}
