"""Fed-PLoRA: a client trains some of the one-rank modules and folds or freezes the rest.

Which ones is up to `adapter.selection`: a strategy of `fed.methods.selection`, at random by default.

Source: Zhang, Hu, Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", ICLR 2026,
arXiv 2602.16936.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods import selection
from fed.methods.average import next_state
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return all R modules, of which the client trains r_i, selected afresh for every matrix."""
    adapter, strategy = server.adapter, selection.find(server.options.selection)
    selected = {}
    for matrix, factors in adapter.factors.items():
        selection.check_budget(client.id, factors[0].shape[0], client.rank)
        modules = selection.Candidates(matrix, factors, server.visits.get(matrix), client.gradients.get(matrix))
        selected[matrix] = strategy(modules, client.rank, rng)
    return ClientStart(adapter.factors, selected, adapter.scale, adapter.unselected)


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return every a_j, b_j as the mean over Q_j, who trained module j; if nobody did it keeps its value."""
    return next_state(server, updates)
