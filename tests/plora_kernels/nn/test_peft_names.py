"""An adapter reaches the layers it was trained in and no others, and a model is changed whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import plora_kernels as pk
from plora_kernels.nn.peft_layout import outline_of
from tests.support.adapter_folders import INPUTS, Small, assert_unchanged, saved_by_peft, snapshot
from tests.support.architectures import ARCHITECTURES, stir

TIED = "ignore:Model has `tie_word_embeddings=True`"  # PEFT's warning; ours is tested


class Chain(nn.Module):
    """Linear layers under given names, one after another."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.order = list(names)
        for name in names:
            *parents, last = name.split(".")
            module: nn.Module = self
            for parent in parents:
                if parent not in module._modules:
                    module.add_module(parent, nn.Module())
                module = module._modules[parent]
            module.add_module(last, nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        for number, name in enumerate(self.order, 1):
            x = torch.tanh(self.get_submodule(name)(x) * number)
        return x


def round_trip(build: Callable[[], nn.Module], folder: Path, **options: Any) -> dict[str, Any]:
    """Assert that an adapter saved here computes the same in PEFT and loaded here; return its configuration."""
    model = build().eval()
    handle = pk.inject(model, pk.PLoRAConfig(**{"rank": 2, **options}))
    stir(model)
    expected = model(INPUTS)
    pk.save_peft(handle, folder)
    torch.testing.assert_close(PeftModel.from_pretrained(build(), folder).eval()(INPUTS), expected)
    again = build().eval()
    assert list(pk.load_peft(again, folder).layers) == list(handle.layers)
    torch.testing.assert_close(again(INPUTS), expected)
    return json.loads((folder / "adapter_config.json").read_text())


TWINS = ["encoder.0", "encoder.1", "teacher.encoder.0", "teacher.encoder.1"]


@pytest.mark.parametrize(
    ("names", "targets", "written"),
    [
        (TWINS, r"encoder\.\d", r"encoder\.0|encoder\.1"),
        (TWINS, r"teacher\.encoder\.\d", TWINS[2:]),
        (TWINS, ["0"], ["encoder.0", "teacher.encoder.0"]),
        (["a", "b.a", "c.b.a"], r"b\.a", r"b\.a"),
        (["a", "ba", "c.ba"], r"a", ["a"]),  # "ba" does not end with ".a"
        ([f"layer.{n}.q" for n in range(30)] + ["other.layer.3.q"], r"layer\.\d+\.q", None),
        ([f"layer.{n}.q" for n in range(30)], [f"layer.{n}.q" for n in range(25)], None),
        (["a+b", "a-b", "(", "$"], ["a+b", "(", "$"], ["a+b", "(", "$"]),
    ],
    ids=str,
)
def test_names_that_are_the_ends_of_others(tmp_path: Path, names: list[str], targets: object, written: object) -> None:
    found = round_trip(lambda: Chain(names), tmp_path, target_modules=targets)["target_modules"]
    assert written is None or found == written


# Names that PEFT's wrappers use, or that look like an adapter's keys.
@pytest.mark.parametrize(
    ("names", "targets", "saved"),
    [
        (["base_layer.proj", "stem.base_layer.proj", "stem.base_layer.norm"], ["proj"], ["norm"]),
        (["base_layer", "x.base_layer", "x.y"], ["base_layer"], ["y"]),
        (["x.original_module", "modules_to_save", "x.y"], ["y", "modules_to_save"], ["original_module"]),
        (["lora_A", "x.lora_B", "x.y"], ["lora_A", "y"], ["lora_B"]),
        (["default", "x.default", "y"], ["default"], ["y"]),
        (["model", "base_model.model", "y"], ["model"], []),
    ],
    ids=str,
)
def test_names_that_peft_uses_itself(tmp_path: Path, names: list[str], targets: list[str], saved: list[str]) -> None:
    round_trip(lambda: Chain(names), tmp_path, target_modules=targets, modules_to_save=saved)


def test_a_module_whose_name_ends_with_an_entry_is_saved_as_peft_will_look_for_it(tmp_path: Path) -> None:
    names = ["q", "head", "lm_head", "x.head"]  # PEFT saves "lm_head" too, without a dot before "head"
    round_trip(lambda: Chain(names), tmp_path, target_modules=["q"], modules_to_save=["head"])


def test_a_layer_that_peft_would_pass_over_is_refused(tmp_path: Path) -> None:
    # PEFT takes "q.a" for an expression when it passes over what lies in modules to save, and so passes over "qxa".
    names = ["q.a", "qxa", "other"]
    config = pk.PLoRAConfig(rank=2, target_modules=["qxa", "other"], modules_to_save=["q.a"])
    with pytest.raises(pk.TargetError, match="'qxa' is adapted, but PEFT would not adapt it"):
        pk.save_peft(pk.inject(Chain(names), config), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ------------------------------------------------------------------------------------------------ torch.compile


@torch.no_grad()
@pytest.mark.parametrize("part", ["proj", "blocks.1", "head"])
def test_parts_that_were_compiled_since_are_saved_by_their_plain_names(tmp_path: Path, part: str) -> None:
    model = Small()
    config = pk.PLoRAConfig(rank=2, target_modules=["proj", "lin"], modules_to_save=["head"])
    handle = pk.inject(model, config)
    stir(model)
    expected = model(INPUTS)
    model.set_submodule(part, torch.compile(model.get_submodule(part), backend="eager"))
    model(INPUTS)
    pk.save_peft(handle, tmp_path)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert b"_orig_mod" not in (tmp_path / name).read_bytes()
    torch.testing.assert_close(PeftModel.from_pretrained(Small(), tmp_path)(INPUTS), expected)
    plain = Small()
    pk.load_peft(plain, tmp_path)
    torch.testing.assert_close(plain(INPUTS), expected)


@pytest.mark.parametrize(("part", "message"), [("", "the model is compiled"), ("proj", "module 'proj' is compiled")])
def test_nothing_is_loaded_into_a_compiled_model(tmp_path: Path, part: str, message: str) -> None:
    # The wrapper of a layer would go on calling the layer that an adapted one replaces.
    saved_by_peft(tmp_path)
    model = Small()
    if part:
        model.set_submodule(part, torch.compile(model.get_submodule(part), backend="eager"))
    wrapped = model if part else torch.compile(model, backend="eager")
    before = snapshot(model)
    with pytest.raises(pk.StateError, match=f"{message}; load into the plain one, its _orig_mod"):
        pk.load_peft(wrapped, tmp_path)
    assert_unchanged(model, before)


def test_a_model_that_was_compiled_in_place_sees_what_is_loaded(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    expected, model = Small(), Small()
    pk.load_peft(expected, tmp_path)
    model.compile(backend="eager")
    with torch.no_grad():
        model(INPUTS)
        pk.load_peft(model, tmp_path)
        torch.testing.assert_close(model(INPUTS), expected(INPUTS))


# ---------------------------------------------------------------------------------------------- whole or nothing


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings("ignore:'lm_head' is saved whole")
@pytest.mark.parametrize("failing", range(8))
def test_a_failure_at_any_moment_leaves_the_model_as_it_was(
    tmp_path: Path, failing: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = ARCHITECTURES["llama-tied"].model
    options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    saved_by_peft(tmp_path, build, **options)
    model = build()
    model.model.norm.requires_grad_(False)
    model.model.layers[0].train()
    before = snapshot(model)
    original, calls = Tensor.copy_, iter(range(100))

    def copy_(self: Tensor, *arguments: object) -> Tensor:
        if next(calls) == failing:
            raise KeyboardInterrupt
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "copy_", copy_)
        with pytest.raises(KeyboardInterrupt):
            pk.load_peft(model, tmp_path)
    assert_unchanged(model, before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_inject_refuses_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    model = Small()
    model.blocks[2].lin.register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with pytest.raises(pk.TargetError, match=r"'blocks\.2\.lin' is an nn\.Linear with hooks"):
        pk.load_peft(model, tmp_path)
    assert_unchanged(model, before)
    handle = pk.load_peft(Small(), tmp_path)
    before = snapshot(handle.model)
    with pytest.raises(pk.StateError, match="holds FusedPLoRALinear layers already"):
        pk.load_peft(handle.model, tmp_path)
    assert_unchanged(handle.model, before)


# --------------------------------------------------------------------------------------------------- tied weights


@pytest.mark.filterwarnings(TIED)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("llama-tied", ["lm_head"]),
        ("llama-tied", ["embed_tokens"]),
        ("llama-tied", ["lm_head", "embed_tokens"]),
        ("t5", ["shared"]),  # one module under three names
        ("t5", ["embed_tokens", "lm_head"]),
        ("bart", ["shared", "lm_head"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("embeddings", [False, True], ids=["", "with-originals"])
def test_whole_modules_that_share_a_weight(tmp_path: Path, name: str, saved: list[str], embeddings: bool) -> None:
    architecture = ARCHITECTURES[name]
    config = LoraConfig(r=2, target_modules=["q_proj", "q"], modules_to_save=saved)
    theirs = stir(get_peft_model(architecture.model(), config)).eval()
    if embeddings:  # PEFT saves the originals of whole modules besides; here they are not the base's
        with torch.no_grad():
            theirs.get_output_embeddings().weight.add_(0.5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=embeddings)
    theirs = PeftModel.from_pretrained(architecture.model(), tmp_path).eval()
    model = architecture.model()
    with pytest.warns(UserWarning, match="is saved whole, so its weights are no longer tied in the model"):
        handle = pk.load_peft(model, tmp_path)
    torch.testing.assert_close(architecture.output(model), architecture.output(theirs))
    pk.save_peft(handle, tmp_path / "again")
    reloaded = PeftModel.from_pretrained(architecture.model(), tmp_path / "again").eval()
    torch.testing.assert_close(architecture.output(reloaded), architecture.output(theirs))


def test_different_values_for_a_tied_weight_are_refused(tmp_path: Path) -> None:
    handle = pk.inject(ARCHITECTURES["llama"].model(), pk.PLoRAConfig(rank=2, target_modules=["q_proj"]))
    pk.save_peft(handle, tmp_path, save_embedding_layers=True)
    model = ARCHITECTURES["llama-tied"].model()
    before = snapshot(model)
    with pytest.raises(
        pk.ConfigError, match=r"different values for 'lm_head\.weight' and 'model\.embed_tokens\.weight'"
    ):
        pk.load_peft(model, tmp_path)
    assert_unchanged(model, before)


# ------------------------------------------------------------------------------------------------------- outlines


def test_an_outline_has_no_memory_and_shares_what_the_model_shares() -> None:
    model = ARCHITECTURES["llama-tied"].model()
    model.kept = torch.ones(2, requires_grad=True) * 2  # cannot be copied by copy.deepcopy
    state = torch.get_rng_state()
    before = snapshot(model)
    outline = outline_of(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert {tensor.device.type for tensor in outline.state_dict().values()} == {"meta"}
    assert outline.state_dict().keys() == model.state_dict().keys()
    assert outline.lm_head.weight is outline.model.embed_tokens.weight
    outline.model.layers[0] = nn.Identity()
    outline.lm_head.register_forward_hook(lambda *_: None)
    outline.config.vocab_size = 1
    assert_unchanged(model, before)
    assert not model.lm_head._forward_hooks
    assert model.config.vocab_size == 64


def test_modules_that_cannot_be_copied_without_memory_are_outlined(tmp_path: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 8), torch.jit.script(nn.Linear(8, 8)), nn.LazyLinear(3))

    outline = outline_of(build())
    assert [(name, value.device.type) for name, value in outline[1].named_parameters()] == [
        ("weight", "meta"),
        ("bias", "meta"),
    ]
    assert all(parameter.device.type == "meta" for parameter in outline.parameters())


def test_saving_draws_no_random_number_and_changes_nothing(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].model()
    handle = pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["query"], task_type="SEQ_CLS"))
    state, before = torch.get_rng_state(), snapshot(model)
    pk.save_peft(handle, tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert_unchanged(model, before)
