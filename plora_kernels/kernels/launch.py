"""What launchers ask about tensors: alignment, width of offsets, precision, and the dropout a layer applies."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from plora_kernels.counter_rng import threshold
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import ShapeClass


class Dropout(NamedTuple):
    """LoRA dropout of probability `p`: `seed` one int64 number on the device.

    `selected` is the index of the modules it touches, None for all that enter: frozen modules that are not selected see
    x as it is. In the grouped form there is a seed and an index for each group, (C,) and (C, W), and `numbers` (M,) are
    the rows' numbers in their group's mask, None if they count from 0.
    """

    p: float
    seed: Tensor
    selected: Tensor | None
    numbers: Tensor | None = None

    @property
    def selected_width(self) -> int:
        """Entries of the index, or of a group's; 0 without one."""
        return 0 if self.selected is None else self.selected.shape[-1]

    @property
    def selected_block(self) -> int:
        """The index's entries as the kernels load them, a power of two; 0 without an index."""
        return 0 if self.selected is None else max(16, 1 << (self.selected_width - 1).bit_length())


class DropoutArguments(NamedTuple):
    """What kernels take of a dropout, or of none: pointers that are not read and numbers that change nothing."""

    seed: Tensor
    numbers: Tensor
    selected: Tensor
    selected_width: int
    threshold: int
    keep_scale: float
    selected_block: int
    numbered: bool

    @classmethod
    def of(cls, dropout: Dropout | None, unused: Tensor) -> DropoutArguments:
        """Return the arguments; `unused` stands where there is nothing to point at."""
        if dropout is None:
            return cls(unused, unused, unused, 0, 0, 1.0, 0, False)
        p, seed, selected, numbers = dropout
        return cls(
            seed,
            numbers if numbers is not None else unused,
            selected if selected is not None else unused,
            dropout.selected_width,
            threshold(p),
            1 / (1 - p),
            dropout.selected_block,
            numbers is not None,
        )


def launches_dependents(device: torch.device) -> bool:
    """Say whether a launch on this device may begin before the one it depends on has ended."""
    return lookup.hardware_of(device).has_dependent_launches


def cdiv(size: int, block: int) -> int:
    """Return ⌈size / block⌉: Triton's own unwraps its arguments at every call, microseconds on the way to a launch."""
    return -(-size // block)


def is_aligned(matrix: Tensor) -> bool:
    """Say whether Triton will load lines of this matrix in wide pieces.

    It must be contiguous along one axis, with a stride along the other and a start that 16 divides (elements and
    bytes): what Triton specialises on.
    """
    short, long = sorted(matrix.stride())
    return short == 1 and long % 16 == 0 and matrix.data_ptr() % 16 == 0


def layer_class(op: str, inputs: Tensor, main: Tensor, width: int) -> tuple[ShapeClass, bool]:
    """Return what blocks of inputs · main with `width` module places are looked up by, and whether all is aligned."""
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    aligned = is_aligned(inputs) and is_aligned(main) and d_out % 16 == 0
    return ShapeClass(op, dtype_name(inputs.dtype), rows, d_in, d_out, width), aligned


def needs_wide_offsets(block: int, *tensors: Tensor) -> bool:
    """Say whether an offset inside a tile of at most block × block elements may pass 2³¹."""
    return any(2 * block * max(tensor.stride()) >= 2**31 for tensor in tensors)


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input precision: tf32 for fp32 only where torch's own matmuls may use it, else IEEE."""
    return "tf32" if dtype is torch.float32 and _may_use_tf32() else "ieee"


def _may_use_tf32() -> bool:
    """Say whether torch's own fp32 matmuls may use tf32 on a GPU.

    Where torch has `fp32_precision` the older flag must not be asked: it raises once the newer one was set.
    """
    settings = (getattr(place, "fp32_precision", "") for place in (torch.backends.cuda.matmul, torch.backends))
    precision = next((precision for precision in settings if precision != "none"), "none")
    return precision == "tf32" if precision else torch.backends.cuda.matmul.allow_tf32


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")
