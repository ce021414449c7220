"""Playing the runs of a comparison; finished runs are kept, and interrupted ones continue from their checkpoints."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fed import config as configuration
from fed import interruption
from fed.config import RunConfig
from fed.data import federated_data
from fed.data.federated_data import FederatedData
from fed.data.pretrained import checkpoint_of
from fed.data.tokenization import Stage
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments import run as running
from fed.experiments.plan import Cell, Plan
from fed.experiments.trackers import require
from fed.files import make_folder, sync
from fed.locks import LOCK, held
from fed.models import base_model, saved_base
from fed.sealed import read_sealed, write_sealed
from fed.simulation import checkpoint
from fed.simulation.checkpoint import last_round
from fed.simulation.finished import input_digests_of
from fed.simulation.inputs import BASE as BASE_MODEL
from fed.simulation.inputs import DEALT, check_same, data_digests, folder_digest, model_digest
from fed.simulation.rows import ROUNDS
from fed.simulation.run_directory import BASE, CONFIG
from fed.simulation.settings import changed_setting, fixed_settings
from fed.types import Row

# A callback that is called with a cell, the kind of event ("base", "data", "row", "event", "finished" or "failed"), and
# a message or, for "row" and "finished", a row.
OnEvent = Callable[[Cell, str, Any], object]

BASES = "bases"
CHECKPOINT = "checkpoint"  # the digest of a folder that base models are made of
# Settings that change no result, and may differ from those that a comparison began with.
_FREE = ("checkpoint_every", "server.patience", "data.cache")


@contextmanager
def open_grid(plan: Plan, directory: Path) -> Iterator[None]:
    """Create a comparison's directory, or check that an existing one belongs to a comparison with the same settings.

    Within the context the directory is held against other processes. Methods, values and seeds may differ from those
    before; existing runs are kept. Raises FedError, naming the first setting that differs, or if the directory is not
    that of a comparison, or another process works in it.
    """
    exists = directory.exists() and (not directory.is_dir() or any(path.name != LOCK for path in directory.iterdir()))
    if exists and not (directory / plans.PLAN).is_file():
        raise FedError(f"--out is {str(directory)!r}, which exists and is no comparison; give another name")
    try:
        make_folder(directory)
        with ExitStack() as stack:
            stack.enter_context(held(directory))
            if exists:
                _require_same(plan, directory)
            plans.write(plan.request, directory)
            for path in (directory / BASES).glob(".*.tmp"):  # of processes that were killed while they made a base
                shutil.rmtree(path)
            opened = stack.pop_all()
    except OSError as error:
        raise FedError(f"--out is {str(directory)!r}: it cannot be written: {error.strerror}") from None
    with opened:
        yield


def _require_same(plan: Plan, directory: Path) -> None:
    before = plans.plan(plans.read(directory))
    pairs = [("its runs share", before.common(), plan.common())]
    for cell in plan.cells:
        path = directory / cell.path / CONFIG
        with suppress(FedError):  # a run whose configuration is damaged is played anew, or named when it is played
            there = configuration.settings_of(configuration.load_saved(path))
            pairs.append((cell.label, _as_planned(there, cell), configuration.settings_of(cell.config)))
    for what, there, here in pairs:
        if (differs := plans.difference(_lasting(there), _lasting(here))) is not None:
            raise FedError(f"{directory} holds a comparison of other settings ({what}: {differs}); give another --out")


def _as_planned(settings: dict[str, Any], cell: Cell) -> dict[str, Any]:
    """Return a run's settings with the plan's number of clients in a pass, which may stand for the measured one."""
    return {**settings, "clients_per_pass": cell.config.clients_per_pass}


def _lasting(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that all runs of a comparison share for good."""
    return {key: value for key, value in settings.items() if key not in _FREE}


def finished(cell: Cell, directory: Path) -> bool:
    """Return whether a run of the comparison is finished, and its files as they were then."""
    path = directory / cell.path
    return running.ended(path, cell.config) and _holds(cell.config, path / CONFIG)


