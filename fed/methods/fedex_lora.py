"""FedEx-LoRA: factors are averaged as in FedIT, and the error of that is folded into the base.

base += Σ p_i s B_i A_i − s B̄ Ā, so that base and adapter together are exactly the mean of the clients' updates. The
residual is sent as a stack of factors: the clients' and the mean ones.

Source: Singhal et al., "FedEx-LoRA: Exact Aggregation for Federated and Efficient Fine-Tuning of Foundation Models",
ACL 2025, arXiv 2410.09432.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fed.methods.average import next_state
from fed.methods.low_rank import fold, stacked
from fed.methods.starts import whole_start
from fed.seeding import ClientRandom
from fed.types import Client, ClientStart, ClientUpdate, ServerState, Stack


def start(server: ServerState, client: Client, rng: ClientRandom) -> ClientStart:
    """Return a start with all R modules, all of them trained; raise `FedError` for a client of another rank."""
    return whole_start(server, client, "fedex-lora")


def aggregate(server: ServerState, updates: Sequence[ClientUpdate]) -> ServerState:
    """Return Ā, B̄ and the base with Σ p_i s B_i A_i − s B̄ Ā folded in, where Ā and B̄ are the rounded means."""
    following = next_state(server, updates)
    total = sum(update.weight for update in updates)
    scale = server.adapter.scale
    residual = {}
    for matrix, (A, B) in following.adapter.factors.items():
        sent = stacked(updates, matrix, [update.weight / total * scale for update in updates])
        mean = torch.full((A.shape[0],), -scale, dtype=torch.float64, device=A.device)
        residual[matrix] = Stack(torch.cat([sent.A, A]), torch.cat([sent.B, B], dim=1), torch.cat([sent.weights, mean]))
    return replace(following, base_delta=fold(server.base_delta, residual), fold=residual)
