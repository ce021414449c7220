"""The expressions in the source code of a method that read the weight of a child module, such as `self.proj.weight`.

Only reads of values count: a dtype, device or shape is the same with an adapter.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType, ModuleType

from plora_kernels.nn.conditions import Condition

# What does not depend on a tensor's values.
_ATTRIBUTES = {
    *("device", "dtype", "element_size", "get_device", "is_cuda", "is_floating_point", "is_meta", "itemsize", "layout"),
    *("dim", "grad", "ndim", "ndimension", "nelement", "numel", "requires_grad", "shape", "size", "stride"),
    *("new_empty", "new_full", "new_ones", "new_tensor", "new_zeros"),
}
_FUNCTIONS = {
    *("getattr", "hasattr", "id", "is_floating_point", "is_tensor", "isinstance", "len", "print", "repr", "type"),
    *("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like", "to", "type_as"),
}
# What hands on the elements of a collection of modules.
_ITERATIONS = {"enumerate", "iter", "list", "reversed", "tuple", "zip", "items", "values", "children"}


@dataclass(frozen=True)
class Read:
    """A read of a child's weight. `path` is an expression for the child's name relative to the module.

    The path starts at `self` (anchored) or at any other value. With `through`, the method of this name gets the child
    as an argument, and reads the weight if `reads_a_local` says so of it.
    """

    path: str
    anchored: bool
    conditions: tuple[Condition, ...]
    through: str | None = None

    def matches(self, name: str) -> bool:
        """Say whether this may read the weight of the child of this relative name."""
        return re.fullmatch(self.path if self.anchored else rf"(.*\.)?{self.path}", name) is not None


def names_in(code: CodeType) -> set[str]:
    """Return the globals and attributes that the code mentions, with those of functions inside it."""
    nested = (const for const in code.co_consts if isinstance(const, CodeType))
    return set(code.co_names).union(*(names_in(inner) for inner in nested))


@functools.lru_cache(maxsize=4096)
def reads_in(function: FunctionType) -> tuple[Read, ...]:
    """Return the reads of children's weights in a method; none if its source is not available."""
    tree = _source_of(function)
    return () if tree is None else tuple(_Source(tree).reads(function))


@functools.lru_cache(maxsize=4096)
def reads_a_local(function: FunctionType) -> bool:
    """Say whether a function reads the weight of an argument or of another local value, such as `proj.weight`."""
    if "weight" not in names_in(function.__code__):
        return False
    tree = _source_of(function)
    return tree is not None and _Source(tree).reads_a_local()


def _source_of(function: FunctionType) -> ast.FunctionDef | None:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree.body[0] if tree.body and isinstance(tree.body[0], ast.FunctionDef) else None


