"""The strategy of a run: played whole, and in a loop of Flower's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import Strategy
from safetensors.torch import load_file

from fed.errors import FedError
from fed.flower.records import tensors_of
from fed.flower.strategy import FederatedRun
from tests.fed.flower.test_training import SMALL, assert_same_run, config_of, play
from tests.support.memory_grid import MemoryGrid
from tests.support.tiers import slow


@pytest.mark.slow
def test_the_strategy_plays_a_whole_run(tmp_path: Path) -> None:
    config = config_of(*SMALL)
    play(config, tmp_path / "here")
    grid = MemoryGrid([{}, {}], tmp_path)
    result = FederatedRun(config, tmp_path / "there", centralised=False).start(grid)
    grid.close()
    assert_same_run(tmp_path / "there", tmp_path / "here")
    adapter = load_file(tmp_path / "there" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(tensors_of(result.arrays, "arrays"), adapter, rtol=0, atol=0)
    assert sorted(result.evaluate_metrics_serverapp) == [0, 1, 2, 3]


@pytest.mark.parametrize("method", ["flora", *slow("fed-plora")])
def test_a_loop_of_flowers_own_gives_the_same_factors(tmp_path: Path, method: str) -> None:
    config = config_of(*SMALL, f"method={method}", "measure.noise=false")
    play(config, tmp_path / "here")
    grid = MemoryGrid([{}, {}], tmp_path)
    with FederatedRun(config, tmp_path / "there") as strategy:
        # Flower's loop, without this class's own.
        result = Strategy.start(strategy, grid, strategy.initial_arrays(grid), num_rounds=3)
    grid.close()
    found = tensors_of(result.arrays, "arrays")
    wanted = load_file(tmp_path / "here" / "adapter" / "adapter_model.safetensors")
    for matrix in {name.split("/", 2)[2] for name in found if name.startswith("adapter/")}:
        for side in "AB":
            name = f"base_model.model.{matrix}.lora_{side}.weight"
            torch.testing.assert_close(found[f"adapter/{side}/{matrix}"], wanted[name], rtol=1e-9, atol=1e-9)
    assert [metrics["used"] for metrics in result.train_metrics_clientapp.values()] == [3, 3, 3]
    assert all("accuracy" in metrics for metrics in result.evaluate_metrics_clientapp.values())


def test_what_a_run_has_no_use_for_is_refused(tmp_path: Path) -> None:
    grid = MemoryGrid([{}], tmp_path)
    strategy = FederatedRun(config_of(*SMALL), tmp_path / "out")
    with pytest.raises(FedError, match="initial_arrays is given, and a run takes none"):
        strategy.start(grid, ArrayRecord())
    with pytest.raises(FedError, match="no round was configured"):
        strategy.aggregate_train(1, [])
    with strategy:
        arrays = strategy.initial_arrays(grid)
        with pytest.raises(FedError, match="round 2 is asked for; 1 would be right"):
            strategy.configure_train(2, arrays, ConfigRecord(), grid)
        with pytest.raises(FedError, match="not this run's factors and head"):
            strategy.configure_train(1, ArrayRecord(), ConfigRecord(), grid)
    grid.close()
