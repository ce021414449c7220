"""The directory of a run: put in its place as a whole, and set right after a process that was killed meanwhile."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fed import config as configuration
from fed.errors import FedError
from fed.locks import LOCK, held
from fed.sealed import read_sealed, write_sealed
from fed.simulation.finished import FINISHED, why_not_finished
from fed.simulation.run_directory import RunDirectory, read, read_centralised, recover, write_centralised
from tests.support.saved_runs import make_finished_run, make_row, make_run


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", [make_row(0)])


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def leave(path: Path) -> Path:
    """Let a directory look as if a process that held it was killed."""
    path.mkdir(exist_ok=True)
    (path / LOCK).write_text("99999999")
    return path


def test_the_old_run_is_there_until_the_new_one_is_ready(old: Path) -> None:
    with RunDirectory(old, overwrite=True) as directory:
        (directory.path / "new").write_text("")
        assert "config.toml" in names(old)
        directory.publish()
        assert "new" in names(old)
        directory.commit()
    assert names(old.parent) == ["run"]
    assert names(old) == ["new"]


def test_a_run_that_fails_leaves_the_old_one(old: Path) -> None:
    def fail(publish: bool) -> None:
        with RunDirectory(old, overwrite=True) as directory:
            if publish:
                directory.publish()
            raise FedError("the moon is full")

    for publish in (False, True):
        with pytest.raises(FedError, match="moon"):
            fail(publish)
        assert names(old.parent) == ["run"]
        assert names(old) == ["config.toml", "rounds.jsonl"]


def test_a_run_that_another_process_holds_is_not_replaced(old: Path) -> None:
    code = "import sys, pathlib, fed.locks\nwith fed.locks.held(pathlib.Path(sys.argv[1])): print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code, str(old)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    other.stdout.readline()
    with pytest.raises(FedError, match=rf"is in use by process {other.pid}"), RunDirectory(old, overwrite=True):
        pass
    other.communicate(b"\n")
    assert names(old.parent) == ["run"]
    assert names(old) == ["config.toml", "rounds.jsonl"]


def test_two_runs_of_one_name_do_not_mix(tmp_path: Path) -> None:
    target = tmp_path / "run"
    with RunDirectory(target, overwrite=False) as first:
        with RunDirectory(target, overwrite=False) as second:
            (first.path / "first").write_text("")
            first.publish()
            (second.path / "second").write_text("")
            with pytest.raises(FedError, match="cannot be written"):
                second.publish()
        first.commit()
    assert names(tmp_path) == ["run"]
    assert names(target) == ["first"]


def test_what_a_killed_process_left_is_deleted_or_put_back(tmp_path: Path) -> None:
    said: list[str] = []
    target, aside, new = (tmp_path / name for name in ("run", ".run.abcd1234.old", ".run.abcd1234.tmp"))
    # killed between the two renames: the old run comes back
    (make_run(leave(aside), [make_row(0)]) / "old").write_text("")
    leave(new)
    recover(target, said.append)
    assert names(tmp_path) == ["run"]
    assert "old" in names(target)
    assert len(said) == 1
    # killed before the new run has a checkpoint: the old one comes back
    target.rename(aside)
    leave(aside)
    (leave(make_run(target, [make_row(0)])) / ".unborn").touch()
    recover(target)
    assert "old" in names(target)
    # something else is there by then: both stay
    target.rename(aside)
    leave(aside)
    (target / "of another program").mkdir(parents=True)
    recover(target, said.append)
    assert said[1] == f"{aside} is a run that was to be replaced, but {target} is not what was to replace it"
    assert names(target) == ["of another program"]
    assert "old" in names(aside)
    shutil.rmtree(target)
    # killed after that: the new run stays
    (make_run(leave(target), [make_row(0)]) / "checkpoint" / "round-0").mkdir(parents=True)
    (target / ".unborn").touch()
    recover(target)
    assert names(tmp_path) == ["run"]
    assert "old" not in names(target)
    # killed while the old run is deleted
    (tmp_path / ".run.abcd1234.gone").mkdir()
    (target / ".unborn").touch()
    recover(target)
    assert names(tmp_path) == ["run"]
    assert ".unborn" not in names(target)


def test_directories_of_others_stay(tmp_path: Path) -> None:
    others = (".run.abcd1234.tmp", ".run.abcd1234.old", ".runs.abcd1234.tmp", ".run.notes.tmp", "run.abcd1234.tmp")
    for name in others:
        (tmp_path / name).mkdir()  # without a lock's file
    leave(tmp_path / ".run.dcba4321.tmp")
    with held(tmp_path / ".run.dcba4321.tmp"):
        recover(tmp_path / "run")
    assert names(tmp_path) == sorted([*others, ".run.dcba4321.tmp"])


def test_a_finished_run_is_known_by_its_digests(tmp_path: Path) -> None:
    config = configuration.RunConfig(rounds=1)
    run = make_finished_run(tmp_path / "run", [make_row(0), make_row(1)], config)
    assert why_not_finished(run, config) is None
    assert "ended with round 1 of 2" in why_not_finished(run, configuration.RunConfig(rounds=2))
    assert "seed = 0, and the run has 1" in why_not_finished(run, configuration.RunConfig(rounds=1, seed=1))
    (run / "base_delta.safetensors").write_bytes(b"of another run")
    assert "does not belong to it" in why_not_finished(run, config)
    (run / "base_delta.safetensors").unlink()
    rows = (run / "rounds.jsonl").read_text()
    (run / "rounds.jsonl").write_text(rows.replace("0.5", "0.7"))
    assert "its rows are not those that the run wrote" in why_not_finished(run, config)
    with pytest.raises(FedError, match="its rows are not those that the run wrote"):
        read(run)
    (run / "rounds.jsonl").write_text(rows)
    marked = (run / FINISHED).read_text()
    (run / FINISHED).write_text(marked.replace('"round": 1', '"round": 2'))
    assert "it does not fit its digest" in why_not_finished(run, configuration.RunConfig(rounds=2))
    (run / FINISHED).unlink()
    assert "there is no finished.json" in why_not_finished(run, config)


def test_results_of_centralised_lora_are_known_too(tmp_path: Path) -> None:
    run = make_finished_run(tmp_path / "run", [make_row(0)], configuration.RunConfig())
    write_centralised(run, [{"steps": 3, "accuracy": 0.5, "loss": None, "train_seconds": 1.0}])
    assert [row["accuracy"] for row in read_centralised(run)] == [0.5]
    (run / "centralised.json").write_text((run / "centralised.json").read_text().replace("0.5", "0.9"))
    with pytest.raises(FedError, match=r"centralised.json' is damaged; delete it, and python -m fed resume"):
        read_centralised(run)
    (run / FINISHED).unlink()  # as in runs of earlier versions
    assert [row["accuracy"] for row in read_centralised(run)] == [0.9]
    for content in ("", "{}", "[1]", '[{"steps": "a", "accuracy": 1}]', "[" * 100_000):
        (run / "centralised.json").write_text(content)
        with pytest.raises(FedError, match=r"centralised.json' is damaged"):
            read_centralised(run)


def test_a_sealed_file_is_read_back_and_every_change_seen(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_sealed(path, {"round": 3, "names": ["a", "é"]})
    assert read_sealed(path) == {"round": 3, "names": ["a", "é"]}
    content = path.read_bytes()
    for place in range(len(content) - 1):  # the last byte ends the line
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(FedError, match=r"facts.json' (is damaged|cannot be read)"):
            read_sealed(path)
    path.write_text(json.dumps({"round": 3}))
    assert read_sealed(path, plain=True) == {"round": 3}  # of an earlier version
    with pytest.raises(FedError, match="it does not fit its digest"):
        read_sealed(path)
