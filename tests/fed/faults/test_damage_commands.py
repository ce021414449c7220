"""Commands on a run with a damaged file: what they print and write is right, or they say in one line what is wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.command_line import Outcome
from tests.support.commands_in_children import TINY, command_here
from tests.support.damage import Damage, damages
from tests.support.interrupted_runs import Tally, differences, fresh, result_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("undrawn_throughout")]

# Settings that may be changed: a damaged configuration in which they are others is a configuration.
_FREE = re.compile(r"^(rounds|threads|device|checkpoint_every|tracker) = .*$", re.MULTILINE)


def run(out: Path, *settings: str) -> Path:
    outcome = command_here("run", "digits", "--no-centralised", "--out", str(out), "--set", *TINY, *settings)
    assert outcome.status == 0, outcome.err
    return out


def results(out: Path) -> dict[str, object]:
    """Return the files of a run without its report and its checkpoints.

    A line end cut off at the end of a text file changes nothing that it says.
    """
    skipped, texts = (
        ("report.", "checkpoint/", "similarity.png", "initialisation"),
        ("config.toml", "base/digests.json"),
    )
    found = {name: content for name, content in result_of(out).items() if not name.startswith(skipped)}
    return {name: content.rstrip() if name in texts else content for name, content in found.items()}


class Commands:
    """The commands on a run, with what they print about the whole run."""

    def __init__(self, whole: Path) -> None:
        self.report = command_here("report", "--markdown", str(whole)).out
        assert command_here("noise", str(whole)).status == 0
        self.noise = (whole / "initialisation.json").read_bytes()
        self.results = results(whole)

    def check(self, out: Path) -> str:
        """Call the commands one after another and return how they came out."""
        reported, measured = command_here("report", "--markdown", str(out)), command_here("noise", str(out))
        if _accepted(reported):
            assert reported.out == self.report, "the report is another"
        if _accepted(measured):
            assert (out / "initialisation.json").read_bytes() == self.noise, "the noise is another"
        rows = (out / "rounds.jsonl").read_bytes() if (out / "rounds.jsonl").exists() else None
        resumed = command_here("resume", "--no-centralised", str(out))
        if not _accepted(resumed):
            assert (rows is None) == (not (out / "rounds.jsonl").exists()), "the rows were changed"
            assert rows is None or (out / "rounds.jsonl").read_bytes() == rows, "the rows were changed"
            return "refused"
        maps = {name for name in self.results if name.startswith("similarity/") and not (out / name).exists()}
        skipped = {*maps, "finished.json"} if maps else set[str]()
        differing = [name for name in differences(results(out), self.results) if name not in skipped]
        assert not differing, f"resumed, but {differing}"
        return "without a map" if maps else "identical"


def _accepted(outcome: Outcome) -> bool:
    """Return whether a command succeeded; if it did not, it must have said why in one line."""
    if outcome.status == 0:
        return True
    assert outcome.status == 2, f"status {outcome.status}: {outcome.err}"
    *warnings, line = outcome.err.splitlines()
    assert all(each.startswith("warning: ") for each in warnings), outcome.err
    assert line.startswith("error: "), outcome.err
    return False


def test_commands_on_a_damaged_run_are_right_or_say_what_is_wrong(tmp_path: Path, tally: Tally) -> None:
    whole, other = run(tmp_path / "whole"), run(tmp_path / "other", "seed=1")
    commands, begun = Commands(whole), fresh(tmp_path / "begun", whole)
    (begun / "initialisation.json").unlink()
    for damage in _of_results(begun, other):
        with tally.fault(str(damage)) as came_out:
            out = fresh(tmp_path / "run", begun)
            damage.apply(out)
            if _only_free_settings_differ(out, begun):
                came_out("another configuration")
            else:
                came_out(commands.check(out))
    tally.check()


def _of_results(begun: Path, other: Path) -> list[Damage]:
    wanted: Callable[[str], bool] = re.compile(r"(config|rounds|base|adapter|finished|checkpoint|similarity)").match
    return [damage for damage in damages(begun, other, flips=6) if wanted(damage.name) and "png" not in damage.name]


def _only_free_settings_differ(out: Path, begun: Path) -> bool:
    try:
        now, before = ((folder / "config.toml").read_text() for folder in (out, begun))
    except (OSError, ValueError):
        return False
    return now != before and _FREE.sub("", now) == _FREE.sub("", before)
