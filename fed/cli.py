"""The command line: `python -m fed run`, `compare`, `resume`, `report`, `attacks`, `noise` and `estimate`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from fed import config as configuration
from fed import interruption
from fed.errors import BAD_INPUT, INTERRUPTED, UNREAD, FedError, UnreadError, machine_fault, printable
from fed.openmp import wait_passively_if_busy

# The base class of typer's errors about arguments, which typer does not export.
_UsageError: Any = typer.BadParameter.__base__


class _Interrupted(Exception):  # noqa: N818 -- it is none
    """Ctrl-C, as something that typer lets pass: of KeyboardInterrupt it makes an exit status without a word."""


class _Commands(TyperGroup):
    """The commands, of which each ends quietly if nobody reads its output any more."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command and return its exit status."""
        try:
            return super().invoke(ctx)
        except UnreadError:
            return UNREAD
        except KeyboardInterrupt as error:
            raise _Interrupted from error


app = typer.Typer(
    cls=_Commands,
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
Flower = Annotated[
    str,
    typer.Option(
        metavar="ADDRESS", help="Train on machines behind Flower's SuperLink at HOST:PORT; http://… without TLS."
    ),
]
Centralised = Annotated[bool, typer.Option(help="Compare with rank-R LoRA on all clients' data together.")]
CopyBase = Annotated[bool, typer.Option("--copy-base", help="Copy the checkpoint, as model.copy_base = true.")]
Jobs = Annotated[int, typer.Option(min=1, max=1024, help="How many runs at once, each in a process of its own.")]


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
    except (KeyboardInterrupt, _Interrupted, typer.Abort) as error:
        cause = error.__cause__ or error
        if isinstance(cause, EOFError):  # which typer takes for the end of what a user types
            raise
        if isinstance(cause, UnreadError):
            sys.exit(UNREAD)
        _fail("interrupted", INTERRUPTED)
    except SystemExit as end:  # of typer's help, whose reader may have closed the pipe
        status = UNREAD if isinstance(end.__context__, BrokenPipeError) else end.code
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
    copy_base: CopyBase = False,
    flower: Flower = "",
) -> int:
    """Run federated fine-tuning and save its configuration, rounds, base, adapter and report in a directory.

    With --flower, or engine.name = "flower", the clients train on the machines that Flower connects.
    """
    config = configuration.load(source, [*_settings(settings, more, track, copy_base), *_engine(flower)])
    directory = _directory(out, source)
    if config.engine.name == "flower":
        return _flower().run(config, directory, overwrite, centralised)
    from fed import commands

    return commands.run(config, directory, overwrite, centralised)


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
    copy_base: CopyBase = False,
) -> int:
    """Run methods, or values of a setting, with the same seeds and compare them.

    The same command continues an interrupted comparison. A method that needs equal ranks runs with every client at
    adapter.rank, or at rank r if named name@r; the scale stays the same.
    """
    from fed import commands
    from fed.experiments import plan as plans

    names = [name.strip() for name in methods.split(",") if name.strip()]
    numbers = plans.parse_seeds(seeds) if seeds else ()
    asked = plans.request(source, _settings(settings, more, track, copy_base), names, numbers, vary, reference)
    return commands.compare(plans.plan(asked), _directory(out, source, "compare-"), jobs)


@app.command()
def resume(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's or a comparison's directory.")],
    jobs: Jobs = 1,
    centralised: Centralised = True,
    flower: Flower = "",
) -> int:
    """Continue an interrupted run or comparison; its files will be the same as without the interruption.

    A run that began over Flower goes on over Flower, unless --flower local is given.
    """
    from fed import commands
    from fed.experiments import plan as plans

    if (directory / plans.PLAN).is_file():
        return commands.compare(plans.plan(plans.read(directory)), directory, jobs)
    if flower != "local" and (engine := commands.engine_of(directory, _engine(flower))).name == "flower":
        return _flower().resume(engine, directory, centralised)
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
def attacks(
    source: Source,
    more: More = None,
    seeds: Annotated[
        str, typer.Option(metavar="0,1,2", help="Seeds, as numbers or a range such as 0-4.", show_default="the file's")
    ] = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The directory.", show_default="runs/attacks-NAME")] = None,
    jobs: Jobs = 1,
) -> int:
    """Play every simulated attack against every defence, with the same seeds, and show what each costs.

    attack.share and attack.factor say who attacks and how hard, server.max_update_norm to what updates are clipped; the
    rules of aggregation are told the share. The same command continues after an interruption.
    """
    from fed import commands
    from fed.experiments import attack_grid
    from fed.experiments import plan as plans

    numbers = plans.parse_seeds(seeds) if seeds else ()
    grid = attack_grid.grid(source, _settings(settings, more, None, False), numbers)
    return commands.attacks(grid, _directory(out, source, "attacks-"), jobs)


@app.command()
def noise(directory: Annotated[Path, typer.Argument(metavar="DIR", help="The directory of a Fed-PLoRA run.")]) -> None:
    """Measure how far clients would start from the server after a run, for several ways to start them.

    Each way is measured in fp32 and bf16. The results are printed, and written to initialisation.json and
    initialisation.md in the run's directory.
    """
    from fed import commands

    commands.noise(directory)


