"""Counting the floating-point operations that code runs, by torch's own formulas (`torch.utils.flop_counter`)."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_flop_count(query, _with_heads(query, key), _with_heads(query, value)))


def _attention_backward(gradient: Any, query: Any, key: Any, value: Any, *rest: Any, **named: Any) -> int:
    return int(sdpa_backward_flop_count(gradient, query, _with_heads(query, key), _with_heads(query, value)))


def _with_heads(query: Any, shape: Any) -> tuple[int, ...]:
    """Return the shape (B, H, T, D) of keys or values with the query's heads, several of which may share one of theirs.

    Operations are those of all the query's heads. torch 2.11 counts none where there are fewer of keys.
    """
    return (*shape[:-3], query[-3], *shape[-2:])


# torch's counter does not know the fused attention of the CPU.
_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_SHAPES: dict[Any, Any] = {
    getattr(_aten, f"_scaled_dot_product_{kind}{suffix}"): formula
    for kind in _FUSED
    for suffix, formula in (("", _attention), ("_backward", _attention_backward))
}


def _out_of_place(packet: Any) -> Any:
    """Return the operator of which this one is the form in place, or itself: the counter knows only the former."""
    name = packet.__name__
    return getattr(_aten, name.removesuffix("_"), packet) if name in ("addmm_", "baddbmm_") else packet


class CountedOperations(TorchDispatchMode):
    """A context that counts the operations of products, convolutions and attention in `total`.

    The operators of `plora_kernels` are counted by what they call.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __enter__(self) -> Self:
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count its operations."""
        given, packet = kwargs or {}, _out_of_place(func._overloadpacket)
        if func.namespace == "plora":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **given)
        if packet not in flop_registry:
            with self:  # a product may be made of other operators
                found = func.decompose(*args, **given)
            if found is not NotImplemented:
                return found
        found = func(*args, **given)
        if packet in _SHAPES:
            shapes = [one.shape if isinstance(one, torch.Tensor) else one for one in args]
            self.total += int(_SHAPES[packet](*shapes))
        elif packet in flop_registry:
            formula: Any = flop_registry[packet]
            self.total += int(formula(*args, **given, out_val=found))
        return found
