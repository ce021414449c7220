"""LoRA on the stacked weights of a mixture's experts (PEFT's `target_parameters`), without making W + s·B A.

PEFT wraps each targeted parameter of an experts module by a `ParamWrapper`, one around the other, and in every forward
makes the whole stack W + s·B A, as large as all experts. `FusedParamWrapper` computes the experts itself wherever
`why_not_experts` knows no reason against it, and calls PEFT's forward everywhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from plora_kernels.checks import DTYPES, may_adapt
from plora_kernels.dispatch import autocast_dtype
from plora_kernels.nn.fused_peft.calls import count
from plora_kernels.nn.fused_peft.conditions import NO_ADAPTER, watched_from_outside, why_altered
from plora_kernels.nn.fused_peft.expert_kinds import Kind, gate_of, kind_of, norm_of
from plora_kernels.nn.fused_peft.expert_products import Stack, equally_fed_experts, routed_experts
from plora_kernels.nn.fused_peft.known_versions import why_unknown
from plora_kernels.selection import MAX_RANK

_ARGUMENTS = ("top_k_index", "top_k_weights")


class FusedParamWrapper(lora.ParamWrapper):
    """PEFT's `ParamWrapper` of an experts module, which computes the experts fused where a call is plain.

        y_t = Σ_j w_tj · f_e(x_t),  e = index_tj

    with f_e the expert e whose stacked weights have the active adapter's modules; see `expert_products.py`. A layer
    becomes fused by `layer.__class__ = FusedParamWrapper` and PEFT's again by the reverse: its parameters, their names,
    state dicts and saved files are the same, and nothing is cached. The outermost wrapper computes the whole; the inner
    ones, which it holds, are then not called.

    Results and gradients equal PEFT's up to rounding. In half precision they are nearer to exact, because PEFT rounds
    W + s·B A to the weight's dtype. Double backward raises `UnsupportedError`.

    >>> FusedParamWrapper.forward is not lora.ParamWrapper.forward
    True
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what the experts module returns for its arguments x (hidden states) and, if routed, index and weights.

        x is (T, H), the index (T, k) integers from 0 to E (E: no expert), the weights (T, k); the result is (T, H) in
        x's dtype. Experts of Llama 4 take x (E·T, H) alone, T rows for each expert.
        """
        if type(self) is not FusedParamWrapper:
            # Other code, such as accelerate's hooks, may hold this method after `unfuse_peft` changed the class.
            own: Tensor = lora.ParamWrapper.forward(self, x, *args, **kwargs)
            return own
        reason = why_not_experts(self)
        if reason is None:
            reason = _why_not_call(self, x, args, kwargs)
        count(self, reason)
        if reason is not None:
            unfused: Tensor = lora.ParamWrapper.forward(self, x, *args, **kwargs)
            return unfused
        experts, wrappers = _experts_of(self), {wrapper.parameter_name: wrapper for wrapper in _chain(self)}
        kind = kind_of(experts)
        assert isinstance(kind, Kind)
        up, down = (_stack(experts, kind, name, wrappers.get(name)) for name in (kind.up, kind.down))
        if not kind.is_routed:
            return equally_fed_experts(x, up, down, gate_of(experts, kind))
        index, weights = (*args, *(kwargs[name] for name in _ARGUMENTS[len(args) :]))
        return routed_experts(x, index, weights, up, down, gate_of(experts, kind), norm_of(experts))


# PEFT finds the wrapper of a parameter by the name of its class, when it adds another adapter.
FusedParamWrapper.__name__ = "ParamWrapper"


def why_not_experts(layer: lora.ParamWrapper) -> str | None:
    """Return in a few words why a wrapper's calls run PEFT's forward at the moment, or None if plain calls run fused.

    It looks at the wrapper, those inside it, and the experts: nothing here depends on a call's arguments.
    """
    experts, wrappers = _experts_of(layer), list(_chain(layer))
    unknown = _why_unknown()
    if unknown is not None:
        return unknown
    if any(not isinstance(one, FusedParamWrapper) and type(one) is not lora.ParamWrapper for one in wrappers):
        return "a subclass of ParamWrapper"
    if "parametrizations" in experts._modules:
        return "parametrized weights"
    kind = kind_of(experts)
    if isinstance(kind, str):
        return kind
    names = [wrapper.parameter_name for wrapper in wrappers]
    if len(set(names)) < len(names):
        return "a parameter wrapped twice"
    others = [name for name in names if name not in (kind.up, kind.down)]
    if others:
        return f"adapted parameter: {others[0]}"
    if any(why_altered(module, "") is not None for module in (*wrappers[1:], experts)):
        return "hooks on the experts"
    for wrapper in wrappers:
        reason = _why_not_adapter(wrapper)
        if reason is not None:
            return reason
    return _why_not_weights(experts, kind, wrappers)


@torch.compiler.assume_constant_result  # a compiler cannot trace the reading of code
def _why_unknown() -> str | None:
    """Return why PEFT's code is no longer what it was when the layer was fused: other code may have patched it."""
    return why_unknown(lora.ParamWrapper)


