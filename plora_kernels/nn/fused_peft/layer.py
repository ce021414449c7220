"""`FusedLoraLinear`: PEFT's `lora.Linear` whose plain calls run as one `plora_linear`.

y = x Wᵀ + bias + Σ_i (s_i·(D(x) A_iᵀ) B_iᵀ + s_i·bias_i)   over the active adapters i
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor
from torch.nn import functional

from plora_kernels.functional import linear_with_index, plora_linear
from plora_kernels.nn.fused_peft.calls import count
from plora_kernels.nn.fused_peft.conditions import (
    NO_ADAPTER,
    Adapter,
    Base,
    adapters_of,
    base_of,
    watched_from_outside,
    why_not_fitting,
)
from plora_kernels.nn.fused_peft.worth import FEW, is_small
from plora_kernels.selection import MAX_RANK

BASE_MODEL = "__base__"  # PEFT's name in `adapter_names` for rows without an adapter


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA layer over a plain linear, with a fused forward; `plora_kernels.fuse_peft` makes it of PEFT's own.

    It has the parameters, names and behaviour of `peft.tuners.lora.Linear`. At every call it is decided whether the
    call is plain: if it is not, for whatever reason, PEFT's own forward computes it. Nothing is kept between calls.

    Shapes: x (…, K) gives y (…, N) in the dtype that the base alone would give.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return y (…, N) for x (…, K), as PEFT's forward does; `adapter_names` gives each sample its own adapter."""
        if type(self) is not FusedLoraLinear:
            # Other code, such as accelerate's hooks, may hold this method after `unfuse_peft` changed the class.
            return lora.Linear.forward(self, x, *args, **kwargs)
        if not args and not kwargs and is_small(self, x):
            count(self, FEW)
            return lora.Linear.forward(self, x)
        names = kwargs.get("adapter_names")
        # PEFT passes the arguments it knows as None if they are not used.
        unknown = args or any(value is not None for key, value in kwargs.items() if key != "adapter_names")
        call: _Call | _MixedCall | str
        if unknown:
            call = "further arguments of the call"
        elif names is not None:
            self._check_forward_args(x, adapter_names=names)
            call = mixed_call(self, x, names)
        else:
            call = plain_call(self, x)
        if isinstance(call, str):
            count(self, call)
            return lora.Linear.forward(self, x, *args, **kwargs)
        count(self, None)
        return call.run(x)


# Code that prints or asks for the name of the class, PEFT's included, finds the one it knows.
FusedLoraLinear.__name__ = lora.Linear.__name__


def why_not(layer: Any) -> str | None:
    """Return why a call of the layer would not be fused, as far as it can be told without an input, or None."""
    found = _parts(layer)
    return found if isinstance(found, str) else None


def _parts(layer: Any) -> tuple[Base, list[Adapter]] | str:
    """Return the layer's base and active adapters, or why a call is not plain."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    if layer.merged_adapters:
        return "its adapters are merged"
    outside = watched_from_outside()
    if outside is not None:
        return outside
    if not layer.cast_input_dtype_enabled:
        return "casting its input is disabled"
    base = base_of(layer)
    if isinstance(base, str):
        return base
    adapters = adapters_of(layer, layer.active_adapters)
    if isinstance(adapters, str):
        return adapters
    if not adapters:
        return NO_ADAPTER
    if len(adapters) > 1:
        if any(adapter.dropout_p for adapter in adapters):
            return "several adapters under dropout"
        rank = sum(adapter.A.shape[0] for adapter in adapters)
        if rank > MAX_RANK:
            return f"the ranks of its adapters add up to {rank}, above {MAX_RANK}"
    return base, adapters


class _Call:
    """A plain call with the active adapters, which is one `plora_linear`."""

    def __init__(self, base: Base, adapters: list[Adapter]) -> None:
        self.base, self.adapters = base, adapters

    def run(self, x: Tensor) -> Tensor:
        """Return y (…, N) for x (…, K)."""
        weight, bias = self.base
        A, B, own, scale, p = self.adapters[0] if len(self.adapters) == 1 else _joined(self.adapters)
        if own is not None:
            shift = scale * own
            bias = shift.to(weight.dtype) if bias is None else (bias + shift).to(bias.dtype)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if p else None
        return linear_with_index(x, weight, A, B, bias, None, scale, False, p, seed)


def _joined(adapters: Sequence[Adapter]) -> Adapter:
    """Return several adapters as one of their ranks' sum: Σ_i s_i·B_i A_i = [s_1·B_1, s_2·B_2, …] [A_1; A_2; …]."""
    A = torch.cat([adapter.A for adapter in adapters])
    B = torch.cat([adapter.B * adapter.scale for adapter in adapters], 1)
    shifts = [adapter.bias * adapter.scale for adapter in adapters if adapter.bias is not None]
    return Adapter(A, B, sum(shifts[1:], shifts[0]) if shifts else None, 1.0, 0.0)


