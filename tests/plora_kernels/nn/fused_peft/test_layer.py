"""What a fused LoRA layer of PEFT's computes, against PEFT's own forward in the same dtype and in float64."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from transformers.models.falcon.modeling_falcon import FalconLinear

import plora_kernels as pk
from tests.support.peft_layers import (
    BASES,
    K,
    N,
    assert_as_exact,
    computed,
    fused_calls,
    layer_of,
    lora_model,
    reasons,
    stirred,
)

pytestmark = pytest.mark.usefixtures("each_backend")
SHAPES = [(1, K), (7, K), (2, 3, K), (K,), (0, K), (2, 0, K)]
DTYPES = [torch.float32, torch.float16]


def add(model: Any, name: str, **options: Any) -> None:
    """Add an adapter as `lora_model` makes the first."""
    own = {"r": 3, "lora_alpha": 4, "target_modules": ["0"], "init_lora_weights": False, **options}
    own.setdefault("fan_in_fan_out", layer_of(model).fan_in_fan_out)
    model.add_adapter(name, LoraConfig(**own))


def check(model: nn.Module, x: Tensor, products: torch.dtype, autocast: torch.dtype | None = None, **call: Any) -> None:
    """Compare a model's fused results with PEFT's and with those in float64."""

    def run(which: nn.Module, rows: Tensor, cast: bool = True) -> dict[str, Tensor]:
        with torch.autocast("cpu", autocast) if autocast and cast else nullcontext():
            return computed(which, rows, **call)

    theirs = run(model, x)
    exact = run(copy.deepcopy(model).double(), x.double(), cast=False)
    pk.fuse_peft(model)
    found = run(model, x)
    assert reasons(model) == set()
    assert fused_calls(model) == 1
    assert_as_exact(found, theirs, exact, products)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_compute_what_pefts_do(base: str, dtype: torch.dtype) -> None:
    model = lora_model(base, dtype, lora_bias=base != "no bias")
    check(model, torch.randn(2, 9, K).to(dtype), dtype)


def test_float64() -> None:
    model, x = lora_model(dtype=torch.float64, lora_bias=True), torch.randn(2, 9, K).double()
    theirs = computed(model, x)
    pk.fuse_peft(model)
    torch.testing.assert_close(computed(model, x), theirs)
    assert reasons(model) == set()


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_of_any_leading_shape(shape: tuple[int, ...]) -> None:
    check(lora_model(), torch.randn(shape), torch.float32)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [torch.bfloat16, None])
@pytest.mark.parametrize("adapter", [True, False])
def test_half_precision_with_adapters_of_either_dtype(
    monkeypatch: pytest.MonkeyPatch, weight: torch.dtype, autocast: torch.dtype | None, adapter: bool
) -> None:
    """`autocast_adapter_dtype` of PEFT is True by default: factors are float32 over a base in half precision."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")  # the interpreter multiplies bfloat16 wrongly
    model = lora_model(dtype=weight)
    if adapter:
        layer_of(model).lora_A.float()
        layer_of(model).lora_B.float()
    x = torch.randn(4, 33, K).to(weight if autocast is None else torch.float32)
    check(model, x, autocast or weight, autocast)


def test_linears_of_falcon() -> None:
    model = lora_model()
    base = FalconLinear(K, N)
    base.load_state_dict(layer_of(model).base_layer.state_dict())
    layer_of(model).base_layer = base.requires_grad_(False)
    check(model, torch.randn(5, K), torch.float32)


def test_rank_stabilised_scales_and_scales_that_are_set_later() -> None:
    model = lora_model(use_rslora=True)
    layer_of(model).set_scale("default", 0.3)
    layer_of(model).scale_layer(2)
    check(model, torch.randn(5, K), torch.float32)


@pytest.mark.parametrize("rank", [1, 256])
def test_the_smallest_and_the_largest_rank(rank: int) -> None:
    check(lora_model(r=rank, lora_alpha=1), torch.randn(5, K), torch.float32)


@pytest.mark.parametrize("base", BASES)
def test_several_active_adapters_are_one_of_their_ranks_sum(base: str) -> None:
    model = lora_model(base, lora_bias=base != "no bias")
    add(model, "second", lora_alpha=9)
    add(model, "third", use_rslora=True, lora_bias=base != "no bias")
    add(model, "idle")
    model.base_model.set_adapter(["third", "default", "second"])
    check(stirred(model), torch.randn(5, K), torch.float32)


def test_bfloat16_results_keep_the_dtype_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    model = lora_model(dtype=torch.bfloat16)
    pk.fuse_peft(model)
    assert layer_of(model).lora_A["default"].weight.dtype is torch.float32
    assert model(torch.randn(3, K, dtype=torch.bfloat16)).dtype is torch.bfloat16
    assert fused_calls(model) == 1


# ------------------------------------------------------------------------------------------------- mixed batches

MIXED = [
    ["default", "default", "default", "default"],
    ["second", "default", "__base__", "second"],
    ["__base__", "second", "elsewhere", "default"],
]


