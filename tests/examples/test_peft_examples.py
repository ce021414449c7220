"""The examples for users of PEFT: fused they learn what they learn without, and no call falls back to PEFT."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import plora_kernels as pk
from tests.examples.conftest import EXAMPLES
from tests.support.models import tiny_llama

Example = Callable[[str], Any]
SCRIPT = EXAMPLES / "peft_script.py"


@pytest.fixture(autouse=True)
def fused_whatever_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fuse small calls too: with a backend that is forced, no call is too small."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")


def without_the_two_lines() -> str:
    """Return the script as it was before it was fused."""
    lines = SCRIPT.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.rstrip().endswith(("# line one", "# line two"))]
    assert len(lines) - len(kept) == 2
    return "".join(kept)


def test_the_two_lines_change_no_loss_of_the_script(example: Example) -> None:
    arguments = ["--steps", "12", "--text", str(SCRIPT)]
    names: dict[str, Any] = {"__name__": "plain", "__file__": str(SCRIPT)}
    exec(compile(without_the_two_lines(), "the script without them", "exec"), names)
    plain = names["main"](arguments)
    assert "pk" not in names
    fused = example("peft_script").main(arguments)
    assert fused[0] > 1.05 * fused[-1]
    assert fused == pytest.approx(plain, rel=2e-4)


def test_the_script_runs_by_itself_and_leaves_an_adapter_of_peft_s(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), "--steps", "2", "--out", str(tmp_path / "adapter")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "14 of 14 LoRA layers fused" in done.stdout
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {
        path.name for path in (tmp_path / "adapter").iterdir()
    }


def test_the_script_takes_a_checkpoint_and_names_of_linears(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = example("trl_sft").byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "llama")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "llama")
    options = ["--model", str(tmp_path / "llama"), "--targets", "q_proj,v_proj", "--steps", "2", "--length", "16"]
    losses = example("peft_script").main([*options, "--out", str(tmp_path / "adapter")])
    assert "4 of 4 LoRA layers fused" in capsys.readouterr().out
    assert all(map(torch.isfinite, map(torch.tensor, losses)))
    PeftModel.from_pretrained(tiny_llama(vocab_size=len(tokenizer)), str(tmp_path / "adapter"))


def test_a_text_that_fills_no_row_is_refused(example: Example, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    for name in ("peft_script", "trainer"):
        with pytest.raises(SystemExit, match="the text has 5 tokens; --length 64 needs that many at least"):
            example(name).main(["--text", str(tmp_path / "short.txt")])


@pytest.mark.slow
def test_a_resumed_trainer_ends_as_one_that_was_not_stopped_and_as_peft_s(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = example("trainer")
    resumed = trainer.main(["--out", str(tmp_path / "stopped")])
    said = capsys.readouterr().out
    assert "stopped after step 10" in said
    assert "calls by PEFT's forward" not in said
    whole = trainer.main(["--out", str(tmp_path / "whole"), "--stop", "20"])
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    saved = load_file(tmp_path / "whole" / "checkpoint-20" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == sum(tensor.numel() for tensor in whole.values())
    without_dropout = trainer.LoraConfig
    monkeypatch.setattr(trainer, "LoraConfig", lambda **named: without_dropout(**{**named, "lora_dropout": 0.0}))
    ends = []
    for name, fuse in (("fused", pk.fuse_peft), ("plain", lambda model: "not fused")):
        monkeypatch.setattr(pk, "fuse_peft", fuse)
        ends.append(trainer.main(["--out", str(tmp_path / name), "--stop", "10", "--steps", "10"]))
    for name, moved in ends[0].items():
        assert torch.linalg.vector_norm(moved - ends[1][name]) <= 1e-2 * torch.linalg.vector_norm(ends[1][name])


# Notices of TRL's own, and of what it imports, are not these tests' subject.
@pytest.mark.filterwarnings("default")
def test_trl_s_trainer_trains_fused_layers_alone_to_the_losses_of_peft(
    example: Example, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sft = example("trl_sft")
    fused = sft.main(["--steps", "10"])
    said = capsys.readouterr().out
    assert "14 of 14 LoRA layers fused" in said
    assert "calls by PEFT's forward" not in said
    assert fused[-1] < fused[0]
    monkeypatch.setattr(pk, "fuse_peft", lambda model: "not fused")
    assert fused == pytest.approx(sft.main(["--steps", "10"]), rel=1e-3)
