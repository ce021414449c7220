"""The command line: `python -m fed run`, `compare`, `resume`, `report` and `noise`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from fed import config as configuration
from fed import interruption
from fed.errors import BAD_INPUT, INTERRUPTED, FedError, machine_fault
from fed.openmp import wait_passively_if_busy

# The base class of typer's errors about arguments, which typer does not export.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning over clients that afford different LoRA ranks.",
)

Source = Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A preset such as digits, or a TOML file.")]
More = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More settings, as after --set.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. train.learning_rate=1e-3; repeatable."),
]
Track = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Send rows to tensorboard, wandb or mlflow as well; repeatable."),
]
Centralised = Annotated[bool, typer.Option(help="Compare with rank-R LoRA on all clients' data together.")]
Jobs = Annotated[int, typer.Option(min=1, help="How many runs at once, each in a process of its own.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; see `run_app`. It is called before torch is imported (see `fed.openmp`)."""
    wait_passively_if_busy()
    interruption.listen()
    run_app(app, "python -m fed", arguments)


def run_app(app: typer.Typer, name: str, arguments: list[str] | None = None) -> None:
    """Run a typer application, called `name`, and exit; bad input gives one line on standard error and status 2."""
    try:
        status = app(args=arguments, standalone_mode=False)
    except FedError as error:
        _fail(str(error))
    except _UsageError as error:
        _fail(f"{error.format_message().rstrip('.')}; see {name} --help")
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(error.__cause__, EOFError):  # which typer takes for the end of what a user types
            raise
        _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if interruption.came():  # a library may make an error of its own of Ctrl-C
            _fail("interrupted", INTERRUPTED)
        if (fault := machine_fault(error)) is None:
            raise
        _fail(fault)
    sys.exit(status)


@app.command()
def run(
    source: Source,
    more: More = None,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.", show_default="runs/NAME")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    centralised: Centralised = True,
    track: Track = None,
) -> int:
    """Run federated fine-tuning and save its configuration, rounds, base, adapter and report in a directory."""
    from fed import commands

    config = configuration.load(source, _settings(settings, more, track))
    return commands.run(config, out or Path("runs", Path(source).stem), overwrite, centralised)


@app.command()
def compare(
    source: Source,
    more: More = None,
    methods: Annotated[
        str,
        typer.Option(metavar="NAME,…", help="Methods; name@r puts every client at rank r.", show_default="the file's"),
    ] = "",
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Seeds, as numbers or a range such as 0-4.", show_default="the file's")
    ] = "",
    vary: Annotated[
        str, typer.Option(metavar="KEY=VALUE,…", help="Compare a key's values, e.g. adapter.selection=random,first.")
    ] = "",
    reference: Annotated[
        str, typer.Option(metavar="NAME", help="What differences are taken from.", show_default="the first")
    ] = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The directory.", show_default="runs/compare-NAME")] = None,
    jobs: Jobs = 1,
    track: Track = None,
) -> int:
    """Run methods, or values of a setting, with the same seeds and compare them.

    The same command continues an interrupted comparison. A method that needs equal ranks runs with every client at
    adapter.rank, or at rank r if named name@r; the scale stays the same.
    """
    from fed import commands
    from fed.experiments import plan as plans

    names = [name.strip() for name in methods.split(",") if name.strip()]
    numbers = plans.parse_seeds(seeds) if seeds else ()
    asked = plans.request(source, _settings(settings, more, track), names, numbers, vary, reference)
    return commands.compare(plans.plan(asked), out or Path("runs", f"compare-{Path(source).stem}"), jobs)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's or a comparison's directory.")],
    jobs: Jobs = 1,
    centralised: Centralised = True,
) -> int:
    """Continue an interrupted run or comparison; its files will be the same as without the interruption."""
    from fed import commands
    from fed.experiments import plan as plans

    if (directory / plans.PLAN).is_file():
        return commands.compare(plans.plan(plans.read(directory)), directory, jobs)
    return commands.resume(directory, centralised)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's or a comparison's directory.")],
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the result as Markdown alone.")] = False,
) -> None:
    """Print the result of a run or a comparison, and write its pictures and report.html again."""
    from fed import commands

    commands.report(directory, as_markdown)


@app.command()
def noise(directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a Fed-PLoRA run.")]) -> None:
    """Measure how far clients would start from the server after a run, for several ways to start them.

    Each way is measured in fp32 and bf16. The results are printed, and written to initialisation.json and
    initialisation.md in the run's directory.
    """
    from fed import commands

    commands.noise(directory)


def _settings(settings: Sequence[str] | None, more: Sequence[str] | None, track: Sequence[str] | None) -> list[str]:
    trackers = [f"tracker={list(track)!r}"] if track else []
    return [*(settings or ()), *(more or ()), *trackers]


def _fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
