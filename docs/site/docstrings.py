"""Docstrings for Markdown: examples become blocks of code, and arguments that share a line get one each."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import griffe

_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n(?!\s*$).*)*", re.M)  # from a prompt to the next blank line
_SECTION = re.compile(r"^(Args|Attributes|Raises|Warns):\n((?: +.*\n?)+)", re.M)
# What begins another item within a line: names, then a colon.
_ITEM = re.compile(r"(?<=[.;]) ((?:\w+, )*(\w+)): ")
_PAIR = re.compile(r"^( +)(\w+), (\w+): ", re.M)  # two that share what is said of them
_ERROR = re.compile(r"[A-Z]\w*(Error|Warning)")


class Tidied(griffe.Extension):
    """Rewrite every docstring before it is parsed."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Rewrite the docstring of an object."""
        if obj.docstring is not None:
            names = [parameter.name for parameter in obj.parameters] if obj.is_function or obj.is_class else []
            known = {*names, *(obj.members if obj.is_class else ())}
            obj.docstring.value = fenced(itemised(obj.docstring.value, known))


def fenced(text: str) -> str:
    """Return a docstring with its examples in fences.

    >>> fenced("Return two.\\n\\n>>> 1 + 1\\n2").splitlines()
    ['Return two.', '', '```pycon', '>>> 1 + 1', '2', '```']
    """
    return _EXAMPLE.sub(lambda match: f"{match[1]}```pycon\n{match[0]}\n{match[1]}```", text)


def itemised(text: str, names: Collection[str]) -> str:
    """Return a docstring in whose sections every argument, attribute or error begins a line.

    >>> print(itemised("Args:\\n    rank: R. alpha: α; or so: more.", ["rank", "alpha"]))
    Args:
        rank: R.
        alpha: α; or so: more.
    """

    def apart(section: re.Match[str]) -> str:
        indent = re.match(" *", section[2])[0]  # type: ignore[index]

        def item(found: re.Match[str]) -> str:
            known = found[2] in names or _ERROR.fullmatch(found[2])
            return f"\n{indent}{found[1]}: " if known else found[0]

        def pair(found: re.Match[str]) -> str:
            both = found[2] in names and found[3] in names
            return f"{found[1]}{found[2]}: see `{found[3]}`.\n{found[1]}{found[3]}: " if both else found[0]

        return f"{section[1]}:\n{_PAIR.sub(pair, _ITEM.sub(item, section[2]))}"

    return _SECTION.sub(apart, text)
