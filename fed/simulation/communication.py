"""Bytes that cross the network: payload, indices, head, and what was folded into the shared base meanwhile."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed.training.memory import tensor_bytes
from fed.types import Client, ClientStart, ClientUpdate, Factors, ServerState, Stack

# A module index is sent as int16: R is at most 256.
INDEX_BYTES = 2


def download_bytes(
    start: ClientStart, head: Mapping[str, Tensor], server: ServerState | None = None, client: Client | None = None
) -> int:
    """Return the bytes one client receives: the modules it was sent, the trained head, and what it missed.

    Σ_matrices m (K + N) · itemsize, of which only the factors the start names as received count, + Σ_head numel ·
    itemsize. The frozen base is there already and counts nothing; the selection is drawn from the shared seed and is
    not sent. Given the server and the client as they are before the round, everything folded into the base since
    the client last received it counts too, as the stacks it is made of: each round's once.
    """
    missed = 0
    if server is not None and client is not None:
        missed = sum(server.fold_bytes[max(client.last_round - 1, 0) :])
    return factor_bytes(start.factors, start.received) + tensor_bytes(head.values()) + missed


def upload_bytes(start: ClientStart, update: ClientUpdate, with_head: bool = True) -> int:
    """Return the bytes one client sends: its r_i modules, their indices and its trained head.

    Σ_matrices r_i ((K + N) · itemsize + 2) + Σ_head numel · itemsize, of A and B those that are sent. A client that
    was to train every module of a matrix sends no indices for it: they go without saying.
    """
    indices = 0
    for matrix, chosen in update.selected.items():
        if len(start.selected[matrix]) < start.factors[matrix][0].shape[0]:
            indices += INDEX_BYTES * len(chosen)
    head = tensor_bytes(update.head.values()) if with_head else 0
    return factor_bytes(update.factors, update.sent) + indices + head


def stack_bytes(stacks: Mapping[str, Stack]) -> int:
    """Return the bytes of what is folded into the base: every A and B of the stacks, and a weight for each module."""
    return sum(tensor_bytes(stack) for stack in stacks.values())


def factor_bytes(factors: Mapping[str, Factors], sides: str = "AB") -> int:
    """Return the bytes of every A and B at their own dtype's size, or of one of the two."""
    return sum(tensor_bytes(pair["AB".index(side)] for side in sides) for pair in factors.values())
