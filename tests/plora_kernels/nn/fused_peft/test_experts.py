"""LoRA on stacked experts, fused: PEFT's results and gradients, without weights of the experts' size."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from bench.harness.memory import peak_bytes
from plora_kernels import dispatch
from plora_kernels.ops import grouped_linear
from tests.support.equality import assert_equal
from tests.support.experts import (
    EXPERTS,
    FUSED_ONCE,
    adapt_experts,
    assert_as_exact,
    calls_of,
    fuse,
    in_double,
    run_experts,
    wrappers_of,
)
from tests.support.pairwise import pairwise

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


@pytest.mark.skipif("muse_spark" not in EXPERTS, reason="experts of older transformers take no such index")
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
