"""Regular expressions for names of modules: a check that matching one takes no time to speak of.

Python's `re` tries every way to match. An expression such as `(a+)+b` has 2ⁿ ways to match n letters, so that a name of
forty letters keeps it busy for hours. Expressions come with configurations and with adapters from elsewhere.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from math import factorial, prod
from re import _constants, _parser  # type: ignore[attr-defined]  # in every Python from 3.11 on, undocumented
from typing import Any, NamedTuple

from plora_kernels.errors import ConfigError

_LONGEST = 50_000  # characters of an expression that repeats something; a list of modules' names may be longer
_REPEATS = re.compile(r"[*+?{]")
_MOST_REPEATS = 1000  # in `{m,n}`; names of modules are shorter
_UNROLLED = 8  # repeats up to this number are taken for that many copies of their content
_MOST_LETTERS = 500_000  # in ranges such as [a-z], for which `re` takes time if case is ignored
_MOST_WAYS = 200_000  # to match one name: a few milliseconds
# How many places of a name are tried for the end of a repeat: any place, or those where one of a few letters stands.
_PLACES, _FEW_PLACES, _FEW_LETTERS = 64, 16, 10

# Sets of characters are the bits of an integer: one for each character of ASCII, and one for all others together.
_OTHERS = 1 << 128
_ALL = (_OTHERS << 1) - 1


def check_pattern(pattern: str, what: str) -> None:
    r"""Raise ConfigError, naming `what`, unless `pattern` is a regular expression that cannot take long to match.

    What is ordinary for names of modules is accepted. Refused are a repeat of something that can match the same text in
    several ways, such as `(a+)+`, `(a|a.)*` or `(.*x)*`; many repeats in a row that can share text between them, as in
    `.*.*.*.*x`; and numbers of repeats above 1000.

    >>> check_pattern(r"model\.layers\.\d+\..*(q|v)_proj", "target_modules")
    >>> check_pattern("(a+)+b", "target_modules")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
      ...
    plora_kernels.errors.ConfigError: target_modules holds '(a+)+b', which can take for ever to match: ...
    """
    if len(pattern) > _LONGEST and _REPEATS.search(pattern):
        raise ConfigError(
            f"{what} holds {_shown(pattern)}, {len(pattern)} characters; at most {_LONGEST} are allowed: shorten it, "
            "or list the names of the modules"
        )
    try:
        reason = _why_slow(pattern) if _REPEATS.search(pattern) else _compiled(pattern)
    except re.error as error:
        why = repr(str(error))[1:-1]  # in it a part of the expression may hold line ends
        raise ConfigError(f"{what} holds {_shown(pattern)}, which is not a regular expression: {why}") from None
    except OverflowError:
        reason = f"it repeats something more than {_MOST_REPEATS} times"
    except RecursionError:
        reason = "its groups are nested too deeply"
    if reason:
        raise ConfigError(f"{what} holds {_shown(pattern)}, which can take for ever to match: {reason}")


def _compiled(pattern: str) -> str:
    """Compile an expression that repeats nothing, which is never slow; raise what `re` raises about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        re.compile(pattern)
    return ""


