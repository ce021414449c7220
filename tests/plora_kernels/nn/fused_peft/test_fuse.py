"""`fuse_peft` and `unfuse_peft`: what they change of a model, what they tell, and what they refuse."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners import lora
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import plora_kernels as pk
from plora_kernels.nn.fused_peft import known_versions
from plora_kernels.nn.fused_peft.layer import FusedLoraLinear
from tests.support.models import tiny_llama
from tests.support.peft_layers import K, N, computed, fused_calls, layer_of, lora_model, reasons

TOKENS = torch.tensor([[5, 9, 20, 33, 7], [8, 6, 58, 41, 30]])


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    return get_peft_model(tiny_llama(), LoraConfig(**options))


def test_nothing_but_the_class_changes() -> None:
    model = llama()
    before = {name: id(p) for name, p in model.named_parameters()}
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    modules = [name for name, _ in model.named_modules()]
    report = pk.fuse_peft(model)
    assert (report.fused, len(report.layers)) == (4, 4)
    assert {name: id(p) for name, p in model.named_parameters()} == before
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trainable
    assert [name for name, _ in model.named_modules()] == modules
    assert all(isinstance(module, lora.Linear) for module in model.modules() if isinstance(module, lora.LoraLayer))
    torch.testing.assert_close(dict(model.state_dict()), states, rtol=0, atol=0)
    assert str(model) == str(llama())
    model(TOKENS)
    assert pk.unfuse_peft(model) == 4
    assert not any(type(module) is FusedLoraLinear for module in model.modules())
    assert all("_plora_calls" not in vars(module) for module in model.modules())


def test_the_table() -> None:
    model = llama()
    report = pk.fuse_peft(model)
    assert repr(report) == "<FusionReport: 4 of 4 LoRA layers fused>"
    assert str(report).splitlines() == [
        "4 of 4 LoRA layers fused",
        "layers                                            count  computed by  why",
        "base_model.model.model.layers.*.self_attn.q_proj      2  fused",
        "base_model.model.model.layers.*.self_attn.v_proj      2  fused",
    ]
    model(TOKENS)
    with model.disable_adapter():
        model(TOKENS)
    layers = "base_model.model.model.layers"
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    first.base_layer.requires_grad_(True)
    told = str(report).splitlines()
    assert (told[0], told[-1]) == (
        "3 of 4 LoRA layers fused; PEFT the others", "4 calls by PEFT's forward: its adapters are disabled",
    )  # fmt: skip
    assert [line.split(maxsplit=3) for line in told[2:-1]] == [
        [f"{layers}.0.self_attn.q_proj", "1", "PEFT", "its base's weight is trained            1             1"],
        [f"{layers}.*.self_attn.v_proj", "2", "fused", "2             2"],
        [f"{layers}.1.self_attn.q_proj", "1", "fused", "1             1"],
    ]
    assert len({len(line) for line in told[1:-1]}) == 1  # columns are aligned


def test_a_report_does_not_keep_its_model() -> None:
    model = lora_model()
    report, gone = pk.fuse_peft(model), weakref.ref(model)
    del model
    assert gone() is None
    with pytest.raises(pk.StateError, match="keep a reference"):
        print(report)


def test_layers_that_transformers_and_inject_adapter_made() -> None:
    for make in (
        lambda: inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), tiny_llama()),
        lambda: tiny_llama().add_adapter(LoraConfig(target_modules=["q_proj"])),
    ):
        model = make()
        if model is None:  # transformers' own method works in place
            model = tiny_llama()
            model.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
        expected = model(TOKENS).logits
        assert pk.fuse_peft(model).fused == 2
        torch.testing.assert_close(model(TOKENS).logits, expected)
        assert fused_calls(model) == 2


# ------------------------------------------------------------------------------------------------- what is refused


def test_models_without_lora_layers_are_refused() -> None:
    with pytest.raises(pk.TargetError, match=r"no LoRA layer of PEFT: call peft\.get_peft_model first"):
        pk.fuse_peft(tiny_llama())
    model = tiny_llama()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["q_proj"]))
    with pytest.raises(pk.TargetError, match="this library's own, from inject or load_peft, and fused already"):
        pk.fuse_peft(model)
    handle.restore()
    other = get_peft_model(tiny_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    with pytest.raises(pk.TargetError, match=r"adapters are of peft\.tuners\.ia3\.layer; only LoRA layers"):
        pk.fuse_peft(other)
    with pytest.raises(pk.TargetError, match="got a str; a model with PEFT's LoRA layers is needed"):
        pk.fuse_peft("model")  # type: ignore[arg-type]


def test_fusing_twice_and_unfusing_twice() -> None:
    model = llama()
    first = pk.fuse_peft(model)
    model(TOKENS)
    second = pk.fuse_peft(model)
    assert (first.fused, second.fused, str(first)) == (4, 4, str(second))
    assert pk.unfuse_peft(model) == 4
    for other in (model, tiny_llama()):
        with pytest.raises(pk.StateError, match=r"no LoRA layer of the model is fused; fuse_peft\(model\)"):
            pk.unfuse_peft(other)
    assert [layer.reason for layer in first.layers] == ["not fused: call fuse_peft again"] * 4


def test_a_library_without_peft_says_what_is_missing() -> None:
    """Neither the import nor the question whether a model has LoRA layers needs PEFT."""
    code = (
        "import sys, torch, plora_kernels as pk\n"
        "for ask in (pk.fuse_peft, pk.unfuse_peft):\n"
        "    try:\n        ask(torch.nn.Linear(2, 2))\n"
        "    except pk.PLoRAError as error:\n        print(error)\n"
        "assert 'peft' not in sys.modules\n"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.split(":")[0] for line in told] == [
        "the model has no LoRA layer of PEFT", "no LoRA layer of the model is fused; fuse_peft(model) fuses them",
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------- what happens later


def compare(model: Any, later: Any) -> None:
    """Fuse a copy of the model, do the same to both, and compare what they compute and their state."""
    fused = copy.deepcopy(model)
    pk.fuse_peft(fused)
    fused(TOKENS)
    for which in (model, fused):
        later(which)
    fused.zero_grad(), model.zero_grad()
    logits = [which(TOKENS).logits for which in (model, fused)]
    # In half precision results are as far from each other as either is from the exact one.
    near = {"rtol": 2e-2, "atol": 1e-2} if logits[0].dtype is torch.bfloat16 else {}
    torch.testing.assert_close(*logits, **near)
    for found in logits:
        if found.requires_grad:
            found.square().mean().backward()
    gradients = [{n: p.grad for n, p in which.named_parameters()} for which in (fused, model)]
    torch.testing.assert_close(*gradients, **near)
    torch.testing.assert_close(*(dict(which.state_dict()) for which in (fused, model)), rtol=0, atol=0)


def second(model: Any, **options: Any) -> None:
    torch.manual_seed(1)
    config = LoraConfig(r=6, target_modules=["q_proj", "v_proj", "o_proj"], init_lora_weights=False, **options)
    model.add_adapter("second", config)
    pk.fuse_peft(model) if any(type(module) is FusedLoraLinear for module in model.modules()) else None


def second_then_deleted(model: Any) -> None:
    second(model)
    model.set_adapter("second")
    model.delete_adapter("default")


def merged_and_back(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def weighted(model: Any) -> None:
    second(model)
    model.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="cat")
    model.set_adapter("both")
    pk.fuse_peft(model) if any(type(module) is FusedLoraLinear for module in model.modules()) else None


LATER = {
    "cast to float64": lambda model: model.double(),
    "cast to bfloat16": lambda model: model.bfloat16(),
    "frozen": lambda model: model.requires_grad_(False),
    "trained whole": lambda model: model.requires_grad_(True),
    "base alone": lambda model: model.disable_adapter_layers(),
    "merged": lambda model: model.merge_adapter(),
    "merged and back": merged_and_back,
    "second adapter": second,
    "second adapter in use": lambda model: (second(model), model.set_adapter("second")),
    "first one deleted": second_then_deleted,
    "both in use": lambda model: (second(model), model.base_model.set_adapter(["default", "second"])),
    "weighted": weighted,
    "scaled": lambda model: [m.scale_layer(3) for m in model.modules() if isinstance(m, lora.Linear)],
    "gradient checkpointing": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}),
    "compiled in place": lambda model: model.base_model.model.model.layers[0].compile(backend="eager"),
}


@pytest.mark.parametrize("name", LATER)
def test_what_is_done_after_fusing_works_as_in_peft(name: str) -> None:
    compare(llama(), LATER[name])


def test_new_layers_of_a_second_adapter_are_fused_by_another_call() -> None:
    model = llama()
    report = pk.fuse_peft(model)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "o_proj"]))
    model.set_adapter("second")
    model(TOKENS)
    told = {layer.name.rpartition(".")[2]: layer.reason for layer in report.layers}
    assert told == {
        "q_proj": None, "v_proj": "no active adapter in this layer", "o_proj": "not fused: call fuse_peft again",
    }  # fmt: skip
    assert pk.fuse_peft(model).fused == 4


def test_moved_weights_on_another_device_are_followed() -> None:
    model = lora_model()
    pk.fuse_peft(model)
    layer_of(model).lora_A.to("meta")
    model(torch.randn(2, K))
    assert reasons(model) == {"its tensors are on several devices"}
    model.to("meta")
    y = model(torch.empty(2, K, device="meta"))
    assert (y.device.type, y.shape, fused_calls(model)) == ("meta", (2, N), 1)


def test_saved_adapters_are_pefts(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "plain")
    pk.fuse_peft(model)
    model.save_pretrained(tmp_path / "fused")
    texts = [(tmp_path / name / "adapter_config.json").read_text() for name in ("plain", "fused")]
    assert texts[0] == texts[1]
    plain, fused = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("plain", "fused"))
    torch.testing.assert_close(fused, plain, rtol=0, atol=0)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "fused")
    assert pk.fuse_peft(loaded).fused == 4
    torch.testing.assert_close(get_peft_model_state_dict(loaded), get_peft_model_state_dict(model))
    tiny_llama().save_pretrained(tmp_path / "base")
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "auto")
    assert pk.fuse_peft(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "auto")).fused == 4


def test_merging_and_unloading_leave_plain_models() -> None:
    for leave in ("merge_and_unload", "unload"):
        model, fused = llama(), llama()
        pk.fuse_peft(fused)
        fused(TOKENS)
        plain, found = getattr(model, leave)(), getattr(fused, leave)()
        assert all(type(module).__module__.startswith(("torch", "transformers")) for module in found.modules())
        torch.testing.assert_close(dict(found.state_dict()), dict(plain.state_dict()), rtol=0, atol=0)


def test_copies_and_pickles_are_fused_and_independent() -> None:
    model = llama()
    pk.fuse_peft(model)
    expected = model(TOKENS).logits
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        torch.testing.assert_close(other(TOKENS).logits, expected, rtol=0, atol=0)
        assert (fused_calls(other), fused_calls(model)) == (8, 4)
        pk.unfuse_peft(other)
        assert pk.fuse_peft(model).fused == 4


def test_hooks_that_hold_the_forward_work_after_unfusing() -> None:
    """accelerate's hooks replace a layer's forward by a function that calls the one it found."""
    model, x = lora_model(), torch.randn(3, K)
    expected = computed(model, x)
    pk.fuse_peft(model)
    layer = layer_of(model)
    held = layer.forward
    layer.forward = lambda *args, **kwargs: held(*args, **kwargs)
    assert pk.fuse_peft(model).layers[0].reason == "it has a forward of its own"
    torch.testing.assert_close(computed(model, x), expected)
    assert layer._plora_calls == {"fused": 1}  # the hook's function called the fused forward
    pk.unfuse_peft(model)
    torch.testing.assert_close(computed(model, x), expected, rtol=0, atol=0)
    assert "_plora_calls" not in vars(layer)


# ------------------------------------------------------------------------------------------- versions and factory


def test_an_unknown_version_of_peft_leaves_all_layers_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    own = lora.Linear.forward

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return own(self, x, *args, **kwargs) + 1

    monkeypatch.setattr(lora.Linear, "forward", forward)
    monkeypatch.setattr("peft.__version__", "9.9")
    model, x = lora_model(), torch.randn(2, K)
    expected = model(x)
    with pytest.warns(pk.PLoRAWarning, match=r"lora\.Linear of PEFT 9\.9 looks otherwise than those known; fuse"):
        report = pk.fuse_peft(model)
    assert report.fused == 0
    assert "lora.Linear of PEFT 9.9 looks otherwise than those known" in str(report)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    config = LoraConfig(target_modules=["0"])
    config._register_custom_module({nn.Linear: pk.fused_lora_factory})
    with pytest.warns(pk.PLoRAWarning, match="fused_lora_factory leaves every layer to PEFT"):
        made = get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    assert type(layer_of(made)) is lora.Linear


def test_a_forward_without_source_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    space: dict[str, Any] = {}
    exec("def forward(self, x):\n    return x", space)
    monkeypatch.setattr(lora.Linear, "forward", space["forward"])
    assert "looks otherwise" in (known_versions.why_unknown(lora.Linear) or "")


def test_code_is_compared_without_comments_and_messages() -> None:
    def first(x: int) -> int:
        """Say one thing."""
        if x > 1:  # large
            raise ValueError(f"{x} is large")
        return x

    def other(x: int) -> int:
        """Say another."""

        if x > 1:
            raise ValueError(f"{x} is too large, {x!r}")

        return x

    def outside(x: int) -> int:
        if x > 1:
            raise ValueError("")
            return x

    def read(function: Any) -> str:
        return known_versions.code_of(function).replace(function.__name__, "name")

    assert read(first) == read(other)
    assert read(first) != read(outside)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_peft_makes_fused_layers_by_the_factory(tmp_path: Path, kind: type[nn.Module]) -> None:
    options = {"target_modules": ["0", "1"], "fan_in_fan_out": kind is Conv1D}
    config = LoraConfig(**options)
    config._register_custom_module({kind: pk.fused_lora_factory})
    model = get_peft_model(nn.Sequential(kind(K, K), nn.Embedding(3, 3)), config)
    assert [layer.reason is None for layer in pk.fuse_peft(model).layers] == [True, False]
    assert type(layer_of(model)) is FusedLoraLinear
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(nn.Sequential(kind(K, K), nn.Embedding(3, 3)), tmp_path)
    assert type(layer_of(loaded)) is lora.Linear  # PEFT does not save what was registered


class Packed(nn.Linear):
    """A linear of another library."""


def test_the_factory_declines_what_is_not_plain() -> None:
    config = LoraConfig(target_modules=["0"])
    config._register_custom_module({nn.Linear: pk.fused_lora_factory})
    assert type(layer_of(get_peft_model(nn.Sequential(Packed(4, 4)), config))) is lora.Linear
    config = LoraConfig(target_parameters=["0.weight"])
    config._register_custom_module({nn.Linear: pk.fused_lora_factory})
    assert type(layer_of(get_peft_model(nn.Sequential(nn.Linear(4, 4)), config))) is lora.layer.ParamWrapper


def test_reasons_of_single_calls_do_not_stay() -> None:
    model = lora_model()
    pk.fuse_peft(model)
    with model.disable_adapter():
        model(torch.randn(2, K))
    assert reasons(model) == {"its adapters are disabled"}
    pk.unfuse_peft(model)
    assert reasons(model) == set()


def test_patched_code_beside_the_forward_is_unknown_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other code may watch how PEFT makes the weights of experts; it would wait for that in vain."""
    proxy = lora.layer._LoraParameterProxy
    own = proxy.forward
    monkeypatch.setattr(proxy, "forward", lambda self, W: own(self, W))
    assert known_versions.why_unknown(lora.Linear) is None
    assert "lora.ParamWrapper of PEFT" in (known_versions.why_unknown(lora.ParamWrapper) or "")
    monkeypatch.undo()
    assert known_versions.why_unknown(lora.ParamWrapper) is None
