"""Checkpoints with code of their own: it never runs, whatever is answered to a question, and no question is asked."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fed.config import RunConfig
from fed.data import pretrained
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, Split
from fed.errors import FedError
from fed.models import base_model, saved_base
from tests.support.text_data import text_config

ROOT = Path(__file__).parents[3]
CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast
class OwnConfig(BertConfig):
    model_type = "own"
class OwnModel(BertForSequenceClassification):
    config_class = OwnConfig
class OwnTokenizer(BertTokenizerFast):
    pass
"""
CLASSES = {
    "AutoConfig": "own.OwnConfig",
    "AutoModel": "own.OwnModel",
    "AutoModelForCausalLM": "own.OwnModel",
    "AutoModelForSequenceClassification": "own.OwnModel",
}


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture
def questions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The questions that were asked; each is answered by "y"."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda prompt="": asked.append(prompt) or "y")
    return asked


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def own(bert: Path, tmp_path: Path, trace: Path) -> Path:
    """A checkpoint whose classes are in a file beside it."""
    path = Path(shutil.copytree(bert, tmp_path / "own"))
    (path / "own.py").write_text(CODE.format(trace=str(trace)))
    change(path / "config.json", auto_map=CLASSES)
    change(path / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]})
    return path


def rows() -> FederatedData:
    tokens = {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    split = Split.whole(DenseTable(tokens, torch.zeros(2, dtype=torch.int64)))
    return FederatedData((split,), split, None, None, ("one", "two"))


LOADERS: dict[str, Callable[[RunConfig], Any]] = {
    "tokenizer": pretrained.load_tokenizer,
    "configuration": pretrained.require_positions,
    "positions": lambda config: pretrained.require_positions(
        config.model_copy(update={"data": config.data.model_copy(update={"max_length": 127})})
    ),
    "classifier": lambda config: base_model.build(config, rows()),
    "language model": lambda config: base_model.build(
        config.model_copy(update={"data": config.data.model_copy(update={"task": "instruction"})}), rows()
    ),
    "saved base": lambda config: saved_base.reopen(Path(str(config.model.path))),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_beside_a_checkpoint_is_not_run(own: Path, trace: Path, questions: list[str], loader: str) -> None:
    change(own / "config.json", model_type="own", architectures=["OwnModel"])
    change(own / "tokenizer_config.json", tokenizer_class="OwnTokenizer")
    with pytest.raises(FedError) as refusal:
        LOADERS[loader](text_config("rows.jsonl", own))
    assert "custom code" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    assert not questions
    assert not trace.exists()


@pytest.mark.parametrize("loader", [name for name in LOADERS if name != "language model"])
def test_where_transformers_has_the_class_itself_its_own_is_taken(
    own: Path, trace: Path, questions: list[str], loader: str
) -> None:
    loaded = LOADERS[loader](text_config("rows.jsonl", own))
    assert type(loaded).__module__.startswith("transformers.")
    assert not questions
    assert not trace.exists()


def test_the_code_would_run_if_it_were_trusted(
    own: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two tests above show something only if this is so."""
    from transformers import AutoConfig

    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    change(own / "config.json", model_type="own")
    assert type(AutoConfig.from_pretrained(own, trust_remote_code=True)).__name__ == "OwnConfig"
    assert trace.exists()


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation", "experts_implementation"])
def test_a_kernel_that_would_be_fetched_is_refused(bert: Path, tmp_path: Path, field: str) -> None:
    path = Path(shutil.copytree(bert, tmp_path / "kernel"))
    change(path / "config.json", **{field: "someone/kernel"})
    for loader in ("configuration", "classifier", "saved base"):
        with pytest.raises(FedError, match=f"has {field} = 'someone/kernel', code that would be fetched and run"):
            LOADERS[loader](text_config("rows.jsonl", path))


class Command:
    """An object whose unpickling runs a command."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return os.mkdir, (str(self.trace),)


def test_pickled_weights_run_no_code(bert: Path, tmp_path: Path, trace: Path) -> None:
    path = Path(shutil.copytree(bert, tmp_path / "pickled"))
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save({**weights, "more": Command(trace)}, path / "pytorch_model.bin")
    with pytest.raises(FedError, match="the checkpoint does not load") as refusal:
        base_model.build(text_config("rows.jsonl", path), rows())
    assert "\n" not in str(refusal.value)
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({**weights, "more": Command(trace)}))
    with pytest.raises(FedError, match="the checkpoint does not load"):
        base_model.build(text_config("rows.jsonl", path), rows())
    assert not trace.exists()


def test_every_call_that_loads_a_checkpoint_trusts_no_code_in_it() -> None:
    calls = 0
    for package in ("fed", "bench", "examples", "plora_kernels"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            for node in ast.walk(ast.parse(text if "from_" in text else "")):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if node.func.attr not in ("from_pretrained", "from_config"):
                    continue
                if isinstance(node.func.value, ast.Name) and node.func.value.id in ("PeftConfig", "PeftModel"):
                    continue  # a table of settings and tensors, which cannot name code
                calls += 1
                trusted = {word.arg: ast.unparse(word.value) for word in node.keywords}.get("trust_remote_code")
                assert trusted == "False", f"{path.relative_to(ROOT)}, line {node.lineno}"
    assert calls >= 6
