"""Initialisation noise: checked against dense matrices, and what `fed noise` writes and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import load_file

from fed.cli import main
from fed.experiments.initialisation_noise import Start, measure
from fed.report.write import initialisation_markdown
from tests.support.command_line import Call, assert_refused

ROOT = Path(__file__).resolve().parents[3]
SMALL = ("rounds=2", "clients.count=4", "clients.per_round=4", "model.pretrain_steps=20", "checkpoint_every=0")
RANKS = (2, 4, 8, 16)


pytestmark = pytest.mark.usefixtures("undrawn_throughout")


def play(out: Path, *settings: str) -> Path:
    with pytest.raises(SystemExit) as exit_:
        main(["run", "digits", "--no-centralised", "--out", str(out), "--set", *SMALL, *settings])
    assert not exit_.value.code
    return out


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return play(tmp_path_factory.mktemp("noise") / "run", "adapter.target_modules=['q_proj']")


@pytest.fixture(scope="module")
def found(played: Path) -> dict[tuple[str, str], Start]:
    return {(start.name, start.dtype): start for start in measure(played, print)}


def updates(played: Path) -> list[torch.Tensor]:
    """s · B A of every matrix, fp64, dense."""
    saved = load_file(played / "adapter" / "adapter_model.safetensors")
    names = [name.removesuffix("lora_A.weight") for name in saved if name.endswith("lora_A.weight")]
    return [2.0 * saved[f"{name}lora_B.weight"].double() @ saved[f"{name}lora_A.weight"].double() for name in names]


def test_truncated_starts_are_what_dense_matrices_say(played: Path, found: dict[tuple[str, str], Start]) -> None:
    dense = updates(played)
    assert len(dense) == 4
    spectra = [torch.linalg.svdvals(update) for update in dense]
    lost = [torch.stack([sigma[rank:].norm() for sigma in spectra]).norm().item() for rank in RANKS]
    best = found["FlexLoRA, raFLoRA", "float32"]
    assert best.noise == pytest.approx(fmean(lost), rel=1e-5)
    assert best.share == pytest.approx(fmean(lost) / torch.stack(dense).norm().item(), rel=1e-5)
    assert found["HETLoRA, FedIT cut to r_i", "float32"].noise > best.noise


def test_fed_plora_starts_at_the_server_to_rounding(found: dict[tuple[str, str], Start]) -> None:
    assert found["Fed-PLoRA, frozen", "float32"].noise == found["Fed-PLoRA, frozen", "bfloat16"].noise == 0.0
    exact, coarse = found["Fed-PLoRA, folded", "float32"], found["Fed-PLoRA, folded", "bfloat16"]
    assert 0.0 < exact.share < 1e-4 < coarse.share
    # bf16 keeps 8 bits where fp32 keeps 24.
    assert coarse.noise / exact.noise == pytest.approx(2.0**16, rel=0.5)


def test_the_command_prints_the_figures_and_leaves_them(played: Path, fed_cli: Call) -> None:
    outcome = fed_cli("noise", str(played))
    assert (outcome.status, outcome.err) == (0, "")
    assert "Fed-PLoRA, frozen" in outcome.out
    facts = json.loads((played / "initialisation.json").read_text())
    assert facts["after_round"] == 2
    assert len(facts["starts"]) == 8
    assert (played / "initialisation.md").read_text() == initialisation_markdown(facts)
    assert "| Fed-PLoRA, frozen | 0 | 0 | 0 | 0 |" in initialisation_markdown(facts)


def test_noise_is_measured_in_both_dtypes_whatever_the_run_had(tmp_path: Path) -> None:
    half = play(tmp_path / "half", "model.dtype=bfloat16", "adapter.dtype=bfloat16", "rounds=1")
    found = {(start.name, start.dtype): start.noise for start in measure(half, print)}
    assert found["Fed-PLoRA, frozen", "float32"] == found["Fed-PLoRA, frozen", "bfloat16"] == 0.0
    assert 0.0 < found["Fed-PLoRA, folded", "float32"] < 1e-3 * found["Fed-PLoRA, folded", "bfloat16"]


def test_what_has_no_such_state_is_refused(tmp_path: Path, fed_cli: Call) -> None:
    assert_refused(fed_cli("noise", str(tmp_path)), "is not a run's directory")
    folding = play(tmp_path / "flora", "method=flora", "rounds=1")
    message = "is a run of FLoRA, whose update is not in R modules; a run of 'fed-plora' would be right"
    assert_refused(fed_cli("noise", str(folding)), message)


def test_the_committed_table_is_the_committed_result() -> None:
    folder = ROOT / "docs" / "results" / "initialisation-noise"
    facts = json.loads((folder / "initialisation.json").read_text(encoding="utf-8"))
    assert (folder / "initialisation.md").read_text(encoding="utf-8") == initialisation_markdown(facts)
