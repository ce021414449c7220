"""Cosines between modules: by hand, and against the modules' dense matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fed.simulation.similarity import module_similarity, save_similarity
from fed.types import Client, ClientUpdate, Factors


def update_of(number: int, factors: Factors, selected: tuple[int, ...]) -> ClientUpdate:
    return ClientUpdate(Client(number, len(selected), 1), {"m": factors}, {"m": selected}, {}, 1.0, 1, 0.0)


def test_by_hand() -> None:
    """Module 0 of both clients is the same but for the sign of b; only one has module 2, none has module 1."""
    one = update_of(0, (torch.tensor([[3.0, 0.0], [0.0, 5.0]]), torch.tensor([[2.0, 7.0]])), (0, 2))
    other = update_of(1, (torch.tensor([[1.0, 1.0]]), torch.tensor([[-4.0]])), (0,))
    found = module_similarity([one, other], rank=3)
    half = 0.5**0.5
    nan = float("nan")
    np.testing.assert_allclose(found["within"], [[1, nan, 0], [nan, nan, nan], [0, nan, 1]], atol=1e-15)
    np.testing.assert_allclose(found["across"], [[-half, nan, -half], [nan, nan, nan], [-half, nan, nan]])
    np.testing.assert_allclose(found["clients"], [[1, -half], [-half, 1]])


def test_against_dense_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [(torch.randn(3, 5, generator=generator), torch.randn(4, 3, generator=generator)) for _ in range(3)]
    found = module_similarity([update_of(n, pair, (0, 1, 2)) for n, pair in enumerate(pairs)], rank=3)
    modules = [[torch.outer(B[:, j], A[j]).flatten().double() for j in range(3)] for A, B in pairs]

    def cosine(x: torch.Tensor, y: torch.Tensor) -> float:
        return (x @ y / (x.norm() * y.norm())).item()

    within = np.mean([[[cosine(x, y) for y in own] for x in own] for own in modules], axis=0)
    across = np.mean(
        [[[cosine(x, y) for y in modules[k]] for x in modules[i]] for i in range(3) for k in range(3) if i != k], axis=0
    )
    np.testing.assert_allclose(found["within"], within, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["across"], across, rtol=1e-5, atol=1e-6)
    assert found["clients"][0, 2].item() == pytest.approx(
        np.mean([cosine(modules[0][j], modules[2][j]) for j in range(3)]), rel=1e-4, abs=1e-6
    )


def test_modules_of_norm_zero_have_no_direction(tmp_path: Path) -> None:
    update = update_of(7, (torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0, 2.0]])), (0, 1))
    save_similarity(tmp_path, 3, [update], rank=2)
    saved = np.load(tmp_path / "similarity" / "round-3.npz")
    assert saved["ids"].tolist() == [7]
    np.testing.assert_allclose(saved["within"], [[np.nan, np.nan], [np.nan, 1.0]])
    assert np.isnan(saved["across"]).all()
    assert [path.name for path in (tmp_path / "similarity").iterdir()] == ["round-3.npz"]
