"""Evaluate conditions in a module's source code that its settings decide, such as `self.config.clip is not None`."""

from __future__ import annotations

import ast
import dis
import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn

_UNKNOWN = object()  # not decided by the module's settings alone
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}


@dataclass(frozen=True)
class Condition:
    """A test of an `if` in a method, and the outcome under which the code in question runs.

    `me` is what the method calls its module: by custom, self.
    """

    test: ast.expr
    outcome: bool
    me: str = "self"


def may_hold(condition: Condition, module: nn.Module) -> bool:
    """Say whether a condition holds for a module, or may hold where its settings do not decide it."""
    value = _evaluate(condition.test, condition.me, module)
    return value is _UNKNOWN or bool(value) == condition.outcome


def _evaluate(node: ast.expr, me: str, module: nn.Module) -> Any:
    """Return the value of an expression of constants and the module's attributes, or _UNKNOWN."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        return _attribute(node, me, module)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _evaluate(node.operand, me, module)
        return value if value is _UNKNOWN else not value
    if isinstance(node, ast.BoolOp):
        values = [_evaluate(value, me, module) for value in node.values]
        decisive = isinstance(node.op, ast.Or)  # one true value decides an `or`, one false value an `and`
        if any(value is not _UNKNOWN and bool(value) == decisive for value in values):
            return decisive
        return _UNKNOWN if _UNKNOWN in values else not decisive
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _evaluate(node.left, me, module), _evaluate(node.comparators[0], me, module)
        compare = _COMPARISONS.get(type(node.ops[0]))
        if compare is not None and left is not _UNKNOWN and right is not _UNKNOWN:
            try:
                return compare(left, right)
            except TypeError:  # such as None > 1
                return _UNKNOWN
    return _UNKNOWN


def _attribute(node: ast.Attribute, me: str, module: nn.Module) -> Any:
    """Return a setting that an expression such as `self.config.clip` names, or _UNKNOWN: other values may change."""
    names = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        names.append(value.attr)
        value = value.value
    if not isinstance(value, ast.Name) or value.id != me or "training" in names:
        return _UNKNOWN
    kind: Any = type(module)  # mypy does not take a class of modules for hashable
    if len(names) == 1 and _is_set_later(kind, names[0]):
        return _UNKNOWN
    found: Any = module
    for name in reversed(names):
        if isinstance(found, nn.Module):  # of a module, no property: it may compute something
            found = {**found._modules, **vars(found)}.get(name, _UNKNOWN)
        else:
            found = getattr(found, name, _UNKNOWN)
        if found is _UNKNOWN:
            return _UNKNOWN
    return found if found is None or isinstance(found, bool | int | float | str) else _UNKNOWN


@functools.lru_cache(maxsize=1024)
def _is_set_later(kind: type, name: str) -> bool:
    """Say whether a method of a class other than __init__ sets the attribute, so that it is no setting."""
    spaces = (vars(ancestor).items() for ancestor in kind.__mro__)
    methods = (value for space in spaces for method, value in space if method != "__init__")
    codes = (method.__code__ for method in methods if isinstance(method, FunctionType))
    return any(
        step.opname == "STORE_ATTR" and step.argval == name for code in codes for step in dis.get_instructions(code)
    )
