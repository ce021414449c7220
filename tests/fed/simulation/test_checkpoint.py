"""Resuming a stopped run: it ends with the files of a run that was never stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fed import methods
from fed.errors import FedError
from fed.simulation import checkpoint
from fed.simulation.run_directory import ROUNDS
from fed.simulation.simulate import _kept_rows, simulate
from tests.support.command_line import StoppedError, contents, without_times
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

HARD = {"server": {"optimizer": "fedadam"}, "adapter": {"selection": "least-visited"}, "train": {"head": "personal"}}
CASES = [(name, {}) for name in methods.METHODS] + [("fed-plora", HARD), ("hetlora", {"hetlora": {"prune": True}})]


def make(method: str, **changes: Any) -> SimpleNamespace:
    ranks = [6] if methods.find(method).equal_ranks else [1, 2, 3, 6]
    return make_config(method=method, clients={"ranks": ranks, "per_round": 2}, rounds=4, **changes)


def run(config: SimpleNamespace, directory: Path, stop_after: int | None = None, resume: bool = False) -> list[dict]:
    def on_round(row: dict) -> None:
        if row["round"] == stop_after:
            raise StoppedError

    return simulate(config, make_data(), TinyClassifier(), HEAD, directory, on_round, resume=resume)


@pytest.mark.parametrize(
    ("method", "changes", "stop_after", "kept"),
    [
        *((*case, 2, 2) for case in CASES),
        ("fed-plora", {}, 0, 0),
        ("fed-plora", {"checkpoint_every": 2}, 3, 2),  # round 3 is played again
    ],
)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(
    method: str, changes: dict, stop_after: int, kept: int, tmp_path: Path
) -> None:
    config, stopped, whole = make(method, **changes), tmp_path / "stopped", tmp_path / "whole"
    rows = run(config, whole)
    with pytest.raises(StoppedError):
        run(config, stopped, stop_after)
    assert checkpoint.last_round(stopped) == kept
    assert len(without_times(stopped)) == stop_after + 1
    with (stopped / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "accura')
    resumed = run(config, stopped, resume=True)
    assert [row["round"] for row in resumed] == [row["round"] for row in rows] == [0, 1, 2, 3, 4]
    assert without_times(stopped) == without_times(whole)
    assert contents(stopped) == contents(whole)


def test_a_finished_run_goes_on_to_more_rounds(tmp_path: Path) -> None:
    short, long = make("flora"), make("flora")
    short.rounds = 2
    run(short, tmp_path / "run")
    assert run(short, tmp_path / "run", resume=True)[-1]["round"] == 2
    run(long, tmp_path / "run", resume=True)
    run(long, tmp_path / "whole")
    assert without_times(tmp_path / "run") == without_times(tmp_path / "whole")


def test_a_half_written_checkpoint_does_not_count(tmp_path: Path) -> None:
    config = make("fedsa-lora")
    with pytest.raises(StoppedError):
        run(config, tmp_path, stop_after=2)
    shutil.copytree(tmp_path / "checkpoint" / "round-2", tmp_path / "checkpoint" / "round-3.tmp")
    assert checkpoint.last_round(tmp_path) == 2
    run(config, tmp_path, resume=True)
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"round-4", "clients"}


def test_without_checkpoints_there_is_nothing_to_go_on_from(tmp_path: Path) -> None:
    config = make("fed-plora", checkpoint_every=0)
    run(config, tmp_path)
    assert not (tmp_path / "checkpoint").exists()
    with pytest.raises(FedError, match="holds no checkpoint to go on from; start the run anew"):
        run(config, tmp_path, resume=True)


def test_other_settings_and_broken_files_are_refused(tmp_path: Path) -> None:
    run(make("fed-plora"), tmp_path)
    with pytest.raises(FedError, match=r"was made with seed = 5, and the run has 6; a run goes on with the settings"):
        run(make("fed-plora", seed=6), tmp_path, resume=True)
    (tmp_path / "checkpoint" / "round-4" / "state.safetensors").write_bytes(b"cut off")
    with pytest.raises(FedError, match=r"round-4' cannot be read"):
        run(make("fed-plora"), tmp_path, resume=True)
    assert len(without_times(tmp_path)) == 5


def test_a_run_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    config = make("fed-plora")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "stopped", stop_after=2)
    for path in (tmp_path / "stopped" / "checkpoint" / "round-2" / "state.json", tmp_path / "stopped" / ROUNDS):
        before = path.read_text()
        path.write_text(before.replace("clients_per_pass", "cohort_size"))
        assert path.read_text() != before
    rows = run(config, tmp_path / "stopped", resume=True)
    assert all("clients_per_pass" in row for row in rows)
    run(config, tmp_path / "whole")
    adapters = [path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "stopped", tmp_path / "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_damaged_row_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    damaged = '{"round": 0}\n{"round" 1}\n{"round": 2}\n{"round": 3}\n'
    (tmp_path / ROUNDS).write_text(damaged)
    with pytest.raises(ValueError, match="Expecting ':'"):
        _kept_rows(tmp_path / ROUNDS, 2)
    assert (tmp_path / ROUNDS).read_text() == damaged
