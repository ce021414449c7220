"""The fold as torch operators: in place and out of place, and many weights in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from plora_kernels.backend import fallback_to_torch, runs_kernels
from plora_kernels.dispatch import is_watched
from plora_kernels.fallback import fold as fallback

# weight, lora_A, lora_B, index, scale, seed, out.
Job = tuple[Tensor, Tensor, Tensor, Tensor | None, float, int | None, Tensor]


def detached(job: Job) -> Job:
    weight, lora_A, lora_B, index, scale, seed, out = job
    return weight.detach(), lora_A.detach(), lora_B.detach(), index, scale, seed, out.detach()


def takes_kernel(job: Job) -> bool:
    *operands, _, _, _, out = detached(job)
    return runs_kernels(job[0]) and not _is_observed(*operands, out)


def fold_together(jobs: Sequence[Job]) -> None:
    """Fold with one launch for each batch of similar jobs; torch folds a batch whose kernel does not compile."""
    from plora_kernels.kernels.fold_many import batches, fold_batch

    for batch in batches(jobs):
        with fallback_to_torch("many folds", batch[0][0]):
            fold_batch(batch)
            continue
        for job in batch:
            fallback.fold(*job)


def independent(jobs: Sequence[Job]) -> bool:
    """Say whether no job writes to memory that another one reads or writes."""
    writers = {job[-1].untyped_storage()._cdata: position for position, job in enumerate(jobs)}
    return len(writers) == len(jobs) and all(
        writers.get(tensor.untyped_storage()._cdata, position) == position
        for position, job in enumerate(jobs)
        for tensor in job[:3]
    )


def run_fold(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None, out: Tensor
) -> None:
    """Fold checked tensors: through the operators if `_is_observed`, else directly, which costs less host time."""
    if not torch.compiler.is_compiling() and out.is_neg():
        # `out` has its negative bit set (`z.conj().imag`): its memory holds negated values, so fold to a plain tensor
        # and let `copy_` negate.
        plain = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        run_fold(weight.detach().resolve_neg(), lora_A, lora_B, index, scale, seed, plain)
        with torch.inference_mode() if out.is_inference() else torch.no_grad():
            out.copy_(plain)
        return
    in_place, written = out is weight, out
    weight, lora_A, lora_B = weight.detach(), lora_A.detach(), lora_B.detach()
    out = weight if in_place else out.detach()
    if not _is_observed(weight, lora_A, lora_B, out):
        _fold(weight, lora_A, lora_B, index, scale, seed, out)
        if not written.is_inference():
            torch.autograd.graph.increment_version(written)
    elif in_place:
        torch.ops.plora.fold_(weight, lora_A, lora_B, index, scale, seed)
    else:
        torch.ops.plora.fold(weight, lora_A, lora_B, index, scale, seed, out)


def _is_observed(*tensors: Tensor) -> bool:
    """Say whether the call must be an operator: for a compiler, a mode, a tensor subclass, a torch.func transform."""
    return is_watched(*tensors) or torch._C._are_functorch_transforms_active()


def _fold(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None, out: Tensor
) -> None:
    if runs_kernels(weight):
        with fallback_to_torch("the fold", weight):
            from plora_kernels.kernels import fold as kernels

            return kernels.fold(weight, lora_A, lora_B, index, scale, seed, out)
    return fallback.fold(weight, lora_A, lora_B, index, scale, seed, out)


@torch.library.custom_op("plora::fold_", mutates_args=("weight",))
def _fold_in_place(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None
) -> None:
    _fold(weight, lora_A, lora_B, index, scale, seed, weight)


@torch.library.custom_op("plora::fold", mutates_args=("out",))
def _fold_out_of_place(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, index: Tensor | None, scale: float, seed: int | None, out: Tensor
) -> None:
    _fold(weight, lora_A, lora_B, index, scale, seed, out)


for _operator in (_fold_in_place, _fold_out_of_place):
    _operator.register_fake(lambda *arguments: None)  # they return nothing
