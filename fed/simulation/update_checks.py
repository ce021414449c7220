"""Checks of what clients send, before it is aggregated, and of the server's state after that."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fed.config.training import TrainConfig
from fed.training.local import Job, weight_of
from fed.types import ClientStart, ClientUpdate, ServerState

# Limits of an update's weight. Weights are 1 or numbers of samples; beyond these limits their shares would be rounded.
LEAST_WEIGHT, MOST_WEIGHT = 1e-9, 1e15
MOST_POSITIONS = 10**15


class Asked(NamedTuple):
    """What an update must say of a job: its steps, its weight, and how many tokens it can have trained on."""

    steps: int
    weight: float
    least_tokens: int
    most_tokens: int


def asked_of(job: Job, settings: TrainConfig) -> Asked:
    """Return what the update of a job must say; of its tokens the bounds, by the client's shortest and longest row."""
    lengths = job.split.lengths(torch.arange(len(job.split)))
    rows = job.steps * min(settings.batch_size, len(job.split))
    return Asked(job.steps, weight_of(job.client, settings), rows * int(lengths.min()), rows * int(lengths.max()))


def find_fault(server: ServerState, start: ClientStart, update: ClientUpdate, asked: Asked | None = None) -> str | None:
    """Return in words why an update cannot be aggregated, or None if it can.

    `server` is the state before the round, `start` what the client started the round with, and `asked` what its job
    lets the server expect of steps, weight and tokens, if known. An update is usable if

    - its loss is finite, it took at least one step, and its weight is from `LEAST_WEIGHT` to `MOST_WEIGHT`;
    - with `asked`, steps and weight are as there, tokens within its bounds, and no more of them than positions;
    - it has exactly the modules that the client was to train, or, if the start has a penalty, the first of them that
      remain after pruning; and A (r_i, K) and B (N, r_i) of every matrix have the start's dtype and device;
    - a factor that the client was to hold fixed is the start's, bit for bit;
    - its head has the server's parameters, with equal shapes, dtypes and devices; and nothing requires gradients;
    - every value is finite, and no two tensors share memory, neither among themselves nor with the server or the start;
    - what it keeps are dense tensors by name, and it says that it sends what its method sends.

    >>> from fed.types import Adapter, Client
    >>> A, B = torch.ones(1, 3), torch.ones(2, 1)
    >>> start = ClientStart({"m": (A, B)}, {"m": (0,)}, 1.0, "folded")
    >>> update = ClientUpdate(Client(0, 1, 8), {"m": (A + 1, B[:1] + 1)}, {"m": (0,)}, {}, 1.0, steps=1, loss=0.5)
    >>> find_fault(ServerState(Adapter({"m": (A, B)}, 1.0)), start, update)
    'its m lora_B is (1, 1); (2, 1) would be right'
    """
    return (
        _figure_fault(start, update)
        or (asked and _count_fault(asked, update))
        or _selection_fault(start, update)
        or _factor_fault(start, update)
        or _head_fault(server, update)
        or _memory_fault(update)
        or _fixed_fault(start, update)
        or _value_fault(update)
        or _sharing_fault(server, start, update)
    )


def hint_of_overflow(update: ClientUpdate, dtypes: Collection[torch.dtype]) -> str:
    """Return what to add to the fault of an update that is not finite, if the model computes in one of these dtypes."""
    if torch.float16 not in dtypes or (_is_finite(update.loss) and _value_fault(update) is None):
        return ""
    return "; float16 overflows beyond 65504, so model.dtype = 'bfloat16' may be right"


def state_fault(server: ServerState) -> str | None:
    """Return which tensor of a server's state holds NaN or infinity, in words, or None if all are finite."""
    named = {f"the server's {matrix} lora_{side}": own for matrix, side, own in _sides(server.adapter.factors)}
    kinds = {"the server's": server.head, "what is folded into": server.base_delta, "the moment": server.moments}
    for kind, tensors in kinds.items():
        named |= {f"{kind} {name}": tensor for name, tensor in tensors.items()}
    name = _first_not_finite(named)
    return None if name is None else f"{name} would hold NaN or infinity"


