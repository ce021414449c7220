"""What the commands do: a run, one that goes on, a comparison. Each returns the exit status."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import fed.config as configuration
from fed.errors import INTERRUPTED, FedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import nn

    from fed.config import RunConfig
    from fed.console import Screen
    from fed.data import FederatedData
    from fed.grid import Plan
    from fed.rundir import RunDirectory
    from fed.small_model import Recipe


def run(config: RunConfig, out: Path, overwrite: bool, centralised: bool) -> int:
    """Load everything, simulate, compare, report; return the exit status."""
    from fed import data as datasets
    from fed import execute, trackers
    from fed.console import Screen
    from fed.rundir import RunDirectory

    trackers.require(config.tracker)
    began, screen, directory = time.perf_counter(), Screen(), RunDirectory(out, overwrite)
    try:
        data = datasets.load(config, screen.warn, screen.stage)
        with execute.limits(config.threads), directory:
            model = _base(config, data, directory, screen)
            directory.place()
            _play(config, data, model, directory.path, screen, directory.keep)
            if centralised:
                _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        if directory.kept:
            return _interrupted(out, screen)
        screen.warn("interrupted: nothing is left of this run")
        return INTERRUPTED
    return _reported(out, screen, began)


def resume(out: Path, centralised: bool) -> int:
    """Go on with a run from its last checkpoint; one that went to its end gets what is missing beside its rounds."""
    from fed import data as datasets
    from fed import execute, models, trackers
    from fed.console import Screen
    from fed.report import CENTRALISED, read
    from fed.rundir import BASE

    began, screen, run = time.perf_counter(), Screen(), read(out)
    config = run.config
    trackers.require(config.tracker)
    wanted = centralised and not (out / CENTRALISED).is_file()
    try:
        with execute.limits(config.threads):
            if not execute.ended(out, config):
                data, model = datasets.load(config, screen.warn, screen.stage), models.reopen(out / BASE)
                _play(config, data, model, out, screen, lambda: None, resume=True)
            elif wanted:
                data, model = datasets.load(config, screen.warn, screen.stage), models.reopen(out / BASE)
            else:
                screen.say(f"{out}: all {config.rounds} rounds are there already")
            if wanted:
                _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        return _interrupted(out, screen)
    return _reported(out, screen, began)


def pretrain(path: str, text: str, left_out: Sequence[str], recipe: Recipe, out: Path, threads: int) -> int:
    """Make a small language model of the rows at `path`, written as `text` says; return the exit status."""
    from fed import execute, small_model, texts
    from fed.console import Screen
    from fed.rundir import RunDirectory
    from fed.sources import read_local

    began, screen, directory = time.perf_counter(), Screen(), RunDirectory(out, overwrite=False)
    written = texts.fill_in(text, read_local(path, "the path", left_out=left_out), "--text")
    try:
        with execute.limits(threads), directory:
            with screen.stage("step", recipe.steps, every=max(1, recipe.steps // 10)) as advance:
                numbers, tokens = small_model.make(
                    written, recipe, directory.path, lambda step, loss: advance(step, f"training loss {loss:.3f}")
                )
            directory.place()
            directory.keep()
    except KeyboardInterrupt:
        screen.warn("interrupted: nothing is left of this model")
        return INTERRUPTED
    screen.say(f"{len(written)} texts of {tokens} tokens; a model of {numbers} numbers: --set model.path={out}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def noise(directory: Path) -> None:
    """Measure every way to start clients after a run, print what came out and leave it in the run's directory."""
    from fed import execute, initialisation
    from fed.console import Screen
    from fed.publish import publish_initialisation
    from fed.report import read

    screen, run = Screen(), read(directory)
    with execute.limits(run.config.threads), screen.wait("starting every client in every way"):
        found = initialisation.measure(directory, screen.warn)
    screen.table(initialisation.table(found))
    written = publish_initialisation(run, found, directory)
    screen.say(f"\n{directory}:\n{', '.join(path.name for path in written)}")


def _interrupted(out: Path, screen: Screen) -> int:
    screen.warn(f"interrupted: the rounds so far are in {out}; python -m fed resume {out} continues")
    return INTERRUPTED


