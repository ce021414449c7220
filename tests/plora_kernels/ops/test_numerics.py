"""Outputs and gradients against float64 on random shapes, masks and dtypes, for both implementations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import plora_kernels as pk
from plora_kernels import reference
from tests.support.numerics import (
    NAMES,
    Problem,
    assert_within_bound,
    check,
    make_problem,
    random_mask,
    run,
    variance_of_fold,
)
from tests.support.tiers import slow


def combinations(dtypes: list[torch.dtype], count: int, largest: int, seed: int) -> list[tuple]:
    """Draw `count` tuples (rows, k, n, rank, dtype, share selected, form, seed) of odd and even sizes."""
    source = random.Random(seed)
    forms = itertools.cycle(itertools.product(dtypes, ("folded", "frozen"), (None, 0.0, 0.3, 0.7, 1.0)))
    sizes = [1, 2, 7, 15, 16, 17, 31, 33, 64, 65, 100, 127, 130, 200, 257]
    sizes = [size for size in sizes if size <= largest]
    drawn = []
    for number, (dtype, form, share) in zip(range(count), forms, strict=False):
        rank = source.choice([1, 2, 5, 8, 16, 17, 31, 33, 64, 100])
        drawn.append((*(source.choice(sizes) for _ in range(3)), rank, dtype, share, form, number))
    return drawn


def name_of(combination: tuple) -> str:
    rows, k, n, rank, dtype, share, form, _ = combination
    return f"M{rows}-K{k}-N{n}-R{rank}-{str(dtype)[6:]}-{form}-{share}"


HALF_AND_FULL = [torch.float32, torch.float16]
TORCH_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def problem_of(combination: tuple) -> Problem:
    rows, k, n, rank, dtype, share, form, seed = combination
    mask = None if share is None else random_mask(rank, seed, share)
    options = {"mask": mask, "unselected": form, "bias": seed % 3 > 0, "dropout_p": 0.3 if seed % 4 == 1 else 0.0}
    return make_problem(rows, k, n, rank, dtype, seed=seed, **options)


TORCH_CASES = combinations(TORCH_DTYPES, 160, 257, seed=1)
KERNEL_CASES = combinations(HALF_AND_FULL, 80, 130, seed=2)


@pytest.mark.parametrize("combination", [*TORCH_CASES[:100], *slow(*TORCH_CASES[100:])], ids=name_of)
def test_torch_path_is_within_the_bound(combination: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    check(problem_of(combination))


@pytest.mark.parametrize("combination", combinations([torch.float64], 20, 257, seed=4), ids=name_of)
def test_float64_is_the_reference_to_rounding(combination: tuple) -> None:
    problem = problem_of(combination)
    exact = problem.reference_results(torch.float64)  # float64 cannot be checked against a more precise dtype
    for name, result, truth in zip(NAMES, run(problem), exact, strict=True):
        if result is not None:
            torch.testing.assert_close(result, truth, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.usefixtures("kernels", "nan_filled")
@pytest.mark.parametrize("combination", [*KERNEL_CASES[:50], *slow(*KERNEL_CASES[50:])], ids=name_of)
def test_kernels_are_within_the_bound(combination: tuple) -> None:
    check(problem_of(combination))


@pytest.mark.usefixtures("kernels", "nan_filled")
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (37, 50, 29, 5), (3, 40, 24, 256)], ids=str)
@pytest.mark.parametrize("dtype", HALF_AND_FULL, ids=str)
def test_kernels_on_the_odd_shapes(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    check(make_problem(*shape, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("combination", combinations([torch.bfloat16], 100, 257, seed=3), ids=name_of)
def test_kernels_in_bfloat16_on_the_device(combination: tuple) -> None:
    check(problem_of(combination))


FOLDS = [*(("torch", dtype) for dtype in TORCH_DTYPES), *(("triton", dtype) for dtype in HALF_AND_FULL)]


@pytest.mark.parametrize(("backend", "dtype"), FOLDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (29, 50, 5), (130, 70, 33), (64, 64, 256)], ids=str)
def test_fold_is_within_the_bound(
    shape: tuple[int, int, int], backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", backend)
    n, k, rank = shape
    problem = make_problem(1, k, n, rank, dtype)
    mask = random_mask(rank, seed=rank)
    weight = problem.weight.clone()
    returned = pk.fold_(weight, problem.lora_A, problem.lora_B, mask, scale=0.5)
    assert returned is weight
    arguments = (problem.weight, problem.lora_A, problem.lora_B)
    exact = reference.fold(*(t.double() for t in arguments), mask, scale=0.5)
    assert_within_bound(weight, exact, variance_of_fold(*arguments, mask, 0.5), "fold")


def test_combinations_cover_at_least_two_hundred() -> None:
    drawn = {*combinations(TORCH_DTYPES, 160, 257, seed=1), *combinations(HALF_AND_FULL, 80, 130, seed=2)}
    assert len(drawn) >= 200