def growth(start: ClientStart, head: Mapping[str, Tensor], update: ClientUpdate) -> float:
    """Return ‖end‖ / ‖start‖, over all factors and the head that the client began with, `head`; fp64."""
    begun = _norm([*(own for _, _, own in _sides(start.factors)), *head.values()])
    ended = _norm([*(own for _, _, own in _sides(update.factors)), *update.head.values()])
    return ended / begun if begun else float("inf")


def _figure_fault(start: ClientStart, update: ClientUpdate) -> str | None:
    if not _is_number(update.loss):
        return f"its training loss is {_shown(update.loss)}; a number would be right"
    if not _is_finite(update.loss):
        return f"its training loss is {update.loss}"
    if type(update.steps) is not int or update.steps < 1:
        return f"its number of steps is {_shown(update.steps)}; an integer of at least 1 would be right"
    if not _is_number(update.weight) or not LEAST_WEIGHT <= update.weight <= MOST_WEIGHT:
        return (
            f"its weight is {_shown(update.weight)}; a number from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g} would be right"
        )
    sent = start.sends or start.trained
    if update.sent != sent:
        return f"it says that it sends {_shown(update.sent)}; {sent!r} would be right"
    return None


def _count_fault(asked: Asked, update: ClientUpdate) -> str | None:
    if update.steps != asked.steps:
        return f"it says that it took {update.steps} steps; {asked.steps} would be right"
    if update.weight != asked.weight:
        return f"its weight is {update.weight:g}; {asked.weight:g} would be right"
    least, most = asked.least_tokens, asked.most_tokens
    if type(update.tokens) is not int or not least <= update.tokens <= most:
        return f"it says that it trained on {_shown(update.tokens)} tokens; {least} to {most} would be right"
    if type(update.positions) is not int or not update.tokens <= update.positions <= MOST_POSITIONS:
        return (
            f"it says that it computed {_shown(update.positions)} tokens, padding included; at least {update.tokens} "
            "would be right"
        )
    return None


def _selection_fault(start: ClientStart, update: ClientUpdate) -> str | None:
    if fault := _names_fault("selection", update.selected, start.selected):
        return fault
    whole = {matrix: tuple(chosen) for matrix, chosen in start.selected.items()}
    allowed = [whole]
    if start.penalty is not None:
        allowed.append({matrix: chosen[: start.penalty.first] for matrix, chosen in whole.items()})
    for matrix, chosen in update.selected.items():
        if not isinstance(chosen, tuple | list) or any(type(module) is not int for module in chosen):
            return f"its selection of {matrix} is {_shown(chosen)}; a tuple of integers would be right"
        if all(tuple(chosen) != wanted[matrix] for wanted in allowed):
            return f"its selection of {matrix} is {_listed(chosen)}; {_listed(whole[matrix])} would be right"
    if {matrix: tuple(chosen) for matrix, chosen in update.selected.items()} not in allowed:
        return "it dropped modules of some matrices; of all or of none would be right"
    return None


def _factor_fault(start: ClientStart, update: ClientUpdate) -> str | None:
    if fault := _names_fault("modules", update.factors, start.factors):
        return fault
    for matrix, (A, B) in start.factors.items():
        pair, count = update.factors[matrix], len(update.selected[matrix])
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            return f"its modules of {matrix} are {_shown(pair)}; a tuple of A and B would be right"
        for side, own, like, shape in zip("AB", pair, (A, B), ((count, A.shape[1]), (B.shape[0], count)), strict=True):
            if fault := _tensor_fault(f"{matrix} lora_{side}", own, like, shape):
                return fault
    return None


def _fixed_fault(start: ClientStart, update: ClientUpdate) -> str | None:
    fixed = [side for side in "AB" if side not in start.trained]
    named = {}
    for matrix, side, own in _sides(update.factors):
        if side in fixed:
            begun, chosen = start.factors[matrix]["AB".index(side)], list(update.selected[matrix])
            named[f"{matrix} lora_{side}"] = (own == (begun[chosen] if side == "A" else begun[:, chosen])).all()
    same = torch.stack(list(named.values())).tolist() if named else []
    name = next((name for name, fine in zip(named, same, strict=True) if not fine), None)
    return None if name is None else f"its {name} was to be held fixed, and is not what the client started with"


def _head_fault(server: ServerState, update: ClientUpdate) -> str | None:
    if fault := _names_fault("head", update.head, server.head):
        return fault
    faults = (_tensor_fault(name, update.head[name], like, like.shape) for name, like in server.head.items())
    return next((fault for fault in faults if fault), None)


