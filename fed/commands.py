"""The commands behind the command line; run, resume, compare and attacks return the exit status.

Each imports `fed.report.write` itself, once there is something to write: it loads matplotlib, whose 30 MB would
otherwise count in the peak memory of the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from torch import nn

from fed import config as configuration
from fed import interruption
from fed.config import RunConfig
from fed.config.engine import EngineConfig
from fed.console import ComparisonProgress, Screen, round_note
from fed.data import federated_data as datasets
from fed.data.federated_data import FederatedData
from fed.errors import INTERRUPTED, FedError, StoppedError
from fed.experiments import initialisation_noise, trackers
from fed.experiments import run as running
from fed.experiments.attack_grid import Grid, outcomes
from fed.experiments.costs import estimate as cost_estimate
from fed.experiments.costs import tables as cost_tables
from fed.experiments.costs.timing import Speeds
from fed.experiments.costs.workload import workload
from fed.experiments.parallel import at_once
from fed.experiments.plan import PLAN, Plan
from fed.experiments.runner import SharedInputs, check, finished, in_turn, open_grid
from fed.files import make_folder
from fed.locks import held
from fed.models.head import head_names
from fed.report import tables
from fed.report.comparison import collect
from fed.simulation.checkpoint import last_round
from fed.simulation.evaluation import evaluate
from fed.simulation.finished import CENTRALISED, input_digests_of, mark_centralised, why_not_finished
from fed.simulation.inputs import BASE as BASE_MODEL
from fed.simulation.inputs import check_same, input_digests, model_digest
from fed.simulation.rounds import Executor
from fed.simulation.rows import ROUNDS
from fed.simulation.run_directory import (
    BASE,
    CONFIG,
    RunDirectory,
    read,
    read_centralised,
    read_config,
    read_rows,
    recover,
    write_centralised,
)
from fed.types import Row

# What makes the executor of a run's clients, given what returns the run's directory, and what takes messages.
MakeExecutor = Callable[[Callable[[], Path], Callable[[str], object]], Executor]


def run(
    config: RunConfig, out: Path, overwrite: bool, centralised: bool, make_executor: MakeExecutor | None = None
) -> int:
    """Play a whole run: base model, rounds, centralised LoRA if asked for, and report; return the exit status.

    With `make_executor` the clients train elsewhere; without one, raises FedError if the configuration says so.
    """
    if make_executor is None:
        running.require_local(config)
    trackers.require(config.tracker)
    began, screen = time.perf_counter(), Screen()
    directory = RunDirectory(out, overwrite, screen.warn)
    try:
        with directory, running.limits(config.threads, config.model.matmul_precision):
            data = datasets.load(config, screen.warn, screen.stage)
            with interruption.deferred():
                model = _base(config, data, directory, screen)

                def publish(ready: RunConfig) -> None:
                    configuration.write(ready, directory.path / CONFIG)
                    (directory.path / ROUNDS).touch()  # by this and the other file --overwrite knows a run
                    directory.publish()

                executor = make_executor and make_executor(lambda: directory.path, screen.warn)
                _play(config, data, model, out, screen, directory.commit, on_ready=publish, executor=executor)
                if centralised:
                    _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        if directory.kept:
            return _interrupted(out, config, screen)
        screen.warn("interrupted: nothing is left of this run")
        return INTERRUPTED
    except FedError as error:
        if not directory.kept or isinstance(error, StoppedError):
            raise
        raise FedError(f"{error}; {_kept(out, config)}") from error
    return _reported(out, screen, began)


def resume(out: Path, centralised: bool, make_executor: MakeExecutor | None = None) -> int:
    """Continue a run from its last checkpoint, train centralised LoRA if missing, report; return the exit status."""
    began, screen = time.perf_counter(), Screen()
    recover(out, screen.warn)
    config = read_config(out)
    trackers.require(config.tracker)
    try:
        with held(out), running.limits(config.threads, config.model.matmul_precision):
            why = why_not_finished(out, config)
            wanted = centralised and not (out / CENTRALISED).is_file()
            if why is not None and last_round(out) is None:
                raise FedError(f"{str(out)!r} holds no checkpoint to go on from, and {why}; start the run anew")
            if why is None:
                screen.say(f"{out}: all {config.rounds} rounds are there already")
            if why is None and not wanted:
                _check_base(out, config)
            else:
                data = datasets.load(_with_own_tokenizer(config, out), screen.warn, screen.stage)
                with interruption.deferred():
                    model = running.reopen_base(out, config, data.label_names)
                    if why is not None:
                        executor = make_executor and make_executor(lambda: out, screen.warn)
                        _play(config, data, model, out, screen, lambda: None, resume=True, executor=executor)
                        wanted = centralised and not _keep_centralised(out)
                    else:
                        check_same(input_digests_of(out), input_digests(data, model), f"the run in {str(out)!r}")
                    if wanted:
                        _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        return _interrupted(out, config, screen)
    return _reported(out, screen, began)


def engine_of(out: Path, settings: Sequence[str] = ()) -> EngineConfig:
    """Return where the clients of a run train, as its directory says and `settings`, `engine.key=value`, change it."""
    recover(out)
    table = read_config(out).model_dump(exclude_none=True)
    configuration.apply(table, settings)
    return configuration.parse(table, where=str(out / CONFIG)).engine


def _keep_centralised(out: Path) -> bool:
    """Return whether there is centralised LoRA for the steps of a run's rounds; if it is for others, it is deleted."""
    if [row["steps"] for row in read_centralised(out)] == _centralised_steps(out):
        mark_centralised(out)
        return True
    (out / CENTRALISED).unlink(missing_ok=True)
    return False


