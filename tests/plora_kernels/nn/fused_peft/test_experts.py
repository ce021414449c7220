"""LoRA on stacked experts, fused: PEFT's results, gradients, files and fallbacks."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import plora_kernels as pk
from bench.harness.memory import peak_bytes
from plora_kernels import dispatch
from plora_kernels.nn.fused_peft.experts import FusedParamWrapper, why_not_experts
from plora_kernels.ops import grouped_linear
from tests.support.equality import assert_equal
from tests.support.experts import (
    BOTH,
    EXPERTS,
    MODELS,
    Block,
    adapt_experts,
    calls_of,
    fuse,
    run_experts,
    tiny_model,
    unfuse,
    wrappers_of,
)
from tests.support.pairwise import pairwise

TOKENS = torch.tensor([[5, 9, 20, 33, 7, 61, 12, 9], [8, 6, 58, 41, 30, 11, 62, 0]])
HALF = (torch.bfloat16, torch.float16)
FUSED_ONCE = [{"fused": 1}]


def assert_as_exact(found: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype) -> None:
    """Assert that errors are at most twice PEFT's at the same dtype, or four spacings of the largest number."""
    for position, (result, unfused, truth) in enumerate(zip(found, plain, exact, strict=True)):
        assert result.dtype is unfused.dtype
        floor = 4 * torch.finfo(dtype).eps * truth.abs().max()
        for norm in (2, float("inf")):
            error, allowed = ((one.double() - truth).norm(norm) for one in (result, unfused))
            assert error <= 2 * allowed + floor, (position, norm, error.item(), allowed.item())


