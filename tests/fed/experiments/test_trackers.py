"""Trackers get every row: TensorBoard's files are read back, Weights & Biases and MLflow are replaced by fakes."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from fed.config import load
from fed.errors import FedError
from fed.experiments.trackers import require, scalars, tracking
from tests.support.command_line import Call, rows_of
from tests.support.saved_runs import make_row

ROWS = [make_row(0), make_row(1)]


def test_only_numbers_go_out() -> None:
    assert scalars(make_row(3, loss=None, worst_accuracy=1)) == {
        "accuracy": pytest.approx(0.4),
        "init_noise": 1e-6,
        "agg_noise": 0.5,
        "upload_bytes": 3000.0,
        "download_bytes": 3000.0,
        "train_seconds": 0.5,
        "worst_accuracy": 1.0,
    }


@pytest.mark.usefixtures("undrawn")
def test_tensorboard_holds_what_the_rows_hold(tmp_path: Path, fed_cli: Call) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    small = ("rounds=2", "clients.count=4", "clients.per_round=2", "train.local_steps=1", "model.pretrain_steps=5")
    outcome = fed_cli("run", "digits", "--track", "tensorboard", "--no-centralised", "--out", str(out), "--set", *small)
    assert (outcome.status, outcome.err) == (0, "")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    rows = rows_of(out)
    for name in ("accuracy", "loss", "upload_bytes", "train_seconds"):
        points = [(event.step, event.value) for event in events.Scalars(name)]
        assert points == [(row["round"], pytest.approx(row[name], rel=1e-6)) for row in rows]
    assert [event.step for event in events.Scalars("agg_noise")] == [1, 2]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "method = 'fed-plora'" in text


def test_wandb_gets_a_run_named_after_the_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class FakeRun:
        def log(self, values: dict, step: int) -> None:
            calls.append(("log", values, step))

        def finish(self, exit_code: int = 0) -> None:
            calls.append(("finish", exit_code))

    def init(**settings: object) -> FakeRun:
        calls.append(("init", settings))
        return FakeRun()

    stand_in("wandb", monkeypatch, init=init)
    config = load("digits", ['tracker=["wandb"]', "seed=7"])
    with tracking(config, tmp_path / "fedit" / "seed-7") as log:
        for row in ROWS:
            log(row)
    (_, settings), *logged, finish = calls
    assert settings["name"] == "fedit/seed-7"
    assert settings["config"]["train.learning_rate"] == 2e-3
    assert settings["config"]["seed"] == 7
    assert logged == [("log", scalars(row), row["round"]) for row in ROWS]
    assert finish == ("finish", 0)
    calls.clear()
    with pytest.raises(KeyboardInterrupt), tracking(config, tmp_path):
        raise KeyboardInterrupt
    assert calls[-1] == ("finish", 1)


def test_mlflow_gets_parameters_and_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple] = []

    class FakeRun:
        def __enter__(self) -> None:
            calls.append(("enter",))

        def __exit__(self, *error: object) -> None:
            calls.append(("exit", error[0]))

    stand_in(
        "mlflow",
        monkeypatch,
        start_run=lambda run_name: calls.append(("start", run_name)) or FakeRun(),
        log_params=lambda values: calls.append(("params", values["adapter.rank"], values["seed"])),
        log_metrics=lambda values, step: calls.append(("metrics", values, step)),
    )
    with tracking(load("digits", ['tracker=["mlflow"]']), tmp_path / "runs" / "mine") as log:
        log(ROWS[1])
    assert calls == [
        ("start", "runs/mine"),
        ("enter",),
        ("params", 16, 0),
        ("metrics", scalars(ROWS[1]), 1),
        ("exit", None),
    ]


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, **functions: object) -> None:
    module = ModuleType(name)
    module.__spec__ = SimpleNamespace(name=name)  # type: ignore[assignment]
    for function, does in functions.items():
        setattr(module, function, does)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_tracker_that_is_not_installed_names_the_extra(
    tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fed.experiments.trackers.find_spec", lambda name: None)
    message = r"tracker 'mlflow' needs mlflow, which is not installed: pip install 'plora-kernels\[mlflow\]'"
    with pytest.raises(FedError, match=message):
        require(["mlflow"])
    for command in ("run", "compare"):
        outcome = fed_cli(command, "digits", "--track", "tensorboard", "--out", str(tmp_path / "out"))
        assert outcome.status == 2
        assert outcome.err.endswith("pip install 'plora-kernels[track]'\n")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_tracker_is_refused(fed_cli: Call) -> None:
    outcome = fed_cli("run", "digits", "--track", "tensorbord")
    assert outcome.status == 2
    assert "tracker[0] is 'tensorbord': it should be 'tensorboard', 'wandb' or 'mlflow'" in outcome.err
