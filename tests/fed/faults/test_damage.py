"""A run with a damaged file ends as if it were whole, or is refused in one line that leaves its rows alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from fed.experiments.run import ended
from tests.support.command_line import StoppedError
from tests.support.damage import Damage, damages
from tests.support.interrupted_runs import CASES, PERSONAL, Case, Tally, attempt, differences, fresh, result_of

RUNS = {
    "fedsa-lora": Case("fedsa-lora", "fedsa-lora", changes=PERSONAL),
    "flora-every-2": CASES["flora-every-2"],
    "fed-plora": Case("fed-plora", "fed-plora", changes=PERSONAL),
}
MORE = 2  # rounds that a finished run is resumed to


def made(case: Case, directory: Path, finished: bool, seed: int | None = None) -> Path:
    """Play the run to its end, or until its last round but one has been reported."""

    def on_round(row: dict) -> None:
        if not finished and row["round"] == case.rounds - 1:
            raise StoppedError

    if seed is not None:
        case = replace(case, changes={**case.changes, "seed": seed})
    try:
        case.play(directory, False, on_round)
    except StoppedError:
        assert not finished
    return directory


def results(directory: Path) -> dict[str, object]:
    """Return what a run leaves for its user: all its files but the checkpoints."""
    return {name: content for name, content in result_of(directory).items() if not name.startswith("checkpoint/")}


def resumed(case: Case, directory: Path, wanted: dict[str, object], said: list[str]) -> str:
    """Go on with a damaged run; return "identical", "refused", or "without a map", which is said at some time.

    Maps of similarity are pictures alone: the run goes on without one that was damaged.
    """
    path = directory / "rounds.jsonl"
    before = path.read_bytes() if path.exists() else None
    rows, line = attempt(lambda: case.play(directory, True, on_event=said.append))
    if rows is None:
        assert (path.read_bytes() if path.exists() else None) == before, f"refused ({line}), but the rows were changed"
        return "refused"
    found = results(directory)
    left_out = {name for name in wanted.keys() - found.keys() if any(Path(name).name in line for line in said)}
    if not all(name.startswith("similarity/") for name in left_out):
        left_out = set()
    skipped = {*left_out, "finished.json"} if left_out else set()
    differing = [name for name in differences(found, wanted) if name not in skipped]
    assert not differing, f"the run went on, but {differing}"
    return "without a map" if left_out else "identical"


def try_damage(
    case: Case, damage: Damage, directory: Path, wanted: dict[str, object], longer: dict[str, object]
) -> str:
    damage.apply(directory)
    said: list[str] = []
    over, _ = attempt(lambda: ended(directory, case.config()))
    if over:
        differing = differences(results(directory), wanted)
        assert not differing, f"the run counts as finished, but {differing}"
    outcome = resumed(case, directory, wanted, said)
    if outcome == "refused":
        return outcome
    over, line = attempt(lambda: ended(directory, case.config()))
    assert over, f"the run went on to its end and does not count as finished: {line}"
    further = resumed(replace(case, rounds=case.rounds + MORE), directory, longer, said)
    return outcome if further != "refused" else f"{outcome}, then refused"


def check(name: str, finished: bool, folder: Path, stride: int, tally: Tally) -> None:
    case = RUNS[name]
    begun, other = made(case, folder / "begun", finished), made(case, folder / "other", finished, seed=6)
    whole, longer = made(case, folder / "whole", True), replace(case, rounds=case.rounds + MORE)
    wanted = results(whole)
    longer.play(fresh(folder / "longer", whole), True)
    for damage in damages(begun, other)[stride // 2 :: stride]:
        with tally.fault(str(damage)) as came_out:
            directory = fresh(folder / "disk" / "run", begun)
            came_out(try_damage(case, damage, directory, wanted, results(folder / "longer")))
    tally.check()


def test_a_damaged_run_is_healed_or_refused(tmp_path: Path, tally: Tally) -> None:
    check("fedsa-lora", True, tmp_path, 25, tally)


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("name", RUNS)
def test_a_run_with_any_damage_is_healed_or_refused(name: str, finished: bool, tmp_path: Path, tally: Tally) -> None:
    check(name, finished, tmp_path, 1, tally)
