"""Clipping of what a client changed, module by module, so that one update moves no module further than a limit.

Let a client begin with the pair (a, b) of a module and end with (a + u, b + v). It is pulled back on the straight line
between the two to (a + t u, b + t v) with the largest t in [0, 1] for which

    D(t) = t (β ‖u‖ + ‖a‖ ‖v‖) + t² ‖u‖ ‖v‖ ≤ M,    M = `server.max_update_norm`,
    β = max(‖b‖, min(‖a‖, M / ‖a‖)).

D bounds the change of the module's product from above by the triangle inequality, for every point of the line:
‖(b + t v)(a + t u)ᵀ − b aᵀ‖_F = ‖t b uᵀ + t v aᵀ + t² v uᵀ‖_F ≤ D(t). It is taken in place of that norm because two
kinds of hostile pairs leave the product as it was and spoil training all the same: (−a, −b) or (c a, b / c), and while
b = 0, as in the first round, any a whatever. D sees them: it counts a b of 0 as one that the next update might make
of it, but as no longer than a. D is the same for (c a, b / c) as for (a, b) unless b is that short, it grows with t,
and has t in closed form.

The head is clipped as one vector: h + t w with t ‖w‖ ≤ M. All norms are in fp64; what is within M stays bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fed.types import ClientResult, ClientStart, ClientUpdate, Factors


def clip(start: ClientStart, head: Mapping[str, Tensor], update: ClientUpdate, most: float) -> ClientUpdate:
    """Return the update with no module, nor the head, changed by more than `most`; the same object if none was.

    `head` is what the client's head began with; empty if its head is not sent. The update has no fault.

    >>> from fed.types import Client
    >>> start = ClientStart({"m": (torch.ones(1, 1), torch.zeros(1, 1))}, {"m": (0,)}, 1.0, "folded")
    >>> far = {"m": (torch.ones(1, 1), torch.full((1, 1), 4.0))}
    >>> clip(start, {}, ClientUpdate(Client(0, 1, 8), far, {"m": (0,)}, {}, 1.0, 1, 0.5), 1.0).factors["m"][1]
    tensor([[1.]])
    """
    factors, moved = {}, False
    for matrix, (A, B) in update.factors.items():
        begun_A, begun_B = start.factors[matrix]
        chosen = list(update.selected[matrix])
        factors[matrix], within = _clip_modules((begun_A[chosen], begun_B[:, chosen]), (A, B), start.trained, most)
        moved = moved or not within
    clipped_head = _clip_head(head, update.head, most) if head else update.head
    if not moved and clipped_head is update.head:
        return update
    return replace(update, factors=factors, head=clipped_head)


def clip_usable(results: Sequence[ClientResult], head: Mapping[str, Tensor], most: float) -> dict[int, ClientResult]:
    """Return, by client, the usable results of which the server takes less, with their clipped updates.

    `head` is the head that clients begin with and send, empty if they do not; with `most` = 0 nothing is clipped.
    """
    clipped = {}
    for result in results if most else ():
        if result.fault is None:
            update = clip(result.start, head, result.update, most)
            if update is not result.update:
                clipped[result.client.id] = replace(result, update=update)
    return clipped


def _clip_modules(begun: Factors, ended: Factors, sides: str, most: float) -> tuple[Factors, bool]:
    """Return A (r, K) and B (N, r) clipped, and whether they were within the limit; `sides` were trained."""
    zero = torch.zeros(len(begun[0]), dtype=torch.float64, device=begun[0].device)
    changes = [end.double() - start.double() for start, end in zip(begun, ended, strict=True)]
    a, b = begun[0].double().norm(dim=1), begun[1].double().norm(dim=0)  # (r,)
    u = changes[0].norm(dim=1) if "A" in sides else zero
    v = changes[1].norm(dim=0) if "B" in sides else zero
    b = torch.where(a > 0, torch.maximum(b, torch.minimum(a, most / a)), b)
    first, second = b * u + a * v, u * v
    within = first + second <= most
    if bool(within.all()):
        return ended, True
    share = 2 * most / (first + (first.square() + 4 * second * most).sqrt())  # solves D(t) = M without cancellation
    share = share.nan_to_num(nan=0.0).clamp(max=1.0)  # NaN: norms that are infinite
    A, B = (
        torch.where(keep, end, (start.double() + part * change).to(end.dtype))
        for start, end, change, part, keep in zip(
            begun, ended, changes, (share[:, None], share), (within[:, None], within), strict=True
        )
    )
    return (A if "A" in sides else ended[0], B if "B" in sides else ended[1]), False


def _clip_head(begun: Mapping[str, Tensor], ended: Mapping[str, Tensor], most: float) -> Mapping[str, Tensor]:
    changes = {name: ended[name].double() - own.double() for name, own in begun.items()}
    norm = torch.stack([change.norm() for change in changes.values()]).norm().item()
    if norm <= most:
        return ended
    return {name: (own.double() + most / norm * changes[name]).to(own.dtype) for name, own in begun.items()}
