"""Fed-PLoRA: a client trains some of the one-rank modules and folds or freezes the others.

The setting `adapter.selection` names the strategy of `fed.methods.selection` that chooses them, by default at random.

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
    """Return a start with all R modules, of which the client trains r_i, selected separately for each matrix."""
    adapter, strategy = server.adapter, selection.find(server.options.selection)
    selected = {}
    for matrix, factors in adapter.factors.items():
        selection.check_budget(client.id, factors[0].shape[0], client.rank)
        modules = selection.Candidates(matrix, factors, server.visits.get(matrix), client.gradients.get(matrix))
        selected[matrix] = strategy(modules, client.rank, rng)
    return ClientStart(adapter.factors, selected, adapter.scale, adapter.unselected)


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return every a_j and b_j as the mean over the clients that trained module j; a module without any is kept."""
    return next_state(server, updates)