@app.command()
def estimate(
    source: Source,
    more: More = None,
    settings: Settings = None,
    machines: Annotated[
        str,
        typer.Option(metavar="1,8,64", help="Numbers of machines; with --clients-per-second.", show_default="1,8,64"),
    ] = "",
    clients: Annotated[str, typer.Option(metavar="100,1000,…", help="Other numbers of clients.")] = "",
    clients_per_second: Annotated[
        float | None, typer.Option(help="How many clients' rounds one machine trains in a second, as measured.")
    ] = None,
    server_seconds: Annotated[
        float | None,
        typer.Option(help="The server's own seconds a round, as measured.", show_default="at a machine's speed"),
    ] = None,
    server_mbit: Annotated[float | None, typer.Option(help="The server's network in Mbit/s.")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, max=1_048_576, help="Tokens of a text.", show_default="data.max_length")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(min=1, max=1_048_576, help="How many of them are the answer.", show_default="data.max_new_tokens"),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, max=1_000_000_000, help="Rows of a client.", show_default="from [data]")
    ] = None,
    test_rows: Annotated[
        int | None, typer.Option(min=0, max=1_000_000_000, help="Rows to test on.", show_default="from [data]")
    ] = None,
    labels: Annotated[
        int | None, typer.Option(min=1, max=1_000_000, help="Labels of the data.", show_default="the checkpoint's")
    ] = None,
) -> None:
    """Say what a run would cost: compute, memory, bytes, time and disk. Nothing is trained, and no weight is read.

    A checkpoint's config.json is enough. With --clients, what changes with their number is shown for others too; with
    --clients-per-second also the time of a round on machines.
    """
    from fed import commands

    config = configuration.load(source, _settings(settings, more, None, False))
    rates = {
        "--clients-per-second": clients_per_second,
        "--server-seconds": server_seconds,
        "--server-mbit": server_mbit,
    }
    for name, value in rates.items():
        if value is not None and not (0 <= value <= 1e12 and (value or name == "--server-seconds")):
            raise FedError(f"{name} is {value:g}: it should be a number above 0")
    if clients_per_second is None and (given := [name for name, value in rates.items() if value is not None]):
        raise FedError(f"--clients-per-second is missing: {given[0]} goes with it")
    if clients_per_second is None and machines:
        raise FedError("--clients-per-second is missing: the time on machines follows from that of one")
    commands.estimate(
        config,
        {"tokens": tokens, "answer": answer_tokens, "client_rows": rows, "test_rows": test_rows, "labels": labels},
        _numbers("--machines", machines or "1,8,64"),
        _numbers("--clients", clients),
        (clients_per_second, server_seconds, server_mbit),
    )


def _numbers(option: str, text: str) -> list[int]:
    """Return the numbers in a list such as 1,8,64; raise FedError for anything else."""
    parts = [part.strip() for part in text.split(",")] if text else []
    if not all(part.isascii() and part.isdecimal() and 1 <= int(part) <= 10**9 for part in parts):
        raise FedError(f"{option} is {text!r}: it should be numbers from 1 to 1000000000, such as 1,8,64")
    return [*dict.fromkeys(map(int, parts))]


def _directory(out: Path | None, source: str, prefix: str = "") -> Path:
    """Return the directory that `--out` names, or one named after the source; raise FedError if none can have it."""
    if out is None and Path(source).stem in ("", ".."):
        raise FedError(f"--out is missing: {source!r} has no name that a directory could have")
    directory = out or Path("runs", f"{prefix}{Path(source).stem}")
    if bad := configuration.bad_character(str(directory)):
        raise FedError(f"--out is {configuration.shown(directory)}: it holds {bad}; it should be UTF-8 text")
    if why := configuration.why_no_path(str(directory)):
        raise FedError(f"--out is {configuration.shown(directory)}: it should be {why}")
    return directory


def _engine(flower: str) -> list[str]:
    """Return the settings that `--flower ADDRESS` stands for."""
    return ["engine.name=flower", f"engine.address={flower}"] if flower else []


def _flower() -> Any:
    """Return the module that hands runs to Flower; raise FedError if that is not installed."""
    if find_spec("flwr") is None:
        raise FedError("engine.name is 'flower', which needs Flower: pip install 'plora-kernels[flower]'")
    from fed.flower import submit

    return submit


def _settings(
    settings: Sequence[str] | None, more: Sequence[str] | None, track: Sequence[str] | None, copy_base: bool
) -> list[str]:
    trackers = [f"tracker={list(track)!r}"] if track else []
    copied = ["model.copy_base=true"] if copy_base else []
    return [*(settings or ()), *(more or ()), *trackers, *copied]


def _fail(message: str, status: int = BAD_INPUT) -> NoReturn:
    with suppress(BrokenPipeError):  # nobody reads it
        print(printable(f"error: {' '.join(message.split())}"), file=sys.stderr, flush=True)
    sys.exit(status)
