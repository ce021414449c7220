"""Updates that a client sends a second time: told by a fingerprint of what it sent, bit for bit.

A client that sends an old update again, by mistake or on purpose, would pull the server back to an old state. Its
shapes, its size and, where all modules are trained, its modules are those asked for. Every usable update's fingerprint
is remembered, the last `REMEMBERED` of each client, with the version of the server's state that it was trained from.
The same fingerprint at another version is a replay; at the same version, after rounds that changed nothing, it may be
honest training repeated. A client that changes a replay in any bit is not found by this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fed.seeding import seed_of
from fed.types import ClientStart, ClientUpdate, RunState, Sent, ServerState

REMEMBERED = 16  # of each client; what a client sent longer ago is no longer known
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a number
_SPREAD = 0x1E3779B97F4A7C15  # odd; its multiples give each place of a tensor a weight of its own


def version(server: ServerState) -> int:
    """Return the round that last changed the server's state."""
    return server.round - server.idle_rounds


def fingerprint(start: ClientStart, update: ClientUpdate) -> int:
    """Return 63 bits that depend on every bit of the trained factors and head, and on which modules these are.

    Tensors are read as integers x_k, and Σ_k (2 k c + 1) x_k is taken modulo 2⁶⁴ on their own device, with c odd.
    """
    sums = [_sum(own) for own in _tensors(start, update)]
    chosen = [f"{matrix} {tuple(modules)}" for matrix, modules in update.selected.items()]
    return seed_of(*(torch.stack(sums).tolist() if sums else ()), *chosen) % 2**63


def replay_fault(
    state: RunState, start: ClientStart, head: Mapping[str, Tensor], update: ClientUpdate, sent: Sent
) -> str | None:
    """Return in words that an update was sent before, or None; `head` is what the client's head began with.

    `sent` is the update's own version and fingerprint. An update that changed nothing at all is no replay.
    """
    known = state.sent.get(update.client.id, ())
    earlier = [old for old in known if old.fingerprint == sent.fingerprint and old.version != sent.version]
    if not earlier or fingerprint(start, _unchanged(start, head, update)) == sent.fingerprint:
        return None
    return f"it is the update that it sent for the state after round {earlier[-1].version}"


def remembered(known: Sequence[Sent], sent: Sent) -> tuple[Sent, ...]:
    """Return what is known of a client's updates after another one."""
    return (*known, sent)[-REMEMBERED:]


def _unchanged(start: ClientStart, head: Mapping[str, Tensor], update: ClientUpdate) -> ClientUpdate:
    """Return the update of a client that ended with what it began with."""
    factors = {}
    for matrix, (A, B) in start.factors.items():
        chosen = list(update.selected[matrix])
        factors[matrix] = A[chosen], B[:, chosen]
    return ClientUpdate(update.client, factors, update.selected, head, update.weight, update.steps, update.loss)


def _tensors(start: ClientStart, update: ClientUpdate) -> list[Tensor]:
    trained = [
        pair["AB".index(side)]
        for matrix in start.factors
        for pair in [update.factors[matrix]]
        for side in start.trained
    ]
    return [*trained, *(update.head[name] for name in sorted(update.head))]


def _sum(values: Tensor) -> Tensor:
    """Return Σ_k (2 k c + 1) x_k modulo 2⁶⁴ of a tensor's numbers, read as integers x_k: a scalar int64."""
    numbers = values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()]).long()
    places = torch.arange(len(numbers), device=values.device)
    return (numbers * (places * (2 * _SPREAD % 2**63) + 1)).sum()
