"""Stopping a run and going on: the files come out as those of a run that was never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fed import methods
from fed.errors import FedError
from fed.simulation import checkpoint
from fed.simulation.run_directory import ROUNDS
from fed.simulation.simulate import simulate
from tests.support.tiny_federation import HEAD, MEASURED, TinyClassifier, make_config, make_data

HARD = {"server": {"optimizer": "fedadam"}, "adapter": {"selection": "least-visited"}, "train": {"head": "personal"}}
CASES = [(name, {}) for name in methods.METHODS] + [("fed-plora", HARD), ("hetlora", {"hetlora": {"prune": True}})]


class StoppedError(Exception):
    """What ends a run in the middle."""


def make(method: str, **changes: Any) -> SimpleNamespace:
    ranks = [6] if methods.find(method).equal_ranks else [1, 2, 3, 6]
    return make_config(method=method, clients={"ranks": ranks, "per_round": 2}, rounds=4, **changes)


def run(config: SimpleNamespace, directory: Path, stop_after: int | None = None, resume: bool = False) -> list[dict]:
    def on_round(row: dict) -> None:
        if row["round"] == stop_after:
            raise StoppedError

    return simulate(config, make_data(), TinyClassifier(), HEAD, directory, on_round, resume=resume)


def timeless(directory: Path) -> list[dict]:
    rows = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.endswith(MEASURED)} for row in rows]


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the rows and what notes the directory's own name."""
    skipped = ("rounds.jsonl", "adapter_config.json")
    files = (path for path in directory.rglob("*") if path.is_file() and path.name not in skipped)
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_run_that_was_stopped_ends_like_one_that_was_not(method: str, changes: dict, tmp_path: Path) -> None:
    config = make(method, **changes)
    rows = run(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "stopped", stop_after=2)
    with (tmp_path / "stopped" / "rounds.jsonl").open("a") as file:
        file.write('{"round": 3, "accura')
    resumed = run(config, tmp_path / "stopped", resume=True)
    assert [row["round"] for row in resumed] == [0, 1, 2, 3, 4]
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert len(rows) == 5


def test_a_run_stopped_after_row_0_has_that_row_once(tmp_path: Path) -> None:
    config = make("fed-plora")
    run(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "stopped", stop_after=0)
    assert checkpoint.last_round(tmp_path / "stopped") == 0
    run(config, tmp_path / "stopped", resume=True)
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_rounds_after_the_checkpoint_are_played_again(tmp_path: Path) -> None:
    config = make("fed-plora", checkpoint_every=2)
    run(config, tmp_path / "whole")
    with pytest.raises(StoppedError):
        run(config, tmp_path / "stopped", stop_after=3)
    assert checkpoint.last_round(tmp_path / "stopped") == 2
    assert len(timeless(tmp_path / "stopped")) == 4
    run(config, tmp_path / "stopped", resume=True)
    assert timeless(tmp_path / "stopped") == timeless(tmp_path / "whole")


def test_a_finished_run_goes_on_to_more_rounds(tmp_path: Path) -> None:
    short, long = make("flora"), make("flora")
    short.rounds = 2
    run(short, tmp_path / "run")
    assert run(short, tmp_path / "run", resume=True)[-1]["round"] == 2
    run(long, tmp_path / "run", resume=True)
    run(long, tmp_path / "whole")
    assert timeless(tmp_path / "run") == timeless(tmp_path / "whole")


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
    assert len(timeless(tmp_path)) == 5


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
