"""Clients' states on disk: they read back equal, take no memory, and survive a stop at any point."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fed.errors import FedError
from fed.files import digest
from fed.models.shared_model import adapted
from fed.simulation import checkpoint
from fed.simulation.client_store import ClientFile, ClientState, ClientStore, client_store
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from tests.support.command_line import StoppedError, contents, timeless, without_times
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

CPU = torch.device("cpu")


def make_kept(value: float, head: bool = True) -> ClientState:
    ones = torch.ones(2, 3)
    ends = {"body.first": (value * ones, value * ones.mT)}
    return ClientState({"rank": torch.tensor(7)}, {"head.bias": value * torch.ones(3)} if head else {}, ends)


def names(store: ClientStore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir())


def test_what_is_kept_is_read_back_when_asked(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, CPU)
    kept = store.keep(3, 2, make_kept(0.5, head=False))
    assert names(store) == ["client-3.round-2.safetensors"]
    assert "rank" in kept.memory
    assert int(kept.memory["rank"]) == 7
    assert kept.head == {}
    assert list(kept.ends) == ["body.first"]
    A, B = kept.ends["body.first"]
    assert (A.shape, B.shape) == ((2, 3), (3, 2))
    assert A.unique().tolist() == B.unique().tolist() == [0.5]
    assert store.stored(4) == ClientState({}, {}, {})
    assert store.keep(4, 2, ClientState({}, {}, {})) == ClientState({}, {}, {})
    known = digest((store.folder / "client-3.round-2.safetensors").read_bytes())
    assert dict(store.entries) == {3: ClientFile(2, ("memory", "ends"), known)}


def test_what_is_kept_again_is_copied(tmp_path: Path) -> None:
    """A client whose state did not change returns the mapping that it was given."""
    store = ClientStore(tmp_path, CPU)
    first = store.keep(0, 1, make_kept(1.0))
    second = store.keep(0, 2, first._replace(head={"head.bias": torch.zeros(3)}))
    assert names(store) == ["client-0.round-2.safetensors"]
    assert int(second.memory["rank"]) == 7
    assert not second.head["head.bias"].any()


def test_a_file_stays_as_long_as_one_of_two_checkpoints_names_it(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, CPU)
    store.keep(0, 1, make_kept(1.0))
    store.checkpointed()
    store.keep(0, 2, make_kept(2.0))
    store.keep(0, 3, make_kept(3.0))
    assert names(store) == ["client-0.round-1.safetensors", "client-0.round-3.safetensors"]
    store.checkpointed()
    assert names(store) == ["client-0.round-1.safetensors", "client-0.round-3.safetensors"]
    store.keep(0, 4, make_kept(4.0))
    store.checkpointed()
    assert names(store) == ["client-0.round-3.safetensors", "client-0.round-4.safetensors"]
    store.checkpointed()
    assert names(store) == ["client-0.round-4.safetensors"]


def test_a_file_that_is_written_again_for_the_same_round_is_no_other_file(tmp_path: Path) -> None:
    """A run that goes on plays rounds again, in which another library's rounding may give other values."""
    store = ClientStore(tmp_path, CPU)
    store.keep(0, 1, make_kept(1.0))
    store.checkpointed()
    store.checkpointed()
    store.keep(0, 1, make_kept(2.0))
    store.checkpointed()
    store.checkpointed()
    assert names(store) == ["client-0.round-1.safetensors"]
    assert float(store.read(0, 1).head["head.bias"][0]) == 2.0


def test_going_on_leaves_the_files_of_the_checkpoint_alone(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, CPU)
    store.keep(0, 1, make_kept(1.0))
    named = dict(store.entries)
    store.checkpointed()
    store.keep(0, 2, make_kept(2.0))
    (store.folder / "client-1.round-2.safetensors.tmp").write_bytes(b"cut")
    (store.folder / "notes.txt").write_text("of a user")
    again = ClientStore(tmp_path, CPU)
    again.adopt([named])
    assert names(again) == ["client-0.round-1.safetensors", "notes.txt"]
    assert again.stored(0).head["head.bias"].tolist() == [1.0] * 3