def _centralised_steps(out: Path) -> list[int]:
    """Return the local steps of one client, and of all, in a run."""
    taken = [row["steps"] for row in read_rows(out)[1:]]
    return sorted({sum(round(fmean(steps)) for steps in taken), sum(map(sum, taken))})


def _check_base(out: Path, config: RunConfig) -> None:
    """Raise FedError unless a finished run's base model is still the one that its adapter belongs to."""
    before = {name: value for name, value in input_digests_of(out).items() if name == BASE_MODEL}
    check_same(before, {BASE_MODEL: model_digest(running.reopen_base(out, config))}, f"the run in {str(out)!r}")


def _with_own_tokenizer(config: RunConfig, out: Path) -> RunConfig:
    """Return the configuration with the base model saved in the run as the checkpoint that text is read with."""
    if config.model.path is None:
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"path": str(out / BASE)})})


def report(directory: Path, as_markdown: bool) -> None:
    """Print the result of a run or a comparison; unless `as_markdown`, write its pages again as well."""
    from fed.report import write

    screen = Screen()
    recover(directory, screen.warn)
    if (directory / PLAN).is_file():
        comparison = collect(directory, screen.warn)
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
    screen = Screen()
    recover(directory, screen.warn)
    run = read(directory)
    limits = running.limits(run.config.threads, run.config.model.matmul_precision)
    with limits, screen.wait("starting every client in every way"):
        found = initialisation_noise.measure(directory, screen.warn)
    screen.table(initialisation_noise.table(found))
    from fed.report import write

    written = write.publish_initialisation(run, found, directory)
    screen.say(f"\n{directory}:\n{', '.join(path.name for path in written)}")


def estimate(
    config: RunConfig,
    rows: Mapping[str, int | None],
    machines: Sequence[int],
    clients: Sequence[int],
    measured: tuple[float | None, float | None, float | None],
) -> None:
    """Print what a run costs. `rows` are arguments of `fed.experiments.costs.workload.workload`.

    `measured` are clients trained in a second on one machine, the server's seconds a round, and its network in Mbit/s.
    """
    screen, (per_second, server_seconds, mbit) = Screen(), measured
    with running.limits(config.threads):
        found = cost_estimate.costs(config, workload(config, **rows), clients)
    speeds = None
    if per_second is not None:
        speeds = Speeds(per_second, server_seconds or 0.0, (mbit or 0.0) * 1e6 / 8)
        if server_seconds is None:
            speeds = replace(speeds, server_seconds=found.server_seconds(speeds))
    for table in (
        cost_tables.model_table,
        cost_tables.client_table,
        cost_tables.server_table,
        cost_tables.clients_table,
    ):
        screen.table(table(found))
    if speeds is not None:
        screen.table(cost_tables.time_table(found, speeds, machines))
    for line in cost_tables.notes(found, speeds):
        screen.say(f"\n{line}")


def _interrupted(out: Path, config: RunConfig, screen: Screen) -> int:
    screen.warn(f"interrupted: {_kept(out, config)}")
    return INTERRUPTED


def _kept(out: Path, config: RunConfig) -> str:
    """Return what there is of a run that ended early, and whether it can go on."""
    if last_round(out) is None and why_not_finished(out, config) is not None:
        return f"the rows so far are in {out}, but no checkpoint to go on from (checkpoint_every is 0)"
    return f"the rounds so far are in {out}; python -m fed resume {out} continues"


