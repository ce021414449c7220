"""Bytes that cross the network: modules, their indices, the head, and changes to the base that a client missed."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fed.training.memory import tensor_bytes
from fed.types import Client, ClientStart, ClientUpdate, Factors, ServerState, Stack

# The bytes of a module index, which is sent as int16 (R is at most 256).
INDEX_BYTES = 2


def download_bytes(
    start: ClientStart, head: Mapping[str, Tensor], server: ServerState | None = None, client: Client | None = None
) -> int:
    """Return the bytes one client receives: its modules, the trained head, and the changes to the base it missed.

    Σ_matrices m (K + N) · itemsize + Σ_head numel · itemsize; of A and B only the factors in `start.received` count.
    The frozen base counts nothing because the client already has it; the selection counts nothing because the client
    draws it from the shared seed. With `server` and `client`, both as before the round, the stacks that were folded
    into the base since the client last received it count as well, those of each round once.
    """
    missed = 0
    if server is not None and client is not None:
        missed = sum(server.fold_bytes[max(client.last_round - 1, 0) :])
    return factor_bytes(start.factors, start.received) + tensor_bytes(head.values()) + missed


def upload_bytes(start: ClientStart, update: ClientUpdate, with_head: bool = True) -> int:
    """Return the bytes one client sends: its r_i modules, their indices and its trained head.

    Σ_matrices r_i ((K + N) · itemsize + 2) + Σ_head numel · itemsize; of A and B only the factors in `update.sent`
    count. A client that was to train every module of a matrix sends no indices for it, because the server knows them.
    """
    indices = 0
    for matrix, chosen in update.selected.items():
        if len(start.selected[matrix]) < start.factors[matrix][0].shape[0]:
            indices += INDEX_BYTES * len(chosen)
    head = tensor_bytes(update.head.values()) if with_head else 0
    return factor_bytes(update.factors, update.sent) + indices + head


def stack_bytes(stacks: Mapping[str, Stack]) -> int:
    """Return the bytes of stacks that are folded into the base: their A and B, and one weight for each module."""
    return sum(tensor_bytes(stack) for stack in stacks.values())


def factor_bytes(factors: Mapping[str, Factors], sides: str = "AB") -> int:
    """Return the bytes of the factors named in `sides` ("AB", "A" or "B") over all matrices, at their own dtypes."""
    return sum(tensor_bytes(pair["AB".index(side)] for side in sides) for pair in factors.values())
