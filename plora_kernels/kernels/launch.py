"""Helpers of the kernels' launchers: alignment, offset width and precision of tensors, arguments of kernels."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from plora_kernels.counter_rng import threshold
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import Blocks, ShapeClass


class Dropout(NamedTuple):
    """LoRA dropout of probability `p`; `seed` is one int64 number on the device.

    `selected` is the index of the modules it applies to, or None for all that enter y: frozen modules that are not
    selected get x without dropout. In the grouped form seeds are (C,) and indices (C, W), and `numbers` (M,) are the
    rows' numbers in their group's mask, or None if a group's rows count from 0.
    """

    p: float
    seed: Tensor
    selected: Tensor | None
    numbers: Tensor | None = None

    @classmethod
    def of_layer(
        cls, index: Tensor | None, frozen: bool, p: float, seed: Tensor | None, numbers: Tensor | None = None
    ) -> Dropout | None:
        """Return the dropout of a layer's low-rank branch, or None if it applies to no module.

        If not `frozen`, all modules that enter y are selected; if `frozen`, the index names the selected ones.
        """
        if seed is None or p == 0.0 or (index is not None and index.shape[-1] == 0):
            return None
        numbers = None if numbers is None else numbers.contiguous()
        return cls(p, seed.contiguous(), index if frozen else None, numbers)


class DropoutArguments(NamedTuple):
    """The dropout arguments of kernels, in their order; without dropout no tensors and neutral numbers.

    `selected_width` is the number of entries of the index (of one group's index in the grouped form).
    """

    seed: Tensor | None = None
    numbers: Tensor | None = None
    selected: Tensor | None = None
    selected_width: int = 0
    threshold: int = 0
    keep_scale: float = 1.0

    @classmethod
    def of(cls, dropout: Dropout | None) -> DropoutArguments:
        """Return the arguments of a launch with this dropout."""
        if dropout is None:
            return cls()
        p, seed, selected, numbers = dropout
        width = 0 if selected is None else selected.shape[-1]
        return cls(seed, numbers, selected, width, threshold(p), 1 / (1 - p))

    @property
    def selected_block(self) -> int:
        """`selected_width` rounded up to a power of two, as the kernels load it; 0 without an index."""
        return 0 if self.selected is None else max(16, 1 << (self.selected_width - 1).bit_length())


@functools.cache  # a fold is not replayed: it asks at every call
def constants(blocks: Blocks) -> dict[str, Any]:
    """Return blocks by the names that kernels and Triton give them: BLOCK_M, …, GROUP_M, num_warps, num_stages."""
    sizes = {name.upper(): size for name, size in vars(blocks).items() if name.startswith(("block_", "group_"))}
    return sizes | {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}


def strides(*tensors: Tensor) -> list[int]:
    """Return the strides of tensors, one tensor after another."""
    return [stride for tensor in tensors for stride in tensor.stride()]


def launches_dependents(device: torch.device) -> bool:
    """Say whether a launch on this device may begin before the one it depends on has ended."""
    return lookup.hardware_of(device).has_dependent_launches


def cdiv(size: int, block: int) -> int:
    """Return ⌈size / block⌉. Used in place of `triton.cdiv`, which takes microseconds to unwrap its arguments."""
    return -(-size // block)


def is_aligned(matrix: Tensor) -> bool:
    """Say whether Triton will vectorise loads of this matrix.

    The matrix must be contiguous along one axis, its other stride a multiple of 16 elements, and its address a multiple
    of 16 bytes: Triton specialises kernels on these properties.
    """
    short, long = sorted(matrix.stride())
    return short == 1 and long % 16 == 0 and matrix.data_ptr() % 16 == 0


def layer_class(op: str, inputs: Tensor, main: Tensor, width: int) -> tuple[ShapeClass, bool]:
    """Return the lookup key of the blocks of inputs · main with `width` side columns, and whether all is aligned."""
    (rows, d_in), d_out = inputs.shape, main.shape[1]
    aligned = is_aligned(inputs) and is_aligned(main) and d_out % 16 == 0
    return ShapeClass(op, dtype_name(inputs.dtype), rows, d_in, d_out, width), aligned


def has_wide_factors(inputs: Tensor, factor: Tensor) -> bool:
    """Say whether a factor is in fp32 beside inputs in half precision."""
    return factor.dtype is not inputs.dtype


def needs_wide_offsets(block: int, *tensors: Tensor) -> bool:
    """Say whether an offset inside a tile of at most block × block elements may exceed 2³¹."""
    return any(2 * block * max(tensor.stride()) >= 2**31 for tensor in tensors)


def dot_precision(dtype: torch.dtype) -> str:
    """Return tl.dot's input precision: "tf32" for fp32 if torch's own matmuls may use tf32, else "ieee"."""
    return "tf32" if dtype is torch.float32 and _may_use_tf32() else "ieee"


def _may_use_tf32() -> bool:
    """Say whether torch's own fp32 matmuls may use tf32 on a GPU.

    If torch has `fp32_precision`, the older flag `allow_tf32` must not be read: it raises once the newer one is set.
    """
    settings = (getattr(place, "fp32_precision", "") for place in (torch.backends.cuda.matmul, torch.backends))
    precision = next((precision for precision in settings if precision != "none"), "none")
    return precision == "tf32" if precision else torch.backends.cuda.matmul.allow_tf32


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16, and so on."""
    return str(dtype).removeprefix("torch.")
