"""Calls that are not plain go to PEFT's own forward, are counted with the reason, and compute what PEFT does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.helpers import disable_input_dtype_casting
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import plora_kernels as pk
from tests.support.peft_layers import K, N, computed, fused_calls, layer_of, lora_model, reasons


class Shifting(nn.Module):
    """A module in the place of dropout that is none."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 1


def add_second(model: Any, **options: Any) -> None:
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["0"], init_lora_weights=False, **options))
    model.base_model.set_adapter(["default", "second"])


def double_forward(model: nn.Module) -> None:
    """Give the base a forward of its own, as accelerate's hooks do."""
    base = layer_of(model).base_layer
    own = base.forward
    base.forward = lambda x: 2 * own(x)


class Mine(nn.Linear):
    """A linear of another class."""


def subclassed(model: nn.Module) -> None:
    layer_of(model).base_layer.__class__ = Mine


def doubled_factors(model: nn.Module) -> None:
    layer_of(model).lora_A.double()
    layer_of(model).lora_B.double()


def wrapped_factor(model: nn.Module) -> None:
    replace(model, "lora_A", nn.Sequential(layer_of(model).lora_A["default"]))


def replace(model: nn.Module, part: str, module: nn.Module) -> None:
    getattr(layer_of(model), part)["default"] = module


def hooked(part: Callable[[Any], nn.Module], kind: str = "register_forward_hook") -> Callable[[nn.Module], None]:
    """Return a change that puts a hook that doubles on a part of the layer."""
    doubled: dict[str, Callable[..., Any]] = {
        "register_forward_hook": lambda module, args, output: 2 * output,
        "register_forward_pre_hook": lambda module, args: (2 * args[0],),
        "register_full_backward_hook": lambda module, before, after: tuple(2 * gradient for gradient in before),
        "register_full_backward_pre_hook": lambda module, after: tuple(2 * gradient for gradient in after),
    }
    return lambda model: getattr(part(layer_of(model)), kind)(doubled[kind])


PARTS: dict[str, Callable[[Any], nn.Module]] = {
    "base": lambda layer: layer.base_layer,
    "lora_A": lambda layer: layer.lora_A["default"],
    "lora_B": lambda layer: layer.lora_B["default"],
    "dropout": lambda layer: layer.lora_dropout["default"],
}
Change = Callable[[nn.Module], object]
# What is done to a model of one layer, and how the reason then begins.
CHANGES: dict[str, tuple[Change, str]] = {
    "disabled": (lambda model: layer_of(model).enable_adapters(False), "its adapters are disabled"),
    "merged": (lambda model: layer_of(model).merge(), "its adapters are merged"),
    "no active adapter": (lambda model: layer_of(model).set_adapter([]), "no active adapter"),
    "trained base": (lambda model: layer_of(model).base_layer.requires_grad_(True), "its base's weight is trained"),
    "own forward": (double_forward, "its base has a forward of its own"),
    "subclass": (subclassed, "its base is a Mine"),
    "parametrised": (lambda model: weight_norm(layer_of(model).base_layer), "its base is a Parametrized"),
    "another A": (wrapped_factor, "its lora_A is a Sequential"),
    "another dropout": (lambda model: replace(model, "lora_dropout", Shifting()), "its dropout is a Shifting"),
    "all dropped": (lambda model: replace(model, "lora_dropout", nn.Dropout(1.0)), "its dropout drops everything"),
    "tensor scale": (lambda model: layer_of(model).scaling.update(default=torch.tensor(0.5)), "its scaling is no"),
    "another dtype": (doubled_factors, "its adapter is float64"),
    "several dtypes": (lambda model: layer_of(model).lora_B.bfloat16(), "its lora_A and lora_B are of several dtypes"),
    "two with dropout": (lambda model: add_second(model, lora_dropout=0.5), "several adapters under dropout"),
    **{
        f"{kind} on {part}": (hooked(find, kind), f"its {part} has hooks")
        for part, find in PARTS.items()
        for kind in (
            "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
            "register_full_backward_pre_hook",
        )
    },
}  # fmt: skip


def outcome(model: nn.Module, x: Tensor) -> dict[str, Tensor] | str:
    """Return what a model computes, or the error that it raises."""
    torch.manual_seed(0)
    try:
        return computed(model, x)
    except (RuntimeError, AttributeError) as error:
        return str(error)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("before", [True, False])
def test_what_is_not_plain_is_pefts(name: str, before: bool) -> None:
    """The change is made before or after the model is fused: nothing is remembered from the time of fusing."""
    change, reason = CHANGES[name]
    model, x = lora_model(), torch.randn(6, K)
    theirs = copy.deepcopy(model)
    change(theirs)
    expected = outcome(theirs, x)
    if before:
        change(model)
    report = pk.fuse_peft(model)
    if not before:
        computed(model, x)
        assert fused_calls(model) == 1
        change(model)
    found = outcome(model, x)
    if isinstance(expected, str):  # some changes make models that do not compute
        assert found == expected
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    [told] = reasons(model)
    assert told.startswith(reason)
    assert told in str(report)


