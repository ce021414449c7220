"""A run's data: digits and texts, held-out sets, the clients' parts, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fed.config import RunConfig, load
from fed.data.digits import shift_images
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.data.tables import DenseTable, Split
from fed.errors import FedError
from tests.support.text_data import PETS, instruction_config, instructions, text_config, write_rows
from tests.support.tiny_federation import everything


@pytest.mark.parametrize(
    ("shift", "expected"),
    [
        ("none", [[0.1, 0.2], [0.3, 0.4]]),
        ("rotate90", [[0.2, 0.4], [0.1, 0.3]]),
        ("rotate180", [[0.4, 0.3], [0.2, 0.1]]),
        ("invert", [[-0.1, -0.2], [-0.3, -0.4]]),
    ],
)
def test_shifts_of_an_image_small_enough_to_see(shift: str, expected: list) -> None:
    image = torch.tensor([[[[0.1, 0.2], [0.3, 0.4]]]])
    torch.testing.assert_close(shift_images(image, shift), torch.tensor([[expected]]))


@pytest.fixture(scope="module")
def digits() -> FederatedData:
    return load_data(RunConfig())


def rows_of(*splits: Split | None) -> list[bytes]:
    return [image.numpy().tobytes() for split in splits if split for image in everything(split)["pixel_values"]]


def test_digits_go_to_pretraining_clients_and_test_each_once(digits: FederatedData) -> None:
    sizes = len(digits.pretrain), sum(map(len, digits.clients)), len(digits.test)
    assert sum(sizes) == 1797
    assert sizes == pytest.approx((0.4 * 1797, 0.35 * 1797, 0.25 * 1797), abs=5)
    assert len(digits.clients) == 20
    assert digits.label_names == tuple("0123456789")
    # Once the rotated images are rotated back, the data are all the images of the set.
    turned = torch.cat([everything(client)["pixel_values"] for client in digits.clients])
    back = Split.whole(DenseTable({"pixel_values": turned.rot90(-1, (-2, -1))}, torch.zeros(len(turned))))
    upright = load_data(load("digits", ["data.shift=none", "seed=9"]))
    every_image = rows_of(upright.pretrain, upright.test, *upright.clients)
    assert sorted(rows_of(digits.pretrain, digits.undisturbed, back)) == sorted(every_image)


def test_digits_are_scaled_and_only_the_base_sees_them_upright(digits: FederatedData) -> None:
    undisturbed, test = everything(digits.undisturbed), everything(digits.test)
    images = undisturbed["pixel_values"]
    assert images.shape == (448, 1, 8, 8)
    assert (images.dtype, test["labels"].dtype) == (torch.float32, torch.int64)
    assert (images.min().item(), images.max().item()) == (-1.0, 1.0)
    assert torch.equal(test["pixel_values"], torch.rot90(images, 1, (-2, -1)))
    assert torch.equal(test["labels"], undisturbed["labels"])


def test_digits_depend_on_the_seed_alone(digits: FederatedData) -> None:
    again, other = load_data(RunConfig()), load_data(RunConfig(seed=1))
    assert rows_of(*again.clients) == rows_of(*digits.clients)
    assert rows_of(again.test) == rows_of(digits.test)
    assert rows_of(*other.clients) != rows_of(*digits.clients)
    # The clients' rows do not depend on the adapter or on training.
    frozen = load_data(load("digits", ["train.local_steps=1", "adapter.rank=32"]))
    assert rows_of(*frozen.clients) == rows_of(*digits.clients)


def test_a_validation_set_is_the_clients_rows_and_leaves_the_test_as_it_is(digits: FederatedData) -> None:
    held = load_data(load("digits", ["data.validation_fraction=0.1"]))
    assert digits.validation is None
    assert rows_of(held.test) == rows_of(digits.test)
    assert len(held.validation) == pytest.approx(0.1 * 1797, abs=5)
    clients = [*rows_of(*held.clients), *rows_of(held.validation)]
    assert sorted(clients) == sorted(rows_of(*digits.clients))


def test_so_many_rows_are_drawn_as_are_asked_for(digits: FederatedData) -> None:
    few = load_data(load("digits", ["data.train_rows=100", "data.test_rows=30", "clients.count=10"]))
    assert (sum(map(len, few.clients)), len(few.test)) == (100, 30)
    assert set(rows_of(few.test)) <= set(rows_of(digits.test))
    assert set(rows_of(*few.clients)) <= set(rows_of(*digits.clients))
    other = load_data(load("digits", ["data.train_rows=100", "clients.count=10", "seed=1"]))
    assert rows_of(*other.clients) != rows_of(*few.clients)


def test_jsonl_becomes_tokens_of_the_checkpoints_own_tokenizer(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": text, "label": f"label {number % 3}"} for number, text in enumerate(PETS * 3)]
    data = load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert))
    assert data.label_names == ("label 0", "label 1", "label 2")
    assert data.pretrain is data.undisturbed is None
    assert (sum(map(len, data.clients)), len(data.test)) == (18, 6)
    assert torch.bincount(everything(data.test)["labels"]).tolist() == [2, 2, 2]
    for split in (data.test, *data.clients):
        batch = everything(split)
        tokens, mask = batch["input_ids"], batch["attention_mask"]
        assert tokens.shape == mask.shape
        assert tokens.dtype == torch.int64
        assert ((tokens == 0) == (mask == 0)).all()


def test_long_texts_are_cut(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": "dog " * 99, "label": number % 2} for number in range(12)]
    data = load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert))
    assert everything(data.test)["input_ids"].shape[1] == 16
    assert data.label_names == ("0", "1")


def test_labels_the_checkpoints_head_knows_keep_its_order(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": text, "label": "dog" if "dog" in text else "cat"} for text in PETS * 2]
    assert load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert)).label_names == ("dog", "cat")


def test_labels_that_make_no_task_are_refused(tmp_path: Path, bert: Path) -> None:
    path = write_rows(tmp_path / "one.jsonl", [{"text": text, "label": "x"} for text in PETS])
    with pytest.raises(FedError, match=r"data.label is 'label': the only label in .* is 'x'"):
        load_data(text_config(path, bert))
    path = write_rows(tmp_path / "free.jsonl", [{"text": text, "label": text} for text in PETS])
    with pytest.raises(FedError, match="8 rows of 8 labels leave none to test on"):
        load_data(text_config(path, bert))


def test_rows_of_a_test_file_are_the_test(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": text, "label": number % 2} for number, text in enumerate(PETS)]
    train, test = write_rows(tmp_path / "train.jsonl", rows), write_rows(tmp_path / "test.jsonl", rows[:3])
    data = load_data(text_config(train, bert, test_path=str(test), validation_fraction=0.25))
    assert (sum(map(len, data.clients)), len(data.validation), len(data.test)) == (6, 2, 3)
    assert data.test.rows.tolist() == [8, 9, 10]
    assert everything(data.test)["labels"].tolist() == [0, 1, 0]


def test_pairs_of_texts_carry_their_types(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": "a cat", "other": "the dog", "label": number % 2} for number in range(8)]
    data = load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert, text_pair="other"))
    batch = everything(data.test)
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert batch["token_type_ids"].sum(1).tolist() == [3] * len(data.test)  # the dog [SEP]


def test_instructions_are_dealt_out_by_a_column(tmp_path: Path, llama: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", instructions(24))
    clients = {"clients": {"count": 3, "per_round": 1}}
    data = load_data(instruction_config(path, llama, partition="natural", partition_by="category", **clients))
    assert [len({row % 3 for row in client.rows.tolist()}) for client in data.clients] == [1, 1, 1]
    assert sorted(row % 3 for row in data.test.rows.tolist()) == [0, 0, 1, 1, 2, 2]
    assert (data.label_names, data.pretrain) == ((), None)
    skewed = load_data(instruction_config(path, llama, partition="dirichlet", partition_by="category", **clients))
    assert sum(map(len, skewed.clients)) == 18
    assert sum(map(len, load_data(instruction_config(path, llama, **clients)).clients)) == 18


def test_instructions_without_a_column_to_go_by_are_refused(tmp_path: Path, llama: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", instructions())
    for partition in ("dirichlet", "natural"):
        with pytest.raises(FedError, match=r"data.partition_by is missing: .*\(category, instruction, input, output\)"):
            load_data(instruction_config(path, llama, partition=partition))
    with pytest.raises(FedError, match=r"line 1: data.partition_by is 'kind'; the columns there are category"):
        load_data(instruction_config(path, llama, partition="natural", partition_by="kind"))


def test_a_person_hears_of_rows_that_are_cut(tmp_path: Path, llama: Path) -> None:
    rows = [{**row, "input": "dog " * 99 if number == 4 else row["input"]} for number, row in enumerate(instructions())]
    said: list[str] = []
    load_data(instruction_config(write_rows(tmp_path / "rows.jsonl", rows), llama), said.append)
    assert said == ["1 of 12 rows have more than data.max_length (64) tokens and are cut"]