def test_nothing_is_deleted_through_a_symbolic_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "client-0.round-1.safetensors").write_bytes(b"of another run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "clients").symlink_to(elsewhere)
    store = ClientStore(tmp_path / "run", CPU)
    for change in (store.clear, lambda: store.adopt([{}])):
        with pytest.raises(FedError, match="clients' is a symbolic link; a run's own folder belongs there"):
            change()
    assert names(store) == ["client-0.round-1.safetensors"]


def test_a_store_that_is_not_to_last_leaves_nothing(tmp_path: Path) -> None:
    with client_store(tmp_path / "checkpoint", CPU, lasting=False) as store:
        store.keep(0, 1, make_kept(1.0))
        assert names(store)
    assert not (tmp_path / "checkpoint").exists()


def test_missing_and_damaged_files_are_one_line(tmp_path: Path) -> None:
    store = ClientStore(tmp_path, CPU)
    kept = store.keep(2, 5, make_kept(1.0))
    path = store.folder / "client-2.round-5.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4] + bytes(4))  # other numbers
    with pytest.raises(FedError, match=r"client-2.round-5.safetensors', what client 2 kept after round 5, cannot be r"):
        kept.memory["rank"]
    path.unlink()
    with pytest.raises(FedError, match=r"cannot be read: .*No such file.*; start the run anew"):
        kept.memory["rank"]
    with pytest.raises(FedError, match=r"is missing: the checkpoint of round 5 needs what client 2 kept"):
        store.check(5, store.entries)
    (tmp_path / "file").write_text("")
    with pytest.raises(FedError, match=r"what a client keeps, cannot be written: Not a directory"):
        ClientStore(tmp_path / "file", CPU).keep(0, 1, make_kept(1.0))


KEEPING = [
    ("fedsa-lora", {"clients": {"ranks": [6], "per_round": 2}, "train": {"head": "personal"}}),
    ("hetlora", {"hetlora": {"prune": True}}),
    ("fed-plora", {}),
]


@pytest.mark.parametrize(("method", "changes"), KEEPING)
def test_rounds_are_the_same_with_what_clients_keep_on_disk(method: str, changes: dict, tmp_path: Path) -> None:
    config, played = make_config(method=method, rounds=5, **changes), []
    for store in (None, ClientStore(tmp_path, CPU)):
        with adapted(config, TinyClassifier(), HEAD) as shared:
            federation = Federation(config, make_data(), shared, print, store)
            played.append(timeless(each.row for each in federation.play(federation.beginning())))
    assert played[0] == played[1]
    assert any(row["factor_noise"] for row in played[0])


class Stopper:
    """Ends a run, as Ctrl-C would, at the `last`-th time that a file is renamed or moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.last, self.after = 0, -1, False
        for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (os, "rmdir")):
            monkeypatch.setattr(owner, name, self.stopping(getattr(owner, name)))

    def stopping(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*arguments: Any, **options: Any) -> Any:
            self.count += 1
            ends_here = self.count == self.last
            if ends_here and not self.after:
                raise StoppedError
            result = change(*arguments, **options)
            if ends_here:
                raise StoppedError
            return result

        return changed


@pytest.fixture
def stopper(monkeypatch: pytest.MonkeyPatch) -> Stopper:
    return Stopper(monkeypatch)


@pytest.mark.parametrize("every", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_stopped_at_any_change_of_its_files_ends_like_one_that_was_not(
    every: int, tmp_path: Path, stopper: Stopper
) -> None:
    changes = {"clients": {"ranks": [6], "per_round": 2}, "train": {"head": "personal", "local_steps": 1}}
    config = make_config(method="fedsa-lora", rounds=3, checkpoint_every=every, measure=QUICK, **changes)

    def run(directory: Path, resume: bool = False) -> None:
        simulate(config, make_data(), TinyClassifier(), HEAD, directory, resume=resume)

    run(tmp_path / "whole")
    wanted, number, continued = contents(tmp_path / "whole"), stopper.count, 0
    for last in range(1, number + 1):
        directory = tmp_path / "stopped"
        stopper.count, stopper.last, stopper.after = 0, last, last % 2 == 0
        with pytest.raises(StoppedError):
            run(directory)
        stopper.last = -1
        if checkpoint.last_round(directory) is not None:
            run(directory, resume=True)
            assert contents(directory) == wanted, f"stopped at change {last} of {number}"
            assert without_times(directory) == without_times(tmp_path / "whole")
            continued += 1
        shutil.rmtree(directory, ignore_errors=True)
    assert continued > number / 2


QUICK = {"noise": True, "similarity": False, "memory": False, "clients": True}


def test_a_run_that_cannot_go_on_names_the_file(tmp_path: Path) -> None:
    config = make_config(rounds=2)
    simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
    longer = make_config(rounds=3)
    for file in (tmp_path / "checkpoint" / "clients").iterdir():
        file.unlink()
    with pytest.raises(FedError, match=r"client-\d.round-\d.safetensors' is missing: the checkpoint of round 2 needs"):
        simulate(longer, make_data(), TinyClassifier(), HEAD, tmp_path, resume=True)


def test_what_a_checkpoint_refers_to_stays_when_a_run_goes_on_without_checkpoints(tmp_path: Path) -> None:
    """Neither a resume that is refused nor one that is interrupted costs the run its last checkpoint."""
    changes = {"method": "fedsa-lora", "clients": {"ranks": [6], "per_round": 2}, "train": {"head": "personal"}}
    short, whole, longer = (make_config(rounds=rounds, **changes) for rounds in (2, 4, 4))
    without = make_config(rounds=4, checkpoint_every=0, **changes)
    simulate(short, make_data(), TinyClassifier(), HEAD, tmp_path / "run")
    simulate(whole, make_data(), TinyClassifier(), HEAD, tmp_path / "whole")

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 3:
            raise StoppedError

    with pytest.raises(FedError, match="began with other inputs"):
        simulate(without, make_data(seed=1), TinyClassifier(), HEAD, tmp_path / "run", resume=True)
    with pytest.raises(StoppedError):
        simulate(without, make_data(), TinyClassifier(), HEAD, tmp_path / "run", stop, resume=True)
    simulate(longer, make_data(), TinyClassifier(), HEAD, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == contents(tmp_path / "whole")


def test_a_run_in_the_place_of_another_takes_nothing_over(tmp_path: Path) -> None:
    simulate(make_config(seed=1), make_data(), TinyClassifier(), HEAD, tmp_path / "again")
    for directory in ("again", "whole"):
        simulate(make_config(), make_data(), TinyClassifier(), HEAD, tmp_path / directory)
    assert contents(tmp_path / "again") == contents(tmp_path / "whole")


def test_a_checkpoint_holds_the_server_alone(tmp_path: Path) -> None:
    """The states of clients that a round did not change are not written again."""
    sizes = []
    for count in (4, 40):
        data = make_data()
        many = replace(data, clients=data.clients * (count // 4))
        config = make_config(clients={"count": count, "per_round": count}, rounds=1)
        simulate(config, many, TinyClassifier(), HEAD, tmp_path / str(count))
        sizes.append((tmp_path / str(count) / "checkpoint" / "round-1" / "state.safetensors").stat().st_size)
        assert len(list((tmp_path / str(count) / "checkpoint" / "clients").iterdir())) == count
    assert sizes[0] == sizes[1]