class SharedInputs:
    """Data and base models of a comparison's runs, made once for all runs that share them.

    Base models are saved in `directory/bases`, one for each seed and each set of model and data settings. The data and
    the model that were used last stay in memory. Both are compared, by the digests that runs keep, with what other
    runs of the comparison started from.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._data: tuple[str, FederatedData] | None = None
        self._model: tuple[str, nn.Module] | None = None

    def data(
        self, config: RunConfig, on_event: Callable[[str], object] | None = None, stage: Stage | None = None
    ) -> FederatedData:
        """Return a run's data, which is the same object as before if seed and settings that affect the data are equal.

        `on_event` and `stage` are passed to `fed.data.federated_data.load`. Raises FedError if the data are not those
        that the comparison began with.
        """
        key = _key(config, "data", "clients", "model")
        if self._data is None or self._data[0] != key:
            self._data = None  # frees the old data before the new data are loaded
            self._data = key, federated_data.load(config, on_event, stage)
            digests = data_digests(self._data[1])
            self._compare(config, ("data", "clients", "model"), digests)
            del digests[DEALT]  # which alone depends on the seed and the clients
            self._compare(config, ("data", "model"), digests, any_seed=True)
        return self._data[1]

    def base(self, config: RunConfig, tell: Callable[[str], object], own: Path | None = None) -> tuple[nn.Module, Path]:
        """Return the base model of a run and the path it is saved at; it is made only if that does not exist yet.

        `own` is the base of a run that has begun: earlier versions called it otherwise.
        """
        path = self.directory / BASES / f"seed-{config.seed}-{_key(config, 'data', 'model')}"
        if own is not None and own.is_dir():
            path = own.resolve()
        key = str(path)
        if self._model is None or self._model[0] != key:
            self._model = None
            if path.is_dir():
                model = saved_base.reopen(path, self.data(config).label_names, config)
            else:
                tell(f"making the base model of seed {config.seed}")
                model = self._made(config, path)
            self._model = key, model
            self._compare(config, ("data", "model"), {BASE_MODEL: model_digest(model)})
        return self._model[1], path

    def _compare(
        self, config: RunConfig, tables: tuple[str, ...], now: Mapping[str, str], any_seed: bool = False
    ) -> None:
        """Raise FedError if a run with the same settings in these tables started from inputs with other digests.

        Without `any_seed` only runs of the same seed are compared.
        """
        key = _key(config, *tables, with_seed=not any_seed)
        for directory in self.directory.glob("runs/*/seed-*"):
            try:
                saved = configuration.load_saved(directory / CONFIG)
                before = input_digests_of(directory) or checkpoint.saved_inputs(directory)
            except FedError:  # a damaged run is named when it is played, or left out when it is reported
                continue
            if _key(saved, *tables, with_seed=not any_seed) != key:
                continue
            check_same({name: before[name] for name in now if name in before}, now, f"{str(directory)!r}")

    def compare_checkpoint(self, config: RunConfig) -> None:
        """Raise FedError if base models of the comparison were made of another content of `model.path`."""
        if config.model.path is None or not (self.directory / BASES).is_dir():
            return
        path = self.directory / BASES / f"checkpoint-{_key(config, 'model', with_seed=False)}.json"
        now = {CHECKPOINT: folder_digest(checkpoint_of(config))}
        if path.is_file():
            check_same(read_sealed(path), now, f"the comparison in {str(self.directory)!r}")
        else:
            write_sealed(path, now)

    def _made(self, config: RunConfig, path: Path) -> nn.Module:
        """Make a base model and save it under a temporary name, then rename it.

        If another process has saved the same base model meanwhile, that one stays.
        """
        make_folder(path.parent)
        self.compare_checkpoint(config)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        model = running.make_base(config, self.data(config), temporary)
        try:
            temporary.rename(path)
            sync([path.parent])
        except OSError:
            shutil.rmtree(temporary)
        return model


def play(cell: Cell, bench: SharedInputs, tell: OnEvent) -> Row:
    """Play one run of a comparison to its end, from its checkpoint if it has one; return its last row."""
    config, directory = cell.config, bench.directory / cell.path
    with running.limits(config.threads, config.model.matmul_precision):
        data = bench.data(config, partial(tell, cell, "data"))
        with interruption.deferred():
            make_folder(directory)
            with held(directory):
                resume = last_round(directory) is not None
                model, base = bench.base(config, partial(tell, cell, "base"), directory / BASE if resume else None)
                if not resume:
                    if (directory / ROUNDS).is_file():
                        tell(cell, "event", "it has no checkpoint to go on from and is played anew")
                    _empty(directory)
                    (directory / BASE).symlink_to(os.path.relpath(base, directory), target_is_directory=True)
                if not resume or not _holds(config, directory / CONFIG):
                    configuration.write(config, directory / CONFIG)
                write = partial(configuration.write, path=directory / CONFIG)
                on_row, on_event = partial(tell, cell, "row"), partial(tell, cell, "event")
                try:
                    rows = running.play(config, data, model, directory, on_row, on_event, resume, write)
                except FedError as error:
                    if not resume:
                        raise
                    raise FedError(f"{error}; without {str(directory)!r} it would be played anew") from error
    return rows[-1]


def _empty(directory: Path) -> None:
    """Delete all that a run left that has no checkpoint to go on from."""
    for path in directory.iterdir():
        if path.name == LOCK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _holds(config: RunConfig, path: Path) -> bool:
    """Return whether a file holds the run's configuration, perhaps with the size of cohorts that was measured."""
    try:
        saved = configuration.load_saved(path)
    except FedError:
        return False
    return changed_setting(fixed_settings(saved), fixed_settings(config)) is None and saved.rounds == config.rounds


