"""The bound that every result must meet, and the problems it is checked on.

The order in which a library sums a product's terms depends on the processor, the layout and the threads. A bound
measured with one library on one machine depends on that order, and on luck where results are few. So the bound is
derived: `Problem.variances` follows the computation of plain torch, with every product as one running sum in fp32, and
adds up the expected squared error of every rounding; `assert_within_bound` says how far a result may be from that. In
fp32, running sums come near the bound; sums in blocks or lanes stay below it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels import reference
from plora_kernels.counter_rng import multiplier

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dA", "dB", "dbias")
# A normal error exceeds so many standard deviations once in 1.7 million draws; a run of the tests checks about 10,000.
FAR = 5.0
TERMS_AT_ONCE = 1 << 18  # of a running sum, so that they stay in the cache


def assert_within_bound(result: Tensor, exact: Tensor, variance: Tensor, what: str) -> None:
    """Assert that a result's error is within rounding, in Frobenius and in max norm, given its expected `variance`.

    An error is a sum of many small roundings, each as likely up as down, so it is as good as normal. With σ² the
    variance of each element, n of them:

        max|e| ≤ √(FAR² + 2·ln n)·max σ: the chance that any of n is that far is that of one at FAR;
        ‖e‖_F ≤ √(Σσ²) + FAR·√(largest share of a row or column in Σσ²).

    The second is how the norm of a normal vector keeps to its mean, from which it deviates by no more than the square
    root of the covariance's largest eigenvalue. Elements share errors along a row (those of a row of S in y) or along a
    column (those of a row of W_g in y, where a path adds modules to the weight first; those of a column of S in dB), so
    no eigenvalue exceeds what one row or column has in Σσ². Among many of both that is little: the bound is then hardly
    more than the expected error. Of few numbers it is far more, as their error may well be.
    """
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    assert variance.shape == exact.shape, f"{what}: variance of {tuple(variance.shape)}, not {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    for norm, (error, allowed) in errors(result, exact, variance).items():
        assert error <= allowed, f"{what}: {norm} error {error:.3g}, allowed {allowed:.3g}"


def errors(result: Tensor, exact: Tensor, variance: Tensor) -> dict[str, tuple[float, float]]:
    """Return the error and what is allowed, by norm."""
    variance, difference = variance.double(), result.double() - exact
    axes = (-1, -2) if variance.dim() > 1 else ()
    share = max([variance.max().item(), *(variance.sum(axis).max().item() for axis in axes)])
    far = math.sqrt(FAR**2 + 2 * math.log(exact.numel()))
    return {
        "Frobenius": (difference.norm().item(), math.sqrt(variance.sum().item()) + FAR * math.sqrt(share)),
        "max": (difference.abs().max().item(), far * math.sqrt(variance.max().item())),
    }


class Rounded(NamedTuple):
    """A matrix as plain torch computes it, and the variance of each element's error, both in fp32."""

    value: Tensor
    variance: Tensor

    @classmethod
    def of(cls, value: Tensor) -> Rounded:
        """Return an exact matrix."""
        return cls(value.float(), torch.zeros_like(value, dtype=torch.float32))

    def transposed(self) -> Rounded:
        """Return the transpose."""
        return Rounded(self.value.T, self.variance.T)

    def where(self, mask: Tensor) -> Rounded:
        """Return zero where the mask is false."""
        return Rounded(torch.where(mask, self.value, 0.0), torch.where(mask, self.variance, 0.0))

    def to(self, dtype: torch.dtype) -> Rounded:
        """Return the matrix rounded to `dtype`; fp32 is unchanged."""
        if dtype is torch.float32:
            return self
        return Rounded(self.value.to(dtype).float(), self.variance + rounding_variance(self.value, dtype))

    def times(self, factor: Tensor | float) -> Rounded:
        """Return the elements times exact numbers, rounded once."""
        value = self.value * factor
        return Rounded(value, self.variance * factor**2 + rounding_variance(value))

    def plus(self, other: Rounded) -> Rounded:
        """Return the sum, rounded once."""
        value = self.value + other.value
        return Rounded(value, self.variance + other.variance + rounding_variance(value))