def in_double(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the results of PEFT's own forward in float64, by the experts' own loop."""
    exact: Any = copy.deepcopy(model).double()
    unfuse(exact)
    experts = wrappers_of(exact)[0].get_base_layer()
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"
    return run_experts(exact, tuple(one.double() if one.is_floating_point() else one for one in inputs))


# ---------------------------------------------------------------------------------------------------- experts alone


def chosen(name: str, targets: str) -> tuple[str, ...]:
    up, down = EXPERTS[name].names
    return {"both": (up, down), "up": (up,), "down": (down,), "turned": (down, up)}[targets]


@pytest.mark.parametrize(
    ("name", "implementation", "targets", "dtype"),
    pairwise(
        list(EXPERTS), ["eager", "grouped_mm", "batched_mm"], ["both", "up", "down", "turned"],
        [torch.float32, torch.bfloat16, torch.float16],
    ),
    ids=str,
)  # fmt: skip
def test_results_and_gradients_are_peft_s(
    name: str, implementation: str, targets: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    case = EXPERTS[name]
    model = adapt_experts(case.block(implementation).to(dtype), chosen(name, targets), rank=5, lora_alpha=3)
    inputs = case.inputs(23, dtype)
    plain, exact = run_experts(model, inputs), in_double(model, inputs)
    fuse(model)
    assert_as_exact(run_experts(model, inputs), plain, exact, dtype)
    assert calls_of(model) == FUSED_ONCE


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("targets", ["both", "up"])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4"])
def test_the_kernels_give_the_same(name: str, targets: str) -> None:
    case = EXPERTS[name]
    model = adapt_experts(case.block(), chosen(name, targets))
    inputs = case.inputs(9, torch.float32)
    plain, exact = run_experts(model, inputs), in_double(model, inputs)
    fuse(model)
    assert_as_exact(run_experts(model, inputs), plain, exact, torch.float32)
    assert calls_of(model) == FUSED_ONCE


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(name: str, tokens: int) -> None:
    case = EXPERTS[name]
    model = adapt_experts(case.block("batched_mm" if tokens == 0 else "eager"), case.names)
    inputs = case.inputs(tokens, torch.float32, chosen=1)
    expected = run_experts(model, inputs)
    fuse(model)
    torch.testing.assert_close(run_experts(model, inputs), expected, rtol=1e-5, atol=1e-6)
    assert calls_of(model) == FUSED_ONCE


def test_an_index_beyond_the_experts_names_none() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("eager"), case.names)
    hidden, index, weights = case.inputs(11, torch.float32)
    index[::2, 1] = 7
    index[3] = 7  # a token without any expert
    expected = run_experts(model, (hidden, index, weights))
    fuse(model)
    found = run_experts(model, (hidden, index, weights))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found[0][3].any()
    assert not found[2][index == 7].any()  # the gradient of the weights
    assert calls_of(model) == FUSED_ONCE


def test_arguments_by_name_and_an_index_of_32_bits() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("grouped_mm"), case.names)
    hidden, index, weights = case.inputs(11, torch.float32)
    fuse(model)
    expected = model(hidden, index, weights)
    assert_equal(model(hidden, top_k_weights=weights, top_k_index=index), expected)
    assert_equal(model(hidden, index.int(), top_k_weights=weights), expected)
    assert calls_of(model) == [{"fused": 3}]


def test_weights_in_fp32_beside_half_precision_are_summed_in_fp32() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("grouped_mm").bfloat16(), case.names)
    hidden, index, weights = case.inputs(23, torch.bfloat16)
    inputs = hidden, index, weights.float() / 3
    plain, exact = run_experts(model, inputs), in_double(model, inputs)
    fuse(model)
    assert_as_exact(run_experts(model, inputs), plain, exact, torch.bfloat16)
    assert calls_of(model) == FUSED_ONCE


def test_gradients_of_biases() -> None:
    case = EXPERTS["gpt_oss"]
    model = adapt_experts(case.block("eager"), ("down_proj",))
    for name, parameter in wrappers_of(model)[0].get_base_layer().named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    inputs = case.inputs(23, torch.float32)
    plain, exact = run_experts(model, inputs), in_double(model, inputs)
    fuse(model)
    assert_as_exact(run_experts(model, inputs), plain, exact, torch.float32)
    assert calls_of(model) == FUSED_ONCE


@pytest.mark.parametrize(
    ("implementation", "weights", "rows"),
    [
        ("grouped_mm", torch.float32, torch.float32),
        ("grouped_mm", torch.bfloat16, torch.float32),
        ("eager", torch.bfloat16, torch.float32),
        ("batched_mm", torch.bfloat16, torch.bfloat16),
    ],
    ids=str,
)
def test_autocast(implementation: str, weights: torch.dtype, rows: torch.dtype) -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block(implementation).to(weights), case.names)
    hidden, index, of_tokens = case.inputs(23, torch.float32)
    inputs = hidden.to(rows), index, of_tokens
    exact = in_double(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        plain = run_experts(model, inputs)
        fuse(model)
        found = run_experts(model, inputs)
    assert_as_exact(found, plain, exact, weights)
    assert calls_of(model) == FUSED_ONCE


def test_autocast_of_the_weights_is_left_to_peft() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("eager"), case.names)
    inputs = case.inputs(23, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        expected = run_experts(model, inputs)
        fuse(model)
        assert_equal(run_experts(model, inputs), expected)
    assert calls_of(model)[0] == {"autocast of the weights": 1}


# ------------------------------------------------------------------------------------------------------ whole models


def gradients(model: nn.Module, tokens: Tensor = TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits, and the gradients of all that trains, of a language model's own loss."""
    model.zero_grad()
    output = model(input_ids=tokens, labels=tokens)
    output.loss.backward()
    return output.logits.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_models_give_peft_s_logits_and_gradients(name: str, dtype: torch.dtype) -> None:
    # In half precision one layer: what a second one routes could depend on the rounding of the first.
    model = adapt_experts(tiny_model(name, 2 if dtype is torch.float32 else 1, dtype))
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")
    exact, plain = gradients(exact_model), gradients(model)
    fuse(model)
    found = gradients(model)
    assert found[1].keys() == plain[1].keys()
    assert_as_exact(*([logits, *grads.values()] for logits, grads in (found, plain, exact)), dtype)
    assert calls_of(model) == FUSED_ONCE * (2 if dtype is torch.float32 else 1)
    assert found[1]


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "llama4"])
def test_training_gives_the_same_losses(name: str) -> None:
    losses = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = adapt_experts(tiny_model(name)).train()
        if fused:
            fuse(model)
        optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=3e-3)
        steps = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[0][9] < losses[0][0] - 0.05
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert calls_of(model) == [{"fused": 10}] * 2


