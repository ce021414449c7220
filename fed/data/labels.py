"""The classes of a data set: the order they are numbered in, and whether a checkpoint's head has them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence
from decimal import Decimal

from fed.data.rows import some_of

_NUMBER = re.compile(r"(?:label[\s_]*)?([+-]?\d+(?:\.\d+)?)")
_TRUTHS = {"false": Decimal(0), "true": Decimal(1)}
_SEPARATORS = re.compile(r"[\s_]+|(?<=\w)-+(?=\w)")


def order_classes(found: Collection[str], head: Sequence[str], source: Sequence[str]) -> tuple[str, ...]:
    """Return the names of a data set's classes in the order of their numbers.

    They are numbered as in the checkpoint's head with the classes `head`, or else as in the data source with the
    classes `source`, if one of them has the classes `found` (see `match_head`). Otherwise they are sorted: as numbers
    if all of them are numbers, else as text.

    >>> order_classes({"no", "yes", "10", "9"}, head=(), source=())
    ('10', '9', 'no', 'yes')
    >>> order_classes({"10", "9"}, head=(), source=())
    ('9', '10')
    >>> order_classes({"joy", "anger"}, head=("Joy", "Anger"), source=())
    ('joy', 'anger')
    """
    everywhere, some = tuple(source), _sorted(found)
    for names, numbers in ((everywhere, range(len(everywhere))), (some, ())):
        if names and (in_head := match_head(names, head, numbers)) is not None:
            return in_head
    return everywhere if set(everywhere) == set(found) else some


def match_head(names: Sequence[str], head: Sequence[str], numbers: Sequence[int] = ()) -> tuple[str, ...] | None:
    """Return the classes of a head in the order of its outputs, as the data name them, or None if it is not theirs.

    `names` are the classes of the data, and `head` are the class names saved with the head. They are compared as they
    are written, else without regard to case and to which of space, underscore and hyphen separates words. A head may
    have classes that the data lack; they keep the head's name. Last, names that are numbers are compared by value,
    where `LABEL_k` is k, false is 0 and true is 1; then both must have the same numbers. `numbers` are those of `names`
    if the data source itself numbers its classes. A comparison in which two names of one side are equal is not used.

    >>> match_head(("contradiction", "entailment"), ("ENTAILMENT", "NEUTRAL", "CONTRADICTION"))
    ('entailment', 'NEUTRAL', 'contradiction')
    >>> match_head(("0", "1"), ("LABEL_0", "LABEL_1"))
    ('0', '1')
    >>> match_head(("bad", "good"), ("LABEL_0", "LABEL_1"))  # which of them is LABEL_0 is not known ...
    >>> match_head(("bad", "good"), ("LABEL_0", "LABEL_1"), numbers=(0, 1))  # ... unless the source says it
    ('bad', 'good')
    """
    for spelling in (_written, _folded):
        ours, theirs = [spelling(name) for name in names], [spelling(name) for name in head]
        # Numbers say too little to tell that a head with more of them is a head for the same task.
        if len(head) > len(names) and any(_NUMBER.fullmatch(_folded(name)) for name in names):
            continue
        if set(ours) <= set(theirs) and _differ(ours) and _differ(theirs):
            own = dict(zip(ours, names, strict=True))
            return tuple(own.get(key, name) for key, name in zip(theirs, head, strict=True))
    ours_by_value = dict(zip(numbers or map(_number, names), names, strict=True))
    outputs = [_number(name) for name in head]
    if None in outputs or ours_by_value.keys() != set(outputs) or not len(ours_by_value) == len(names) == len(head):
        return None
    return tuple(ours_by_value[value] for value in outputs)


def quoted(names: Sequence[str], most: int = 4) -> str:
    """Return the first names, in quotation marks, for a message, and how many more there are.

    >>> quoted(["a", "b", "c"], most=2)
    "'a', 'b' and 1 more"
    """
    return some_of(map(repr, names), most)


def _sorted(names: Collection[str]) -> tuple[str, ...]:
    values = {name: _number(name) for name in names}
    if all(value is not None for value in values.values()):
        return tuple(sorted(names, key=lambda name: (values[name], name)))
    return tuple(sorted(names))


def _number(name: str) -> Decimal | None:
    """Return the number that a class is named after, or None."""
    plain = name.strip().casefold()
    match = _NUMBER.fullmatch(plain)
    return Decimal(match[1]) if match else _TRUTHS.get(plain)


def _written(name: str) -> str:
    return name


def _folded(name: str) -> str:
    """Return a name without case, with single spaces between its words, in one of the ways to encode its letters."""
    return _SEPARATORS.sub(" ", unicodedata.normalize("NFC", name.casefold())).strip()


def _differ(keys: Sequence[object]) -> bool:
    return len(set(keys)) == len(keys)
