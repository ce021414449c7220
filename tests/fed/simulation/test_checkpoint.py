"""Resuming a stopped run: it ends with the files of a run that was never stopped."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fed import methods
from fed.errors import FedError
from fed.experiments.run import ended
from fed.simulation import checkpoint
from fed.simulation.rows import ROUNDS, parse_rows
from fed.simulation.simulate import simulate
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


def test_a_run_of_more_than_ten_clients_goes_on(tmp_path: Path) -> None:
    """Clients are keys of a checkpoint's text, in which 10 stands before 2."""
    config = make_config(clients={"count": 12, "per_round": 12}, rounds=2)

    def play(directory: Path, stop_after: int | None = None, resume: bool = False) -> None:
        def on_round(row: dict) -> None:
            if row["round"] == stop_after:
                raise StoppedError

        simulate(config, make_data(sizes=(5,) * 12), TinyClassifier(), HEAD, directory, on_round, resume=resume)

    with pytest.raises(StoppedError):
        play(tmp_path / "stopped", stop_after=1)
    play(tmp_path / "stopped", resume=True)
    play(tmp_path / "whole")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


@pytest.mark.parametrize(("method", "folds"), [("fed-plora", False), ("flora", True)])
def test_only_what_is_folded_is_listed_by_round(method: str, folds: bool, tmp_path: Path) -> None:
    config = make(method)
    with suppress(StoppedError):
        run(config, tmp_path, stop_after=3)
    facts = json.loads((tmp_path / "checkpoint" / "round-3" / "state.json").read_text())["facts"]
    assert len(facts["fold_bytes"]) == 3 * folds
    rows = run(config, tmp_path, resume=True)
    assert [row["download_bytes"] for row in rows] == [row["download_bytes"] for row in run(config, tmp_path / "whole")]


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
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == {"round-3", "round-4", "clients"}


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
    for number in (3, 4):
        (tmp_path / "checkpoint" / f"round-{number}" / "state.safetensors").write_bytes(b"cut off")
    with pytest.raises(FedError, match=r"round-4/state.safetensors' is damaged: .* no checkpoint is whole"):
        run(make("fed-plora"), tmp_path, resume=True)
    assert len(without_times(tmp_path)) == 5


def as_of_version_1(directory: Path, number: int) -> None:
    """Turn a run's files into those of the version before digests: one checkpoint, without any."""
    state = directory / "checkpoint" / f"round-{number}" / "state.json"
    facts = json.loads(state.read_text())["facts"]
    for key in ("rows", "inputs", "tensors", "similarity"):
        del facts[key]
    facts["kept"] = {client: [entry["round"], *entry["fields"]] for client, entry in facts["kept"].items()}
    facts["settings"]["cohort_size"] = facts["settings"].pop("clients_per_pass")
    state.write_text(json.dumps(facts))
    rows = directory / ROUNDS
    rows.write_text(rows.read_text().replace("clients_per_pass", "cohort_size"))
    shutil.rmtree(directory / "checkpoint" / f"round-{number - 1}")
    (directory / "finished.json").unlink(missing_ok=True)


@pytest.mark.parametrize(("stop_after", "reached"), [(2, 2), (None, 4)])
def test_a_run_of_an_earlier_version_goes_on(stop_after: int | None, reached: int, tmp_path: Path) -> None:
    config = make("fedsa-lora")
    with suppress(StoppedError):
        run(config, tmp_path / "stopped", stop_after)
    as_of_version_1(tmp_path / "stopped", reached)
    rows = run(config, tmp_path / "stopped", resume=True)
    assert all("clients_per_pass" in row for row in rows)
    run(config, tmp_path / "whole")
    assert ended(tmp_path / "stopped", config)
    adapters = [path / "adapter" / "adapter_model.safetensors" for path in (tmp_path / "stopped", tmp_path / "whole")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_a_damaged_row_is_named_by_its_line(tmp_path: Path) -> None:
    for damaged, message in (
        ('{"round": 0, "accuracy": 0.5}\n{"round" 1}\n', "line 2: Expecting ':'"),
        ('{"round": 0, "accuracy": 0.5}\n{"round": 2, "accuracy": 0.5}\n', "line 2: round 1 belongs there, .* round 2"),
        ('{"round": 0}\n', "line 1: 'accuracy' is missing or no number"),
        ('{"round": 0, "accuracy": NaN}\n', "line 1: NaN is no number"),
        ("[]\n", "line 1: it holds no JSON object"),
    ):
        with pytest.raises(FedError, match=message):
            parse_rows(tmp_path, damaged.encode())
