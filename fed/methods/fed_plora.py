"""Fed-PLoRA: a client trains a random part of the one-rank modules and folds or freezes the rest.

Source: Zhang, Hu, Xu, "Heterogeneous Federated Fine-Tuning with Parallel One-Rank Adaptation", ICLR 2026,
arXiv 2602.16936.
"""

from __future__ import annotations

from collections.abc import Sequence

from fed.methods.average import next_state
from fed.select import random_selection
from fed.streams import Source
from fed.types import Client, ClientStart, ClientUpdate, ServerState


def start(server: ServerState, client: Client, rng: Source) -> ClientStart:
    """Return all R modules, of which the client trains r_i, drawn afresh for every matrix."""
    adapter = server.adapter
    selected = {
        matrix: random_selection(rng.seed, rng.round, rng.client, matrix, A.shape[0], client.rank)
        for matrix, (A, _) in adapter.factors.items()
    }
    return ClientStart(adapter.factors, selected, adapter.scale, adapter.unselected)


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return every a_j, b_j as the mean over Q_j, who trained module j; if nobody did it keeps its value."""
    return next_state(server, updates)
