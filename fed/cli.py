"""The command line: `python -m fed run`, `compare`, `resume` and `report`."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import fed.config as configuration
from fed.errors import FedError

if TYPE_CHECKING:
    from torch import nn

    from fed.config import RunConfig
    from fed.console import Screen
    from fed.data import FederatedData
    from fed.grid import Plan
    from fed.rundir import RunDirectory

# typer keeps the parent of its errors about arguments to itself.
_UsageError: Any = typer.BadParameter.__base__
_BAD_INPUT, _INTERRUPTED = 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning over clients that afford different LoRA ranks.",
)

Source = Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A preset (digits) or a TOML file.")]
More = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More settings, as after --set.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. train.learning_rate=1e-3; repeatable."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Send rows to tensorboard, wandb or mlflow as well; repeatable."),
]
Jobs = Annotated[int, typer.Option(min=1, help="How many runs at once, each in a process of its own.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: bad input is one line on standard error and exit status 2."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except FedError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(f"{error.format_message().rstrip('.')}; see python -m fed --help")
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    sys.exit(status)


@app.command()
def run(
    source: Source,
    more: More = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.  [default: runs/NAME]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    centralised: Annotated[bool, typer.Option(help="Compare with rank-R LoRA on all clients' data together.")] = True,
    track: Track = None,
) -> int:
    """Run federated fine-tuning and leave its configuration, rounds, base, adapter and report in a directory."""
    config = configuration.load(source, _settings(settings, more, track))
    return _run(config, out or Path("runs", Path(source).stem), overwrite, centralised)


@app.command()
def compare(
    source: Source,
    more: More = None,
    methods: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Methods; name@r puts every client at rank r.  [default: the file's]"),
    ] = "",
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Seeds, as numbers or a range such as 0-4.  [default: the file's]")
    ] = "",
    vary: Annotated[
        str, typer.Option(metavar="KEY=VALUE,…", help="Compare a key's values, e.g. adapter.selection=random,first.")
    ] = "",
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="What differences are taken from.  [default: the first]")
    ] = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The directory.  [default: runs/compare-NAME]")] = None,
    jobs: Jobs = 1,
    track: Track = None,
) -> int:
    """Run methods, or values of a setting, with the same seeds and compare them; the same command continues it.

    Methods that need equal ranks run with every client at adapter.rank unless name@r says otherwise; the scale
    stays as it is.
    """
    from fed import grid

    names = [name.strip() for name in methods.split(",") if name.strip()]
    asked = grid.request(
        source,
        _settings(settings, more, track),
        names,
        grid.parse_seeds(seeds) if seeds else (),
        vary=vary,
        reference=reference,
    )
    return _compare(grid.plan(asked), out or Path("runs", f"compare-{Path(source).stem}"), jobs)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A comparison's directory.")], jobs: Jobs = 1
) -> int:
    """Go on with a comparison that was stopped: what is finished stays, the rest is played."""
    from fed import grid

    return _compare(grid.plan(grid.read(directory)), directory, jobs)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's or a comparison's directory.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as Markdown alone.")] = False,
) -> None:
    """Print the result of a run or a comparison and write its pictures and report.html anew."""
    from fed import publish, wording
    from fed.comparison import collect
    from fed.console import Screen
    from fed.grid import PLAN
    from fed.report import markdown, read

    screen = Screen()
    if (directory / PLAN).is_file():
        comparison = collect(directory)
        if as_markdown:
            screen.say(wording.as_markdown(comparison).rstrip())
            return
        screen.show(comparison)
        written = publish.publish_comparison(comparison, directory)
    else:
        if as_markdown:
            screen.say(markdown(read(directory)).rstrip())
            return
        screen.summarise(read(directory))
        written = publish.publish_run(directory)
    screen.say(f"\nreport  {written[-1]}")


def _settings(settings: Sequence[str] | None, more: Sequence[str] | None, track: Sequence[str] | None) -> list[str]:
    trackers = [f"tracker={list(track)!r}"] if track else []
    return [*(settings or ()), *(more or ()), *trackers]


def _run(config: RunConfig, out: Path, overwrite: bool, centralised: bool) -> int:
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
            _federate(config, data, model, directory, screen)
            if centralised:
                _centralise(config, data, model, out, screen)
    except KeyboardInterrupt:
        kept = f"the rounds so far are in {out}; show them with python -m fed report {out}"
        screen.warn(f"interrupted: {kept if directory.kept else 'nothing is left of this run'}")
        return _INTERRUPTED
    return _reported(out, screen, began)


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


def _federate(
    config: RunConfig, data: FederatedData, model: nn.Module, directory: RunDirectory, screen: Screen
) -> None:
    """Run the rounds; from the first row on, the run's directory stays."""
    from fed import execute
    from fed.console import round_note

    rows = [len(split) for split in data.clients]
    screen.say(f"clients: {len(rows)} with {min(rows)} to {max(rows)} rows each; test: {len(data.test)} rows")
    with screen.stage("round", config.rounds) as advance:

        def on_round(row: dict[str, Any]) -> None:
            directory.keep()
            advance(row["round"], round_note(row))

        execute.play(config, data, model, directory.path, on_round, screen.warn)


def _centralise(config: RunConfig, data: FederatedData, model: nn.Module, out: Path, screen: Screen) -> None:
    """Train rank-R LoRA on all clients' rows together, for as many steps as one client, and as all, took."""
    from fed.models import head_names
    from fed.report import write_centralised
    from fed.simulate import centralised

    of_one = config.rounds * config.train.local_steps
    reached = []
    for steps in sorted({of_one, of_one * config.clients.per_round}):
        with screen.wait(f"centralised: {steps} steps"):
            reached.append(centralised(config, data, model, head_names(model), steps))
    write_centralised(out, reached)


def _compare(plan: Plan, out: Path, jobs: int) -> int:
    """Play what is not finished yet, then write and show the comparison; return the exit status."""
    from fed.board import Board
    from fed.compare import Workbench, check, finished, in_turn, open_grid
    from fed.comparison import collect
    from fed.console import Screen
    from fed.publish import publish_comparison
    from fed.workers import at_once

    began, screen, bench = time.perf_counter(), Screen(), Workbench(out)
    check(plan.cells, bench)
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
        return _INTERRUPTED
    comparison = collect(out)
    screen.show(comparison)
    written = publish_comparison(comparison, out)
    screen.say(f"\n{out}:\n{', '.join(path.name for path in written)}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    if board.failures:
        raise FedError(f"{len(board.failures)} of {len(plan.cells)} runs could not be played: {board.failures[0]}")
    return 0


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_BAD_INPUT)
