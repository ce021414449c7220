"""What the fused experts leave to PEFT's own forward, and the reasons they count."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

import plora_kernels as pk
from plora_kernels.nn.fused_peft.experts import FusedParamWrapper, why_not_experts
from tests.support.equality import assert_equal
from tests.support.experts import (
    BOTH,
    EXPERTS,
    Block,
    adapt_experts,
    fuse,
    wrappers_of,
)


def disabled(model: nn.Module) -> None:
    for wrapper in wrappers_of(model):
        wrapper.enable_adapters(False)


def merged(model: nn.Module) -> None:
    for wrapper in wrappers_of(model):
        wrapper.merge()


def several(model: Any) -> None:
    model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
    model.base_model.set_adapter(["default", "other"])


def inactive(model: Any) -> None:
    for wrapper in wrappers_of(model):
        wrapper._active_adapter = ["other"]


def hooked(model: nn.Module) -> None:
    wrappers_of(model)[0].get_base_layer().register_forward_hook(lambda *_: None)


def hooked_within(model: nn.Module) -> None:
    wrappers_of(model)[1].register_forward_pre_hook(lambda *_: None)


def with_a_forward_of_its_own(model: nn.Module) -> None:
    experts = wrappers_of(model)[0].get_base_layer()
    experts.forward = experts.forward


def trained(model: nn.Module) -> None:
    wrappers_of(model)[0].get_base_layer().down_proj.requires_grad_()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(model: nn.Module) -> None:
    parametrize.register_parametrization(wrappers_of(model)[0].get_base_layer(), "down_proj", Doubled())


def of_another_class(model: nn.Module) -> None:
    wrappers_of(model)[1].__class__ = type("Own", (lora.ParamWrapper,), {})


def with_another_forward(model: nn.Module) -> None:
    experts: Any = wrappers_of(model)[0].get_base_layer()
    kind = type(experts)

    def forward(self: Any, *inputs: Tensor) -> Tensor:
        return 2 * kind.forward(self, *inputs)

    experts.__class__ = type("OwnExperts", (kind,), {"forward": forward})


def mixed(model: nn.Module) -> None:
    for wrapper in wrappers_of(model):
        wrapper.lora_A.double()


def in_parallel(model: nn.Module) -> None:
    wrappers_of(model)[0].get_base_layer()._is_expert_parallel = True


def of_an_older_decorator(model: nn.Module) -> None:
    del wrappers_of(model)[0].get_base_layer().has_gate


def by_another_implementation(model: nn.Module) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    ALL_EXPERTS_FUNCTIONS.register("of_a_test", lambda *given: 3 * batched_mm_experts_forward(*given))
    wrappers_of(model)[0].get_base_layer().config._experts_implementation = "of_a_test"


def of_a_variant(model: nn.Module) -> None:
    wrappers_of(model)[1].lora_variant["default"] = object()


def with_a_computed_scale(model: nn.Module) -> None:
    wrappers_of(model)[0].scaling["default"] = torch.tensor(2.0)


def with_missing_experts(model: nn.Module) -> None:
    wrappers_of(model)[0].get_base_layer().num_experts = 8  # the last has no tokens, and so is not missed


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (disabled, "its adapters are disabled"),
    (merged, "its adapters are merged"),
    (several, "several adapters"),
    (inactive, "no active adapter in this layer"),
    (hooked, "hooks on the experts"),
    (hooked_within, "hooks on the experts"),
    (with_a_forward_of_its_own, "hooks on the experts"),
    (trained, "a trainable base weight"),
    (of_a_variant, "a variant of LoRA"),
    (with_a_computed_scale, "a computed scale"),
    (with_missing_experts, "weights that are not stacked"),
    (parametrized, "parametrized weights"),
    (of_another_class, "a subclass of ParamWrapper"),
    (with_another_forward, "unknown experts: OwnExperts"),
    (mixed, "a mixture of dtypes"),
    (in_parallel, "expert parallelism"),
    (of_an_older_decorator, "unknown experts: Qwen2MoeExperts"),
    (by_another_implementation, "experts implementation: of_a_test"),
]


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")  # PEFT beside another parametrization
@pytest.mark.parametrize(("change", "reason"), CHANGES, ids=lambda one: getattr(one, "__name__", None))
def test_what_is_not_plain_runs_peft_s_forward(change: Callable[[Any], object], reason: str) -> None:
    case = EXPERTS["qwen2_moe"]
    found = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = adapt_experts(case.block("eager"), case.names)
        if fused:
            fuse(model)
            assert [why_not_experts(wrapper) for wrapper in wrappers_of(model)] == [None, None]
        change(model)
        found.append(model(*case.inputs(9, torch.float32)))
    assert_equal(*found)
    outermost = wrappers_of(model)[0]
    assert why_not_experts(outermost) == reason
    assert outermost._plora_calls == {reason: 1}


def test_a_parameter_of_two_dimensions_or_of_a_single_expert_is_left_to_peft() -> None:
    case = EXPERTS["gpt_oss"]
    model = adapt_experts(case.block(), ("down_proj_bias",))
    fuse(model)
    assert why_not_experts(wrappers_of(model)[0]) == "adapted parameter: down_proj_bias"
    block = EXPERTS["qwen2_moe"].block()
    block.experts.num_experts = 1
    for name in BOTH:
        setattr(block.experts, name, nn.Parameter(getattr(block.experts, name)[:1].clone(), requires_grad=False))
    model = adapt_experts(block)
    hidden, index, weights = EXPERTS["qwen2_moe"].inputs(5, torch.float32, chosen=1)
    expected = model(hidden, 0 * index, weights)
    fuse(model)
    assert_equal(model(hidden, 0 * index, weights), expected)
    assert wrappers_of(model)[0]._plora_calls == {"a single expert": 1}


def test_a_loop_that_is_wider_than_its_dtype_is_left_to_peft() -> None:
    from transformers import OpenAIPrivacyFilterConfig
    from transformers.models.openai_privacy_filter.modeling_openai_privacy_filter import OpenAIPrivacyFilterExperts

    config = OpenAIPrivacyFilterConfig(hidden_size=32, intermediate_size=24, num_local_experts=7)
    for implementation, expected in (
        ("eager", "unknown experts: OpenAIPrivacyFilterExperts"),
        ("grouped_mm", None),
    ):
        config._experts_implementation = implementation
        model = adapt_experts(Block(OpenAIPrivacyFilterExperts(config)))
        assert why_not_experts(wrappers_of(model)[0]) == expected


def test_a_rank_beyond_the_kernels_is_left_to_peft() -> None:
    model = adapt_experts(EXPERTS["qwen2_moe"].block(), rank=257)
    fuse(model)
    assert why_not_experts(wrappers_of(model)[0]) == "a rank above 256"


def in_half(hidden: Tensor, index: Tensor, weights: Tensor) -> tuple[Any, ...]:
    return hidden.bfloat16(), index, weights


class Own(Tensor):
    """A subclass of tensors."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda hidden, index, weights: (hidden, index), "other arguments"),
        (lambda hidden, index, weights: (hidden, index, weights, 1), "other arguments"),
        (lambda hidden, index, weights: (hidden.as_subclass(Own), index, weights), "a tensor subclass"),
        (lambda hidden, index, weights: (hidden, index[0], weights[0]), "other shapes"),
        (lambda hidden, index, weights: (hidden[:, :3], index, weights), "other shapes"),
        (lambda hidden, index, weights: (hidden, index, weights[:, :1]), "other shapes"),
        (in_half, "a mixture of dtypes"),
        (lambda hidden, index, weights: (hidden, index.float(), weights), "a mixture of dtypes"),
        (lambda hidden, index, weights: (hidden.to("meta"), index, weights), "several devices"),
    ],
)
def test_calls_that_are_not_plain_run_peft_s_forward(change: Callable[..., tuple[Any, ...]], reason: str) -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("eager"), case.names)
    inputs = change(*case.inputs(9, torch.float32))
    outcomes = []
    for fused in (False, True):
        if fused:
            fuse(model)
        try:
            outcomes.append(model(*inputs).detach())
        except Exception as error:  # what PEFT and the experts raise
            outcomes.append(type(error))
    if isinstance(outcomes[0], type):
        assert outcomes[0] is outcomes[1]
    else:
        assert_equal(outcomes[1], outcomes[0])
    assert wrappers_of(model)[0]._plora_calls == {reason: 1}


