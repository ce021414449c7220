"""The data of a run: digits or text, with some rows held out and the others partitioned among clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fed.config import RunConfig
from fed.data import sources, text_tables
from fed.data.digits import load_digits, shift_images
from fed.data.partition import Array, Classes, deal, describe_leftover, split_stratified
from fed.data.rows import Rows, listed, remarks
from fed.data.tables import DenseTable, Split, Table
from fed.data.tokenization import Stage
from fed.errors import FedError
from fed.seeding import permutation, seed_of


@dataclass(frozen=True)
class FederatedData:
    """The training and evaluation rows of a run. Clients, test, pretrain and validation have no row in common.

    clients: the training rows of each client, shifted for digits.  test: held-out rows, shifted the same way.
    pretrain: unshifted rows for pretraining the embedded base.  undisturbed: the test rows without the shift.
    Both are None for text.  validation: held-out rows for choosing settings, or None.  label_names: the labels, in the
    order of their numbers in the tables.  source_numbers: the numbers that the data source itself gives these labels,
    or () if it has only names.
    """

    clients: tuple[Split, ...]
    test: Split
    pretrain: Split | None
    undisturbed: Split | None
    label_names: tuple[str, ...]
    validation: Split | None = None
    source_numbers: tuple[int, ...] = ()

    def to(self, device: torch.device) -> FederatedData:
        """Return the data with the clients', test and validation rows on a device; each table is copied only once."""
        moved: dict[int, Table] = {}

        def move(split: Split) -> Split:
            key = id(split.table)
            if key not in moved:
                moved[key] = split.table.to(device)
            return Split(moved[key], split.rows)

        return replace(
            self,
            clients=tuple(map(move, self.clients)),
            test=move(self.test),
            validation=move(self.validation) if self.validation is not None else None,
        )


def load(
    config: RunConfig, on_event: Callable[[str], object] | None = None, stage: Stage | None = None
) -> FederatedData:
    """Load, split and partition the data that a configuration names; raise FedError if it cannot be loaded.

    `on_event` receives messages for the user, for example how many rows were cut or are no client's. `stage` shows the
    progress of work that takes longer than a second.
    """
    if config.data.name == "digits":
        return _digits(config, on_event or _discard)
    return _text(config, on_event or _discard, stage)


def _digits(config: RunConfig, on_event: Callable[[str], object]) -> FederatedData:
    """Return the digits, split by label into disjoint parts for pretraining, testing, validating and the clients."""
    images, labels, names = load_digits()
    pretrain, rest = split_stratified(labels, config.data.pretrain_fraction, _rng(config, "pretrain"))
    if len(pretrain) == 0:
        raise _too_small("data.pretrain_fraction", config.data.pretrain_fraction, labels, "pretrain")
    held_out = _Parts.of(config, labels[rest], taken=config.data.pretrain_fraction)
    if len(held_out.test) == 0:
        raise _too_small("data.test_fraction", config.data.test_fraction, labels, "test")
    plain = DenseTable({"pixel_values": images}, torch.from_numpy(labels))
    shifted = replace(plain, inputs={"pixel_values": shift_images(images, config.data.shift)})
    return FederatedData(
        clients=_deal(config, shifted, labels, rest[held_out.clients], [Classes("label", labels, names)], on_event),
        test=_view(shifted, rest[held_out.test]),
        pretrain=_view(plain, pretrain),
        undisturbed=_view(plain, rest[held_out.test]),
        label_names=names,
        validation=_view(shifted, rest[held_out.validation]) if len(held_out.validation) else None,
    )


def _text(config: RunConfig, on_event: Callable[[str], object], stage: Stage | None) -> FederatedData:
    """Return text, tokenised by the checkpoint's tokenizer, for testing, validating and the clients."""
    rows, data = sources.read(config) if stage is None else sources.read(config, stage), config.data
    for line in remarks(rows):
        on_event(line)
    names: tuple[str, ...] = ()
    labels: Array | None = None
    if data.task == "classification":
        labels, names = text_tables.make_labels(config, rows, on_event)
    else:
        rows = text_tables.leave_out_unanswered(config, rows, on_event)
    groups, values = _groups(config, rows, labels)
    strata = _strata(config, rows, groups, on_event) if labels is None else labels
    parts = _Parts.of(config, strata, first_test=rows.first_test)
    if len(parts.test) == 0:
        repeat = "" if labels is None else ", or data.label a column whose values repeat"
        raise _too_small("data.test_fraction", data.test_fraction, strata, "test", repeat)
    if labels is None:
        table: Table = text_tables.instruction_table(config, rows, on_event, stage)
    else:
        table = text_tables.classification_table(config, rows, labels, on_event, stage)
    classes = [] if labels is None else [Classes(data.label, labels, names)]
    if data.partition_by is not None and data.partition_by != data.label:
        trained = np.full_like(groups, -1)
        trained[parts.clients] = groups[parts.clients]
        classes.append(Classes(data.partition_by, trained, values))
    return FederatedData(
        clients=_deal(config, table, groups, parts.clients, classes, on_event),
        test=_view(table, parts.test),
        pretrain=None,
        undisturbed=None,
        label_names=names,
        validation=_view(table, parts.validation) if len(parts.validation) else None,
        source_numbers=_source_numbers(rows, names),
    )


