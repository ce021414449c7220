"""Playing the runs of a comparison; finished runs are kept, and interrupted ones continue from their checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fed import config as configuration
from fed.config import RunConfig
from fed.data import federated_data
from fed.data.federated_data import FederatedData
from fed.data.tokenization import Stage
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments import run as running
from fed.experiments.plan import Cell, Plan
from fed.experiments.trackers import require
from fed.models import base_model
from fed.simulation.checkpoint import last_round
from fed.simulation.run_directory import BASE, CONFIG
from fed.types import Row

# A callback that is called with a cell, the kind of event ("base", "data", "row", "event", "finished" or "failed"), and
# a message or, for "row" and "finished", a row.
OnEvent = Callable[[Cell, str, Any], object]

BASES = "bases"


def open_grid(plan: Plan, directory: Path) -> None:
    """Create a comparison's directory, or check that an existing one belongs to a comparison with the same settings.

    Methods, values and seeds may differ from those before; existing runs are kept. Raises FedError, naming the first
    setting that differs, or if the directory is not that of a comparison.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        if not (directory / plans.PLAN).is_file():
            raise FedError(f"--out is {str(directory)!r}, which exists and is no comparison; give another name")
        _require_same(plan, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        plans.write(plan.request, directory)
    except OSError as error:
        raise FedError(f"--out is {str(directory)!r}: it cannot be written: {error.strerror}") from None


def _require_same(plan: Plan, directory: Path) -> None:
    before = plans.plan(plans.read(directory))
    pairs = [("its runs share", before.common(), plan.common())]
    for cell in plan.cells:
        if (path := directory / cell.path / CONFIG).is_file():
            there = configuration.settings_of(configuration.load_saved(path))
            pairs.append((cell.label, there, configuration.settings_of(cell.config)))
    for what, there, here in pairs:
        if (differs := plans.difference(there, here)) is not None:
            raise FedError(f"{directory} holds a comparison of other settings ({what}: {differs}); give another --out")


def finished(cell: Cell, directory: Path) -> bool:
    """Return whether a run of the comparison is finished."""
    return running.ended(directory / cell.path, cell.config)


class SharedInputs:
    """Data and base models of a comparison's runs, made once for all runs that share them.

    Base models are saved in `directory/bases`, one for each seed and each set of model and data settings. The data and
    the model that were used last stay in memory.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._data: tuple[str, FederatedData] | None = None
        self._model: tuple[str, nn.Module] | None = None

    def data(
        self, config: RunConfig, on_event: Callable[[str], object] | None = None, stage: Stage | None = None
    ) -> FederatedData:
        """Return a run's data, which is the same object as before if seed and settings that affect the data are equal.

        `on_event` and `stage` are passed to `fed.data.federated_data.load`.
        """
        key = _key(config, "data", "clients", "model")
        if self._data is None or self._data[0] != key:
            self._data = None  # frees the old data before the new data are loaded
            self._data = key, federated_data.load(config, on_event, stage)
        return self._data[1]

    def base(self, config: RunConfig, tell: Callable[[str], object]) -> tuple[nn.Module, Path]:
        """Return the base model of a run and the path it is saved at; it is made only if that does not exist yet."""
        key = _key(config, "data", "model")
        path = self.directory / BASES / f"seed-{config.seed}-{key}"
        if self._model is None or self._model[0] != key:
            self._model = None
            if path.is_dir():
                model = base_model.reopen(path, self.data(config).label_names)
            else:
                tell(f"making the base model of seed {config.seed}")
                model = self._made(config, path)
            self._model = key, model
        return self._model[1], path

    def _made(self, config: RunConfig, path: Path) -> nn.Module:
        """Make a base model and save it under a temporary name, then rename it.

        If another process has saved the same base model meanwhile, that one stays.
        """
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        model = running.make_base(config, self.data(config), temporary)
        try:
            temporary.rename(path)
        except OSError:
            shutil.rmtree(temporary)
        return model


def play(cell: Cell, bench: SharedInputs, tell: OnEvent) -> Row:
    """Play one run of a comparison to its end, from its checkpoint if it has one; return its last row."""
    config, directory = cell.config, bench.directory / cell.path
    with running.limits(config.threads):
        data = bench.data(config, partial(tell, cell, "data"))
        model, base = bench.base(config, partial(tell, cell, "base"))
        resume = last_round(directory) is not None
        if not resume:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            configuration.write(config, directory / CONFIG)
            (directory / BASE).symlink_to(os.path.relpath(base, directory), target_is_directory=True)
        on_row, on_event = partial(tell, cell, "row"), partial(tell, cell, "event")
        rows = running.play(config, data, model, directory, on_row, on_event, resume=resume)
    return rows[-1]


def check(
    cells: Sequence[Cell], bench: SharedInputs, on_event: Callable[[str], object], stage: Stage | None = None
) -> set[str]:
    """Check the runs before any is played, and return the messages about their data.

    Raises FedError if a tracker is not installed, or if with the first seed data cannot be loaded or an adapter does
    not fit its model. Other seeds are not loaded, because they use the same rows. `on_event` receives each message
    about data and base model once; messages about other seeds' partitions come when their runs are played (event
    "data").
    """
    built: dict[str, nn.Module] = {}
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            on_event(line)

    for cell in cells:
        require(cell.config.tracker)
        if cell.seed != cells[0].seed:
            continue
        with running.limits(cell.config.threads):
            data, key = bench.data(cell.config, once, stage), _key(cell.config, "data", "model")
            if key not in built:
                built = {key: base_model.build(cell.config, data, once)}
            running.check_adapter(cell.config, built[key])
    return said


def in_turn(cells: Sequence[Cell], bench: SharedInputs, tell: OnEvent) -> None:
    """Play runs one after another; a FedError in one is reported to `tell` as "failed" and the next run begins."""
    for cell in cells:
        try:
            last = play(cell, bench, tell)
        except FedError as error:
            tell(cell, "failed", str(error))
        else:
            tell(cell, "finished", last)


def _key(config: RunConfig, *tables: str) -> str:
    """Return a short hash of the settings in these tables, the seed and the number of threads."""
    decisive = {name: getattr(config, name).model_dump(mode="json") for name in tables}
    content = json.dumps([config.seed, config.threads, decisive], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
