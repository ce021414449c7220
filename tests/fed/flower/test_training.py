"""Runs whose clients train on other machines, against runs in one process; the machines are in this process, too."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fed import config as configuration
from fed.config import RunConfig
from fed.data import federated_data
from fed.errors import FedError
from fed.experiments import run as running
from fed.flower.training import FlowerTraining
from fed.types import Row
from tests.support.memory_grid import MemoryGrid

SMALL = [
    *("rounds=3", "clients.count=4", "clients.per_round=3", "clients.ranks=[1, 2, 4, 3]", "adapter.rank=4"),
    *("model.dtype=float64", "model.pretrain_steps=5", "data.train_rows=120", "data.test_rows=60", "threads=1"),
]
EQUAL = [*SMALL, "clients.ranks=[4]"]
METHODS = {
    "fed-plora": SMALL,
    "flora": SMALL,
    "flexlora": SMALL,
    "hetlora": [*SMALL, "hetlora.prune=true", "hetlora.penalty=0.5"],
    "raflora": SMALL,
    "fedit": EQUAL,
    "ffa-lora": EQUAL,
    "fedex-lora": EQUAL,
    "fedsa-lora": EQUAL,
    "rolora": EQUAL,
}
TIMES = {"fold_seconds", "train_seconds", "tokens_per_second", "peak_memory_bytes"}
# Of clients' own models, which a server does not have in a deployment.
OWN = {"client_accuracy", "worst_accuracy"}


def config_of(*settings: str) -> RunConfig:
    return configuration.load("digits", settings)


def deployed(count: int = 4) -> list[dict[str, Any]]:
    return [{"partition-id": number} for number in range(count)]


def play(config: RunConfig, out: Path, grid: MemoryGrid | None = None, told: list[str] | None = None) -> list[Row]:
    """Play a run, on a grid if there is one, and return its rows."""
    tell = [].append if told is None else told.append
    executor = None if grid is None else FlowerTraining(grid, lambda: out, tell)
    with running.limits(config.threads):
        data = federated_data.load(config)
        model = running.make_base(config, data, out / "base")
        return running.play(config, data, model, out, lambda row: None, tell, executor=executor)


def assert_same_run(found: Path, expected: Path, without: set[str] | None = None, tolerance: float = 1e-9) -> None:
    """Assert that two runs have the same rows, but for times, and the same adapter."""
    rows = [[json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()] for out in (found, expected)]
    assert len(rows[0]) == len(rows[1])
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for key in one.keys() - TIMES - (without or set()):
            exact = other[key] is None or key == "faults"
            same = other[key] if exact else pytest.approx(other[key], rel=tolerance, abs=tolerance)
            assert one[key] == same, (one["round"], key)
    for name in ("adapter/adapter_model.safetensors", "base_delta.safetensors"):
        assert (found / name).exists() == (expected / name).exists()
        if (found / name).exists():
            wanted = load_file(expected / name)
            own = load_file(found / name)
            torch.testing.assert_close(own, wanted, rtol=tolerance, atol=tolerance)


# One that folds, and one that keeps something on its machines.
FEW = ("simulation", "flora"), ("deployment", "fedsa-lora")


@pytest.mark.parametrize(
    ("mode", "method"),
    [
        pytest.param(*each, marks=[] if each in FEW else pytest.mark.slow)
        for each in itertools.product(("simulation", "deployment"), METHODS)
    ],
)
def test_a_run_over_machines_is_as_one_in_a_process(tmp_path: Path, method: str, mode: str) -> None:
    settings = [*METHODS[method], f"method={method}"]
    play(config_of(*settings), tmp_path / "here")
    grid = MemoryGrid(deployed() if mode == "deployment" else [{}, {}], tmp_path)
    play(config_of(*settings, f"engine.mode={mode}"), tmp_path / "there", grid)
    grid.close()
    personal = method == "fedsa-lora" and mode == "deployment"
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN if personal else None)


@pytest.mark.parametrize(
    "settings",
    [
        ["train.head=personal"],
        ["train.head=freeze"],
        ["adapter.selection=gradient"],
        ["adapter.selection=least-visited", "adapter.unselected=frozen"],
        ["adapter.dropout=0.1", "train.weighting=samples"],
        # A client's activations in a cohort are a share of the cohort's, which others train in.
        ["execution=cohort", "clients_per_pass=2", "train.client_steps=[1, 3]", "measure.memory=false"],
        ["server.optimizer=fedadam", "measure.noise=false", "measure.memory=false"],
    ],
    ids=" ".join,
)
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["simulation", "deployment"])
def test_settings_mean_the_same_on_machines(tmp_path: Path, settings: Sequence[str], mode: str) -> None:
    play(config_of(*SMALL, *settings), tmp_path / "here")
    grid = MemoryGrid(deployed() if mode == "deployment" else [{}, {}], tmp_path)
    play(config_of(*SMALL, *settings, f"engine.mode={mode}"), tmp_path / "there", grid)
    grid.close()
    personal = "train.head=personal" in settings and mode == "deployment"
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN if personal else None)


def test_too_few_machines_end_the_run_before_it_begins(tmp_path: Path) -> None:
    grid = MemoryGrid(deployed(3), tmp_path)
    with pytest.raises(FedError, match=r"clients.count is 4, and 3 SuperNodes have joined after engine.wait = 1 s"):
        play(config_of(*SMALL, "engine.mode=deployment", "engine.wait=1"), tmp_path / "out", grid)
    grid.close()
    assert not (tmp_path / "out" / "rounds.jsonl").exists()