def check(
    cells: Sequence[Cell], bench: SharedInputs, on_event: Callable[[str], object], stage: Stage | None = None
) -> set[str]:
    """Check the runs before any is played, and return the messages about their data.

    Raises FedError if a tracker is not installed, if clients are to train on other machines, or if with the first seed
    data cannot be loaded or an adapter does not fit its model. Other seeds are not loaded, because they use the same
    rows. `on_event` receives each message about data and base model once; messages about other seeds' partitions come
    when their runs are played (event "data").
    """
    built: dict[str, nn.Module] = {}
    said: set[str] = set()

    def once(line: str) -> None:
        if line not in said:
            said.add(line)
            on_event(line)

    for cell in cells:
        require(cell.config.tracker)
        running.require_local(cell.config)
        if cell.seed != cells[0].seed:
            continue
        with running.limits(cell.config.threads, cell.config.model.matmul_precision):
            data, key = bench.data(cell.config, once, stage), _key(cell.config, "data", "model")
            bench.compare_checkpoint(cell.config)
            if key not in built:
                built.clear()  # two models are never held at once
                built = {key: base_model.build(cell.config, data, once)}
            running.check_adapter(cell.config, built[key])
    return said


def in_turn(cells: Sequence[Cell], bench: SharedInputs, tell: OnEvent) -> None:
    """Play runs one after another; a FedError in one is reported to `tell` as "failed" and the next run begins."""
    for cell in cells:
        try:
            last = play(cell, bench, tell)
        except FedError as error:
            if interruption.came():  # a library may make an error of its own of Ctrl-C
                raise KeyboardInterrupt from error
            tell(cell, "failed", str(error))
        else:
            tell(cell, "finished", last)


def _key(config: RunConfig, *tables: str, with_seed: bool = True) -> str:
    """Return a short hash of the settings in these tables, the seed if asked for, and the number of threads."""
    located = configuration.located(config.model_dump(mode="json"))
    decisive = {name: located[name] for name in tables}
    content = json.dumps([config.seed if with_seed else None, config.threads, decisive], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=4).hexdigest()
