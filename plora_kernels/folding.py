"""Folding modules into weights: the public functions `fold_`, `fold` and `fold_many_`.

No function here reads a device tensor on the host.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plora_kernels.backend import runs_kernels
from plora_kernels.checks import check_alike, check_factors, check_number, check_operands, index_for
from plora_kernels.counter_rng import HALF, ROUNDINGS
from plora_kernels.errors import ConfigError, DTypeError, ShapeError, StateError
from plora_kernels.ops.fold import Job, detached, fold_together, independent, run_fold, takes_kernel
from plora_kernels.selection import Selection, complement, host_indices, padded, to_device


def fold_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | None,
    *,
    scale: float = 1.0,
    sign: int = 1,
    rounding: str = "nearest",
    seed: int | None = None,
) -> Tensor:
    """Add the unselected modules to the weight in place, W += sign·s·Σ_{j∉selected} b_j a_jᵀ, and return it.

    Args:
        weight: (N, K), changed in place; lora_A (R, K), lora_B (N, R) of the same device and dtype, or both float32
            beside a weight of half precision.
        selected: the modules to leave out: a bool mask (R,), indices, `[]` to fold all, None (all selected) to fold
            none.
        scale: s. sign: +1 adds the modules, −1 subtracts them again, up to rounding errors: keep the original weight
            if it must be restored exactly.
        rounding: "nearest", or "stochastic" for a float16 or bfloat16 weight: up or down at random such that the
            expectation is exact, so that a weight that is folded many times does not drift. Values beyond the largest
            finite one, infinities and NaN are rounded as by "nearest".
        seed: 0 … 2⁶³ − 1, required for "stochastic" and not allowed otherwise; use another one for every fold. The
            random number of an element depends on the seed and its position (n, k) only.

    The sum runs in fp32 (float64 for float64) and is rounded once into the weight. It has no autograd: the factors
    enter as constants.

    Raises:
        ShapeError, RankError, DTypeError, DeviceError, SelectionError: an argument does not fit.
        ConfigError: sign is neither 1 nor −1; rounding or seed cannot be used.
        StateError: weight requires a gradient and gradients are enabled.

    Source: Select-N-Fold, arXiv 2602.16936.

    >>> weight = torch.zeros(2, 3)
    >>> lora_A, lora_B = torch.ones(2, 3), torch.tensor([[1.0, 10.0], [1.0, 10.0]])
    >>> fold_(weight, lora_A, lora_B, selected=[0], scale=0.5)  # module 1 goes in
    tensor([[5., 5., 5.],
            [5., 5., 5.]])
    """
    scale = check_fold(weight, lora_A, lora_B, scale, sign)
    seed = check_rounding(weight, rounding, seed)
    refuse_gradient("weight", weight)
    folds, index = index_of_others(selected, lora_A.shape[0], weight.device)
    if folds:
        run_fold(weight, lora_A, lora_B, index, scale, seed, weight)
    return weight


def fold(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    selected: Selection | None,
    *,
    scale: float = 1.0,
    sign: int = 1,
    out: Tensor | None = None,
    rounding: str = "nearest",
    seed: int | None = None,
) -> Tensor:
    """Return W + sign·s·Σ_{j∉selected} b_j a_jᵀ (N, K) in `out` or a new tensor; the weight is not changed.

    Arguments and errors are those of `fold_`, and the result is equal to its result bit for bit. The kernel reads W
    once and writes the result once, as for `fold_`; on CPU torch's `addmm` first copies an fp32 W. The result has no
    autograd.

    Args:
        out: (N, K) of the weight's dtype and device; every element is written. It may be the weight itself, but must
            not overlap it partly, nor overlap the factors.

    Raises:
        ShapeError: out is not (N, K). StateError: out requires a gradient and gradients are enabled.

    >>> weight = torch.zeros(1, 2)
    >>> fold(weight, torch.ones(1, 2), torch.ones(1, 1), selected=[]), weight
    (tensor([[1., 1.]]), tensor([[0., 0.]]))
    """
    scale = check_fold(weight, lora_A, lora_B, scale, sign)
    seed = check_rounding(weight, rounding, seed)
    if out is None:
        out = torch.empty_like(weight, requires_grad=False)
    else:
        check_out(weight, out)
    folds, index = index_of_others(selected, lora_A.shape[0], weight.device)
    if folds:
        run_fold(weight, lora_A, lora_B, index, scale, seed, out)
    elif out is not weight:
        with torch.no_grad():
            out.copy_(weight)
    return out


@dataclass(frozen=True, eq=False)
class Fold:
    """One fold of `fold_many_`: the arguments of `fold_`, and `out` (N, K) for the result; None writes to the weight.

    >>> Fold(torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 1), selected=[]).scale
    1.0
    """

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    selected: Selection | None
    scale: float = 1.0
    sign: int = 1
    out: Tensor | None = None


def fold_many_(folds: Sequence[Fold], *, rounding: str = "nearest", seed: int | None = None) -> list[Tensor]:
    """Do many folds in place, or into their `out`, and return the tensors that were written, in order.

    On a GPU the weights of one dtype and alignment share launches of up to 512 folds, and the host does not wait for
    the device; elsewhere one fold runs after another. Results equal those of `fold_` and `fold` bit for bit; with
    stochastic rounding fold number i uses seed + i. All arguments are checked before anything is written. Folds that
    share memory run in order, one launch each.

    Raises the errors of `fold_` and `fold`.

    >>> weights = [torch.zeros(1, 2), torch.zeros(2, 1)]
    >>> jobs = [Fold(W, torch.ones(1, W.shape[1]), torch.ones(W.shape[0], 1), []) for W in weights]
    >>> [W.tolist() for W in fold_many_(jobs)]
    [[[1.0, 1.0]], [[1.0], [1.0]]]
    """
    scales, seeds = [], []
    for position, one in enumerate(folds):
        scales.append(check_fold(one.weight, one.lora_A, one.lora_B, one.scale, one.sign))
        seeds.append(check_rounding(one.weight, rounding, seed if seed is None else seed + position))
        if one.out is None:
            refuse_gradient("weight", one.weight)
        else:
            check_out(one.weight, one.out)
    written = [one.weight if one.out is None else one.out for one in folds]
    jobs: list[Job] = []
    unfolded: list[tuple[Tensor, Tensor]] = []
    settings = zip(folds, _indices_of_others(folds), scales, seeds, written, strict=True)
    for one, (folds_any, index), scale, number, out in settings:
        if folds_any:
            jobs.append((one.weight, one.lora_A, one.lora_B, index, scale, number, out))
        elif out is not one.weight:
            unfolded.append((out, one.weight))
    with torch.no_grad():
        for out, weight in unfolded:
            out.copy_(weight)
    if len(jobs) > 1 and all(takes_kernel(job) for job in jobs) and independent(jobs):
        fold_together([detached(job) for job in jobs])
        torch.autograd.graph.increment_version([job[-1] for job in jobs if not job[-1].is_inference()])
    else:
        for job in jobs:
            run_fold(*job)
    return written


def _indices_of_others(folds: Sequence[Fold]) -> list[tuple[bool, Tensor | None]]:
    """Return `index_of_others` of every fold; indices known on the host go to each device in one copy."""
    found: list[tuple[bool, Tensor | None]] = []
    known: dict[torch.device, list[tuple[int, list[int]]]] = {}
    for position, one in enumerate(folds):
        rank, device = one.lora_A.shape[0], one.weight.device
        selected = one.selected
        if selected is None or not _is_on_host(selected):
            found.append(index_of_others(selected, rank, device))
            continue
        others = complement(host_indices(selected, rank), rank)
        found.append((bool(others), None))
        # Without an index the torch path folds all modules; the table of `fold_many_kernel` needs an index always.
        if runs_kernels(one.weight) or len(others) < rank:
            known.setdefault(device, []).append((position, padded(others)))
    for device, entries in known.items():
        buffer = to_device([place for _, places in entries for place in places], torch.int32, device)
        parts = buffer.split([len(places) for _, places in entries])
        for (position, _), part in zip(entries, parts, strict=True):
            found[position] = found[position][0], part
    return found


def check_fold(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scale: float, sign: int) -> float:
    """Return sign·s; raise unless shapes, dtypes and devices fit together, sign is ±1 and scale a finite number."""
    if sign not in (1, -1):
        raise ConfigError(f"sign is {sign!r}; 1 folds and -1 takes out again")
    check_factors(weight, lora_A, lora_B)
    check_operands("weight", {"weight": weight}, lora_A, lora_B)
    return check_number("scale", scale) * sign


def check_rounding(weight: Tensor, rounding: str, seed: int | None) -> int | None:
    """Return the seed of stochastic rounding, or None for rounding to nearest."""
    if rounding not in ROUNDINGS:
        raise ConfigError(f"rounding is {rounding!r}; it may be 'nearest' or 'stochastic'")
    if rounding == "nearest":
        if seed is not None:
            raise ConfigError(f"seed is {seed!r}, but rounding is 'nearest', which draws nothing: leave the seed out")
        return None
    if weight.dtype not in HALF:
        raise DTypeError(
            f"rounding is 'stochastic' and weight {weight.dtype}; that is for float16 and bfloat16, a wider sum is "
            "not rounded again: use 'nearest'"
        )
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise ConfigError(f"seed is {seed!r}; rounding='stochastic' needs an integer from 0 to 2**63 - 1")
    return number


def check_out(weight: Tensor, out: Tensor) -> None:
    """Raise unless a fold of `weight` can be written to `out`."""
    if out.shape != weight.shape:
        raise ShapeError(f"out is {tuple(out.shape)}; weight needs {tuple(weight.shape)}")
    check_alike("weight", {"weight": weight, "out": out})
    refuse_gradient("out", out)


def refuse_gradient(name: str, tensor: Tensor) -> None:
    """Raise StateError if autograd would have to record a change of this tensor in place."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise StateError(
            f"{name} requires a gradient: fold inside torch.no_grad() or call {name}.requires_grad_(False)"
        )


def index_of_others(selected: Selection | None, rank: int, device: torch.device) -> tuple[bool, Tensor | None]:
    """Return whether there may be modules to fold, and the unselected ones as an index buffer (None: all or none)."""
    if selected is None:
        return False, None
    if not _is_on_host(selected):
        return True, index_for(selected, rank, device, invert=True)
    others = complement(host_indices(selected, rank), rank)
    if len(others) in (0, rank):
        return bool(others), None
    return True, index_for(others, rank, device)


def _is_on_host(selected: Selection) -> bool:
    """Say whether the host may read a selection: inside torch.compile it may not read any tensor."""
    return not isinstance(selected, Tensor) or (selected.device.type == "cpu" and not torch.compiler.is_compiling())
