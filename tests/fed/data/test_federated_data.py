"""A run's data: digits and texts, held-out sets, the clients' parts, and errors."""

from __future__ import annotations

import re
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


def owned(count: int = 40) -> list[dict[str, object]]:
    """Return rows of text with a label and an owner each, two of either."""
    numbers = range(count)
    return [{"text": PETS[number % 8], "label": "xy"[number % 2], "user": number // 2 % 2} for number in numbers]


def test_rows_of_a_test_file_need_no_owner(tmp_path: Path, bert: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", owned())
    test = write_rows(tmp_path / "test.jsonl", [{"text": "a cat", "label": "xy"[number % 2]} for number in range(10)])
    asked = {"test_path": str(test), "partition": "natural", "partition_by": "user", "validation_fraction": 0.2}
    said: list[str] = []
    data = load_data(text_config(train, bert, **asked), said.append)
    assert [set(client.rows.numpy() // 2 % 2) for client in data.clients] in ([{0}, {1}], [{1}, {0}])
    assert (sum(map(len, data.clients)), len(data.validation), data.test.rows.tolist()) == (32, 8, list(range(40, 50)))
    assert said == []
    nameless = write_rows(tmp_path / "nameless.jsonl", [*owned(), {"text": "a cat", "label": "x"}])
    with pytest.raises(FedError, match=r"nameless.jsonl line 41: data.partition_by is 'user'; the columns there are"):
        load_data(text_config(nameless, bert, **asked))


def test_instructions_of_a_test_file_need_no_owner(tmp_path: Path, llama: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", instructions(24))
    bare = [{name: row[name] for name in ("instruction", "input", "output")} for row in instructions(6)]
    test = write_rows(tmp_path / "test.jsonl", bare)
    asked = {"test_path": str(test), "partition": "natural", "partition_by": "category", "validation_fraction": 0.25}
    data = load_data(instruction_config(train, llama, **asked))
    assert (sum(map(len, data.clients)), len(data.validation), data.test.rows.tolist()) == (18, 6, list(range(24, 30)))


@pytest.mark.parametrize("task", ["classification", "instruction"])
def test_every_owner_may_have_one_row(tmp_path: Path, bert: Path, llama: Path, task: str) -> None:
    said: list[str] = []
    asked = {"partition": "natural", "partition_by": "user", "clients": {"count": 15, "per_round": 2}}
    if task == "classification":
        rows = [{**row, "user": f"user {number}"} for number, row in enumerate(owned(20))]
        config = text_config(write_rows(tmp_path / "rows.jsonl", rows), bert, **asked)
    else:
        rows = [{**row, "user": number} for number, row in enumerate(instructions(20))]
        config = instruction_config(write_rows(tmp_path / "rows.jsonl", rows), llama, **asked)
    data = load_data(config, said.append)
    test = 4 if task == "classification" else 5
    assert (len(data.test), sum(map(len, data.clients))) == (test, 20 - test)
    assert min(map(len, data.clients)) == 1
    together = "no user has rows enough to hold out a part of each; rows are held out from all together"
    assert said == ([] if task == "classification" else [together])


def test_a_validation_set_without_rows_is_refused(tmp_path: Path, bert: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", owned(8))
    with pytest.raises(FedError, match=r"data.validation_fraction is 0.1: 6 rows of 2 labels leave none to vali"):
        load_data(text_config(path, bert, validation_fraction=0.1))


def test_rows_and_labels_no_client_trains_on_are_said(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": PETS[number % 8], "label": f"l{number % 5}"} for number in range(40)]
    path, said = write_rows(tmp_path / "rows.jsonl", rows), []
    data = load_data(text_config(path, bert, partition="pathological", labels_per_client=1), said.append)
    assert sum(map(len, data.clients)) == 12
    assert said == [
        "partition 'pathological': 18 of 30 training rows go to no client; no client trains on label 'l2', 'l3', 'l4'"
    ]
    said.clear()
    load_data(load("digits", ["data.partition=pathological", "clients.count=2", "clients.per_round=2"]), said.append)
    assert len(said) == 1
    rows_left, labels_left = said[0].split("; ")
    assert rows_left == "partition 'pathological': 378 of 630 training rows go to no client"
    assert labels_left.startswith("no client trains on label '")


def test_owners_no_client_trains_on_are_said(tmp_path: Path, bert: Path, llama: Path) -> None:
    said: list[str] = []
    asked = {"partition": "pathological", "labels_per_client": 1, "partition_by": "user"}
    rows = [{**row, "user": f"u{number // 2 % 4}"} for number, row in enumerate(owned())]
    texts = load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert, **asked), said.append)
    rows = [{**row, "user": number % 4} for number, row in enumerate(instructions(24))]
    answers = load_data(instruction_config(write_rows(tmp_path / "answers.jsonl", rows), llama, **asked), said.append)
    left = 30 - sum(map(len, texts.clients)), 16 - sum(map(len, answers.clients))
    assert [re.sub("'[u0-9]+'", "'…'", line) for line in said] == [
        f"partition 'pathological': {left[0]} of 30 training rows go to no client; no client trains on user '…', '…'",
        f"partition 'pathological': {left[1]} of 16 training rows go to no client; no client trains on user '…', '…'",
    ]


def test_a_label_of_the_test_file_alone_is_said(tmp_path: Path, bert: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", owned())
    test = write_rows(tmp_path / "test.jsonl", [{"text": "a cat", "label": label} for label in ("x", "z")])
    said: list[str] = []
    load_data(text_config(train, bert, test_path=str(test)), said.append)
    assert said == ["partition 'dirichlet': no client trains on label 'z'"]


def test_owners_that_differ_only_in_a_nul_character_are_two(tmp_path: Path, bert: Path) -> None:
    rows = [{**row, "user": "u" if row["user"] else "u\0"} for row in owned()]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    data = load_data(text_config(path, bert, partition="natural", partition_by="user"))
    assert [len({int(number) // 2 % 2 for number in client.rows}) for client in data.clients] == [1, 1]


def test_half_a_surrogate_pair_in_any_column_is_no_obstacle(tmp_path: Path, bert: Path, llama: Path) -> None:
    half = "\ud83d"
    rows = [{**row, "label": row["label"] + half, "pair": half, "user": f"{row['user']}{half}"} for row in owned()]
    path, said = write_rows(tmp_path / "rows.jsonl", rows), []
    asked = {"text_pair": "pair", "partition": "natural", "partition_by": "user"}
    assert load_data(text_config(path, bert, **asked), said.append).label_names == ("x\ufffd", "y\ufffd")
    rows = [{**row, "input": half, "output": [half, "a"]} for row in instructions(12)]
    path = write_rows(tmp_path / "answers.jsonl", rows)
    data = load_data(instruction_config(path, llama), said.append)
    assert data.test.table.answers[0] == ("\ufffd", "a")
    assert [line.split(" rows hold half")[0] for line in said] == ["40 of 40", "12 of 12"]


def test_rows_without_an_answer_are_left_out_and_said(tmp_path: Path, llama: Path) -> None:
    rows: list[dict[str, object]] = list(instructions(30))
    for number, answer in {3: "", 5: None, 8: [], 9: [""], 11: ["cat", ""]}.items():
        rows[number] = {**rows[number], "output": answer}
    path, said = write_rows(tmp_path / "rows.jsonl", rows), []
    data = load_data(instruction_config(path, llama), said.append)
    assert len(data.test) + sum(map(len, data.clients)) == 26
    assert [answers for answers in data.test.table.answers if len(answers) > 1 or not answers[0]] == []
    assert said == [
        f"1 of 30 rows list empty answers beside others, which are left out; the first is {path} line 12",
        f"4 of 30 rows have no answer in 'output' and are left out; the first is {path} line 4",
    ]
    (tmp_path / "rows.csv").write_text("instruction,input,output\n" + "Do.,a,b\n" * 20 + "Do.,a,\n")
    said.clear()
    load_data(instruction_config(tmp_path / "rows.csv", llama), said.append)
    assert said == [
        f"1 of 21 rows have no answer in 'output' and are left out; the first is {tmp_path / 'rows.csv'} row 21"
    ]


def test_answers_left_out_of_a_test_file_leave_the_other_rows_where_they_belong(tmp_path: Path, llama: Path) -> None:
    rows = instructions(12)
    train = write_rows(tmp_path / "train.jsonl", [{**rows[0], "output": ""}, *rows[1:]])
    test = write_rows(tmp_path / "test.jsonl", [rows[0], {**rows[1], "output": ""}, rows[2]])
    data = load_data(instruction_config(train, llama, test_path=str(test)))
    assert (data.test.rows.tolist(), sum(map(len, data.clients))) == ([11, 12], 11)
    empty = write_rows(tmp_path / "empty.jsonl", [{**row, "output": ""} for row in rows])
    with pytest.raises(FedError, match=r"data.output is 'output': none of the 12 rows has an answer there"):
        load_data(instruction_config(empty, llama))
    with pytest.raises(FedError, match=r"data.output is 'output': none of the 12 test rows has an answer there"):
        load_data(instruction_config(train, llama, test_path=str(empty)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.test_fraction=0.001"], r"data.test_fraction is 0.001: 1797 rows of 10 labels leave none to test on"),
        (
            ["data.pretrain_fraction=0.001"],
            r"data.pretrain_fraction is 0.001: .* leave none to pretrain on",
        ),
        (["data.validation_fraction=0.001"], r"data.validation_fraction is 0.001: .* leave none to validate on"),
        (["data.test_fraction=5e-324"], r"data.test_fraction is 5e-324: .* leave none to test on"),
        (["data.pretrain_fraction=0.9999999999999999", "data.test_fraction=1e-17"], r"data.test_fraction is 1e-17"),
        (["data.test_fraction=0.599"], r"clients.count is 20: \d+ training rows allow at most"),
        (["data.train_rows=3"], r"clients.count is 20: 3 training rows allow at most 1 clients"),
    ],
)
def test_digits_that_leave_no_rows_are_one_line(changes: list[str], message: str) -> None:
    with pytest.raises(FedError, match=message):
        load_data(load("digits", changes))
