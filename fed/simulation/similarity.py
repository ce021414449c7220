"""Cosines between the one-rank modules that clients end a round with: within a client and between clients.

The cosine of two modules is that of their matrices. Because ⟨b_j a_jᵀ, b_k a_kᵀ⟩ = (a_j·a_k)(b_j·b_k), it is computed
from the factors alone, without forming an (N, K) matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fed.files import make_folder, replacing
from fed.types import ClientUpdate

FOLDER = "similarity"


def module_similarity(updates: Sequence[ClientUpdate], rank: int) -> dict[str, Tensor]:
    """Return mean cosines over all matrices, fp64, NaN where there is no pair to compare.

    within (R, R): modules j and k of one client, mean over clients.  across (R, R): module j of one client and k of
    another, mean over ordered pairs of clients.  clients (C, C): the same module of two clients, mean over modules.
    Only trained modules count, each at its index; modules of norm 0 are left out because they have no direction.
    """
    count = len(updates)
    sums = torch.zeros(count, count, rank, rank, dtype=torch.float64)  # client, other client, module, other module
    pairs = torch.zeros_like(sums)
    for matrix in updates[0].factors:
        placed = [_unit_modules(update, matrix, rank) for update in updates]
        A, B, there = (torch.stack(parts) for parts in zip(*placed, strict=True))  # (C, R, K), (C, R, N), (C, R)
        for client in range(count):
            cosines = (A[client] @ A.mT) * (B[client] @ B.mT)  # (C, R, R)
            both = there[client][:, None] & there[:, None]
            sums[client] += cosines.where(both, 0.0)
            pairs[client] += both
    same = torch.eye(count, dtype=torch.bool)
    return {
        "within": _mean(sums[same].sum(0), pairs[same].sum(0)),
        "across": _mean(sums[~same].sum(0), pairs[~same].sum(0)),
        "clients": _mean(*(values.diagonal(dim1=-2, dim2=-1).sum(-1) for values in (sums, pairs))),
    }


def _mean(total: Tensor, count: Tensor) -> Tensor:
    return (total / count).where(count > 0, torch.nan)


def save_similarity(directory: Path, number: int, updates: Sequence[ClientUpdate], rank: int) -> None:
    """Write `similarity/round-N.npz`: within, across, clients, and ids, the clients' ids along the axes of clients."""
    folder = directory / FOLDER
    make_folder(folder)
    arrays = {name: values.numpy() for name, values in module_similarity(updates, rank).items()}
    ids = np.array([update.client.id for update in updates])
    with replacing(folder / f"round-{number}.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, ids=ids, **arrays)


def similarity_files(directory: Path, rounds: int | None = None) -> list[Path]:
    """Return a run's files of similarity by name; with `rounds`, those of the first and the last round alone."""
    found = sorted((directory / FOLDER).glob("round-*.npz"))
    return [path for path in found if rounds is None or path.stem in ("round-1", f"round-{rounds}")]


def _unit_modules(update: ClientUpdate, matrix: str, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return a_j/‖a_j‖ (R, K) and b_j/‖b_j‖ (R, N), fp64, by module index, and which modules exist, (R,) bool."""
    A, B = (factor.double().cpu() for factor in update.factors[matrix])
    norms = A.norm(dim=1), B.norm(dim=0)
    kept = (norms[0] > 0) & (norms[1] > 0)
    places = torch.tensor(update.selected[matrix], dtype=torch.int64)[kept]
    unit_A, unit_B = A.new_zeros(rank, A.shape[1]), B.new_zeros(rank, B.shape[0])
    unit_A[places] = A[kept] / norms[0][kept, None]
    unit_B[places] = (B[:, kept] / norms[1][kept]).mT
    there = torch.zeros(rank, dtype=torch.bool)
    there[places] = True
    return unit_A, unit_B, there