def _source_numbers(rows: Rows, names: tuple[str, ...]) -> tuple[int, ...]:
    numbers = {name: number for number, name in enumerate(rows.label_names or ())}
    return tuple(numbers[name] for name in names) if numbers.keys() >= set(names) else ()


def _groups(config: RunConfig, rows: Rows, labels: Array | None) -> tuple[Array, tuple[str, ...]]:
    """Return the groups to partition by, (n,), and their names if they come from the column `data.partition_by`.

    Without that column the groups are the labels, or else all zero. The source's own test rows go to no client, so they
    need no such column: their group is -1.
    """
    data = config.data
    if data.partition_by is not None:
        values = [str(value) for value in rows.training.column("data.partition_by", data.partition_by, (str, int))]
        names = tuple(sorted(set(values)))
        numbers = {name: number for number, name in enumerate(names)}
        test = [-1] * (len(rows) - len(values))
        return np.array([*(numbers[value] for value in values), *test], dtype=np.int64), names
    if labels is not None:
        return labels, ()
    even = data.partition == "iid" or (data.partition == "dirichlet" and config.clients.dirichlet_alpha == "iid")
    if not even:
        raise FedError(
            f"data.partition_by is missing: instructions have no labels, so data.partition = {data.partition!r} needs "
            f"a column to go by ({listed(rows.rows[0])}); or data.partition should be 'iid'"
        )
    return np.zeros(len(rows), dtype=np.int64), ()


def _strata(config: RunConfig, rows: Rows, groups: Array, on_event: Callable[[str], object]) -> Array:
    """Return the strata from which instructions are held out: their groups, or one if all groups are too small."""
    data = config.data
    fractions = [data.validation_fraction, data.test_fraction if rows.first_test is None else 0.0]
    largest = np.bincount(groups[groups >= 0]).max()
    if data.partition_by is None or not any(fraction > 0 and round(fraction * largest) == 0 for fraction in fractions):
        return groups
    on_event(f"no {data.partition_by} has rows enough to hold out a part of each; rows are held out from all together")
    return np.zeros_like(groups)


@dataclass(frozen=True)
class _Parts:
    """Disjoint sets of sorted row indices: for testing, for validating, and for the clients."""

    test: Array
    validation: Array
    clients: Array

    @classmethod
    def of(cls, config: RunConfig, strata: Array, taken: float = 0.0, first_test: int | None = None) -> _Parts:
        """Hold out the configured test and validation fractions, the same fraction of every stratum.

        The fractions refer to all rows, of which the fraction `taken` has been removed already. With `first_test`, the
        rows from that index on are the test rows, and the validation fraction is one of the rows before it.
        """
        data = config.data
        if first_test is None:
            test, pool = split_stratified(strata, _of_rest(data.test_fraction, taken), _rng(config, "test"))
            taken += data.test_fraction
        else:
            pool, test = np.arange(first_test), np.arange(first_test, len(strata))
        validation = pool[:0]
        if data.validation_fraction > 0:
            fraction = _of_rest(data.validation_fraction, taken)
            inside, outside = split_stratified(strata[pool], fraction, _rng(config, "validation"))
            if len(inside) == 0:
                raise _too_small("data.validation_fraction", data.validation_fraction, strata[pool], "validate")
            validation, pool = pool[inside], pool[outside]
        test = _drawn(config, test, data.test_rows, "test rows")
        return cls(test, validation, _drawn(config, pool, data.train_rows, "train rows"))


def _of_rest(fraction: float, taken: float) -> float:
    """Return a fraction of all rows as one of the rows that are left when the fraction `taken` is taken."""
    return min(1.0, fraction / (1 - taken)) if taken < 1 else 1.0


def _too_small(key: str, fraction: float, strata: Array, purpose: str, repeat: str = "") -> FedError:
    """Return the error that a fraction of every stratum is less than half a row."""
    return FedError(
        f"{key} is {fraction}: {len(strata)} rows of {len(np.unique(strata))} labels leave none to {purpose} on; "
        f"it should be larger{repeat}"
    )


def _drawn(config: RunConfig, rows: Array, most: int, purpose: str) -> Array:
    """Return `most` random rows in their order, or all of them if `most` is 0 or there are no more than that."""
    if most == 0 or len(rows) <= most:
        return rows
    return np.sort(rows[permutation(len(rows), config.seed, purpose)[:most]])


def _deal(
    config: RunConfig,
    table: Table,
    groups: Array,
    pool: Array,
    classes: Sequence[Classes],
    on_event: Callable[[str], object],
) -> tuple[Split, ...]:
    """Deal the rows `pool` out by their groups; tell `on_event` which of them, and of the classes, no client has."""
    parts = [pool[part] for part in deal(config, groups[pool])]
    if line := describe_leftover(config, pool, parts, classes):
        on_event(line)
    return tuple(_view(table, part) for part in parts)


def _view(table: Table, rows: Array) -> Split:
    return Split(table, torch.from_numpy(rows))


def _rng(config: RunConfig, purpose: str) -> np.random.Generator:
    return np.random.default_rng(seed_of(config.seed, purpose))


def _discard(event: str) -> None:
    pass
