"""Small runs that are interrupted and resumed, and what has to come of it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeVar

from fed import methods
from fed.errors import FedError
from fed.simulation.checkpoint import is_due
from fed.simulation.simulate import simulate
from fed.types import Row
from tests.support.command_line import timeless
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

T = TypeVar("T")

NO_CHECKPOINT = "holds no checkpoint to go on from"


@dataclass(frozen=True)
class Case:
    """A run of the tiny federation; with `begun`, a finished run of so many rounds that is resumed to more."""

    name: str
    method: str
    every: int = 1
    rounds: int = 3
    begun: int = 0
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, rounds: int = 0) -> SimpleNamespace:
        ranks = [6] if methods.find(self.method).equal_ranks else [1, 2, 3, 6]
        return make_config(
            method=self.method,
            rounds=rounds or self.rounds,
            checkpoint_every=self.every,
            **{"clients": {"ranks": ranks, "per_round": 2}, **self.changes},
        )

    def play(
        self,
        directory: Path,
        resume: bool,
        on_round: Callable[[Row], object] | None = None,
        on_event: Callable[[str], object] | None = None,
    ) -> list[Row]:
        """Play the run, or go on with it."""
        config, data = self.config(), make_data()
        return simulate(config, data, TinyClassifier(), HEAD, directory, on_round, on_event, resume=resume)

    def begin(self, directory: Path) -> None:
        """Make what the run begins with: nothing, or the finished run of fewer rounds."""
        if self.begun:
            simulate(self.config(self.begun), make_data(), TinyClassifier(), HEAD, directory)

    def __str__(self) -> str:
        return self.name


PERSONAL = {"train": {"head": "personal", "local_steps": 1}}
QUICK = {"train": {"local_steps": 1}}
CASES = {
    case.name: case
    for case in (
        Case("fed-plora-personal", "fed-plora", changes=PERSONAL),
        Case("fedsa-lora", "fedsa-lora", changes=QUICK),
        Case("fedsa-lora-every-2", "fedsa-lora", every=2, changes=PERSONAL),
        Case("flora", "flora", changes=QUICK),
        Case("flora-every-2", "flora", every=2, rounds=4, changes=QUICK),
        Case("longer", "fed-plora", rounds=5, begun=3, changes=QUICK),
        Case("flora-longer", "flora", rounds=5, begun=3, every=2, changes=QUICK),
    )
}


class Tally:
    """How the faults of one test came out: all of them are tried, also after one that came out wrong."""

    def __init__(self) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []

    @contextmanager
    def fault(self, what: str) -> Iterator[Callable[[str], None]]:
        """Try one fault in the context, which is given a function to call with the outcome; what it raises is wrong."""
        try:
            yield lambda outcome: self.outcomes.update([outcome])
        except Exception as error:
            self.outcomes["WRONG"] += 1
            self.wrong.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:400]}")

    def check(self) -> None:
        """Raise AssertionError with all that came out wrong."""
        assert not self.wrong, "\n".join([f"{len(self.wrong)} of {self}", *self.wrong[:40]])

    def __str__(self) -> str:
        counts = ", ".join(f"{outcome} {count}" for outcome, count in sorted(self.outcomes.items()))
        return f"tried {self.outcomes.total()}: {counts}"


class Prepared(NamedTuple):
    """A case's directories: what the run begins with and where it is played; and what it ends with if nothing fails."""

    begun: Path
    directory: Path
    wanted: dict[str, Any]


def prepared(case: Case, folder: Path, directory: Path | None = None) -> Prepared:
    """Play a case's run to its end in `folder`, and return what faults are compared with."""
    begun, whole, directory = folder / "begun", folder / "whole", directory or folder / "disk" / "run"
    directory.parent.mkdir(exist_ok=True)
    case.begin(begun)
    case.play(fresh(whole, begun), bool(case.begun))
    return Prepared(begun, directory, result_of(whole))


def files_of(directory: Path) -> dict[str, bytes]:
    """Return the content of every file but the lock, by name; a symbolic link counts as a file with its target."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = b"-> " + str(path.readlink()).encode()
        elif path.is_file() and path.name != ".lock":
            found[name] = path.read_bytes()
    return found


def result_of(directory: Path) -> dict[str, Any]:
    """Return every file of a run, without the lock, what is measured in its rows, the run's path, and their digests.

    Files that cannot be read as what they should be are returned as they are.
    """
    found: dict[str, Any] = dict(files_of(directory))
    for name, content in found.items():
        with suppress(ValueError, KeyError, AttributeError):
            found[name] = _comparable(name, content)
    return found


def _comparable(name: str, content: bytes) -> Any:
    if name.endswith("rounds.jsonl"):
        return timeless(json.loads(line) for line in content.decode().splitlines())
    if name.endswith("adapter_config.json"):
        facts = json.loads(content)
        del facts["base_model_name_or_path"]
        return {**facts, "target_modules": sorted(facts["target_modules"])}
    if name.endswith(("state.json", "finished.json")):
        facts = json.loads(content)["facts"]
        del facts["rows"]  # the digest of rows with times
        facts.get("files", {}).pop("adapter/adapter_config.json", None)
        return facts
    return content


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Return the names of files that are missing, not wanted or different."""
    return sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))


def go_on(case: Case, directory: Path, wanted: dict[str, Any], acknowledged: int) -> str:
    """Resume an interrupted run, check its files, and return "identical", or "anew" if there was no checkpoint.

    `acknowledged` is the last round, or -1, that was reported to `on_round`. What was saved by then must not be lost,
    and a run that is refused must be left as it is; played anew in its place it must end as if nothing had been there.
    """
    saved = max((number for number in range(acknowledged + 1) if is_due(case.config(), number)), default=-1)
    before, played = files_of(directory), []
    rows, refusal = attempt(lambda: case.play(directory, True, lambda row: played.append(row["round"])))
    if rows is None:
        assert NO_CHECKPOINT in refusal, refusal
        assert saved < 0, f"the checkpoint of round {saved} is lost"
        assert not case.begun, "the checkpoint of the finished run is lost"
        assert files_of(directory) == before, "the refused run was changed"
        case.play(directory, False)
    else:
        numbers = [row["round"] for row in rows]
        assert numbers == list(range(case.rounds + 1)), f"the rows are of the rounds {numbers}"
        reached = max(saved, case.begun)  # from a checkpoint of round 0 that round's row is made again
        assert not reached or not played or played[0] > reached, f"round {played[0]} was saved, and is played again"
    outcome = "anew" if rows is None else "identical"
    differing = differences(result_of(directory), wanted)
    assert not differing, f"{outcome}, but {differing}"
    return outcome


def attempt(work: Callable[[], T]) -> tuple[T | None, str]:
    """Return what some work returns, or None and the one line of the FedError that it raises."""
    try:
        return work(), ""
    except FedError as error:
        line = str(error)
    assert line.strip(), "a refusal without words"
    assert "\n" not in line, f"a refusal of several lines: {line!r}"
    return None, line


def fresh(directory: Path, begun: Path) -> Path:
    """Make the directory a copy of `begun`, or remove it if that does not exist."""
    shutil.rmtree(directory, ignore_errors=True)
    if begun.exists():
        shutil.copytree(begun, directory, symlinks=True)
    return directory
