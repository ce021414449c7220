"""LoRA dropout: the elements a seed drops, the same in forward and backward, and how a layer draws seeds."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plora_kernels as pk
from plora_kernels import reference
from plora_kernels.counter_rng import keep_mask, multiplier
from plora_kernels.fallback.linear import where_kept
from tests.support.hashing import word_by_hand
from tests.support.layer_inputs import GROUPS, layer_inputs


def kept_by_hand(seed: int, row: int, column: int, p: float) -> bool:
    """Say whether an element is kept: its random word, with the highest bit flipped, is at least p·2³²."""
    return word_by_hand(seed, row, column) ^ 2**31 >= round(p * 2**32)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_the_mask_is_the_hash_of_seed_row_and_column(seed: int) -> None:
    mask = keep_mask(torch.tensor([seed]), 5, 9, 0.4)
    assert mask.tolist() == [[kept_by_hand(seed, row, column, 0.4) for column in range(9)] for row in range(5)]


def test_chunks_of_rows_make_one_mask() -> None:
    mask = keep_mask(torch.tensor(3), 300, 1000, 0.5)
    for row, column in ((0, 0), (64, 999), (65, 0), (66, 1), (131, 7), (299, 999)):
        assert mask[row, column].item() == kept_by_hand(3, row, column, 0.5)


@pytest.mark.parametrize("p", [0.001, 0.05, 0.5, 0.9])
def test_the_share_dropped_is_p_in_rows_columns_and_all(p: float) -> None:
    rows, columns = 600, 800
    dropped = ~keep_mask(torch.tensor(7), rows, columns, p)
    for counts, draws in (
        (dropped.sum().reshape(1), rows * columns),
        (dropped.sum(0), rows),
        (dropped.sum(1), columns),
    ):
        # For a small p counts are far from normal, so the tails are those of the binomial distribution.
        tails = np.minimum(binom.cdf(counts, draws, p), binom.sf(counts - 1, draws, p))
        assert tails.min() > 2e-8  # the chance that any of 1 400 counts is further out is 1 in 20 000
        deviations = (counts - draws * p) / math.sqrt(draws * p * (1 - p))
        assert counts.numel() == 1 or 0.85 < deviations.std() < 1.15


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 16), (16, 0), (0, 32), (32, 0), (3, 5)], ids=str)
def test_neighbours_are_dropped_independently(shift: tuple[int, int]) -> None:
    rows, columns = shift
    signs = keep_mask(torch.tensor(11), 512, 512, 0.5).double() * 2 - 1
    products = signs[rows:, columns:] * signs[: 512 - rows, : 512 - columns]
    assert abs(products.mean()) * math.sqrt(products.numel()) < 5


@pytest.mark.parametrize("other", [1, 2, 1 << 31, 1 << 32, 1 << 62, -1])
def test_seeds_give_unrelated_masks(other: int) -> None:
    first, second = (keep_mask(torch.tensor(seed), 256, 256, 0.5).double() * 2 - 1 for seed in (0, other))
    assert abs((first * second).mean()) * 256 < 5
    assert abs((first[1:] * second[:-1]).mean()) * 256 < 5


def inputs() -> tuple[Tensor, ...]:
    """Return x (37, 50), weight (29, 50), lora_A (5, 50), lora_B (29, 5)."""
    return tuple(torch.randn(s) for s in ((37, 50), (29, 50), (5, 50), (29, 5)))


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_only_selected_modules_see_dropout(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B = inputs()
    mask = torch.tensor([True, False, True, False, False])
    y = pk.plora_linear(x, weight, lora_A, lora_B, mask, unselected=form, dropout_p=0.3, dropout_seed=9)
    dropped = x * multiplier(torch.tensor(9), 37, 50, 0.3, x.dtype)
    expected = x @ weight.T + dropped @ lora_A[mask].T @ lora_B[:, mask].T
    if form == "frozen":
        expected += x @ lora_A[~mask].T @ lora_B[:, ~mask].T
    torch.testing.assert_close(y, expected)


def test_selecting_none_leaves_nothing_to_drop(each_backend: str) -> None:
    x, weight, lora_A, lora_B = inputs()
    for form in ("folded", "frozen"):
        plain = pk.plora_linear(x, weight, lora_A, lora_B, [], unselected=form)
        dropped = pk.plora_linear(x, weight, lora_A, lora_B, [], unselected=form, dropout_p=0.5, dropout_seed=1)
        assert torch.equal(plain, dropped)


ONE = {"groups": None, "scale": 0.7, "dropout_seed": 3}
SEVERAL = {"groups": GROUPS, "scale": [0.7, 0.2, 2.0], "dropout_seed": [1, 2, 3]}


@pytest.mark.parametrize(
    ("selected", "form"), [(None, ONE), ([0, 3], ONE), (None, SEVERAL), ([[0, 3], [], [1]], SEVERAL)], ids=str
)
def test_gradcheck_with_dropout(selected: list | None, form: dict) -> None:
    x, weight, lora_A, lora_B, bias = layer_inputs(torch.float64, groups=form["groups"])

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias, dropout_p=0.4, **form)

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B, bias))


def test_a_seed_repeats_itself_to_the_bit_and_a_tensor_is_its_number(each_backend: str) -> None:
    x, weight, lora_A, lora_B = inputs()
    first = pk.plora_linear(x, weight, lora_A, lora_B, dropout_p=0.2, dropout_seed=5)
    assert torch.equal(first, pk.plora_linear(x, weight, lora_A, lora_B, dropout_p=0.2, dropout_seed=5))
    seed = torch.tensor([5])
    assert torch.equal(first, pk.plora_linear(x, weight, lora_A, lora_B, dropout_p=0.2, dropout_seed=seed))
    assert not torch.equal(first, pk.plora_linear(x, weight, lora_A, lora_B, dropout_p=0.2, dropout_seed=6))


# --------------------------------------------------------------------------------------------------- in the layer


def make(dropout: float = 0.5) -> pk.FusedPLoRALinear:
    layer = pk.FusedPLoRALinear(12, 6, rank=4, dropout=dropout)
    nn.init.normal_(layer.lora_B)
    return layer


def test_a_layer_drops_in_training_alone() -> None:
    layer, x = make(), torch.randn(9, 12)
    expected = reference.forward(x, layer.weight, layer.lora_A, layer.lora_B, bias=layer.bias, scale=layer.scale)
    torch.testing.assert_close(layer.eval()(x), expected)
    assert not torch.allclose(layer.train()(x), expected)
    layer.dropout_seed = 4
    kept = multiplier(torch.tensor(4), 9, 12, 0.5, x.dtype)
    options = {"bias": layer.bias, "scale": layer.scale, "dropout": kept}
    torch.testing.assert_close(layer(x), reference.forward(x, layer.weight, layer.lora_A, layer.lora_B, **options))


def test_every_call_draws_a_seed_from_torchs_generator() -> None:
    layer, x = make(), torch.randn(9, 12)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert torch.equal(layer(x), second)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_selection_keeps_dropout_on_what_is_trained(form: str) -> None:
    layer, x = make(), torch.randn(9, 12)
    full_A, full_B = layer.factors()
    original = layer.weight.detach().clone()
    layer.select([1, 3], form)
    layer.dropout_seed = 8
    kept, mask = multiplier(torch.tensor(8), 9, 12, 0.5, x.dtype), torch.tensor([False, True, False, True])
    options = {"bias": layer.bias, "scale": layer.scale, "dropout": kept, "unselected": "frozen"}
    torch.testing.assert_close(layer(x), reference.forward(x, original, full_A, full_B, mask, **options))
    layer.select([], form)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_by_checkpointing_drops_the_same(reentrant: bool) -> None:
    layer, x = make(), torch.randn(9, 12, requires_grad=True)
    torch.manual_seed(2)
    plain = torch.autograd.grad(layer(x).square().sum(), [layer.lora_A, x])
    torch.manual_seed(2)
    layer.zero_grad()
    checkpoint(layer, x, use_reentrant=reentrant).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, plain[0])
    assert torch.equal(x.grad, plain[1])


def test_a_compiled_layer_draws_anew_at_every_call() -> None:
    layer, x = make(), torch.randn(9, 12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    layer.dropout_seed = torch.tensor([4])
    torch.testing.assert_close(compiled(x), layer(x))


def test_a_compiler_traces_the_mask() -> None:
    seed = torch.tensor(3)
    traced = torch.compile(lambda seed: keep_mask(seed, 8, 16, 0.3), backend="eager", fullgraph=True)
    assert torch.equal(traced(seed), keep_mask(seed, 8, 16, 0.3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_what_is_dropped_is_zero_whatever_it_was(dtype: torch.dtype) -> None:
    odd = [torch.inf, -torch.inf, torch.nan, -0.0, 1.0, torch.finfo(dtype).tiny / 2, torch.finfo(dtype).max]
    values = torch.tensor([odd, odd], dtype=dtype).t()  # not contiguous
    kept = torch.tensor([[True, False]] * len(odd))
    result = where_kept(values, kept)
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    assert torch.equal(result.view(words), torch.where(kept, values, 0.0).view(words))  # signs of zeros too
    assert torch.equal(result[:, 1].view(words), torch.zeros(len(odd), dtype=words))
