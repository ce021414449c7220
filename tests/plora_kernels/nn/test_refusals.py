"""What `inject` cannot adapt is refused before anything changes, and what fails on the way is undone."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.equality import assert_equal
from tests.support.models import adapted, tiny_bert, tiny_llama


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def of_torch() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.nn.quantized.Linear(8, 8)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Unlike(torch.Tensor):
    """A tensor subclass, as quantisation and sharding make them."""


class Quantised(nn.Linear):
    """As bitsandbytes' layers: a subclass with a packed weight."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers: no nn.Linear, with integers in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return x


def of_dtype(dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.data.to(dtype), requires_grad=False)
    return linear


def of_type() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Unlike))
    return linear


def sparse() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(linear.weight.data.to_sparse())
    return linear


def partitioned() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.weight = nn.Parameter(torch.empty(0))
    return linear


def with_state_hook() -> nn.Linear:
    linear = nn.Linear(8, 8)
    linear.register_state_dict_post_hook(lambda *_: None)
    return linear


REFUSED = {
    "float8": (lambda: of_dtype(torch.float8_e4m3fn), r"a Linear that holds torch\.float8_e4m3fn; quantised weights"),
    "int8": (
        lambda: of_dtype(torch.int8),
        r"a Linear that holds torch\.int8; quantised weights .* \(4 and 8 bits\) .* plora-kernels\[quantized\]",
    ),
    "complex": (lambda: of_dtype(torch.complex64), r"a Linear that holds torch\.complex64"),
    "bitsandbytes": (Quantised, r"a Quantised that holds torch\.uint8; .* load the model in bf16, fp16 or fp32"),
    "gptq": (Packed, r"a Packed that holds torch\.int32; quantised weights"),
    "torch.ao": (of_torch, r"a torch\.ao\.nn\.quantized\S*\.Linear that holds torch\.qint8"),
    "torchao": (of_type, "whose weight is a Unlike; a plain dense parameter is needed"),
    "sparse": (sparse, "whose weight is a sparse tensor"),
    "zero3": (partitioned, r"whose weight is \(0,\) and not \(N, K\) = \(8, 8\)"),
    "hook": (with_state_hook, "with hooks, which would be lost"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("targets", ["all-linear", ["0", "1"], r"[01]"], ids=str)
def test_weights_that_cannot_be_adapted_are_refused_by_name(name: str, targets: object) -> None:
    make, message = REFUSED[name]
    model = nn.Sequential(nn.Linear(8, 8), make())
    flags = [parameter.requires_grad for parameter in model.parameters()]
    children = list(model)
    with pytest.raises(pk.TargetError, match=message) as caught:
        pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=targets))
    assert "'1' is" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(model) == children
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"])).restore()
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_floating_weights_are_adapted(dtype: torch.dtype) -> None:
    assert pk.inject(two().to(dtype), pk.PLoRAConfig(rank=4, target_modules="all-linear")).layers


def test_a_single_layer_is_held_to_the_same() -> None:
    with pytest.raises(pk.TargetError, match=r"from_linear got a Linear that holds torch\.int8"):
        pk.FusedPLoRALinear.from_linear(of_dtype(torch.int8))


@pytest.mark.parametrize("targets", ["all-linear", ["0"], ["2"]], ids=str)
def test_models_of_peft_are_refused_with_the_way_that_works(targets: object) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = get_peft_model(plain, LoraConfig(r=4, target_modules=["0"]))
    for model in (wrapped, wrapped.base_model.model):  # PEFT changes the model in place
        with pytest.raises(pk.StateError, match=r"is PEFT's \w+; call merge_and_unload\(\) or unload\(\) .* load_peft"):
            pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=targets))
    assert pk.inject(wrapped.merge_and_unload(), pk.PLoRAConfig(rank=2, target_modules=targets)).layers


