"""`add_side_branch_` on both backends: against the reference in float64, on odd shapes, and as an operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plora_kernels import reference
from plora_kernels.counter_rng import keep_mask
from plora_kernels.fallback import linear as whole
from plora_kernels.ops.side_branch import add_side_branch_

# Rows, K, N, R: one row and odd sizes, more than one tile of rows and columns, more than one block of modules.
SHAPES = [(1, 7, 5, 3), (16, 130, 70, 16), (37, 50, 129, 40), (3, 33, 64, 1), (0, 8, 8, 2)]
FORMS = [(None, True), ([0, 2], True), ([0, 2], False), ([], True), ([], False)]
CASES = [*zip(SHAPES, FORMS, strict=True), *zip(SHAPES, FORMS[2:] + FORMS[:2], strict=True)]
TOLERANCES = {torch.float16: (4e-3, 4e-3), torch.float32: (1e-5, 1e-5)}  # a few roundings of results near 1


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype, factors: torch.dtype) -> tuple[Tensor, ...]:
    m, k, n, r = shape
    y, x = torch.randn(m, n).to(dtype), torch.randn(m, k).to(dtype)
    return y, x, (torch.randn(r, k) / k**0.5).to(factors), (torch.randn(n, r) / r**0.5).to(factors)


def index_of(selected: list[int] | None, rank: int) -> Tensor | None:
    if selected is None:
        return None
    kept = [j for j in selected if j < rank]
    return torch.tensor([*kept, *[-1] * (-len(kept) % 16)], dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("mixed", [False, True], ids=["one dtype", "fp32 factors"])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.usefixtures("nan_filled")
def test_it_adds_what_the_reference_adds(dtype: torch.dtype, mixed: bool, p: float, each_backend: str) -> None:
    absolute, relative = TOLERANCES[dtype]
    for shape, (selected, frozen) in CASES:
        y, x, lora_A, lora_B = operands(shape, dtype, torch.float32 if mixed else dtype)
        index, rank, seed = index_of(selected, shape[3]), shape[3], torch.tensor([7])
        mask = None if selected is None else torch.tensor([j in selected for j in range(rank)])
        kept = keep_mask(seed, *x.shape, p).double() / (1 - p) if p else None
        # Factors are rounded as they enter the products.
        x64, A64, B64 = x.double(), lora_A.to(dtype).double(), lora_B.to(dtype).double()
        none = torch.zeros(shape[2], shape[1], dtype=torch.float64)
        form = {"scale": 0.5, "unselected": "frozen" if frozen else "folded", "dropout": kept}
        expected = y.double() + reference.forward(x64, none, A64, B64, mask, **form)
        before = y.clone()
        s = add_side_branch_(y, x, lora_A, lora_B, index, 0.5, frozen, True, p, seed if p else None)
        torch.testing.assert_close(y.double(), expected, atol=absolute, rtol=relative)
        none = torch.zeros(shape[2], shape[1], dtype=dtype)
        same = whole.forward(x, none, lora_A, lora_B, None, index, 0.5, frozen, True, p, seed if p else None)[1]
        torch.testing.assert_close(s, same, atol=absolute, rtol=relative)
        again = before.clone()
        kept_s = add_side_branch_(again, x, lora_A, lora_B, index, 0.5, frozen, False, p, seed if p else None)
        assert torch.equal(again, y)
        assert kept_s.numel() == 0


def test_rows_and_factors_of_any_strides(each_backend: str) -> None:
    y, x, lora_A, lora_B = operands((5, 40, 24, 6), torch.float32, torch.float32)
    expected = y + 2.0 * (x @ lora_A.T) @ lora_B.T
    x, lora_A, lora_B = (torch.stack([t, t], dim=-1)[..., 1] for t in (x, lora_A.t(), lora_B.t()))
    add_side_branch_(y, x, lora_A.t(), lora_B.t(), None, 2.0, True, False, 0.0, None)
    torch.testing.assert_close(y, expected)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, in the interpreter
def test_infinity_in_a_row_stays_out_of_absent_modules(each_backend: str) -> None:
    y, x, lora_A, lora_B = operands((2, 8, 4, 3), torch.float32, torch.float32)
    x[0, 0] = float("inf")
    s = add_side_branch_(y, x, lora_A, lora_B, index_of([1], 3), 1.0, False, True, 0.0, None)
    assert torch.equal(s[:, 1:], torch.zeros(2, 15))
    assert torch.isfinite(y[1]).all()


def test_it_is_a_mutating_operator() -> None:
    y, x, lora_A, lora_B = operands((3, 8, 4, 2), torch.float32, torch.float32)
    torch.library.opcheck(
        torch.ops.plora.add_side_branch_.default, (y, x, lora_A, lora_B, None, 1.0, True, True, 0.0, None)
    )