@functools.lru_cache(maxsize=1024)  # an adapter's file may name the same one for each layer
def _why_slow(pattern: str) -> str:
    """Return why matching an expression may take long, or "" if it does not; raise what `re` raises about it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what may change in a later Python; who uses the expression hears of it
        parsed = _parser.parse(pattern)
        ignore_case = bool(parsed.state.flags & re.IGNORECASE) or re.search(r"\(\?\w*i", pattern) is not None
        if ignore_case and _letters(parsed) > _MOST_LETTERS:
            return "ranges of letters as wide as its own take long if case is ignored"
        try:
            ways = _Expression(ignore_case).ways(parsed, 0)
        except _SlowError as error:
            return str(error)
        re.compile(pattern)
    if ways.number > _MOST_WAYS:
        return "too many of its repeats or choices can match the same text; write what must stand between them"
    return ""


def _shown(pattern: str) -> str:
    return repr(pattern) if len(pattern) <= 80 else f"{pattern[:80]!r}…"


class _SlowError(Exception):
    """Something in an expression that can take long to match."""


class _Ways(NamedTuple):
    """A bound on the number of ways to match a text from one place on.

    `wide` repeats may end at any place, `narrow` ones only before one of a few letters; `choices` are the other ways.
    """

    wide: int = 0
    narrow: int = 0
    choices: float = 1.0

    @property
    def number(self) -> float:
        """How many ways there are: repeats in a row end at places in order, hence the factorials."""
        wide, narrow = min(self.wide, _PLACES), min(self.narrow, _FEW_PLACES)
        return self.choices * _PLACES**wide / factorial(wide) * _FEW_PLACES**narrow / factorial(narrow)

    @classmethod
    def in_turn(cls, parts: Iterable[_Ways]) -> _Ways:
        """Return the ways to match one part after the other."""
        found = list(parts)
        choices = min(1e30, prod(part.choices for part in found))
        return cls(sum(part.wide for part in found), sum(part.narrow for part in found), choices)

    @classmethod
    def of_any(cls, parts: Sequence[_Ways], at_once: int) -> _Ways:
        """Return the ways to match one of the parts, of which as many as `at_once` can match the same text."""
        wide, narrow, choices = (max(column) for column in zip(*parts, strict=True))
        return cls(wide, narrow, min(1e30, choices * max(1, at_once)))


class _Expression:
    """What can follow what in an expression, as `re` parses it: sequences of pairs of an operation and its arguments.

    In all methods `after` is the set of characters that can follow a part.
    """

    def __init__(self, ignore_case: bool) -> None:
        self.ignore_case = ignore_case
        # By the identity of a node, for groups within groups would ask again and again.
        self._begins: dict[int, int] = {}
        self._may_be_empty: dict[int, bool] = {}

    def ways(self, sequence: Any, after: int) -> _Ways:
        """Return a bound on the ways to match a sequence; raise _SlowError at a repeat that has too many."""
        found = []
        for node in reversed(list(sequence)):
            found.append(self._ways_of(node, after))
            after = self._first_of(node) | (after if self._can_be_empty(node) else 0)
        return _Ways.in_turn(found)

    def _ways_of(self, node: Any, after: int) -> _Ways:
        name, _ = node
        if _is_repeat(node):
            return self._ways_of_repeat(node, after)
        branches = _branches(node)
        if not branches:
            return _Ways()
        if len(branches) == 1:
            inner = self.ways(branches[0], after)
            # What looks ahead or back is tried wherever the part before it may end.
            return _Ways.in_turn([inner, _Ways(narrow=1)]) if _is_assertion(name) else inner
        return _Ways.of_any([self.ways(branch, after) for branch in branches], self._at_once(branches, after))

    def _ways_of_repeat(self, node: Any, after: int) -> _Ways:
        _, (least, most, content) = node
        unbounded = most == _constants.MAXREPEAT
        if least > _MOST_REPEATS or (most > _MOST_REPEATS and not unbounded):
            raise _SlowError(f"it repeats something more than {_MOST_REPEATS} times")
        first = self._first(content)
        if most == 1:
            ways = self.ways(content, after)
            return _Ways.of_any([ways], 2 if least == 0 and (first & after or self._empty(content)) else 1)
        if not self._empty(content) and self._is_determined(content, first):
            assertions = self._assertions(content)
            if least == most or not after or (_is_one_character(content) and not first & after):
                return assertions  # there is one place for its end
            few = self._is_few(after)
            bound = most - least + 1
            if not unbounded and bound <= (_FEW_PLACES if few else _PLACES):
                end = _Ways(choices=bound)
            else:
                end = _Ways(narrow=1) if few else _Ways(wide=1)
            return _Ways.in_turn([end, assertions])
        if most > _UNROLLED:
            raise _SlowError(
                "it repeats something that can match the same text in several ways, as (a+)+ and (.*x)* do"
            )
        copies = [self.ways(content, after | first)] * most
        return _Ways.in_turn([*copies, _Ways(choices=float(most))])

    def _assertions(self, sequence: Any) -> _Ways:
        """Return the ways to match what looks ahead or back anywhere in a sequence."""
        found = []
        for node in sequence:
            for branch in _branches(node):
                found.append(self.ways(branch, 0) if _is_assertion(node[0]) else self._assertions(branch))
        return _Ways.in_turn(found)

    def _is_determined(self, sequence: Any, after: int) -> bool:
        """Say whether at each place of a text one character decides how a repeated sequence goes on."""
        for node in reversed(list(sequence)):
            branches, first, can_be_empty = _branches(node), self._first_of(node), self._can_be_empty(node)
            if _is_repeat(node):
                _, (least, most, content) = node
                if (least != most and first & after) or self._empty(content):
                    return False
                if not self._is_determined(content, after | (first if most > 1 else 0)):
                    return False
            elif branches and not _is_assertion(node[0]):
                firsts = [self._first(branch) for branch in branches]
                empties = [self._empty(branch) for branch in branches]
                sets = [*firsts, after] if len(branches) > 1 and any(empties) else firsts
                if sum(empties) > 1 or _overlap(sets) or not all(self._is_determined(b, after) for b in branches):
                    return False
            elif node[0].name == "GROUPREF":
                return False
            after = first | (after if can_be_empty else 0)
        return True

    def _at_once(self, branches: Sequence[Any], after: int) -> int:
        """Return how many branches can match the same text at most."""
        texts = [_literal(branch) for branch in branches]
        if all(text is not None for text in texts) and not self.ignore_case:
            return _longest_chain([text for text in texts if text is not None])
        firsts = [self._first(branch) | (after if self._empty(branch) else 0) for branch in branches]
        empty = sum(self._empty(branch) for branch in branches)
        return max(empty, *(sum(first >> bit & 1 for first in firsts) for bit in range(129)))

    def _is_few(self, characters: int) -> bool:
        letters = {chr(code).lower() for code in range(128) if characters >> code & 1}
        return not characters & _OTHERS and len(letters) <= _FEW_LETTERS

    def _first(self, sequence: Any) -> int:
        """Return the set of characters with which a match of a sequence can begin."""
        characters = 0
        for node in sequence:
            characters |= self._first_of(node)
            if not self._can_be_empty(node):
                break
        return characters

    def _empty(self, sequence: Any) -> bool:
        return all(self._can_be_empty(node) for node in sequence)

    def _first_of(self, node: Any) -> int:
        if id(node) not in self._begins:
            self._begins[id(node)] = self._find_first(node)
        return self._begins[id(node)]

    def _find_first(self, node: Any) -> int:
        name, arguments = node
        if (characters := _characters(node)) is not None:
            return _both_cases(characters) if self.ignore_case else characters
        if name.name == "GROUPREF":
            return _ALL
        if _is_repeat(node):
            return self._first(arguments[2]) if arguments[1] else 0
        return 0 if _is_assertion(name) else functools.reduce(int.__or__, map(self._first, _branches(node)), 0)

    def _can_be_empty(self, node: Any) -> bool:
        if id(node) not in self._may_be_empty:
            self._may_be_empty[id(node)] = self._find_empty(node)
        return self._may_be_empty[id(node)]

    def _find_empty(self, node: Any) -> bool:
        name, arguments = node
        if _characters(node) is not None:
            return False
        if _is_repeat(node):
            return arguments[0] == 0 or self._empty(arguments[2])
        branches = _branches(node)
        return _is_assertion(name) or not branches or any(map(self._empty, branches))


def _is_repeat(node: Any) -> bool:
    return node[0].name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT")


def _is_assertion(name: Any) -> bool:
    return name.name in ("ASSERT", "ASSERT_NOT")


def _is_one_character(sequence: Any) -> bool:
    if len(sequence) != 1:
        return False
    branches = _branches(sequence[0])
    return _is_one_character(branches[0]) if len(branches) == 1 else _characters(sequence[0]) is not None


def _branches(node: Any) -> list[Any]:
    """Return the sequences of which a node that is not a repeat matches one."""
    name, arguments = node
    match name.name:
        case "BRANCH":
            return list(arguments[1])
        case "SUBPATTERN":
            return [arguments[3]]
        case "ATOMIC_GROUP":
            return [arguments]
        case "ASSERT" | "ASSERT_NOT":
            return [arguments[1]]
        case "GROUPREF_EXISTS":
            return [arguments[1], arguments[2] or []]
    return []


def _letters(sequence: Any) -> int:
    """Return how many characters the ranges in a sequence have."""
    count = 0
    for node in sequence:
        name, arguments = node
        if name.name == "IN":
            count += sum(item[1][1] - item[1][0] for item in arguments if item[0].name == "RANGE")
        for inner in [arguments[2]] if _is_repeat(node) else _branches(node):
            count += _letters(inner)
    return count


def _characters(node: Any) -> int | None:
    """Return the set of characters that a node matches one of, or None if it is of another kind."""
    name, arguments = node
    match name.name:
        case "LITERAL":
            return _range(arguments, arguments)
        case "NOT_LITERAL":
            return _ALL & ~_range(arguments, arguments) | _OTHERS
        case "ANY" | "ANY_ALL":
            return _ALL
        case "RANGE":
            return _range(*arguments)
        case "CATEGORY":
            return _category(arguments.name)
        case "IN":
            found = functools.reduce(int.__or__, (_characters(item) or 0 for item in arguments), 0)
            return _ALL & ~found | _OTHERS if arguments[0][0].name == "NEGATE" else found
    return None


@functools.lru_cache(maxsize=1024)
def _range(low: int, high: int) -> int:
    ascii_part = sum(1 << code for code in range(low, min(high, 127) + 1))
    return ascii_part | (_OTHERS if high > 127 else 0)


@functools.cache
def _category(name: str) -> int:
    kinds: dict[str, Callable[[str], bool]] = {
        "DIGIT": str.isdigit,
        "SPACE": str.isspace,
        "WORD": lambda character: character.isalnum() or character == "_",
    }
    holds = kinds[name.rpartition("_")[2]]
    found = sum(1 << code for code in range(128) if holds(chr(code)) != ("_NOT_" in name))
    return found | _OTHERS


def _both_cases(characters: int) -> int:
    """Return a set of characters with the other case of each; a few letters have one outside ASCII."""
    found = characters | _OTHERS
    for code in range(128):
        if characters >> code & 1:
            found |= 1 << ord(chr(code).swapcase())
    return found if not characters & _OTHERS else found | 1 << ord("k") | 1 << ord("K") | 1 << ord("s") | 1 << ord("S")


def _overlap(sets: Sequence[int]) -> bool:
    seen = 0
    for characters in sets:
        if seen & characters:
            return True
        seen |= characters
    return False


def _literal(sequence: Any) -> str | None:
    """Return the text that a sequence of single letters matches, or None for another one."""
    if all(name.name == "LITERAL" for name, _ in sequence):
        return "".join(chr(code) for _, code in sequence)
    return None


def _longest_chain(texts: Sequence[str]) -> int:
    """Return how many of the texts begin one another at most: that many can match at one place."""
    longest, open_ones = 0, list[str]()
    for text in sorted(texts):
        while open_ones and not text.startswith(open_ones[-1]):
            open_ones.pop()
        open_ones.append(text)
        longest = max(longest, len(open_ones))
    return longest
