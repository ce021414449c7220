"""Tables and views of them: what a batch holds, where it is padded, and that rows are held once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, InstructionTable, Sequences, Split, TextTable
from tests.support.tiny_federation import everything

PAD = 9


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


def make_text_table() -> TextTable:
    tokens = {
        "input_ids": Sequences.of([[1, 2, 3], [4], [5, 6]]),
        "token_type_ids": Sequences.of([[0, 1, 1], [1], [0, 1]]),
    }
    return TextTable(tokens, torch.tensor([7, 8, 9]), PAD)


def make_instruction_table() -> InstructionTable:
    """Prompts [1 2 3], [4], [5 6] with answers [11 12], [13], [14]."""
    tokens = Sequences.of([[1, 2, 3, 11, 12], [4, 13], [5, 6, 14]])
    tokenizer = SimpleNamespace(pad_token_id=PAD)
    return InstructionTable(tokens, torch.tensor([3, 1, 2]), [["a"], ["b"], ["c"]], tokenizer, max_new_tokens=2)


def test_a_dense_batch_is_the_models_keyword_arguments() -> None:
    split = Split.whole(DenseTable({"pixel_values": torch.arange(6).reshape(3, 2)}, torch.tensor([7, 8, 9])))
    batch = split.batch(rows(2, 0))
    assert len(split) == 3
    assert batch["pixel_values"].tolist() == [[4, 5], [0, 1]]
    assert batch["labels"].tolist() == [9, 7]
    assert split.lengths(rows(2, 0)).tolist() == [1, 1]


def test_texts_are_padded_to_the_longest_of_the_batch() -> None:
    split = Split.whole(make_text_table())
    batch = split.batch(rows(1, 2))
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[4, PAD], [5, 6]],
        "token_type_ids": [[1, 0], [0, 1]],
        "attention_mask": [[1, 0], [1, 1]],
        "labels": [8, 9],
    }
    assert all(values.dtype == torch.int64 for values in batch.values())
    assert split.batch(rows(1, 0))["input_ids"].shape == (2, 3)
    assert split.lengths(rows(2, 1, 0)).tolist() == [2, 1, 3]


@given(st.lists(st.lists(st.integers(0, 8), min_size=1, max_size=7), min_size=1, max_size=9), st.randoms())
def test_every_sequence_comes_back_whole(sequences: list[list[int]], random: object) -> None:
    order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(random.randrange(99)))
    padded, inside = Sequences.of(sequences).padded(order, PAD)
    assert padded.shape[1] == max(map(len, sequences))
    assert [row[mask].tolist() for row, mask in zip(padded, inside, strict=True)] == [sequences[i] for i in order]
    assert (padded[~inside] == PAD).all()


def test_only_the_answer_and_its_end_cost_loss() -> None:
    batch = Split.whole(make_instruction_table()).batch(rows(1, 0))
    assert batch["input_ids"].tolist() == [[4, 13, PAD, PAD, PAD], [1, 2, 3, 11, 12]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, 13, -100, -100, -100], [-100, -100, -100, 11, 12]]


def test_prompts_to_generate_from_are_padded_on_the_left_and_hold_no_answer() -> None:
    prompts = make_instruction_table().prompts(rows(2, 0, 1))
    assert prompts["input_ids"].tolist() == [[PAD, 5, 6], [1, 2, 3], [PAD, PAD, 4]]
    assert prompts["attention_mask"].tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]


def test_a_split_is_a_view_and_joining_splits_copies_no_row() -> None:
    table = make_text_table()
    first, second = Split(table, rows(2)), Split(table, rows(0, 1))
    joined = Split.joined([first, second])
    assert joined.table is table
    assert joined.rows.tolist() == [2, 0, 1]
    assert first.batch(rows(0))["labels"].tolist() == [9]
    with pytest.raises(ValueError, match="different tables"):
        Split.joined([first, Split.whole(make_text_table())])


def test_batches_take_every_row_once_the_longest_first_within_their_bounds() -> None:
    lengths = [3, 1, 2, 5, 2, 9]
    tokens = Sequences.of([[0] * length for length in lengths])
    split = Split.whole(TextTable({"input_ids": tokens}, torch.zeros(6, dtype=torch.int64), PAD))
    found = [batch.tolist() for batch in split.batches(most_rows=3, most_tokens=8)]
    assert found == [[5], [3], [0, 2], [4, 1]]
    dense = Split.whole(DenseTable({}, torch.zeros(7)))
    assert [batch.tolist() for batch in dense.batches(3, 100)] == [[0, 1, 2], [3, 4, 5], [6]]


def test_ten_thousand_clients_hold_one_table_and_lists_of_indices() -> None:
    table = DenseTable({"inputs": torch.zeros(30_000, 100)}, torch.zeros(30_000, dtype=torch.int64))
    *clients, test = (Split(table, part) for part in torch.arange(30_000).split([2] * 10_000 + [10_000]))
    data = FederatedData(tuple(clients), test, pretrain=None, undisturbed=None, label_names=())
    moved = data.to(torch.device("cpu", 0))
    for some in (data, moved):
        assert len({id(split.table) for split in (*some.clients, some.test)}) == 1
    assert sum(client.rows.nbytes for client in moved.clients) == 10_000 * 2 * 8


def test_moving_data_moves_every_part_of_it_but_the_bases_own() -> None:
    table, other = make_text_table(), make_instruction_table()
    data = FederatedData((Split.whole(table),), Split.whole(other), Split.whole(table), None, (), Split(other, rows(1)))
    moved = data.to(torch.device("meta"))
    assert {split.table.device.type for split in (*moved.clients, moved.test, moved.validation)} == {"meta"}
    assert moved.test.table is moved.validation.table
    assert moved.pretrain.table.device.type == "cpu"
    assert everything(moved.pretrain)["labels"].tolist() == [7, 8, 9]


@pytest.mark.gpu
@pytest.mark.parametrize("make", [make_text_table, make_instruction_table])
def test_a_batch_on_a_device_is_the_hosts(make: Callable) -> None:
    table, there = make(), make().to(torch.device("cuda"))
    for name, values in there.batch(rows(1, 2)).items():
        assert values.is_cuda
        assert torch.equal(values.cpu(), table.batch(rows(1, 2))[name])
    if isinstance(table, InstructionTable):
        for name, values in there.prompts(rows(1, 2)).items():
            assert torch.equal(values.cpu(), table.prompts(rows(1, 2))[name])