def _why_not_adapter(wrapper: lora.ParamWrapper) -> str | None:
    """Return why the state of a wrapper's adapters is not plain: exactly one active, not merged, without variants."""
    if wrapper.disable_adapters:
        return "its adapters are disabled"
    if wrapper.merged:
        return "its adapters are merged"
    active = wrapper.active_adapters
    if len(active) > 1:
        return "several adapters"
    if not active or active[0] not in wrapper.lora_A:
        return NO_ADAPTER
    if active[0] in getattr(wrapper, "lora_variant", ()):
        return "a variant of LoRA"
    if not isinstance(wrapper.scaling[active[0]], int | float):
        return "a computed scale"
    return None


def _why_not_weights(experts: Any, kind: Kind, wrappers: list[lora.ParamWrapper]) -> str | None:
    """Return why the weights, biases or factors are not plain tensors that fit."""
    bases = [experts._parameters.get(name) for name in (kind.up, kind.down)]
    biases = [experts._parameters.get(f"{name}_bias") for name in (kind.up, kind.down)] if kind.has_bias else []
    factors: list[Any] = [
        getattr(half[wrapper.active_adapters[0]], "weight", None)
        for wrapper in wrappers
        for half in (wrapper.lora_A, wrapper.lora_B)
    ]
    if any(type(tensor) is not nn.Parameter for tensor in (*bases, *biases, *factors)):
        return "a tensor that is no plain parameter"
    first = bases[0]
    number = experts.num_experts
    if any(base.dim() != 3 or base.shape[0] != number for base in bases):
        return "weights that are not stacked"
    if number == 1:
        return "a single expert"
    if any(base.requires_grad for base in bases):
        return "a trainable base weight"
    if first.device.type == "meta" or any(tensor.device != first.device for tensor in (*bases, *biases, *factors)):
        return "several devices"
    if first.dtype not in DTYPES or any(tensor.dtype is not first.dtype for tensor in (*bases, *biases)):
        return "a mixture of dtypes"
    if any(tensor.dtype is not factors[0].dtype or not may_adapt(tensor.dtype, first.dtype) for tensor in factors):
        return "a mixture of dtypes"
    if any(factor.shape[0] > MAX_RANK * number for factor in factors[::2]):
        return f"a rank above {MAX_RANK}"
    return None


def _why_not_call(layer: lora.ParamWrapper, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return why a call of a wrapper that `why_not_experts` does not refuse runs PEFT's forward, or None."""
    experts = _experts_of(layer)
    kind = kind_of(experts)
    assert isinstance(kind, Kind)
    if kwargs.get("adapter_names") is not None:
        return "adapter_names"
    wanted = _ARGUMENTS[len(args) :] if kind.is_routed else ()
    if len(args) > 2 * kind.is_routed or set(kwargs) != set(wanted):
        return "other arguments"
    tensors = (x, *args, *(kwargs[name] for name in wanted))
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return "a tensor subclass"
    weight = experts._parameters[kind.up]
    assert weight is not None
    if any(tensor.device != weight.device for tensor in tensors):
        return "several devices"
    if any(tensor.dim() != 2 for tensor in tensors) or x.shape[1] != weight.shape[1 if kind.is_turned else 2]:
        return "other shapes"
    if kind.is_routed and not tensors[1].shape == tensors[2].shape == (x.shape[0], tensors[1].shape[1]):
        return "other shapes"
    if not kind.is_routed and x.shape[0] % weight.shape[0]:
        return "other shapes"
    casting = autocast_dtype(x.device.type)
    if casting is not None and not kind.casts and casting is not weight.dtype:
        return "autocast of the weights"
    if x.dtype is not weight.dtype and (casting is None or x.dtype not in DTYPES):
        return "a mixture of dtypes"
    if kind.is_routed and not (_is_index(tensors[1]) and tensors[2].is_floating_point()):
        return "a mixture of dtypes"
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return "torch.jit.trace"
    return watched_from_outside()


def _is_index(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _chain(layer: nn.Module) -> Iterator[lora.ParamWrapper]:
    """Yield the wrappers of an experts module, from this one inwards."""
    while isinstance(layer, lora.ParamWrapper):
        yield layer
        layer = layer.base_layer


def _experts_of(layer: nn.Module) -> Any:
    """Return the module that the wrappers wrap."""
    while isinstance(layer, lora.ParamWrapper):
        layer = layer.base_layer
    return layer


def _stack(experts: Any, kind: Kind, name: str, wrapper: lora.ParamWrapper | None) -> Stack:
    """Return the weight of this name, as (E, N, K), with its bias and the wrapper's active adapter.

    PEFT stores what it adds to a parameter P (E, p, q) as s·left · right, left (E, p, R) and right (E, R, q). For a
    weight that is stored (E, K, N), that is A = leftᵀ and B = rightᵀ, else A = right and B = left.
    """
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias") if kind.has_bias else None
    weight = weight.mT if kind.is_turned else weight
    if wrapper is None:
        return Stack(weight, bias)
    adapter, number = wrapper.active_adapters[0], weight.shape[0]
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    a = a.view(number, -1, a.shape[1])  # (E, R, in)
    b = b.view(b.shape[0], -1, number).permute(2, 0, 1)  # (E, out, R)
    # PEFT takes a parameter for (E, in, out) unless it swapped the two, as it does where `is_transposed` is not set.
    left, right = (b, a) if getattr(wrapper, "_did_swap_in_out_features", False) else (a.mT, b.mT)
    lora_A, lora_B = (left.mT, right.mT) if kind.is_turned else (right, left)
    return Stack(weight, bias, lora_A.contiguous(), lora_B.contiguous(), float(wrapper.scaling[adapter]))
