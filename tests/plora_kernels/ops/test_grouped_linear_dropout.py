"""Dropout of groups of rows: each group has its own seed, and a row its number in the group."""

from __future__ import annotations

import pytest
import torch

import plora_kernels as pk
from plora_kernels.counter_rng import keep_mask, keep_mask_of_rows
from tests.support.equality import assert_equal
from tests.support.groups import DEVICE, FORMS, draw_grouped
from tests.support.numerics import run

SEEDS = torch.tensor([5, -3, 2**62], device=DEVICE)


def test_a_row_is_dropped_by_its_number_in_its_group() -> None:
    seeds, sizes = torch.tensor([3, 9]), torch.tensor([4, 6])
    numbers = torch.cat([torch.arange(4), torch.arange(6)])
    together = keep_mask_of_rows(seeds.repeat_interleave(sizes), numbers, 7, 0.5)
    alone = [keep_mask(seed, int(size), 7, 0.5) for seed, size in zip(seeds, sizes, strict=True)]
    assert torch.equal(together, torch.cat(alone))


def test_dropout_drops_the_same_elements_as_one_call_a_group(each_backend: str) -> None:
    # With W = 0 and modules that pick out features, y is zero exactly where an element was dropped.
    k = 16
    x, weight = torch.ones(50, k, device=DEVICE), torch.zeros(k, k, device=DEVICE)
    eye = torch.eye(k, device=DEVICE).expand(3, k, k)
    y = pk.plora_linear(x, weight, eye, eye, groups=[0, 17, 17, 50], dropout_p=0.5, dropout_seed=SEEDS)
    kept = torch.cat([keep_mask(SEEDS[0], 17, k, 0.5), keep_mask(SEEDS[2], 33, k, 0.5)])
    assert torch.equal(y != 0, kept)


@pytest.mark.parametrize(
    ("share", "form"), [*(pytest.param(*form, marks=pytest.mark.slow) for form in FORMS[:2]), FORMS[2]]
)
def test_rows_numbered_as_by_default_drop_the_same(share: float | None, form: str, each_backend: str) -> None:
    sizes = (33, 0, 7, 20)
    problem = draw_grouped(sizes, 24, 40, 17, torch.float32, share=share, unselected=form, dropout_p=0.4)
    numbers = torch.cat([torch.arange(size) for size in sizes]).to(DEVICE)
    told, counted = run(problem, dropout_rows=numbers), run(problem)
    assert_equal(told, counted)
    operands = (problem.x, problem.weight, problem.lora_A, problem.lora_B)
    strided = torch.stack([numbers, numbers], 1)[:, 0]
    assert torch.equal(pk.plora_linear(*operands, **problem.form(), dropout_rows=strided), counted[0])
    assert not torch.equal(pk.plora_linear(*operands, **problem.form(), dropout_rows=numbers + 1), counted[0])


@pytest.mark.parametrize(("share", "form"), FORMS[:3])
def test_padding_between_rows_leaves_their_masks(share: float | None, form: str, each_backend: str) -> None:
    # Two texts a group of 3 and 5, 7 and 2 tokens, each text padded to 9: real rows keep the numbers they had.
    texts, longest = ((3, 5), (7, 2)), 9
    sizes, padded_sizes = [sum(lengths) for lengths in texts], [longest * len(lengths) for lengths in texts]
    options = {"share": share, "unselected": form, "dropout_p": 0.4}
    problem = draw_grouped(sizes, 24, 40, 17, torch.float32, **options)
    padded = draw_grouped(padded_sizes, 24, 40, 17, torch.float32, seed=1, **options)
    real = torch.cat([torch.arange(longest) < length for lengths in texts for length in lengths]).to(DEVICE)
    numbers = torch.full((len(real),), -1, device=DEVICE)
    numbers[real] = torch.cat([torch.arange(size) for size in sizes]).to(DEVICE)
    padded.x[real], padded.dy[real], padded.dy[~real] = problem.x, problem.dy, 0.0
    for name in ("weight", "lora_A", "lora_B", "bias"):
        setattr(padded, name, getattr(problem, name))
    padded.problems = problem.problems
    y, dx, *gradients = run(padded, groups=padded.bounds, dropout_rows=numbers)
    torch.testing.assert_close((y[real], dx[real], *gradients), run(problem), rtol=1e-5, atol=1e-5)
