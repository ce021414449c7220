"""Digests of what a run starts from: equal for equal inputs, and different for every change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, Sequences, Split, TextTable
from fed.errors import FedError
from fed.simulation.inputs import check_same, input_digests, model_digest
from tests.support.tiny_federation import TinyClassifier, make_data


def changed(data: FederatedData) -> dict[str, FederatedData]:
    table = data.test.table
    inputs, labels = table.inputs["inputs"], table.labels
    others = {
        "rows": DenseTable({"inputs": inputs.nextafter(inputs + 1)}, labels),
        "types of rows": DenseTable({"inputs": inputs.double()}, labels),
        "swapped labels": DenseTable({"inputs": inputs}, (labels + 1) % 3),
        "order of rows": DenseTable({"inputs": inputs.flip(0)}, labels.flip(0)),
        "names of inputs": DenseTable({"others": inputs}, labels),
    }
    of_table = {
        what: replace(
            data,
            clients=tuple(Split(other, split.rows) for split in data.clients),
            test=Split(other, data.test.rows),
        )
        for what, other in others.items()
    }
    one, two, *rest = data.clients
    return of_table | {
        "clients exchanged": replace(data, clients=(two, one, *rest)),
        "a row from one client to another": replace(
            data, clients=(Split(table, one.rows[:-1]), Split(table, torch.cat([one.rows[-1:], two.rows])), *rest)
        ),
        "a test row less": replace(data, test=Split(table, data.test.rows[1:])),
        "a test row as a validation row": replace(
            data, test=Split(table, data.test.rows[1:]), validation=Split(table, data.test.rows[:1])
        ),
        "label names": replace(data, label_names=("label 1", "label 0", "label 2")),
    }


def test_equal_inputs_have_equal_digests_and_every_change_another() -> None:
    data = make_data()
    assert input_digests(data, TinyClassifier()) == input_digests(make_data(), TinyClassifier())
    found = [input_digests(data, TinyClassifier()), input_digests(data, TinyClassifier(seed=1))]
    found += [input_digests(other, TinyClassifier()) for other in changed(data).values()]
    assert len({tuple(digests.values()) for digests in found}) == len(found)


def test_one_bit_of_a_weight_and_its_type_count() -> None:
    data, found = make_data(), set()
    for change in (
        lambda value: value,
        lambda value: value.nextafter(value + 1),
        lambda value: -value,
        torch.Tensor.half,
    ):
        model = TinyClassifier()
        model.head.bias = torch.nn.Parameter(change(model.head.bias.detach()))
        found.add(input_digests(data, model)["base model"])
    assert len(found) == 4


def test_tokens_and_their_division_into_rows_count() -> None:
    found = set()
    for texts, pad in (([[1, 2], [3]], 0), ([[1], [2, 3]], 0), ([[1, 2], [3]], 9)):
        split = Split.whole(TextTable({"input_ids": Sequences.of(texts)}, torch.zeros(2, dtype=torch.int64), pad))
        data = replace(make_data(), clients=(split,), test=split)
        found.add(input_digests(data, TinyClassifier())["rows"])
    assert len(found) == 3


def test_a_change_is_named() -> None:
    now = input_digests(make_data(), TinyClassifier())
    check_same({}, now, "the run")  # of an earlier version
    check_same(now, now, "the run")
    with pytest.raises(FedError, match=r"the run began with other inputs: the base model changed since; put back what"):
        check_same({**now, "base model": "other"}, now, "the run")


def test_weights_that_are_made_of_several_tensors_are_known_by_all_of_them() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    def of(*values: float) -> str:
        model = torch.nn.Linear(3, 2, bias=False)
        model.weight = torch.nn.Parameter(TwoTensor(*(torch.full((2, 3), value) for value in values)))
        return model_digest(model)

    assert of(1.0, 2.0) == of(1.0, 2.0)
    assert len({of(1.0, 2.0), of(1.0, 3.0), of(2.0, 2.0), of(2.0, 1.0)}) == 4