def _memory_fault(update: ClientUpdate) -> str | None:
    if not isinstance(update.memory, Mapping):
        return f"what it keeps is {_shown(update.memory)}; a mapping would be right"
    if update.memory is update.client.memory:  # checked when the client began to keep it
        return None
    for name, kept in update.memory.items():
        if not isinstance(name, str) or not _is_dense(kept) or kept.is_complex() or kept.is_meta:
            return f"what it keeps as {_shown(name)} is {_shown(kept)}; a dense tensor of numbers would be right"
    return None


def _value_fault(update: ClientUpdate) -> str | None:
    named = {f"{matrix} lora_{side}": own for matrix, side, own in _sides(update.factors)} | dict(update.head)
    name = _first_not_finite(named)
    if name is None and update.memory is not update.client.memory:
        known = {id(tensor) for tensor in named.values()}
        rest = {f"{name} that it keeps": kept for name, kept in update.memory.items() if id(kept) not in known}
        name = next((title for title, kept in rest.items() if _first_not_finite({title: kept})), None)
    return None if name is None else f"its {name} holds NaN or infinity"


def _sharing_fault(server: ServerState, start: ClientStart, update: ClientUpdate) -> str | None:
    """Return which tensor shares memory with another one, in words; factors held fixed may be the start's own."""
    own = {f"{matrix} lora_{side}": value for matrix, side, value in _sides(update.factors) if side in start.trained}
    own |= update.head
    received = (*_sides(start.factors), *_sides(server.adapter.factors))
    others = (*(value for _, _, value in received), *server.head.values())
    taken = {other.untyped_storage().data_ptr() for other in others if other.numel()}
    spans = sorted((*_span(value), name) for name, value in own.items() if value.numel())
    for name, value in own.items():
        if value.numel() and value.untyped_storage().data_ptr() in taken:
            return f"its {name} shares memory with what the client received; a copy would be right"
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            return f"its {name} and {other} share memory; copies would be right"
    return None


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first address of a tensor's elements and the one after the last."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + reach * tensor.element_size()


def _names_fault(what: str, found: Any, wanted: Collection[str]) -> str | None:
    if not isinstance(found, Mapping):
        return f"its {what} is {_shown(found)}; a mapping would be right"
    if missing := [name for name in wanted if name not in found]:
        return f"its {what} lacks {missing[0]}"
    if extra := [name for name in found if name not in wanted]:
        return f"its {what} holds {_shown(extra[0])}, which the server does not have"
    return None


def _tensor_fault(name: str, found: Any, like: Tensor, shape: Sequence[int]) -> str | None:
    if not _is_dense(found):
        return f"its {name} is {_shown(found)}; a dense tensor would be right"
    if found.device != like.device:
        return f"its {name} is on {found.device}; {like.device} would be right"
    if found.dtype != like.dtype:
        return f"its {name} is {found.dtype}; {like.dtype} would be right"
    if tuple(found.shape) != tuple(shape):
        return f"its {name} is {tuple(found.shape)}; {tuple(shape)} would be right"
    if found.requires_grad:  # the server's tensors would hold on to the graphs of all rounds
        return f"its {name} requires gradients; a detached tensor would be right"
    return None


def _first_not_finite(named: Mapping[str, Tensor]) -> str | None:
    if not named:
        return None
    finite = torch.stack([tensor.isfinite().all() for tensor in named.values()]).tolist()
    return next((name for name, fine in zip(named, finite, strict=True) if not fine), None)


def _norm(tensors: Sequence[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    return torch.stack(norms).norm().item() if norms else 0.0


def _sides(factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[tuple[str, str, Tensor]]:
    return [(matrix, side, own) for matrix, pair in factors.items() for side, own in zip("AB", pair, strict=True)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and -float("inf") < value < float("inf")


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested


def _listed(modules: Sequence[int]) -> str:
    return f"({', '.join(map(str, modules[:8]))}{', …' if len(modules) > 8 else ''})"


def _shown(value: Any) -> str:
    """Return a value as part of a line: plain values as they are, anything else by its kind."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} and {value.layout}"
    return repr(value)[:80] if isinstance(value, str | int | float | None) else f"a {type(value).__name__}"