@pytest.mark.parametrize("names", MIXED)
@pytest.mark.parametrize("base", BASES)
def test_samples_with_adapters_of_their_own(base: str, names: list[str]) -> None:
    model = lora_model(base)
    add(model, "second", r=8, lora_alpha=24)
    stirred(model).eval()
    layer, x = layer_of(model), torch.randn(4, 3, K)
    theirs = layer(x, adapter_names=names)
    exact = copy.deepcopy(layer).double()(x.double(), adapter_names=names)
    pk.fuse_peft(model)
    found = layer(x, adapter_names=names)
    assert reasons(model) == set()
    assert_as_exact({"y": found}, {"y": theirs}, {"y": exact}, torch.float32)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in Triton's interpreter
def test_mixed_batches_of_a_whole_model_and_samples_of_infinity() -> None:
    """A sample without an adapter must not be multiplied by zeros: that makes NaN of infinity."""
    model = lora_model("no bias")
    add(model, "second", r=8)
    model.eval()
    x = torch.randn(3, K)
    x[1, 4] = float("inf")
    names = ["second", "__base__", "default"]
    theirs = model(x, adapter_names=names)
    pk.fuse_peft(model)
    found = model(x, adapter_names=names)
    assert fused_calls(model) == 1
    torch.testing.assert_close(found, theirs)
    assert not found[1].isnan().any()


def test_mixed_batches_that_peft_refuses_are_refused_in_its_words() -> None:
    model = lora_model().eval()
    pk.fuse_peft(model)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        layer_of(model)(torch.randn(3, K), adapter_names=["default"])
    layer_of(model).merge()
    with pytest.raises(ValueError, match="merged adapters"):
        layer_of(model)(torch.randn(1, K), adapter_names=["default"])


# ----------------------------------------------------------------------------------------------------- dropout


def test_dropout_drops_a_share_of_the_inputs_and_scales_the_others() -> None:
    """With W = 0, A = 1 and B = 1 an output is s/(1−p) times the sum of the inputs that stay."""
    model = lora_model("no bias", r=1, lora_alpha=1, lora_dropout=0.25)
    layer = layer_of(model)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.lora_A["default"].weight.fill_(1)
        layer.lora_B["default"].weight.fill_(1)
    pk.fuse_peft(model)
    kept = model(torch.ones(400, K))[:, 0] * 0.75
    assert reasons(model) == set()
    torch.testing.assert_close(kept, kept.round())
    assert abs(kept.mean().item() / K - 0.75) < 0.02
    assert kept.std() > 1
    model.eval()
    torch.testing.assert_close(model(torch.ones(2, K)), torch.full((2, N), float(K)))


def test_small_calls_are_pefts_unless_a_backend_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a few rows take less time in PEFT's forward and backward; the numbers are those of `worth.py`."""
    monkeypatch.delenv("PLORA_BACKEND")
    few = {"few rows, for which it is faster on a CPU"}
    for dtype, factors, both, forward in (
        (torch.float32, torch.float32, 1 << 18, 1 << 16),
        (torch.bfloat16, torch.bfloat16, 1 << 20, 1 << 17),
        (torch.bfloat16, torch.float32, 1 << 18, 1 << 17),
    ):
        model = lora_model(dtype=dtype).train()
        layer_of(model).lora_A.to(factors)
        layer_of(model).lora_B.to(factors)
        for recorded, least in ((True, -(-both // (N + K))), (False, -(-forward // N))):
            for rows, expected in ((least - 1, few), (least, set())):
                pk.fuse_peft(model)
                with torch.set_grad_enabled(recorded):
                    model(torch.randn(rows, K, dtype=dtype))
                assert reasons(model) == expected, (dtype, factors, recorded, rows)
                pk.unfuse_peft(model)
    pk.fuse_peft(model)
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    model(torch.randn(1, K, dtype=torch.bfloat16))
    assert reasons(model) == set()


def test_small_calls_are_pefts_inside_a_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora_model()
    pk.fuse_peft(model)
    for forced, fused in ((None, 0), ("torch", 1)):
        monkeypatch.delenv("PLORA_BACKEND") if forced is None else monkeypatch.setenv("PLORA_BACKEND", forced)
        torch._dynamo.reset()
        backend = EagerAndRecordGraphs()
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(3, K))
        nodes = [node for graph in backend.graphs for node in graph.graph.nodes]
        assert sum("plora.linear" in str(node.target) for node in nodes) == fused


def test_dropout_draws_from_torchs_generator_and_again_when_recomputed() -> None:
    model = lora_model(lora_dropout=0.5)
    pk.fuse_peft(model)
    x = torch.randn(8, K, requires_grad=True)
    torch.manual_seed(3)
    first = model(x)
    assert not torch.equal(model(x), first)
    torch.manual_seed(3)
    again = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    torch.testing.assert_close(again, first)
    gradients = [torch.autograd.grad(y.square().sum(), x)[0] for y in (first, again)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["all", "lora_only"])
@pytest.mark.parametrize("base", ["linear", "Conv1D"])
def test_biases_of_the_base_are_trained_where_peft_trains_them(base: str, kind: str) -> None:
    model = lora_model(base, bias=kind)
    assert layer_of(model).base_layer.bias.requires_grad
    check(model, torch.randn(4, 3, K), torch.float32)
