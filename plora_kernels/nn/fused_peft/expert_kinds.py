"""Which experts modules of transformers are known, and how each kind stores and calls its experts.

Two kinds are. Most models decorate their experts by `use_experts_implementation`: the module gets each token's experts
and their weights, and says by attributes whether it has a gate, biases, weights stored (E, K, N) or a norm after. Those
of Llama 4 get rows for every expert, equally many for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ROUTED, _EQUALLY_FED = "routed", "equally fed"
_LLAMA4 = "transformers.models.llama4.modeling_llama4"
# What transformers calls implementations that compute the same by other products, besides the model's own ("eager").
_IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
_SETTINGS = ("config", "has_gate", "has_bias", "is_transposed", "_apply_gate")


class Kind(NamedTuple):
    """How an experts module computes: the names of its two weights, how they are stored, and what runs between them.

    Attributes:
        up, down: names of the parameters; their biases, if `has_bias`, have "_bias" after the name.
        is_turned: whether the weights are stored (E, K, N) and not (E, N, K).
        has_bias: whether both products have a bias (E, N).
        is_routed: whether a call has an index and weights of each token's experts, and not rows for every expert.
        casts: whether rows are cast to the weights' dtype, and autocast does not touch the products.
    """

    up: str
    down: str
    is_turned: bool
    has_bias: bool
    is_routed: bool
    casts: bool


def kind_of(experts: Any) -> Kind | str:
    """Return the kind of an experts module, or in a few words why it is not a known one."""
    form = _form_of(type(experts))
    if form == _EQUALLY_FED:
        return Kind("gate_up_proj", "down_proj", True, False, False, False)
    # An older decorator may not have set all of them.
    if form != _ROUTED or not all(hasattr(experts, name) for name in _SETTINGS):
        return f"unknown experts: {type(experts).__name__}"
    if getattr(experts, "_is_expert_parallel", False):
        return "expert parallelism"
    chosen = experts.config._experts_implementation
    if chosen in (None, "eager"):
        # This class's own loop alone computes in fp32 whatever the dtype.
        wider = type(experts).__name__ == "OpenAIPrivacyFilterExperts"
        if wider or not type(experts).__module__.startswith("transformers.models."):
            return f"unknown experts: {type(experts).__name__}"
    elif not _is_transformers_own(chosen):
        return f"experts implementation: {chosen}"
    up = "gate_up_proj" if experts.has_gate else "up_proj"
    return Kind(up, "down_proj", experts.is_transposed, experts.has_bias, True, chosen == "grouped_mm")


def norm_of(experts: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what an experts module applies to the rows of its second product, or None."""
    return experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None


def gate_of(experts: Any, kind: Kind) -> Callable[[Tensor], Tensor]:
    """Return what an experts module applies between its two products."""
    if kind.is_routed:
        gate: Callable[[Tensor], Tensor] = experts._apply_gate if experts.has_gate else experts.act_fn
        return gate

    def of_llama4(rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        product: Tensor = up * experts.act_fn(gate)
        return product

    return of_llama4


@torch.compiler.assume_constant_result  # it asks for code objects, which a compiler cannot trace
def _form_of(kind: type[nn.Module]) -> str | None:
    """Return the form of an experts class, or None if its forward is not one that is known."""
    forward: Any = kind.forward
    if (forward.__module__, forward.__qualname__) == (_LLAMA4, "Llama4TextExperts.forward"):
        return _EQUALLY_FED
    code: CodeType | None = getattr(forward, "__code__", None)
    if code is None or code is not _decorated_code():
        return None
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    free = dict(zip(code.co_freevars, forward.__closure__, strict=True))
    return _ROUTED if free["experts_interface"].cell_contents is ALL_EXPERTS_FUNCTIONS else None


@functools.cache
def _decorated_code() -> CodeType | None:
    """Return the code that all forwards made by `use_experts_implementation` share; None if transformers has none."""
    try:
        from transformers.integrations.moe import use_experts_implementation
    except ImportError:  # an older version, whose experts are not stacked
        return None
    code: CodeType = use_experts_implementation(type("Probe", (nn.Module,), {})).forward.__code__
    return code


@torch.compiler.assume_constant_result
def _is_transformers_own(implementation: str) -> bool:
    """Say whether an implementation is one whose products are known, and not another registered under its name."""
    from transformers.integrations import moe

    own = getattr(moe, f"{implementation}_experts_forward", None)
    return implementation in _IMPLEMENTATIONS and moe.ALL_EXPERTS_FUNCTIONS.get(implementation) is own