def plain_call(layer: Any, x: Any) -> _Call | str:
    """Return the call of a layer with its active adapters, or why it is not plain."""
    found = _parts(layer)
    if isinstance(found, str):
        return found
    base, adapters = found
    unfitting = why_not_fitting(x, base, adapters)
    return _Call(base, adapters) if unfitting is None else unfitting


class _MixedCall:
    """A call whose samples have adapters of their own: one `plora_linear` with a group of rows for each adapter."""

    def __init__(self, base: Base, adapters: list[Adapter | None], places: list[int]) -> None:
        """Take the adapters of the groups (None: the base alone), and each sample's place among them."""
        self.base, self.adapters, self.places = base, adapters, places

    def run(self, x: Tensor) -> Tensor:
        """Return y (samples, …, N) for x (samples, …, K)."""
        order = sorted(range(len(self.places)), key=self.places.__getitem__)  # stable: samples of a group stay in order
        is_sorted = order == list(range(len(order)))
        rows = x.shape[:-1].numel() // max(1, x.shape[0])  # of one sample
        offsets = [0]
        for group in range(len(self.adapters)):
            offsets.append(offsets[-1] + rows * self.places.count(group))
        width = max(adapter.A.shape[0] for adapter in self.adapters if adapter is not None)
        present = [adapter for adapter in self.adapters if adapter is not None]
        like = present[0]
        stack_A = torch.stack([_padded(adapter and adapter.A, 0, width, like.A) for adapter in self.adapters])
        stack_B = torch.stack([_padded(adapter and adapter.B, 1, width, like.B) for adapter in self.adapters])
        # Modules that only fill up the stacks are not selected: zeros would turn an infinite x into NaN.
        selected = [list(range(0 if adapter is None else adapter.A.shape[0])) for adapter in self.adapters]
        scales = [0.0 if adapter is None else adapter.scale for adapter in self.adapters]
        weight, bias = self.base
        if not is_sorted:
            places = torch.tensor(order).to(x.device, non_blocking=True)
            x = x.index_select(0, places)
        y = plora_linear(x, weight, stack_A, stack_B, selected, bias=bias, scale=scales, groups=offsets)
        return y if is_sorted else y.index_select(0, torch.argsort(places))


def _padded(factor: Tensor | None, axis: int, width: int, like: Tensor) -> Tensor:
    """Return a factor with zeros up to `width` modules along the axis; zeros alone, shaped as `like`, for None."""
    if factor is None:
        return like.new_zeros((width, like.shape[1]) if axis == 0 else (like.shape[0], width))
    missing = width - factor.shape[axis]
    return functional.pad(factor, (0, missing) if axis else (0, 0, 0, missing)) if missing else factor


def mixed_call(layer: Any, x: Any, names: Sequence[str]) -> _MixedCall | str:
    """Return the call of a layer with an adapter named for each sample, or why it is not plain."""
    if layer._disable_adapters:
        return "its adapters are disabled"
    outside = watched_from_outside()
    if outside is not None:
        return outside
    base = base_of(layer)
    if isinstance(base, str):
        return base
    present = layer._modules["lora_A"]._modules
    known = [name if name in present else BASE_MODEL for name in names]
    groups = list(dict.fromkeys(known))
    adapters = adapters_of(layer, [name for name in groups if name != BASE_MODEL])
    if isinstance(adapters, str):
        return adapters
    if not adapters:
        return NO_ADAPTER
    if any(adapter.dropout_p for adapter in adapters):
        return "adapter_names under dropout"
    if any(adapter.bias is not None for adapter in adapters):
        return "adapter_names with biases of adapters"
    unfitting = why_not_fitting(x, base, adapters)
    if unfitting is not None:
        return unfitting
    each = iter(adapters)
    return _MixedCall(
        base,
        [None if name == BASE_MODEL else next(each) for name in groups],
        [groups.index(name) for name in known],
    )