def _reported(out: Path, screen: Screen, began: float) -> int:
    """Write the report of a run that went to its end, and say what there is."""
    from fed.publish import publish_run
    from fed.report import read

    written = ", ".join(path.name for path in publish_run(out))
    screen.summarise(read(out))
    screen.say(f"\n{out}:\nconfig.toml, rounds.jsonl, base/, adapter/, {written}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _base(config: RunConfig, data: FederatedData, directory: RunDirectory, screen: Screen) -> nn.Module:
    """Load or train the base model; it and the configuration are saved in the run's directory."""
    from fed import execute
    from fed.evaluate import evaluate
    from fed.rundir import BASE, CONFIG

    steps = 0 if data.pretrain is None else config.model.pretrain_steps
    with screen.stage("base: central step", steps, every=max(1, steps // 5)) as advance:
        model = execute.make_base(
            config, data, directory.path / BASE, lambda step, loss: advance(step, f"training loss {loss:.3f}")
        )
    if data.undisturbed is not None:
        accuracy = evaluate(model, data.undisturbed)["accuracy"]
        screen.say(f"base: {100 * accuracy:.1f} % of {len(data.undisturbed)} undisturbed test images right")
    configuration.write(config, directory.path / CONFIG)
    return model


def _play(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    directory: Path,
    screen: Screen,
    on_row: Callable[[], object],
    resume: bool = False,
) -> None:
    """Run the rounds, all or those that are left; `on_row` is called with every row, before it is shown."""
    from fed import execute
    from fed.console import round_note

    rows = [len(split) for split in data.clients]
    screen.say(f"clients: {len(rows)} with {min(rows)} to {max(rows)} rows each; test: {len(data.test)} rows")
    with screen.stage("round", config.rounds) as advance:

        def on_round(row: dict[str, Any]) -> None:
            on_row()
            advance(row["round"], round_note(row))

        execute.play(config, data, model, directory, on_round, screen.warn, resume=resume)


def _centralise(config: RunConfig, data: FederatedData, model: nn.Module, out: Path, screen: Screen) -> None:
    """Train rank-R LoRA on all clients' rows together, for as many steps as one client, and as all, took."""
    from fed.models import head_names
    from fed.report import read_rows, write_centralised
    from fed.simulate import centralised

    taken = [row["steps"] for row in read_rows(out)[1:]]
    of_one, of_all = sum(round(fmean(steps)) for steps in taken), sum(map(sum, taken))
    reached = []
    for steps in sorted({of_one, of_all}):
        with screen.wait(f"centralised: {steps} steps"):
            reached.append(centralised(config, data, model, head_names(model), steps))
    write_centralised(out, reached)


def compare(plan: Plan, out: Path, jobs: int) -> int:
    """Play what is not finished yet, then write and show the comparison; return the exit status."""
    from fed.board import Board
    from fed.compare import Workbench, check, finished, in_turn, open_grid
    from fed.comparison import collect
    from fed.console import Screen
    from fed.publish import publish_comparison
    from fed.workers import at_once

    began, screen, bench = time.perf_counter(), Screen(), Workbench(out)
    check(plan.cells, bench, screen.warn, screen.stage)
    open_grid(plan, out)
    left = [cell for cell in plan.cells if not finished(cell, out)]
    already = len(plan.cells) - len(left)
    if already:
        screen.say(f"{already} of {len(plan.cells)} runs are finished already")
    board = Board(left, already)
    try:
        with board:
            in_turn(left, bench, board.tell) if jobs == 1 else at_once(left, jobs, out, board.tell)
    except KeyboardInterrupt:
        done = sum(finished(cell, out) for cell in plan.cells)
        screen.warn(
            f"interrupted: {done} of {len(plan.cells)} runs are finished and kept in {out}; "
            f"python -m fed resume {out} continues"
        )
        return INTERRUPTED
    comparison = collect(out)
    screen.show(comparison)
    written = publish_comparison(comparison, out)
    screen.say(f"\n{out}:\n{', '.join(path.name for path in written)}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    if board.failures:
        raise FedError(f"{len(board.failures)} of {len(plan.cells)} runs could not be played: {board.failures[0]}")
    return 0