def _reported(out: Path, screen: Screen, began: float) -> int:
    """Write the report of a finished run, print its summary and files, and return the exit status."""
    try:
        from fed.report import write

        written = ", ".join(path.name for path in write.publish_run(out))
    except KeyboardInterrupt:
        screen.warn(f"interrupted: the run in {out} is over; python -m fed report {out} writes its report")
        return INTERRUPTED
    screen.summarise(read(out))
    screen.say(f"\n{out}:\nconfig.toml, rounds.jsonl, base/, adapter/, {written}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _base(config: RunConfig, data: FederatedData, directory: RunDirectory, screen: Screen) -> nn.Module:
    """Make the base model, and save it in the run's directory."""
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
    return model


def _play(
    config: RunConfig,
    data: FederatedData,
    model: nn.Module,
    directory: Path,
    screen: Screen,
    on_row: Callable[[], object],
    resume: bool = False,
    on_ready: Callable[[RunConfig], object] | None = None,
    executor: Executor | None = None,
) -> None:
    """Play all rounds, or with `resume` the remaining ones; `on_row` is called, without arguments, for each new row."""
    rows = [len(split) for split in data.clients]
    screen.say(f"clients: {len(rows)} with {min(rows)} to {max(rows)} rows each; test: {len(data.test)} rows")
    with screen.stage("round", config.rounds) as advance:

        def on_round(row: Row) -> None:
            on_row()
            advance(row["round"], round_note(row))

        progress = screen.inner_progress(advance)
        running.play(config, data, model, directory, on_round, screen.warn, resume, on_ready, progress, executor)


def _centralise(config: RunConfig, data: FederatedData, model: nn.Module, out: Path, screen: Screen) -> None:
    """Train LoRA of rank R on all clients' rows together, for the local steps of one client, and of all, in the run."""
    reached = []
    for steps in _centralised_steps(out):
        with screen.wait(f"centralised: {steps} steps"):
            reached.append(running.centralised(config, data, model, head_names(model), steps))
    write_centralised(out, reached)


def compare(plan: Plan, out: Path, jobs: int) -> int:
    """Play the runs that are not finished, then print and write the comparison; return the exit status.

    Raises FedError at the end if any run failed.
    """
    began, screen, bench = time.perf_counter(), Screen(), SharedInputs(out)
    recover(out, screen.warn)
    left = [cell for cell in plan.cells if not finished(cell, out)]
    told = check(left, bench, screen.warn, screen.stage)
    with open_grid(plan, out):
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
    if board.failures and len(board.failures) == len(plan.cells):
        raise FedError(_failed(board.failures, plan))
    comparison = collect(out, screen.warn)
    screen.show(comparison)
    from fed.report import write

    written = write.publish_comparison(comparison, out)
    screen.say(f"\n{out}:\n{', '.join(path.name for path in written)}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    if board.failures:
        raise FedError(_failed(board.failures, plan))
    return 0


def attacks(grid: Grid, out: Path, jobs: int) -> int:
    """Play the runs of a grid of attacks that are not finished, then print and write it; return the exit status.

    Raises FedError if any run failed.
    """
    began, screen, bench = time.perf_counter(), Screen(), SharedInputs(out)
    left = [cell for cell in grid.cells if not finished(cell, out)]
    told = check(left, bench, screen.warn, screen.stage)
    make_folder(out)
    with held(out):
        board = ComparisonProgress(screen, left, len(grid.cells) - len(left), told, quiet=True)
        try:
            with board:
                in_turn(left, bench, board.on_event) if jobs == 1 else at_once(left, jobs, out, board.on_event)
        except KeyboardInterrupt:
            screen.warn(f"interrupted: finished runs are kept in {out}; the same command continues")
            return INTERRUPTED
        if board.failures:
            raise FedError(_failed(board.failures, grid))
        from fed.report import attacks as report_of

        found = outcomes(grid, out)
        screen.table(report_of.accuracy_table(grid, found))
        screen.table(report_of.rejected_table(found))
        written = report_of.publish(grid, found, out)
    screen.say(f"\n{out}:\n{', '.join(path.name for path in written)}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _failed(failures: Sequence[str], plan: Plan | Grid) -> str:
    return f"{len(failures)} of {len(plan.cells)} runs could not be played: {failures[0]}"
