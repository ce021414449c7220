"""The grid of attacks and defences: its runs, what comes of them, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fed.errors import FedError
from fed.experiments import attack_grid
from fed.experiments.attack_grid import Grid, Outcome, grid, outcomes
from fed.experiments.plan import Cell
from fed.report import attacks as report
from tests.support.command_line import Call, assert_refused
from tests.support.saved_runs import make_finished_run, make_row

SETTINGS = ("rounds=2", "server.max_update_norm=0.05", "attack.share=0.3", "attack.factor=5.0")


def test_a_grid_has_every_attack_and_every_defence() -> None:
    found = grid("digits", SETTINGS, (0, 1))
    assert len(found.cells) == 2 * (4 * 6 + 3)
    assert [own.name for own in found.defences] == [
        *("none", "clipping", "median", "trimmed-mean", "krum", "clipping-median")
    ]
    by_name = {cell.variant.name: cell.config for cell in found.cells if cell.seed == 1}
    clean, krum = by_name["none.none"], by_name["sign-flip.krum"]
    assert (clean.attack.kind, clean.server.aggregation, clean.server.max_update_norm) == ("none", "mean", 0.0)
    assert (krum.attack.kind, krum.attack.share, krum.attack.factor) == ("sign-flip", 0.3, 5.0)
    assert (krum.server.aggregation, krum.server.byzantine_share, krum.server.max_update_norm) == ("krum", 0.3, 0.0)
    both = by_name["scale.clipping-median"]
    assert (both.server.aggregation, both.server.max_update_norm) == ("median", 0.05)
    assert by_name["scale.trimmed-mean"].server.trim == 0.3
    assert "nan.median" not in by_name
    assert len(grid("digits", SETTINGS[:1], (0,)).defences) == 4
    assert grid("digits").seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["attack.share=0.5"], "attack.share is 0.5: no rule withstands half"),
        (["attack.kind=nan"], "attack.kind is 'nan': that is what the runs differ by; 'none' would be right"),
        (["server.aggregation=median"], "server.aggregation is 'median': that is what the runs differ by"),
        (["method=flora"], "FLoRA does not average module by module"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(FedError, match=said):
        grid("digits", settings, (0,))


def play_by_hand(cell: Cell, directory: Path) -> None:
    """Leave a finished run whose accuracy follows from its seed, and in which client 3 of two attackers is rejected."""
    attacks = {"attackers": [2, 3]} if cell.config.attack.kind != "none" else {}
    hit = {"skipped": [3, 4], "faults": ["its training loss is nan"] * 2} if attacks else {}
    rows = [
        make_row(number, **attacks, **hit, accuracy=0.5 + 0.1 * cell.seed + 0.01 * number, clipped=[1] * number)
        for number in range(3)
    ]
    make_finished_run(directory / cell.path, rows, cell.config)


@pytest.fixture
def played(tmp_path: Path) -> tuple[Grid, Path]:
    found = grid("digits", SETTINGS, (0, 1))
    for cell in found.cells:
        play_by_hand(cell, tmp_path)
    return found, tmp_path


def test_what_came_of_the_runs_is_counted(played: tuple[Grid, Path]) -> None:
    found = outcomes(*played)
    assert len(found) == 27
    counts = {0: 6, 1: 6}, {0: 3, 1: 3}, {0: 3, 1: 3}, {0: 3, 1: 3}
    (nan,) = (one for one in found if one.attack == "nan")
    assert nan == Outcome("nan", "none", {0: 0.52, 1: 0.62}, *counts)
    none = {0: 0, 1: 0}
    assert found[0] == Outcome("none", "none", {0: 0.52, 1: 0.62}, none, none, none, counts[3])


def test_tables_picture_and_files(played: tuple[Grid, Path]) -> None:
    own, directory = played
    found = outcomes(own, directory)
    accuracy = report.accuracy_table(own, found)
    assert accuracy[0] == (
        "accuracy (%)", "mean", "clipping to 0.05", "median", "trimmed mean", "Krum", "clipping, median"
    )  # fmt: skip
    assert accuracy[1] == ("no attack", *["57.0 ± 7.1"] * 6)
    assert [line[0] for line in accuracy[2:]] == ["label-flip", "scale", "sign-flip"]
    assert report.rejected_table(found)[1:] == [
        (title, "12", "6", "6", "57.0 ± 7.1") for title in ("NaN", "wrong shape", "replay")
    ]
    paths = report.publish(own, found, directory)
    assert [path.name for path in paths] == ["attacks.png", "attacks.json", "attacks.md"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    saved = json.loads(paths[1].read_text())
    assert (saved["share"], saved["factor"], saved["seeds"]) == (0.3, 5.0, [0, 1])
    assert saved["outcomes"][0]["accuracy"] == {"0": 0.52, "1": 0.62}
    said = paths[2].read_text()
    assert "python -m fed attacks digits --seeds 0,1 --set rounds=2 server.max_update_norm=0.05" in said
    assert "30% of the clients attack, with a factor of 5" in said


def test_a_run_without_accuracy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = grid("digits", SETTINGS, (0,))
    for cell in own.cells:
        make_finished_run(tmp_path / cell.path, [make_row(0), make_row(1, accuracy=None)], cell.config)
    with pytest.raises(FedError, match="none, mean, seed 0 has no accuracy after its last round"):
        outcomes(own, tmp_path)


def test_the_command_plays_what_is_left_and_reports(
    fed_cli: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The runs are played by hand; a second call finds all of them, and one that fails is named."""
    out, calls = tmp_path / "grid", []

    def in_turn(cells: list[Cell], bench: Any, tell: Any) -> None:
        for cell in cells:
            calls.append(cell.variant.name)
            if (cell.variant.name, len(calls)) == ("nan.none", 25):
                tell(cell, "failed", "the disk is full")
                continue
            tell(cell, "event", "round 1: client 3 is left out")
            play_by_hand(cell, out)
            (out / cell.path / "base").mkdir()
            tell(cell, "finished", make_row(2))

    monkeypatch.setattr("fed.commands.in_turn", in_turn)
    monkeypatch.setattr("fed.commands.check", lambda cells, *others: set())
    command = ("attacks", "digits", "--seeds", "0", "--out", str(out), "--set", *SETTINGS)
    outcome = fed_cli(*command)
    assert outcome.status == 2
    assert "1 of 27 runs could not be played: nan, mean, seed 0: the disk is full" in outcome.err
    assert "is left out" not in outcome.err
    again = fed_cli(*command)
    assert (again.status, calls[-1], len(calls)) == (0, "nan.none", 28)
    assert "sign-flip" in again.out
    assert (out / "attacks.md").is_file()


