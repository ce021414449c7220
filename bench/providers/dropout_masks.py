"""The elements of x that a layer's dropout keeps for a seed of torch's generator, for checking its results.

PEFT draws a mask with `F.dropout`, this library makes it from a seed that it draws; both can be drawn again. Compiled
code has its own random numbers, so its mask is derived from a gradient.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import DROPOUT_P, Problem
from bench.checks.correctness import WrongResultError
from plora_kernels.counter_rng import keep_mask

SEED = 20
# By how many standard deviations the share of dropped elements may differ from p.
SPREAD = 6.0


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Seed torch's generators with SEED in the body, and restore their states afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SEED)
        yield


def kept_by_torch(problem: Problem, dtype: torch.dtype) -> Tensor:
    """Return the mask (m, k) that `F.dropout` draws for an x cast to `dtype`."""
    with seeded(problem.x.device):
        return F.dropout(torch.ones_like(problem.x, dtype=dtype), DROPOUT_P) != 0


def kept_by_layer(problem: Problem) -> Tensor:
    """Return the mask (m, k) of a `FusedPLoRALinear`, which first draws the seed of a call."""
    with seeded(problem.x.device):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=problem.x.device)
    rows, columns = problem.x.shape
    return keep_mask(seed, rows, columns, DROPOUT_P)


def kept_by_call(call: Callable[[Tensor], Tensor], problem: Problem, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Return the mask (m, k) of a layer, derived from its gradient of x, for any random numbers that it uses.

    With A and B all ones and dY one in its first column only, dx is the weight's first row, plus s·r/(1 − p) where x is
    kept, which is far larger than any weight. The factors are restored. Comparing the results then shows that another
    call with the same seed has the same mask, in forward and backward.

    Raises WrongResultError if the share of dropped elements is not p.
    """
    x, grad_y = problem.x.detach().requires_grad_(), torch.zeros_like(problem.grad_y)
    grad_y[:, 0] = 1
    before = [factor.detach().clone() for factor in (lora_A, lora_B)]
    with torch.no_grad():
        lora_A.fill_(1)
        lora_B.fill_(1)
    with seeded(x.device):
        (grad_x,) = torch.autograd.grad(call(x), x, grad_y)
    with torch.no_grad():
        lora_A.copy_(before[0])
        lora_B.copy_(before[1])
    kept = grad_x > problem.scale * problem.B.shape[1] / 2
    dropped = 1 - kept.double().mean().item()
    if abs(dropped - DROPOUT_P) > SPREAD * (DROPOUT_P * (1 - DROPOUT_P) / kept.numel()) ** 0.5:
        raise WrongResultError(f"dropout drops {dropped:.4f} of x; it must be {DROPOUT_P}")
    return kept