def test_other_adapters_of_peft_are_refused_too() -> None:
    saving = get_peft_model(tiny_bert(), LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"]))
    with pytest.raises(pk.StateError, match=r"module '\S+\.query' is PEFT's Linear"):
        pk.inject(saving.base_model.model, pk.PLoRAConfig(target_modules=["pooler.dense"]))
    prompted = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(pk.StateError, match="the model is PEFT's PeftModelForCausalLM"):
        pk.inject(prompted, pk.PLoRAConfig(target_modules=["q_proj"]))


def test_compiled_and_wrapped_models_are_refused_with_the_order_that_works() -> None:
    model = two()
    with pytest.raises(pk.StateError, match="the model is compiled; inject into the plain one, its _orig_mod"):
        pk.inject(torch.compile(model), pk.PLoRAConfig(target_modules="all-linear"))
    with pytest.raises(pk.StateError, match="module '1' is compiled"):
        pk.inject(nn.Sequential(nn.Linear(8, 8), torch.compile(model)), pk.PLoRAConfig(target_modules=["0"]))
    with pytest.raises(pk.StateError, match="the model is a DataParallel; inject into its module"):
        pk.inject(nn.DataParallel(model), pk.PLoRAConfig(target_modules="all-linear"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_compiled_in_place_sees_its_adapters() -> None:
    model, x = Chain(), torch.randn(2, 8)
    model.compile(backend="eager")
    before = model(x)
    handle = adapted(model, "all-linear")
    after = model(x)
    assert not torch.equal(after, before)
    handle.select([1])
    torch.testing.assert_close(model(x), after)
    handle.restore()
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("failing", ["build", "group", "swap", "watch"])
def test_whatever_fails_half_way_is_undone(failing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.nn import inject as module

    model = tiny_bert()
    model.bert.pooler.dense.weight.requires_grad_(False)
    model.bert.encoder.layer[1].eval()
    before = copy.deepcopy(model.state_dict())
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modules, modes = list(model.named_modules()), [m.training for m in model.modules()]
    owner, name = {
        "build": (pk.FusedPLoRALinear, "reset_adapter"),
        "group": (module.SiblingPLoRALinear, "group"),
        "swap": (nn.Module, "set_submodule"),
        "watch": (module, "CallWatch"),
    }[failing]
    real, calls = getattr(owner, name), []

    def fails_once(*arguments: object, **named: object) -> object:
        calls.append(name)
        if len(calls) == (1 if failing in ("group", "watch") else 3):
            raise torch.OutOfMemoryError("no memory")
        return real(*arguments, **named)

    monkeypatch.setattr(owner, name, fails_once)
    config = pk.PLoRAConfig(rank=2, target_modules=["query", "key", "value"], fuse_projections=True)
    with pytest.raises(torch.OutOfMemoryError):
        pk.inject(model, config)
    monkeypatch.undo()
    assert list(model.named_modules()) == modules
    assert [m.training for m in model.modules()] == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert_equal(model.state_dict(), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    pk.inject(model, config).restore()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_lazy_layers_and_saved_modules_without_gradients_are_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8))
    with pytest.raises(pk.StateError, match="module '1' has no weights yet; call the model once"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0"]))
    model = nn.Sequential(nn.Linear(8, 8), of_dtype(torch.int8))
    with pytest.raises(pk.StateError, match=r"module to save '1' holds torch\.int8, which cannot be trained"):
        pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["0"], modules_to_save=["1"]))
    assert type(model[0]) is nn.Linear
    assert model[0].weight.requires_grad


def test_a_saved_head_that_is_tied_is_refused_whole() -> None:
    model = tiny_bert()
    model.extra = nn.Linear(32, 3)
    model.extra.weight = model.classifier.weight
    with pytest.raises(pk.StateError, match="module to save 'classifier' shares a weight"):
        pk.inject(model, pk.PLoRAConfig(target_modules=["query"], task_type="SEQ_CLS"))
    assert all(parameter.requires_grad for parameter in model.parameters())