@pytest.mark.parametrize("name", list(MODELS))
def test_generation_gives_the_same_tokens(name: str) -> None:
    model = adapt_experts(tiny_model(name))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=TOKENS, **options)
    fuse(model)
    assert_equal(model.generate(input_ids=TOKENS, **options), expected)
    assert all(set(calls) == {"fused"} for calls in calls_of(model))


def test_attention_may_have_adapters_too_and_nothing_need_be_recorded() -> None:
    config = peft.LoraConfig(
        r=3, target_modules=["q_proj", "v_proj"], target_parameters=[f"experts.{name}" for name in BOTH],
        init_lora_weights=False,
    )  # fmt: skip
    model = peft.get_peft_model(tiny_model("olmoe"), config)
    expected = gradients(model)
    fuse(model)
    found = gradients(model)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    for quiet in (torch.no_grad(), torch.inference_mode()):
        with quiet:
            torch.testing.assert_close(model(input_ids=TOKENS).logits, found[0])
    assert calls_of(model) == [{"fused": 3}] * 2


def test_checkpointing_computes_again_what_it_computed() -> None:
    model = adapt_experts(tiny_model("qwen3_moe")).train()
    fuse(model)
    logits, expected = gradients(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, found = gradients(model)
    assert_equal((again, found), (logits, expected))
    assert calls_of(model) == [{"fused": 3}] * 2


# ------------------------------------------------------------------------------------------- adapters and their files


def test_files_are_peft_s(tmp_path: Path) -> None:
    model = adapt_experts(tiny_model("mixtral"))
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    fuse(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "fused")
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "fused" / file).read_bytes()
    expected = model(input_ids=TOKENS).logits
    base = model.unload()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "fused").eval()
    torch.testing.assert_close(loaded(input_ids=TOKENS).logits, expected)
    fuse(loaded)
    assert_equal(loaded(input_ids=TOKENS).logits, expected)


def test_adapters_are_added_switched_and_merged_as_in_peft() -> None:
    model = adapt_experts(tiny_model("mixtral"))
    first = model(input_ids=TOKENS).logits
    fuse(model)
    wrapped = len(wrappers_of(model))
    config = copy.deepcopy(model.peft_config["default"])
    config.r, config.lora_alpha = 2, 5
    model.add_adapter("other", config)
    assert len(wrappers_of(model)) == wrapped  # none around another
    model.set_adapter("other")
    second = model(input_ids=TOKENS).logits
    assert [set(calls) for calls in calls_of(model)] == [{"fused"}] * 2
    unfuse(model)
    torch.testing.assert_close(second, model(input_ids=TOKENS).logits)
    assert not torch.allclose(first, second)
    fuse(model)
    model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=TOKENS).logits, first)
    merged = model.merge_and_unload()
    assert not wrappers_of(merged)
    torch.testing.assert_close(merged(input_ids=TOKENS).logits, first)


# ------------------------------------------------------------------------------------------------------ what is made


class Made(TorchDispatchMode):
    """Note the shapes of all tensors that operators make, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator."""
        out = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.shapes.append(tuple(one.shape))
        return out


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("targets", ["both", "up", "down"])
def test_nothing_of_the_size_of_the_experts_is_made(name: str, targets: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (dispatch, grouped_linear):  # so that the mode sees the operators inside this library's own
        monkeypatch.setattr(module, "is_watched", lambda *_: False)
    case = EXPERTS[name]
    model = adapt_experts(case.block("eager"), chosen(name, targets))
    inputs = case.inputs(9, torch.float32)
    parameters = wrappers_of(model)[0].get_base_layer().parameters()
    stacks = {tuple(parameter.shape) for parameter in parameters if parameter.dim() == 3}
    stacks |= {(number, n, k) for number, k, n in stacks}
    for fused in (False, True):
        if fused:
            fuse(model)
        with Made() as made:
            run_experts(model, inputs)
        assert len(made.shapes) > 20
        assert bool(stacks & set(made.shapes)) is not fused
    assert calls_of(model) == FUSED_ONCE


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_peak_of_memory_is_below_peft_s(implementation: str) -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block(implementation), case.names)
    inputs, stack = case.inputs(16, torch.float32), 7 * 48 * 32 * 4
    unfused = peak_bytes(lambda: run_experts(model, inputs), torch.device("cpu"))
    fuse(model)
    fused = peak_bytes(lambda: run_experts(model, inputs), torch.device("cpu"))
    assert calls_of(model) == FUSED_ONCE
    assert fused < unfused - stack


