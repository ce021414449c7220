"""What a client sees of a model: its accuracy on the test set, weighted to the client's own mix of labels."""

from __future__ import annotations

from torch import Tensor

from fed.samples import DenseTable, Split, TextTable


def labels_of(split: Split) -> Tensor | None:
    """Return the labels of a split's rows, (n,) int64 on the CPU; None where rows are not classified."""
    if not isinstance(split.table, DenseTable | TextTable):
        return None
    return split.table.labels[split.rows.to(split.table.device)].cpu()


def accuracy_for(client_labels: Tensor, right: Tensor, test_labels: Tensor) -> float:
    """Return Σ_l share_l · accuracy_l, share_l being label l's share of the client's samples.

    `right` (n,) says which test rows, of `test_labels` (n,), are right. Clients have no test set of their own; their
    mix of labels is what tells one from another. Labels the test set lacks are left out and the rest renormalised.
    """
    total, weight = 0.0, 0
    for label, count in zip(*client_labels.unique(return_counts=True), strict=True):
        of_label = test_labels == label
        if of_label.any():
            total += int(count) * right[of_label].double().mean().item()
            weight += int(count)
    return total / weight if weight else right.double().mean().item()
