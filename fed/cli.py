"""The command line: `python -m fed run` and `python -m fed report`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
    from fed.rundir import RunDirectory

# typer keeps the parent of its errors about arguments to itself.
_UsageError: Any = typer.BadParameter.__base__
_BAD_INPUT, _INTERRUPTED = 2, 130

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated fine-tuning over clients that afford different LoRA ranks.",
)


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
    source: Annotated[str, typer.Argument(metavar="PRESET_OR_TOML", help="A preset (digits) or a TOML file.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More settings, as after --set.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key, e.g. train.learning_rate=1e-3; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run's directory.  [default: runs/NAME]")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run that is there.")] = False,
    centralised: Annotated[bool, typer.Option(help="Compare with rank-R LoRA on all clients' data together.")] = True,
) -> int:
    """Run federated fine-tuning and leave its configuration, rounds, base, adapter and report in a directory."""
    config = configuration.load(source, [*(settings or ()), *(more or ())])
    return _run(config, out or Path("runs", Path(source).stem), overwrite, centralised)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A run's directory.")],
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the result as a Markdown table alone.")
    ] = False,
) -> None:
    """Print a run's result and draw its report.png anew."""
    from fed.console import Screen
    from fed.report import draw, markdown, read

    screen = Screen()
    if as_markdown:
        screen.say(markdown(read(directory)).rstrip())
        return
    screen.summarise(read(directory))
    screen.say(f"\nreport  {draw(directory)}")


def _run(config: RunConfig, out: Path, overwrite: bool, centralised: bool) -> int:
    """Load everything, simulate, compare, report; return the exit status."""
    from fed import data as datasets
    from fed.console import Screen
    from fed.report import draw, read
    from fed.rundir import RunDirectory
    from plora_kernels import PLoRAError

    began, screen, directory = time.perf_counter(), Screen(), RunDirectory(out, overwrite)
    try:
        data = datasets.load(config)
        with _threads(config.threads), directory:
            model = _base(config, data, directory, screen)
            directory.place()
            _federate(config, data, model, directory, screen)
            if centralised:
                _centralise(config, data, model, out, screen)
    except PLoRAError as error:
        raise FedError(str(error)) from error
    except KeyboardInterrupt:
        kept = f"the rounds so far are in {out}; show them with python -m fed report {out}"
        screen.warn(f"interrupted: {kept if directory.kept else 'nothing is left of this run'}")
        return _INTERRUPTED
    picture = draw(out)
    screen.summarise(read(out))
    screen.say(f"\n{out}: config.toml, rounds.jsonl, base/, adapter/, {picture.name}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _base(config: RunConfig, data: FederatedData, directory: RunDirectory, screen: Screen) -> nn.Module:
    """Load or train the base model; it and the configuration are saved in the run's directory."""
    from fed import models
    from fed.evaluate import evaluate
    from fed.local import adapted
    from fed.rundir import BASE, CONFIG

    model = models.build(config, data)
    with adapted(config, model, models.head_names(model)):
        pass  # an adapter that does not fit, or a device that is not there, shows before any training
    model.cpu()
    if data.pretrain is not None:
        steps = config.model.pretrain_steps
        with screen.stage("base: central step", steps, every=max(1, steps // 5)) as advance:
            models.pretrain(model, data.pretrain, config, lambda step, loss: advance(step, f"training loss {loss:.3f}"))
    if data.undisturbed is not None:
        accuracy = evaluate(model, data.undisturbed)["accuracy"]
        screen.say(f"base: {100 * accuracy:.1f} % of {len(data.undisturbed)} undisturbed test images right")
    models.save(model, config, directory.path / BASE)
    configuration.write(config, directory.path / CONFIG)
    return model


def _federate(
    config: RunConfig, data: FederatedData, model: nn.Module, directory: RunDirectory, screen: Screen
) -> None:
    """Run the rounds; from the first row on, the run's directory stays."""
    from fed.console import round_note
    from fed.models import head_names
    from fed.simulate import simulate

    rows = [len(split) for split in data.clients]
    screen.say(f"clients: {len(rows)} with {min(rows)} to {max(rows)} rows each; test: {len(data.test)} rows")
    with screen.stage("round", config.rounds) as advance:

        def on_round(row: dict[str, Any]) -> None:
            directory.keep()
            advance(row["round"], round_note(row))

        simulate(config, data, model, head_names(model), directory.path, on_round, screen.warn)


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


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch use `number` threads inside, or as many as it likes if 0."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(_BAD_INPUT)