# --------------------------------------------------------------------------------------------------- torch.compile


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "llama4"])
def test_a_compiler_traces_one_graph(name: str) -> None:
    case = EXPERTS[name]
    model = adapt_experts(case.block("grouped_mm"), case.names)
    fuse(model)
    layer = model.base_model.model.experts
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (23, 23, 40, 57):
        inputs = case.inputs(tokens, torch.float32, seed=tokens)
        torch.testing.assert_close(run_experts(compiled, inputs), run_experts(layer, inputs), rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2  # one graph for the first number of tokens, one for all others
    assert calls_of(model) == [{"fused": 4}]  # compiled calls are not counted


def test_a_compiled_layer_follows_its_adapters() -> None:
    case = EXPERTS["qwen2_moe"]
    model = adapt_experts(case.block("grouped_mm"), case.names)
    fuse(model)
    layer, inputs = model.base_model.model.experts, case.inputs(23, torch.float32)
    compiled = torch.compile(layer, backend="eager")
    seen = []
    for change in (
        lambda: None,
        lambda: [wrapper.scale_layer(0.5) for wrapper in wrappers_of(model)],
        lambda: [wrapper.enable_adapters(False) for wrapper in wrappers_of(model)],
        lambda: [wrapper.enable_adapters(True) for wrapper in wrappers_of(model)],
    ):
        change()
        seen.append(compiled(*inputs))
        torch.testing.assert_close(seen[-1], layer(*inputs), rtol=1e-4, atol=1e-5)
    assert all(not torch.allclose(one, other) for one, other in itertools.pairwise(seen))


# ------------------------------------------------------------------------------------------------------ PEFT's forward


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


def by_another_implementation(model: nn.Module) -> None:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, batched_mm_experts_forward

    ALL_EXPERTS_FUNCTIONS.register("of_a_test", lambda *given: 3 * batched_mm_experts_forward(*given))
    wrappers_of(model)[0].get_base_layer().config._experts_implementation = "of_a_test"


def of_a_variant(model: nn.Module) -> None:
    wrappers_of(model)[1].lora_variant["default"] = object()


def with_a_computed_scale(model: nn.Module) -> None:
    wrappers_of(model)[0].scaling["default"] = torch.tensor(2.0)


def with_fewer_experts(model: nn.Module) -> None:
    wrappers_of(model)[0].get_base_layer().num_experts = 6  # the last has no tokens to lose


CHANGES: list[tuple[Callable[[Any], object], str]] = [
    (disabled, "adapters disabled"),
    (merged, "adapters merged"),
    (several, "several adapters"),
    (inactive, "no active adapter"),
    (hooked, "hooks on the experts"),
    (hooked_within, "hooks on the experts"),
    (with_a_forward_of_its_own, "hooks on the experts"),
    (trained, "a trainable base weight"),
    (of_a_variant, "a variant of LoRA"),
    (with_a_computed_scale, "a computed scale"),
    (with_fewer_experts, "weights that are not stacked"),
    (parametrized, "parametrized weights"),
    (of_another_class, "a subclass of ParamWrapper"),
    (with_another_forward, "unknown experts: OwnExperts"),
    (mixed, "a mixture of dtypes"),
    (in_parallel, "expert parallelism"),
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
    assert wrappers_of(model)[0]._plora_calls == {"torch.func": 1, "forward-mode differentiation": 1}


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