def test_ranks_above_256_are_pefts() -> None:
    model = lora_model(r=257)
    assert pk.fuse_peft(model).layers[0].reason == "rank 257 is above 256"
    model(torch.randn(2, K))
    assert reasons(model) == {"rank 257 is above 256"}
    two = lora_model(r=200)
    two.add_adapter("second", LoraConfig(r=57, target_modules=["0"]))
    assert pk.fuse_peft(two).fused == 1
    two.base_model.set_adapter(["default", "second"])
    assert pk.fuse_peft(two).layers[0].reason == "the ranks of its adapters add up to 257, above 256"


def test_inputs_without_a_cast_are_pefts() -> None:
    model = lora_model()
    pk.fuse_peft(model)
    with disable_input_dtype_casting(model):
        model(torch.randn(2, K))
    assert reasons(model) == {"casting its input is disabled"}
    model(torch.randn(2, K))
    assert fused_calls(model) == 1


def test_variants_of_lora_are_pefts() -> None:
    model = lora_model(use_dora=True)
    x = torch.randn(4, K)
    expected = computed(model, x)
    report = pk.fuse_peft(model)
    assert report.layers[0].reason == "a variant of LoRA (DoraLinearVariant)"
    torch.testing.assert_close(computed(model, x), expected, rtol=0, atol=0)
    assert reasons(model) == {"a variant of LoRA (DoraLinearVariant)"}


@pytest.mark.parametrize("keyword", ["alora_offsets", "something"])
def test_further_arguments_are_pefts(keyword: str) -> None:
    model = lora_model()
    pk.fuse_peft(model)
    with nullcontext() if keyword == "alora_offsets" else pytest.raises(TypeError, match=keyword):
        layer_of(model)(torch.randn(2, K), **{keyword: [1, 2]})
    assert reasons(model) == {"further arguments of the call"}


class Marked(torch.Tensor):
    """A subclass of tensors."""


def inputs() -> dict[str, Tensor]:
    return {
        "subclass": torch.randn(3, K).as_subclass(Marked),
        "sparse": torch.randn(3, K).to_sparse(),
        "double": torch.randn(3, K).double(),
        "integers": torch.ones(3, K, dtype=torch.int64),
        "a number": torch.tensor(1.0),
        "too narrow": torch.randn(3, K - 1),
        "elsewhere": torch.empty(3, K, device="meta"),
    }


@pytest.mark.parametrize("name", inputs())
def test_inputs_that_do_not_fit_are_pefts(name: str) -> None:
    """PEFT's own result or error, whichever it is."""
    x, model = inputs()[name], lora_model()
    results = []
    for _ in range(2):
        try:
            results.append(model(x))
        except (RuntimeError, NotImplementedError) as error:
            results.append(str(error))
        pk.fuse_peft(model)
    assert type(results[0]) is type(results[1])
    if isinstance(results[0], str):
        assert results[0] == results[1]
    else:
        torch.testing.assert_close(*results, rtol=0, atol=0)
    assert len(reasons(model)) == 1


def test_hooks_on_all_modules_are_pefts() -> None:
    model, seen = lora_model(), list[str]()
    pk.fuse_peft(model)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *rest: seen.append(type(module).__name__))
    try:
        model(torch.randn(2, K))
    finally:
        handle.remove()
    assert reasons(model) == {"hooks on all modules (register_module_forward_hook)"}
    assert seen.count("Linear") == 4  # base, A and B, and the layer, which has the name of PEFT's


def test_transforms_of_functions_are_pefts() -> None:
    model = lora_model()
    x = torch.randn(4, 3, K)
    expected = torch.func.vmap(model)(x), torch.func.jvp(model, (x,), (x,))
    pk.fuse_peft(model)
    torch.testing.assert_close((torch.func.vmap(model)(x), torch.func.jvp(model, (x,), (x,))), expected)
    assert reasons(model) == {"torch.func transforms"}
    with torch.autograd.forward_ad.dual_level():
        model(torch.autograd.forward_ad.make_dual(x, x))
    assert "forward-mode differentiation" in reasons(model)


def test_layers_of_other_kinds_stay_pefts() -> None:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Embedding(9, K), nn.Linear(K, N), nn.Conv1d(3, 3, 1))
    config = LoraConfig(r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
    model = lora.LoraModel(inner, config, "default")
    tokens = torch.tensor([[1, 5, 8]])
    expected = model(tokens)
    report = pk.fuse_peft(model)
    assert [layer.kind for layer in report.layers] == ["Embedding", "Linear", "Conv1d"]
    told = [layer.reason for layer in report.layers]
    assert told == ["lora.layer.Embedding has no fused form", None, "lora.layer.Conv1d has no fused form"]
    torch.testing.assert_close(model(tokens), expected)


def test_mixed_batches_with_biases_are_pefts() -> None:
    model = lora_model(lora_bias=True).eval()
    x = torch.randn(2, K)
    expected = model(x, adapter_names=["default", "__base__"])
    pk.fuse_peft(model)
    torch.testing.assert_close(model(x, adapter_names=["default", "__base__"]), expected, rtol=0, atol=0)
    assert reasons(model) == {"adapter_names with biases of adapters"}
