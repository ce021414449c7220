"""Splits, shifts, partitions, and JSONL files good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fed.config import RunConfig, load, parse
from fed.data import FederatedData, read_jsonl, shift_images
from fed.data import load as load_data
from fed.errors import FedError
from fed.partition import partition_dirichlet, split_stratified
from fed.samples import DenseTable, Split
from tests.support.tiny_bert import make_tiny_bert
from tests.support.tiny_federation import everything

TEXTS = ["a small cat", "a big dog", "the cat sat", "the dog ran", "cat and dog", "one dog", "two cats", "no pets"]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_batch_is_the_models_keyword_arguments() -> None:
    split = Split.whole(DenseTable({"pixel_values": torch.arange(6).reshape(3, 2)}, torch.tensor([7, 8, 9])))
    batch = split.batch(torch.tensor([2, 0]))
    assert len(split) == 3
    assert batch["pixel_values"].tolist() == [[4, 5], [0, 1]]
    assert batch["labels"].tolist() == [9, 7]


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


def test_a_stratified_split_takes_the_fraction_of_every_label() -> None:
    labels = np.array([0] * 8 + [1] * 4 + [2])
    taken, left = split_stratified(labels, 0.25, rng())
    assert np.bincount(labels[taken], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*taken, *left]) == list(range(13))


@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=90),
    clients=st.integers(1, 10),
    alpha=st.sampled_from([0.05, 0.5, 100.0, "iid"]),
    seed=st.integers(0, 1000),
)
def test_a_partition_deals_every_row_once_and_two_to_each(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    parts = partition_dirichlet(np.array(labels), clients, alpha, rng(seed))
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert len(parts) == clients
    assert min(map(len, parts)) >= 2
    again = partition_dirichlet(np.array(labels), clients, alpha, rng(seed))
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def skew(parts: list, labels: np.ndarray) -> float:
    """The mean share of a client's commonest label."""
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def test_a_small_alpha_skews_labels_and_iid_does_not() -> None:
    labels = np.arange(2000) % 10
    shares = [skew(partition_dirichlet(labels, 20, alpha, rng()), labels) for alpha in (0.1, 1.0, 100.0, "iid")]
    assert shares[0] > 0.5 > shares[1] > 0.2 > max(shares[2:])
    assert {len(part) for part in partition_dirichlet(labels, 20, "iid", rng())} == {100}


def test_too_few_rows_for_the_clients_are_refused() -> None:
    with pytest.raises(FedError, match=r"clients.count is 6: 11 training rows allow at most 5 clients of 2 rows"):
        partition_dirichlet(np.zeros(11, dtype=np.int64), 6, 0.5, rng())


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
    # They are all the images there are, once those that were turned are turned back.
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
    # Clients do not move with what the adapter or the training is.
    frozen = load_data(load("digits", ["train.local_steps=1", "adapter.rank=32"]))
    assert rows_of(*frozen.clients) == rows_of(*digits.clients)


def write_rows(path: Path, rows: list[object]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def text_config(path: Path, model: Path | str = "m", **data: object) -> RunConfig:
    return parse(
        {
            "model": {"path": str(model)},
            "data": {"path": str(path), "max_length": 16, **data},
            "clients": {"count": 2, "per_round": 2},
        },
        where="here",
    )


def test_jsonl_rows_are_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "á\\u2028b", "label": 1}\r\n\n{"label": "x", "text": "", "more": null}\n  \n', "utf-8")
    assert read_jsonl(text_config(path)) == (["á\u2028b", ""], ["1", "x"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "x"}\n{"text": ', r"rows.jsonl line 2: not JSON"),
        ("[1, 2]\n", r"line 1: holds \[1, 2\]; every line should be a JSON object"),
        ('{"text": "a", "output": "x"}', r"line 1: data.label is 'label'; the columns there are text, output"),
        ('\n{"input": "a", "label": "x"}', r"line 2: data.text is 'text'; the columns there are input, label"),
        ('{"text": 3, "label": "x"}', r"line 1: data.text 'text' holds 3; it should be a string"),
        ('{"text": "a", "label": null}', r"line 1: data.label 'label' holds None; it should be a string or an integer"),
        ('{"text": "a", "label": 0.5}', r"data.label 'label' holds 0.5"),
        ("\n\n", r"the file holds no rows"),
    ],
)
def test_a_bad_jsonl_file_is_refused_by_line(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(FedError, match=message) as caught:
        read_jsonl(text_config(path))
    assert "\n" not in str(caught.value)


def test_a_jsonl_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"data.path is '.*none.jsonl': there is no such file"):
        read_jsonl(text_config(tmp_path / "none.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe1"}')
    with pytest.raises(FedError, match="cannot read it as UTF-8 text"):
        read_jsonl(text_config(tmp_path / "latin.jsonl"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_bert(tmp_path_factory.mktemp("bert"), TEXTS, hidden=32, layers=1, labels=("dog", "cat"))


def test_jsonl_becomes_tokens_of_the_checkpoints_own_tokenizer(tmp_path: Path, bert: Path) -> None:
    rows = [{"text": text, "label": f"label {number % 3}"} for number, text in enumerate(TEXTS * 3)]
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
    rows = [{"text": text, "label": "dog" if "dog" in text else "cat"} for text in TEXTS * 2]
    assert load_data(text_config(write_rows(tmp_path / "rows.jsonl", rows), bert)).label_names == ("dog", "cat")


def test_labels_that_make_no_task_are_refused(tmp_path: Path, bert: Path) -> None:
    path = write_rows(tmp_path / "one.jsonl", [{"text": text, "label": "x"} for text in TEXTS])
    with pytest.raises(FedError, match=r"data.label is 'label': the only label in .* is 'x'"):
        load_data(text_config(path, bert))
    path = write_rows(tmp_path / "free.jsonl", [{"text": text, "label": text} for text in TEXTS])
    with pytest.raises(FedError, match="8 rows of 8 labels leave none to test on"):
        load_data(text_config(path, bert))
