"""A base model on the disk: reopened as it was saved, or refused by the name of the file or weight that is not."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
)

from fed.config import load
from fed.errors import FedError
from fed.files import digest_of
from fed.models import saved_base
from tests.support.models import tiny_bert, tiny_distilbert, tiny_llama

Tensors = dict[str, Tensor]
SIZES = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 12}
WEIGHT = "bert.pooler.dense.weight"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A saved classifier; each test has its own."""
    saved_base.save(
        tiny_bert(hidden_size=8, intermediate_size=8, num_hidden_layers=1), load("digits"), tmp_path / "base", ()
    )
    return tmp_path / "base"


@pytest.fixture
def older(saved: Path) -> Path:
    """A classifier that was saved without digests, as earlier versions did."""
    (saved / "digests.json").unlink()
    return saved


def assert_refused(directory: Path, message: str) -> None:
    with pytest.raises(FedError, match=message) as refusal:
        saved_base.reopen(directory)
    assert "\n" not in str(refusal.value)
    assert str(directory) in str(refusal.value)


def change_weights(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    path = directory / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return directory


def change_config(directory: Path, **fields: object) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return directory


MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "bert": tiny_bert,
    "distilbert": tiny_distilbert,
    "llama": tiny_llama,
    "tied llama": lambda: tiny_llama(tied=True),
    "bf16 llama": lambda: tiny_llama().bfloat16(),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=12, n_positions=8)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**SIZES)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("digests", [True, False])
def test_a_base_is_reopened_bit_for_bit(tmp_path: Path, name: str, digests: bool) -> None:
    model = MODELS[name]()
    saved_base.save(model, load("digits"), tmp_path, ())
    if not digests:
        (tmp_path / "digests.json").unlink()
    again = saved_base.reopen(tmp_path)
    assert type(again) is type(model)
    values = again.state_dict()
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert {value.dtype for value in values.values()} == {value.dtype for value in model.state_dict().values()}


def test_values_that_are_no_numbers_are_kept_as_saved(older: Path) -> None:
    change_weights(older, lambda weights: weights | {WEIGHT: torch.full((8, 8), torch.nan)})
    model = saved_base.reopen(older)
    assert isinstance(model, BertForSequenceClassification)
    assert model.bert.pooler.dense.weight.isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: {k: v for k, v in w.items() if k != WEIGHT}, f"its file has no '{WEIGHT}'; start the run anew"),
        (
            lambda w: {k.replace("pooler", "poolex"): v for k, v in w.items()},
            "its file has no 'bert.pooler.dense.bias'",
        ),
        (lambda w: w | {"more": torch.ones(2)}, "its file has 'more', which is not in the model; start the run anew"),
        (lambda w: w | {WEIGHT: torch.ones(8, 9)}, rf"'{WEIGHT}' is \(8, 9\), not \(8, 8\); start the run anew"),
        (lambda w: w | {WEIGHT: w[WEIGHT].half()}, f"'{WEIGHT}' is torch.float16, not torch.float32; start the run"),
        (lambda w: w | {WEIGHT: w[WEIGHT].int()}, f"'{WEIGHT}' is torch.int32, not torch.float32; start the run"),
        (lambda w: {}, "its file has no"),
    ],
)
def test_weights_that_are_not_the_model_s_are_named(
    older: Path, change: Callable[[Tensors], Tensors], message: str
) -> None:
    assert_refused(change_weights(older, change), message)


@pytest.mark.parametrize(
    "names",
    [
        None,
        [],
        "BertModel",
        [1],
        ["AutoModel"],
        ["os"],
        ["pipeline"],
        ["PreTrainedModel"],
        ["BertModel"],
        ["a.b"],
        [[]],
    ],
    ids=str,
)
def test_architectures_that_are_no_model_of_this_file_are_refused(older: Path, names: object) -> None:
    assert_refused(change_config(older, architectures=names), "architectures|is damaged|does not load")


def test_a_configuration_of_a_huge_model_takes_no_memory(older: Path) -> None:
    change_config(older, vocab_size=10**12)
    assert_refused(older, r"'bert.embeddings.word_embeddings.weight' is \(60, 8\), not \(1000000000000, 8\)")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 5000, '{"model_type": "nothing"}', '{"model_type": 3}'])
def test_a_configuration_that_is_none_is_one_line(older: Path, text: str) -> None:
    (older / "config.json").write_text(text)
    assert_refused(older, "does not load")


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\xff" * 8, b"\x08" + bytes(7) + b"{}      "])
def test_a_damaged_file_of_weights_is_one_line(older: Path, content: bytes) -> None:
    (older / "model.safetensors").write_bytes(content)
    assert_refused(older, "does not load|is damaged")


def test_digests_hold_every_file_and_themselves(saved: Path) -> None:
    written = json.loads((saved / "digests.json").read_text())
    assert written["facts"] == {name: digest_of(saved / name) for name in ("config.json", "model.safetensors")}
    for name in ("config.json", "model.safetensors", "digests.json"):
        damaged = Path(shutil.copytree(saved, saved.with_name(f"{name}-damaged")))
        content = bytearray((damaged / name).read_bytes())
        content[len(content) // 2] ^= 1
        (damaged / name).write_bytes(content)
        assert_refused(damaged, f"is damaged: {name} is not as it was saved; start the run anew")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    assert_refused(saved, f"is damaged: {name} is missing; start the run anew")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"digest": 1, "files": {}}', '{"files": 3, "digest": "x"}', "[" * 5000]
)
def test_a_file_of_digests_that_is_none_is_refused(saved: Path, content: str) -> None:
    (saved / "digests.json").write_text(content)
    assert_refused(saved, "is damaged: digests.json is not as it was saved")


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin", "own.py", "deeper/model.safetensors"])
def test_a_file_that_was_not_saved_is_refused_if_it_would_be_read(saved: Path, name: str) -> None:
    (saved / "NOTES.md").write_text("of the user's own")
    (saved / ".DS_Store").touch()
    saved_base.reopen(saved)
    (saved / name).parent.mkdir(exist_ok=True)
    (saved / name).write_text("{}")
    assert_refused(saved, f"holds {name}, which was not saved with it; remove that file, or start the run anew")


def test_an_adapter_beside_an_older_base_is_refused(older: Path) -> None:
    (older / "adapter_config.json").write_text("{}")
    assert_refused(older, "holds adapter_config.json, which was not saved with it")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "digests.json"])
@pytest.mark.parametrize("make", [os.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_refused_without_waiting(saved: Path, name: str, make: Callable[[Path], None]) -> None:
    (saved / name).unlink()
    make(saved / name)
    assert_refused(saved, f"is damaged: {name} is not a file")


def test_a_folder_and_files_may_be_links(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(saved, target_is_directory=True)
    (saved / "model.safetensors").rename(tmp_path / "weights")
    (saved / "model.safetensors").symlink_to(tmp_path / "weights")
    saved_base.reopen(tmp_path / "link")


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert_refused(tmp_path / "base", "is missing; start the run anew")


def test_saving_again_replaces_the_digests(saved: Path) -> None:
    saved_base.save(tiny_bert(hidden_size=16, intermediate_size=8), load("digits"), saved, ())
    saved_base.reopen(saved)


def test_digests_come_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    model = tiny_bert(hidden_size=8, intermediate_size=8)
    saved_base.save(model, load("digits"), tmp_path, ())
    monkeypatch.setattr("fed.models.saved_files.sync_tree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        saved_base.save(model, load("digits"), tmp_path, ())
    assert not (tmp_path / "digests.json").exists()
