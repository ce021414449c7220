"""The one bound every result is held to, and the problems it is checked on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from plora_kernels import reference
from plora_kernels.dropout import multiplier

NAMES = ("y", "dx", "dA", "dB", "dbias")


def assert_within_bound(result: Tensor, same_dtype: Tensor, exact: Tensor, what: str) -> None:
    """Hold a result to twice the error of plain torch at its dtype, in Frobenius and max norm.

    The floor is 4·eps(dtype)·max|exact|: below that plain torch may be exact by luck.
    """
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    floor = 4 * torch.finfo(same_dtype.dtype).eps * exact.abs().max().item()
    for norm, order in (("Frobenius", 2), ("max", float("inf"))):
        error = torch.linalg.vector_norm(result.double() - exact, order).item()
        allowed = max(2 * torch.linalg.vector_norm(same_dtype.double() - exact, order).item(), floor)
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

    def reference_results(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return y, dx, dA, dB, dbias of the reference computed in `dtype`."""
        x, weight, lora_A, lora_B, dy = (t.to(dtype) for t in (self.x, self.weight, self.lora_A, self.lora_B, self.dy))
        bias = None if self.bias is None else self.bias.to(dtype)
        form = {"scale": self.scale, "unselected": self.unselected}
        if self.dropout_p:
            seed = torch.tensor([self.dropout_seed], device=x.device)
            form["dropout"] = multiplier(seed, *x.shape, self.dropout_p, dtype)
        y = reference.forward(x, weight, lora_A, lora_B, self.mask, bias=bias, **form)
        return y, *reference.gradients(dy, x, weight, lora_A, lora_B, self.mask, **form)


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