def rounding_variance(values: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return what rounding fp32 values to nearest in `dtype` adds to the variance: spacing²/12; zero is exact.

    The error of rounding to nearest lies anywhere within half a spacing on either side, evenly.
    """
    kind = torch.finfo(dtype)
    power = (values.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)  # 2 to the exponent
    spacing = power.clamp_min(kind.smallest_normal) * kind.eps
    return torch.where(values == 0, 0.0, spacing.square() / 12)


class Product(NamedTuple):
    """left (M, K) · right (K, N), each element of which is multiplied by `kept` (M, N) if there is one."""

    left: Rounded
    right: Tensor
    kept: Tensor | None = None


def running_sum(start: Tensor, products: Sequence[Product]) -> Rounded:
    """Return start (M, N) + Σ of the products, every term added to one sum in fp32, in order.

    A term is rounded once as it is made and the sum once as it is added, whether or not a machine fuses the two; adding
    zero rounds nothing. What is wrong with a `left` enters by its factor.
    """
    columns = start.shape[1]
    widest = max(1, *(product.right.shape[0] for product in products))
    parts = [
        _running_sum_of_rows(slice(first, first + rows), start, products)
        for rows in [max(1, TERMS_AT_ONCE // max(1, columns * widest))]
        for first in range(0, start.shape[0], rows)
    ]
    if not parts:
        return Rounded.of(start)
    return Rounded(torch.cat([part.value for part in parts]), torch.cat([part.variance for part in parts]))


def _running_sum_of_rows(rows: slice, start: Tensor, products: Sequence[Product]) -> Rounded:
    total, variance = start[rows].float(), torch.zeros_like(start[rows], dtype=torch.float32)
    for left, right, kept in products:
        factors = right.T if kept is None else right.T * kept[rows][:, :, None]  # (N, K) or (rows, N, K)
        terms = left.value[rows][:, None, :] * factors
        sums = total[:, :, None] + terms.cumsum(2)
        added = torch.where(terms == 0, 0.0, rounding_variance(sums) + rounding_variance(terms))
        variance = variance + added.sum(2) + (left.variance[rows][:, None, :] * factors**2).sum(2)
        total = total + terms.sum(2)
    return Rounded(total, variance)


@dataclass
class Problem:
    """One layer's inputs at some dtype, with the mask that selects its modules (None: all)."""

    x: Tensor
    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None
    mask: Tensor | None
    dy: Tensor
    scale: float
    unselected: str
    dropout_p: float = 0.0
    dropout_seed: int = 0

    def form(self) -> dict[str, Any]:
        """Return the operator's arguments other than the operands."""
        form = {"selected": self.mask, "bias": self.bias, "scale": self.scale, "unselected": self.unselected}
        return form | {"dropout_p": self.dropout_p, "dropout_seed": self.dropout_seed}

    def reference_results(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return y, dx, dA, dB, dbias of the reference computed in `dtype`."""
        x, weight, lora_A, lora_B, dy = (t.to(dtype) for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))
        bias = None if self.bias is None else self.bias.to(dtype)
        form = {"scale": self.scale, "unselected": self.unselected, "dropout": self._dropout(dtype)}
        y = reference.forward(x, weight, lora_A, lora_B, self.mask, bias=bias, **form)
        return y, *reference.gradients(dy, x, weight, lora_A, lora_B, self.mask, **form)

    def _dropout(self, dtype: torch.dtype) -> Tensor | None:
        if not self.dropout_p:
            return None
        seed = torch.tensor([self.dropout_seed], device=self.x.device)
        return multiplier(seed, *self.x.shape, self.dropout_p, dtype)

    def variances(self) -> tuple[Tensor, ...]:
        """Return the expected variance of the errors of y, dx, dA, dB, dbias, computed as `reference` computes them.

        Each product is a running sum. In fp32 y and dx are one running sum of the base's terms and the modules', the
        one part on top of the other: a fused product adds them to what is there. Which comes first is up to the path,
        so the worse counts. In half precision every result of plain torch is kept in that precision: S, dS, D(x), each
        product, its multiple by s, what dropout leaves of it, and each sum of two. That is what makes the error there,
        and no order of summation changes it.
        """
        dtype, drop = self.x.dtype, self._dropout(torch.float32)
        x, dy = Rounded.of(self.x), Rounded.of(self.dy)
        weight, lora_A, lora_B = (t.float() for t in (self.weight, self.lora_A, self.lora_B))
        frozen, rank = self.unselected == "frozen", lora_A.shape[0]
        chosen = torch.ones(rank, dtype=torch.bool, device=x.value.device) if self.mask is None else self.mask
        dropped = x if drop is None else x.times(drop).to(dtype)

        s = _product(dropped, lora_A.T).to(dtype)  # (M, R)
        entering = s.where(chosen)
        if frozen:
            rest = _product(x, lora_A.T).to(dtype)
            entering = Rounded(*(torch.where(chosen, one, other) for one, other in zip(s, rest, strict=True)))
        y = self._base_and_modules(self.bias, Product(x, weight.T), [Product(entering, lora_B.T)])

        ds = _product(dy, lora_B).to(dtype)  # (M, R)
        modules = [Product(ds.where(chosen), lora_A, drop)]
        if frozen and self.mask is not None:
            modules.append(Product(ds.where(~chosen), lora_A))
        d_x = self._base_and_modules(None, Product(dy, weight), modules)

        ds_chosen, s_chosen = ds.where(chosen).transposed(), s.where(chosen).transposed()
        d_A = _product(ds_chosen, dropped.value).to(dtype).times(self.scale).to(dtype)
        of_dropped = self.scale**2 * ds_chosen.value**2 @ dropped.variance
        d_B = _product(s_chosen, dy.value).to(dtype).times(self.scale).to(dtype).transposed()
        d_bias = variance_of_rows_sum(self.dy)
        return y.variance, d_x.variance, d_A.variance + of_dropped, d_B.variance, d_bias

    def _base_and_modules(self, bias: Tensor | None, base: Product, modules: Sequence[Product]) -> Rounded:
        """Return bias + base + s·Σ modules."""
        dtype = self.x.dtype
        if dtype is torch.float32:
            start = base.right.new_zeros(base.left.value.shape[0], base.right.shape[1])
            start = start if bias is None else start + bias
            scaled = [Product(left.times(self.scale), right, kept) for left, right, kept in modules]
            one, other = running_sum(start, [base, *scaled]), running_sum(start, [*scaled, base])
            return Rounded(one.value, torch.maximum(one.variance, other.variance))
        total = _product(base.left, base.right).to(dtype)
        for left, right, kept in modules:
            low = _product(left, right).to(dtype).times(self.scale).to(dtype)
            total = total.plus(low if kept is None else low.times(kept).to(dtype)).to(dtype)
        return total if bias is None else total.plus(Rounded.of(bias)).to(dtype)


def _product(left: Rounded, right: Tensor) -> Rounded:
    return running_sum(right.new_zeros(left.value.shape[0], right.shape[1]), [Product(left, right)])


def variance_of_rows_sum(rows: Tensor) -> Tensor:
    """Return the expected variance of the errors of Σ rows, (N,) of (M, N)."""
    ones = rows.new_ones(rows.shape[0], 1, dtype=torch.float32)
    return _product(Rounded.of(rows).transposed(), ones).to(rows.dtype).variance[:, 0]


def variance_of_fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the expected variance of the errors of W + s·Σ_{j: m_j = 0} b_j a_jᵀ, as `Problem.variances` does."""
    dtype, rest = weight.dtype, Rounded.of(lora_B).where(~mask)
    if dtype is torch.float32:
        return running_sum(weight, [Product(rest.times(scale), lora_A.float())]).variance
    low = _product(rest, lora_A.float()).to(dtype).times(scale).to(dtype)
    return low.plus(Rounded.of(weight)).to(dtype).variance


def run(problem: Any, **changes: object) -> tuple[Tensor | None, ...]:
    """Return y, dx, dA, dB, dbias of the operator, for a `Problem` or a `GroupedProblem`."""
    form = problem.form() | changes
    return differentiated(
        problem, lambda x, *AB, bias: pk.plora_linear(x, problem.weight, *AB, **form | {"bias": bias})
    )


def differentiated(problem: Any, layer: Callable[..., Tensor]) -> tuple[Tensor | None, ...]:
    """Return y of `layer(x, lora_A, lora_B, bias)`, and the gradients of all four for the problem's dy."""
    given = (problem.x, problem.lora_A, problem.lora_B, problem.bias)
    leaves = [None if tensor is None else tensor.clone().requires_grad_() for tensor in given]
    y = layer(*leaves[:3], bias=leaves[3])
    y.backward(problem.dy)
    return y.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


def check(problem: Any) -> None:
    """Check that the operator's results are within the bound."""
    exact, variances = problem.reference_results(torch.float64), problem.variances()
    for name, result, truth, variance in zip(NAMES, run(problem), exact, variances, strict=True):
        if result is not None:
            assert_within_bound(result, truth, variance, name)


def make_problem(
    rows: int,
    k: int,
    n: int,
    rank: int,
    dtype: torch.dtype,
    *,
    mask: Tensor | None = None,
    unselected: str = "folded",
    scale: float = 0.5,
    bias: bool = True,
    dropout_p: float = 0.0,
    seed: int = 0,
    device: str = DEVICE,
) -> Problem:
    """Draw a problem whose outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
        return values.to(dtype).to(device)

    return Problem(
        x=draw(rows, k),
        weight=draw(n, k, spread=k**-0.5),
        lora_A=draw(rank, k, spread=k**-0.5),
        lora_B=draw(n, rank, spread=rank**-0.5),
        bias=draw(n) if bias else None,
        mask=mask,
        dy=draw(rows, n, spread=n**-0.5),
        scale=scale,
        unselected=unselected,
        dropout_p=dropout_p,
        dropout_seed=seed,
    )


def random_mask(rank: int, seed: int, share: float = 0.5, device: str = DEVICE) -> Tensor:
    """Return a mask (R,) that selects about `share` of the modules."""
    return (torch.rand(rank, generator=torch.Generator().manual_seed(seed)) < share).to(device)


def in_form(form: str | None, rank: int, seed: int, device: str = DEVICE) -> dict[str, Any]:
    """Return options of a problem: all modules selected (None), or half of them and the others folded or frozen."""
    return {"mask": None if form is None else random_mask(rank, seed, device=device), "unselected": form or "folded"}
