"""A client's accuracy: the test set weighted to its own mix of labels."""

from __future__ import annotations

import pytest
import torch

from fed.simulation.evaluation import accuracy_for, labels_of
from tests.support.tiny_federation import make_data

TEST = torch.tensor([0, 0, 1, 1, 1, 1, 2])
RIGHT = torch.tensor([True, False, True, True, True, False, False])  # ½ of label 0, ¾ of label 1, none of label 2


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 0], 0.5),
        ([1], 0.75),
        ([0, 1, 1, 1], 0.25 * 0.5 + 0.75 * 0.75),
        ([0, 2], 0.25),
        ([0, 9, 9], 0.5),  # the test set has no 9
        ([9], 4 / 7),  # without weights: the plain accuracy
    ],
)
def test_by_hand(labels: list[int], expected: float) -> None:
    assert accuracy_for(torch.tensor(labels), RIGHT, TEST) == pytest.approx(expected)


def test_labels_of_a_view() -> None:
    data = make_data()
    labels = labels_of(data.clients[2])
    assert torch.equal(labels, data.clients[2].batch(torch.arange(14))["labels"])
