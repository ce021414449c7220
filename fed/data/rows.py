"""Rows of text as they were read from a source, each with the place that messages name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fed.errors import FedError

Row = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Rows as they were read, each with its place (such as file and line), which error messages name.

    The rows from `first_test` on are the source's own test rows; it is None if there are none. `label_names` are the
    names of labels that the rows hold as numbers, by number. `mended` are the places of the rows in which half a
    surrogate pair became U+FFFD, and `doubtful` those of the rows that may be several (`remarks` tells the user).
    """

    rows: Sequence[Row]
    places: Sequence[str]
    first_test: int | None = None
    label_names: Sequence[str] | None = None
    mended: Sequence[str] = ()
    doubtful: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def training(self) -> Rows:
        """The rows that are not the source's own test rows."""
        return self if self.first_test is None else self.take(range(self.first_test))

    def take(self, indices: Sequence[int]) -> Rows:
        """Return the rows with these ascending indices.

        >>> Rows([{"a": 1}, {"a": 2}, {"a": 3}], ["one", "two", "three"], first_test=2).take([1, 2]).first_test
        1
        """
        first, places = self.first_test, [self.places[index] for index in indices]
        taken = set(places) if self.mended or self.doubtful else ()
        return replace(
            self,
            rows=[self.rows[index] for index in indices],
            places=places,
            first_test=None if first is None else sum(index < first for index in indices),
            mended=[place for place in self.mended if place in taken],
            doubtful=[place for place in self.doubtful if place in taken],
        )

    def column(self, key: str, name: str, kinds: tuple[type, ...] = (str,), empty: bool = False) -> list[Any]:
        """Return the values of the column `name`, which the configuration's `key` names.

        With `empty` values may be missing, and are then None. Raises FedError, naming the first such row, if a value is
        missing or not of one of the types `kinds`.
        """
        wanted = " or ".join({str: "a string", int: "an integer", list: "a list"}[kind] for kind in kinds)
        values = []
        for row, place in zip(self.rows, self.places, strict=True):
            if name not in row and not empty:
                raise FedError(f"{place}: {key} is {name!r}; the columns there are {listed(row)}")
            value = row.get(name)
            if not isinstance(value, kinds) and not (empty and value is None):
                why = " (a value is missing)" if value is None else ""
                raise FedError(f"{place}: {key} {name!r} holds {value!r:.40}; it should be {wanted}{why}")
            values.append(value)
        return values


def remarks(rows: Rows) -> list[str]:
    """Return lines for the user on rows that were changed, or perhaps misunderstood, as they were read."""
    lines = []
    if rows.mended:
        lines.append(
            f"{len(rows.mended)} of {len(rows)} rows hold half a surrogate pair, which is no character and becomes "
            f"U+FFFD; the first is {rows.mended[0]}"
        )
    if rows.doubtful:
        lines.append(
            f"{len(rows.doubtful)} of {len(rows)} rows span lines that look like rows themselves, as where a quotation "
            f"mark is meant as text but opens a field; the first is {rows.doubtful[0]}"
        )
    return lines


def joined(parts: Iterable[Rows]) -> Rows:
    """Return the rows of several files after each other, as training rows."""
    found = list(parts)
    return Rows(
        [row for part in found for row in part.rows],
        [place for part in found for place in part.places],
        mended=[place for part in found for place in part.mended],
        doubtful=[place for part in found for place in part.doubtful],
    )


def listed(names: Iterable[str]) -> str:
    """Return names, such as those of columns, in one line, even if a name holds line ends."""
    return re.sub(r"[\r\n]+", " ", ", ".join(names))


def some_of(names: Iterable[str], most: int = 10) -> str:
    """Return the first names, at most so many, and how many more there are.

    >>> some_of("abcde", most=3)
    'a, b, c and 2 more'
    """
    first, rest = (names := list(names))[:most], names[most:]
    return listed(first) + (f" and {len(rest)} more" if rest else "")
