"""The one bound every result is held to, and the problems it is checked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plora_kernels import reference
from plora_kernels.counter_rng import multiplier

NAMES = ("y", "dx", "dA", "dB", "dbias")
FEW, ORDERS = 64, 8


def assert_within_bound(result: Tensor, same_dtype: Tensor, exact: Tensor, what: str) -> None:
    """Hold a result to twice the error of plain torch at its dtype, in Frobenius and max norm.

    The floor is 4·eps(dtype)·max|exact|: below that plain torch may be exact by luck. `same_dtype` may have a leading
    axis of several orders of summation, of which the largest error counts.
    """
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    floor = 4 * torch.finfo(same_dtype.dtype).eps * exact.abs().max().item()
    orders = same_dtype if same_dtype.dim() > exact.dim() else same_dtype[None]
    for norm, order in (("Frobenius", 2), ("max", float("inf"))):
        error = torch.linalg.vector_norm(result.double() - exact, order).item()
        plain = max(torch.linalg.vector_norm(one.double() - exact, order).item() for one in orders)
        allowed = max(2 * plain, floor)
        assert error <= allowed, f"{what}: {norm} error {error:.3g}, allowed {allowed:.3g}"


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

    def reference_results(self, dtype: torch.dtype, order: int | None = None) -> tuple[Tensor, ...]:
        """Return y, dx, dA, dB, dbias of the reference computed in `dtype`.

        With an `order`, rows, features and outputs stand in an order drawn from it while it computes.
        """
        x, weight, lora_A, lora_B, dy = (t.to(dtype) for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))
        bias = None if self.bias is None else self.bias.to(dtype)
        rows, features, outputs = (_order(size, order, x.device) for size in (*x.shape, weight.shape[0]))
        form = {"scale": self.scale, "unselected": self.unselected}
        if self.dropout_p:
            seed = torch.tensor([self.dropout_seed], device=x.device)
            form["dropout"] = multiplier(seed, *x.shape, self.dropout_p, dtype)[rows][:, features]
        x, dy = x[rows][:, features], dy[rows][:, outputs]
        weight, lora_A, lora_B = weight[outputs][:, features], lora_A[:, features], lora_B[outputs]
        bias = None if bias is None else bias[outputs]
        y = reference.forward(x, weight, lora_A, lora_B, self.mask, bias=bias, **form)
        d_x, d_A, d_B, d_bias = reference.gradients(dy, x, weight, lora_A, lora_B, self.mask, **form)
        back_rows, back_features, back_outputs = (places.argsort() for places in (rows, features, outputs))
        return (
            y[back_rows][:, back_outputs],
            d_x[back_rows][:, back_features],
            d_A[:, back_features],
            d_B[back_outputs],
            None if d_bias is None else d_bias[back_outputs],
        )

    def yardstick(self) -> tuple[Tensor, ...]:
        """Return the reference's results at the problem's own dtype, several orders of summation for small ones.

        A norm of many numbers hardly depends on the order. Of few numbers the error of one order says little: by luck
        it may be a tenth of what the next order gives.
        """
        results = self.reference_results(self.x.dtype)
        if min(one.numel() for one in results if one is not None) >= FEW:
            return results
        others = [self.reference_results(self.x.dtype, order) for order in range(ORDERS - 1)]
        return tuple(
            one if one is None or one.numel() >= FEW else torch.stack([one, *(other[place] for other in others)])
            for place, one in enumerate(results)
        )


def _order(size: int, seed: int | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.arange(size, device=device)
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).to(device)


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
    device: str = "cpu",
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


def random_mask(rank: int, seed: int, share: float = 0.5) -> Tensor:
    """Return a mask (R,) that selects about `share` of the modules."""
    return torch.rand(rank, generator=torch.Generator().manual_seed(seed)) < share
