"""The commands behind the command line: run, resume and compare, which return the exit status, report and noise.

Each imports `fed.report.write` itself, once there is something to write: it loads matplotlib, whose 30 MB would
otherwise count in the peak memory of the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

from torch import nn

from fed import config as configuration
from fed.config import RunConfig
from fed.console import ComparisonProgress, Screen, round_note
from fed.data import federated_data as datasets
from fed.data.federated_data import FederatedData
from fed.errors import INTERRUPTED, FedError
from fed.experiments import initialisation_noise, trackers
from fed.experiments import run as running
from fed.experiments.parallel import at_once
from fed.experiments.plan import PLAN, Plan
from fed.experiments.runner import SharedInputs, check, finished, in_turn, open_grid
from fed.models import base_model
from fed.report import tables
from fed.report.comparison import collect
from fed.simulation.evaluation import evaluate
from fed.simulation.run_directory import BASE, CENTRALISED, CONFIG, RunDirectory, read, read_rows, write_centralised
from fed.types import Row


def run(config: RunConfig, out: Path, overwrite: bool, centralised: bool) -> int:
    """Play a whole run: base model, rounds, centralised LoRA if asked for, and report; return the exit status."""
    trackers.require(config.tracker)
    began, screen, directory = time.perf_counter(), Screen(), RunDirectory(out, overwrite)
    try:
        data = datasets.load(config, screen.warn, screen.stage)
        with running.limits(config.threads), directory:
            model = _base(config, data, directory, screen)
            directory.publish()
            _play(config, data, model, directory.path, screen, directory.commit)
            if centralised:
                _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        if directory.kept:
            return _interrupted(out, screen)
        screen.warn("interrupted: nothing is left of this run")
        return INTERRUPTED
    return _reported(out, screen, began)


def resume(out: Path, centralised: bool) -> int:
    """Continue a run from its last checkpoint, train centralised LoRA if missing, report; return the exit status."""
    began, screen, run = time.perf_counter(), Screen(), read(out)
    config = run.config
    trackers.require(config.tracker)
    wanted = centralised and not (out / CENTRALISED).is_file()
    missing = not running.ended(out, config)
    try:
        with running.limits(config.threads):
            if missing or wanted:
                data = datasets.load(config, screen.warn, screen.stage)
                model = base_model.reopen(out / BASE, data.label_names)
            else:
                screen.say(f"{out}: all {config.rounds} rounds are there already")
            if missing:
                _play(config, data, model, out, screen, lambda: None, resume=True)
            if wanted:
                _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        return _interrupted(out, screen)
    return _reported(out, screen, began)


def report(directory: Path, as_markdown: bool) -> None:
    """Print the result of a run or a comparison; unless `as_markdown`, write its pages again as well."""
    from fed.report import write

    screen = Screen()
    if (directory / PLAN).is_file():
        comparison = collect(directory)
        if as_markdown:
            screen.say(tables.as_markdown(comparison).rstrip())
            return
        screen.show(comparison)
        written = write.publish_comparison(comparison, directory)
    else:
        run = read(directory)
        if as_markdown:
            screen.say(tables.markdown_table(tables.summary(run)))
            return
        screen.summarise(run)
        written = write.publish_run(directory)
    screen.say(f"\nreport  {written[-1]}")


def noise(directory: Path) -> None:
    """Measure the initialisation noise of ways to start clients after a run; print it and write it to files."""
    screen, run = Screen(), read(directory)
    with running.limits(run.config.threads), screen.wait("starting every client in every way"):
        found = initialisation_noise.measure(directory, screen.warn)
    screen.table(initialisation_noise.table(found))
    from fed.report import write

    written = write.publish_initialisation(run, found, directory)
    screen.say(f"\n{directory}:\n{', '.join(path.name for path in written)}")


def _interrupted(out: Path, screen: Screen) -> int:
    screen.warn(f"interrupted: the rounds so far are in {out}; python -m fed resume {out} continues")
    return INTERRUPTED


def _reported(out: Path, screen: Screen, began: float) -> int:
    """Write the report of a finished run, print its summary and files, and return the exit status."""
    from fed.report import write

    written = ", ".join(path.name for path in write.publish_run(out))
    screen.summarise(read(out))
    screen.say(f"\n{out}:\nconfig.toml, rounds.jsonl, base/, adapter/, {written}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _base(config: RunConfig, data: FederatedData, directory: RunDirectory, screen: Screen) -> nn.Module:
    """Make the base model, and save it and the configuration in the run's directory."""
    steps = 0 if data.pretrain is None else config.model.pretrain_steps
    with screen.stage("base: central step", steps, every=max(1, steps // 5)) as advance:
        model = running.make_base(
            config,
            data,
            directory.path / BASE,
            lambda step, loss: advance(step, f"training loss {loss:.3f}"),
            screen.warn,
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
    """Play all rounds, or with `resume` the remaining ones; `on_row` is called, without arguments, for each new row."""
    rows = [len(split) for split in data.clients]
    screen.say(f"clients: {len(rows)} with {min(rows)} to {max(rows)} rows each; test: {len(data.test)} rows")
    with screen.stage("round", config.rounds) as advance:

        def on_round(row: Row) -> None:
            on_row()
            advance(row["round"], round_note(row))

        running.play(config, data, model, directory, on_round, screen.warn, resume=resume)


def _centralise(config: RunConfig, data: FederatedData, model: nn.Module, out: Path, screen: Screen) -> None:
    """Train LoRA of rank R on all clients' rows together, for the local steps of one client, and of all, in the run."""
    taken = [row["steps"] for row in read_rows(out)[1:]]
    of_one, of_all = sum(round(fmean(steps)) for steps in taken), sum(map(sum, taken))
    reached = []
    for steps in sorted({of_one, of_all}):
        with screen.wait(f"centralised: {steps} steps"):
            reached.append(running.centralised(config, data, model, base_model.head_names(model), steps))
    write_centralised(out, reached)


def compare(plan: Plan, out: Path, jobs: int) -> int:
    """Play the runs that are not finished, then print and write the comparison; return the exit status.

    Raises FedError at the end if any run failed.
    """
    began, screen, bench = time.perf_counter(), Screen(), SharedInputs(out)
    told = check(plan.cells, bench, screen.warn, screen.stage)
    open_grid(plan, out)
    left = [cell for cell in plan.cells if not finished(cell, out)]
    already = len(plan.cells) - len(left)
    if already:
        screen.say(f"{already} of {len(plan.cells)} runs are finished already")
    board = ComparisonProgress(screen, left, already, told)
    try:
        with board:
            in_turn(left, bench, board.on_event) if jobs == 1 else at_once(left, jobs, out, board.on_event)
    except KeyboardInterrupt:
        done = sum(finished(cell, out) for cell in plan.cells)
        screen.warn(
            f"interrupted: {done} of {len(plan.cells)} runs are finished and kept in {out}; "
            f"python -m fed resume {out} continues"
        )
        return INTERRUPTED
    comparison = collect(out)
    screen.show(comparison)
    from fed.report import write

    written = write.publish_comparison(comparison, out)
    screen.say(f"\n{out}:\n{', '.join(path.name for path in written)}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    if board.failures:
        raise FedError(f"{len(board.failures)} of {len(plan.cells)} runs could not be played: {board.failures[0]}")
    return 0