class _Source:
    """The syntax tree of one function, with the parent and the conditions of every expression."""

    def __init__(self, tree: ast.FunctionDef) -> None:
        arguments = [*tree.args.posonlyargs, *tree.args.args]
        self.me = arguments[0].arg if arguments else ""
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.conditions: dict[ast.AST, tuple[Condition, ...]] = {}
        self._note_conditions(tree, ())

    def _note_conditions(self, node: ast.AST, known: tuple[Condition, ...]) -> None:
        """Note under which conditions each expression inside `node` runs."""
        self.conditions[node] = known
        for field, value in ast.iter_fields(node):
            inside = known
            if isinstance(node, ast.If | ast.IfExp) and field in ("body", "orelse"):
                inside = (*known, Condition(node.test, field == "body", self.me))
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    self._note_conditions(child, inside)
                if isinstance(child, ast.If):  # what follows an `if` that leaves runs only without that outcome
                    for block, outcome in ((child.body, False), (child.orelse, True)):
                        if block and isinstance(block[-1], ast.Return | ast.Raise):
                            inside = (*inside, Condition(child.test, outcome, self.me))

    def reads(self, function: FunctionType) -> Iterator[Read]:
        """Yield the reads of children's weights, by the function itself or by those it calls."""
        a_local = self.reads_a_local()
        for node in ast.walk(self.tree):
            base = _owner_of_weight(node)
            if base is not None and self._is_used(node):
                root, parts = _path(base)
                if parts:
                    yield Read(r"\.".join(parts), root == self.me, self.conditions[node])
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                root, parts = _path(node)
                if parts and root == self.me:
                    yield from self._reads_of_handed(node, parts, function, a_local)

    def reads_a_local(self) -> bool:
        """Say whether the weight of a local value, such as an argument, is read."""
        bases = ((node, _owner_of_weight(node)) for node in ast.walk(self.tree))
        return any(isinstance(base, ast.Name) and base.id != self.me and self._is_used(node) for node, base in bases)

    def _reads_of_handed(
        self, node: ast.Attribute, parts: Sequence[str], function: FunctionType, a_local: bool
    ) -> Iterator[Read]:
        """Yield the read of a child that is not called but handed on: to a function, or to a local name."""
        path, conditions = r"\.".join(parts) + r"(\.[^.]+)?", self.conditions[node]
        user = self.parents[node]
        if isinstance(user, ast.Attribute) and user.attr in _ITERATIONS:
            user = self.parents[user]
        elif isinstance(user, ast.Attribute | ast.Subscript) or (isinstance(user, ast.Call) and user.func is node):
            return
        while isinstance(user, ast.keyword | ast.Starred):
            user = self.parents[user]
        if isinstance(user, ast.Call) and _called_name(user) not in _ITERATIONS:
            root, method = _path(user.func)
            if root == self.me and len(method) == 1:
                yield Read(path, True, conditions, through=method[0])
            else:
                called = _resolve(user.func, function)
                if called is not None and reads_a_local(called):
                    yield Read(path, True, conditions)
        elif a_local and not isinstance(user, ast.Compare):
            yield Read(path, True, conditions)

    def _is_used(self, node: ast.AST, seen: frozenset[str] = frozenset()) -> bool:
        """Say whether more of a tensor than its dtype, device or shape is used."""
        user = self.parents[node]
        while isinstance(user, ast.keyword | ast.Starred):
            user = self.parents[user]
        if isinstance(user, ast.Attribute):
            return user.attr not in _ATTRIBUTES and (user.attr != "data" or self._is_used(user, seen))
        if isinstance(user, ast.Call):
            return _called_name(user) not in _FUNCTIONS
        if isinstance(user, ast.Compare):
            return not all(isinstance(op, ast.Is | ast.IsNot) for op in user.ops)
        target = user.targets[0] if isinstance(user, ast.Assign) else getattr(user, "target", None)
        if isinstance(user, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name):
            name = target.id
            loads = (n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load))
            return name not in seen and any(self._is_used(n, seen | {name}) for n in loads if n.id == name)
        return not isinstance(user, ast.Expr)


def _owner_of_weight(node: ast.AST) -> ast.expr | None:
    """Return the expression whose weight this reads, written `x.weight` or `getattr(x, "weight")`; None for others."""
    if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
        return node.value
    if isinstance(node, ast.Call) and _called_name(node) == "getattr" and len(node.args) > 1:
        name = node.args[1]
        return node.args[0] if isinstance(name, ast.Constant) and name.value == "weight" else None
    return None


def _path(node: ast.expr) -> tuple[str, list[str]]:
    """Return the name that an expression starts with ("" for none), and its attributes as expressions for names."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute | ast.Subscript):
        parts.append(re.escape(node.attr) if isinstance(node, ast.Attribute) else r"[^.]+")
        node = node.value
    return node.id if isinstance(node, ast.Name) else "", parts[::-1]


def _called_name(call: ast.Call) -> str:
    """Return the last part of the name that is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def _resolve(node: ast.expr, function: FunctionType) -> FunctionType | None:
    """Return the plain function that an expression such as `helper` or `helpers.project` means in `function`."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    found = function.__globals__.get(node.id)
    for name in reversed(names):
        found = getattr(found, name, None) if isinstance(found, ModuleType) else None
    found = inspect.unwrap(found) if isinstance(found, FunctionType) else None
    return found if isinstance(found, FunctionType) else None