def test_the_command_refuses_what_is_wrong(fed_cli: Call) -> None:
    assert_refused(fed_cli("attacks", "digits", "--seeds", "x"), "--seeds is 'x'")
    assert_refused(fed_cli("attacks", "digits", "--set", "attack.share=0.7"), "no rule withstands half")


@pytest.mark.slow
def test_a_small_grid_is_played(fed_cli: Call, tmp_path: Path) -> None:
    """Six clients in two rounds; what is rejected is rejected in full, and a replay from its second round on."""
    small = (
        "rounds=2",
        "clients.count=6",
        "clients.per_round=6",
        "model.pretrain_steps=20",
        "server.max_update_norm=1.0",
    )
    outcome = fed_cli("attacks", "digits", "--seeds", "0", "--out", str(tmp_path), "--set", *small, "attack.share=0.34")
    assert outcome.status == 0
    saved = {
        (one["attack"], one["defence"]): one for one in json.loads((tmp_path / "attacks.json").read_text())["outcomes"]
    }
    for attack, rejected in (("nan", 4), ("shape", 4), ("replay", 2)):
        assert (saved[attack, "none"]["sent"], saved[attack, "none"]["rejected"]) == ({"0": 4}, {"0": rejected})
        assert saved[attack, "none"]["lost"] == {"0": 0}
    assert saved["nan", "none"]["accuracy"] == saved["shape", "none"]["accuracy"]
    assert {name for name, _ in saved} == {"none", *attack_grid.AGGREGATED, *attack_grid.REJECTED}