def test_transforms_and_forward_mode_run_peft_s_forward() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("batched_mm"), case.names)
    hidden, index, weights = case.inputs(9, torch.float32)

    def total(hidden: Tensor) -> Tensor:
        y: Tensor = model(hidden, index, weights)
        return y.sum()

    tangents = []
    for fused in (False, True):
        if fused:
            fuse(model)
        with forward_ad.dual_level():
            y = total(forward_ad.make_dual(hidden, torch.ones_like(hidden)))
            tangents.append(forward_ad.unpack_dual(y).tangent)
    assert_equal(*tangents)
    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):  # PEFT's forward takes no transforms
        torch.func.grad(total)(hidden)
    assert wrappers_of(model)[0]._plora_calls == {"torch.func transforms": 1, "forward-mode differentiation": 1}


def test_double_backward_raises() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block(), case.names)
    fuse(model)
    hidden, index, weights = case.inputs(9, torch.float32)
    hidden.requires_grad_()
    (gradient,) = torch.autograd.grad(model(hidden, index, weights).sum(), hidden, create_graph=True)
    with pytest.raises(pk.UnsupportedError, match="no double backward"):
        gradient.sum().backward()


def test_adapter_names_raise_as_in_peft() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block(), case.names)
    fuse(model)
    layer = model.base_model.model.experts
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        layer(*case.inputs(9, torch.float32), adapter_names=["default"] * 9)
    assert layer._plora_calls == {"adapter_names": 1}
    assert pickle.loads(pickle.dumps(type(layer))) is FusedParamWrapper
