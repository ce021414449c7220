"""Files of adapters: those that PEFT loads load here and compute the same, the others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import plora_kernels as pk
from tests.support.adapter_folders import (
    INPUTS,
    PREFIX,
    Small,
    assert_unchanged,
    change_config,
    change_tensors,
    saved_by_peft,
    snapshot,
)

Tensors = dict[str, Tensor]


def assert_loads_as_in_peft(directory: Path, build: Callable[[], torch.nn.Module] = Small) -> pk.Injected:
    """Assert that PEFT and this package compute the same from the directory."""
    theirs = PeftModel.from_pretrained(build(), directory).eval()
    model = build().eval()
    handle = pk.load_peft(model, directory)
    torch.testing.assert_close(model(INPUTS), theirs(INPUTS))
    return handle


def assert_refused(directory: Path, kind: type[pk.PLoRAError], message: str) -> None:
    """Assert that the directory is refused in one line, and that the model stays as it was."""
    model = Small().eval()
    model.head.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(kind, match=message) as refusal:
        pk.load_peft(model, directory)
    assert "\n" not in str(refusal.value)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    "options",
    [
        {"exclude_modules": ["1.lin"]},
        {"exclude_modules": r"blocks\.2.*"},
        {"target_modules": r"proj|blocks\.1\.lin"},
        {"target_modules": "ALL-linear"},
        {"target_modules": ["lin"], "layers_to_transform": [0, 2], "layers_pattern": "blocks"},
        {"rank_pattern": {"blocks.1.lin": 2}, "alpha_pattern": {r"blocks\.[01]\.lin": 3, "lin": 5}},
        {"use_rslora": True, "rank_pattern": {"lin": 9}},
        {"lora_dropout": 0.5},
        {"modules_to_save": ["head"]},
        {"modules_to_save": ["blocks.1"]},
        {"r": 300, "rank_pattern": {"lin": 2, "proj": 3}},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "Gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": False},
    ],
    ids=str,
)
def test_configurations_mean_what_they_mean_in_peft(tmp_path: Path, options: dict[str, Any]) -> None:
    assert_loads_as_in_peft(saved_by_peft(tmp_path, **options))


@pytest.mark.filterwarnings("ignore:lora with eva initialization used with low_cpu_mem_usage")
def test_a_data_driven_start_leaves_the_base_alone(tmp_path: Path) -> None:
    from peft import EvaConfig

    assert_loads_as_in_peft(saved_by_peft(tmp_path, init_lora_weights="eva", eva_config=EvaConfig()))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "OLoRA", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(tmp_path: Path, start: str) -> None:
    change_config(saved_by_peft(tmp_path), init_lora_weights=start)
    assert_refused(tmp_path, pk.ConfigError, f"init_lora_weights = '{start}', which changes the base weight")


def test_an_unknown_start_is_not_called_one_that_changes_the_base(tmp_path: Path) -> None:
    change_config(saved_by_peft(tmp_path), init_lora_weights="later")
    message = "init_lora_weights = 'later'; known are true, false, gaussian, orthogonal, eva, mica"
    assert_refused(tmp_path, pk.ConfigError, message)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True")
def test_fan_in_fan_out_says_nothing_of_a_linear(tmp_path: Path) -> None:
    assert_loads_as_in_peft(change_config(saved_by_peft(tmp_path), fan_in_fan_out=True))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.filterwarnings("ignore:The following")  # PEFT's own warning
def test_patterns_for_no_layer_are_named(tmp_path: Path, field: str) -> None:
    change_config(saved_by_peft(tmp_path), **{field: {"nope": 3}})
    with pytest.warns(UserWarning, match=f"has 'nope' in {field}, which matches no targeted module"):
        assert_loads_as_in_peft(tmp_path)


FEATURES = {
    "use_dora": True,
    "bias": "lora_only",
    "lora_bias": True,
    "use_qalora": True,
    "layer_replication": [[0, 1]],
    "alora_invocation_tokens": [1],
    "trainable_token_indices": [1],
    "target_parameters": ["proj.weight"],
    "megatron_config": {"size": 1},
    "velora_config": {"num_groups": 2},
    "kasa_config": {"beta": 1.0},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 1},
    "a_later_feature": 0.5,  # no field of any version
}


@pytest.mark.parametrize("field", FEATURES)
def test_what_computes_more_than_lora_is_refused_by_name(tmp_path: Path, field: str) -> None:
    change_config(saved_by_peft(tmp_path), **{field: FEATURES[field]})
    assert_refused(tmp_path, pk.ConfigError, f"adapter_config.json has {field} = ")


def test_every_variant_that_peft_knows_is_refused(tmp_path: Path) -> None:
    import dataclasses

    from peft import LoraConfig

    variants = {field.name for field in dataclasses.fields(LoraConfig) if field.metadata.get("is_lora_variant")}
    assert variants <= FEATURES.keys()


def test_unknown_fields_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    fields = {"later": None, "flag": False, "names": [], "table": {}, "rank_pattern": None}
    saved_by_peft(tmp_path)
    model = Small()
    expected = pk.load_peft(model, tmp_path).model(INPUTS)
    again = Small()
    pk.load_peft(again, change_config(tmp_path, **fields))
    torch.testing.assert_close(again(INPUTS), expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": "4"}, "has r = '4'; a positive integer is needed"),
        ({"r": 4.0}, "has r = 4.0; a positive integer is needed"),
        ({"r": 0}, "has r = 0; a positive integer is needed"),
        ({"rank_pattern": {"lin": True}}, r"has rank_pattern\['lin'\] = True; a positive integer is needed"),
        ({"lora_alpha": None}, "has lora_alpha = None; a positive number is needed"),
        ({"alpha_pattern": {"lin": -1}}, r"has alpha_pattern\['lin'\] = -1; a positive number is needed"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern in .* holds '\(', which is not a regular expression"),
        ({"target_modules": "["}, r"target_modules in .* holds '\[', which is not a regular expression"),
        ({"lora_dropout": 1.0}, "has lora_dropout = 1.0; a probability from 0 to below 1 is needed"),
        ({"peft_type": "IA3"}, "is the configuration of a IA3 adapter; LoRA is needed"),
        ({"peft_type": "ADALORA", "target_r": 4, "total_step": 10}, "is the configuration of a ADALORA adapter"),
        ({"peft_type": "NONE"}, "is not an adapter's configuration"),
        ({"task_type": "NONE"}, "is not an adapter's configuration"),
    ],
    ids=str,
)
def test_odd_values_are_named(tmp_path: Path, fields: dict[str, object], message: str) -> None:
    assert_refused(change_config(saved_by_peft(tmp_path), **fields), pk.ConfigError, message)


@pytest.mark.parametrize("text", ["[1]", "null", "{", ""])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (saved_by_peft(tmp_path) / "adapter_config.json").write_text(text)
    assert_refused(tmp_path, pk.ConfigError, "is not an adapter's configuration")


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        (
            {"r": 8},
            pk.ShapeError,
            r"A \(4, 8\) and B \(8, 4\) for 'proj', of rank 4; adapter_config.json gives it rank 8",
        ),
        (
            {"rank_pattern": {"1.lin": 2}},
            pk.ShapeError,
            "'blocks.1.lin', of rank 4; adapter_config.json gives it rank 2",
        ),
        ({"target_modules": ["proj"]}, pk.TargetError, "has factors for 'blocks.0.lin', which adapter_config.json"),
        (
            {"target_modules": ["proj", "lin", "head"]},
            pk.TargetError,
            "has no factors for 'head', which adapter_config",
        ),
        ({"target_modules": ["nothing"]}, pk.TargetError, "PEFT cannot adapt the model"),
        ({"target_modules": None}, pk.TargetError, "PEFT cannot adapt the model"),
        ({"exclude_modules": ["proj"]}, pk.TargetError, "has factors for 'proj', which adapter_config.json"),
        ({"modules_to_save": ["head"]}, pk.TargetError, "misses 'head.weight', which is part of a module saved whole"),
    ],
    ids=str,
)
def test_a_configuration_that_is_not_the_tensors(
    tmp_path: Path, fields: dict[str, object], kind: type[pk.PLoRAError], message: str
) -> None:
    assert_refused(change_config(saved_by_peft(tmp_path), **fields), kind, message)


def with_tensor(name: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {PREFIX + name: value}


def replaced(side: str, value: Tensor) -> Callable[[Tensors], Tensors]:
    return with_tensor(f"proj.lora_{side}.weight", value)


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (replaced("A", torch.ones(2, 8)), pk.ShapeError, r"A \(2, 8\) and B \(8, 4\) for 'proj'; its weight"),
        (replaced("A", torch.ones(8, 4)), pk.ShapeError, r"A \(8, 4\) and B \(8, 4\) for 'proj'; its weight"),
        (replaced("A", torch.ones(32)), pk.ShapeError, r"A \(32,\) and B \(8, 4\) for 'proj'; its weight"),
        (replaced("B", torch.ones(8, 4, dtype=torch.int8)), pk.DTypeError, "lora_B of 'proj' is torch.int8"),
        (replaced("B", torch.ones(8, 4, dtype=torch.cfloat)), pk.DTypeError, "lora_B of 'proj' is torch.complex64"),
        (without("proj.lora_A"), pk.ConfigError, "holds lora_B of 'proj' alone; both are needed"),
        (without("proj"), pk.TargetError, "has no factors for 'proj'"),
        (lambda t: {}, pk.ConfigError, "holds no LoRA factors"),
        (with_tensor("other", torch.ones(1)), pk.TargetError, "holds 'other', which is not in the model"),
        (with_tensor("proj.weight", torch.ones(8, 8)), pk.TargetError, "'proj.weight', which PEFT does not read"),
        (with_tensor("head.weight", torch.ones(4, 9)), pk.ShapeError, r"'head.weight' is \(4, 9\); the model's is"),
        (with_tensor("head.bias", torch.ones(4).int()), pk.DTypeError, "'head.bias' is torch.int32; the model's is"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, change: Callable[[Tensors], Tensors], kind: type[pk.PLoRAError], message: str
) -> None:
    assert_refused(change_tensors(saved_by_peft(tmp_path), change), kind, message)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_factors_of_another_precision_are_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    assert_loads_as_in_peft(change_tensors(saved_by_peft(tmp_path), lambda t: {n: v.to(dtype) for n, v in t.items()}))


def test_base_weights_in_the_file_are_loaded_and_saved_again(tmp_path: Path) -> None:
    weights = {f"{PREFIX}proj.base_layer.weight": torch.eye(8), f"{PREFIX}head.bias": torch.ones(4)}
    message = "replaces weights of the base model, as in PEFT: head.bias, proj.weight; restore"
    with pytest.warns(pk.PLoRAWarning, match=message):
        handle = assert_loads_as_in_peft(change_tensors(saved_by_peft(tmp_path), lambda t: t | weights))
    pk.save_peft(handle, tmp_path / "again")
    assert load_file(tmp_path / "again" / "adapter_model.safetensors").keys() >= weights.keys()
    with pytest.warns(pk.PLoRAWarning, match=message):
        assert_loads_as_in_peft(tmp_path / "again")


def pickled(directory: Path) -> Path:
    """Turn the file of tensors into the one that PEFT wrote before safetensors."""
    path = directory / "adapter_model.safetensors"
    torch.save(load_file(path), directory / "adapter_model.bin")
    path.unlink()
    return directory


def test_pickled_tensors_are_loaded(tmp_path: Path) -> None:
    assert_loads_as_in_peft(pickled(saved_by_peft(tmp_path, modules_to_save=["head"])))


class Code:
    """An object whose unpickling would run code."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, ...]]:
        return (pytest.fail, ("the file's code was run",))


def test_nothing_but_tensors_is_unpickled(tmp_path: Path) -> None:
    path = pickled(saved_by_peft(tmp_path)) / "adapter_model.bin"
    for content, message in ((Code(), "is not a pickled dict of tensors"), ([1], "does not hold a dict of tensors")):
        torch.save({f"{PREFIX}proj.lora_A.weight": content} if isinstance(content, Code) else content, path)
        assert_refused(tmp_path, pk.ConfigError, message)
    path.write_bytes(b"cut off")
    assert_refused(tmp_path, pk.ConfigError, "is not a pickled dict of tensors, or is cut off")


def named(adapter: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.replace(".weight", f".{adapter}.weight"): value for name, value in tensors.items()}


def test_adapter_names_within_keys(tmp_path: Path) -> None:
    model = Small()
    expected = pk.load_peft(model, saved_by_peft(tmp_path / "plain")).model(INPUTS)
    for adapter in ("default", "other"):
        renamed = Small()
        pk.load_peft(renamed, change_tensors(saved_by_peft(tmp_path / adapter), named(adapter)))
        assert torch.equal(renamed(INPUTS), expected)
    both = change_tensors(saved_by_peft(tmp_path / "both"), lambda t: named("a")(t) | named("b")(t))
    assert_refused(both, pk.ConfigError, r"holds the factors of several adapters \('a', 'b'\); one is needed")


def test_ranks_above_the_kernels_are_refused_with_the_way_out(tmp_path: Path) -> None:
    saved_by_peft(tmp_path, rank_pattern={"proj": 300})
    message = "has rank 300 for 'proj'; layers, as the kernels, take ranks 1 to 256: .* merge_and_unload"
    assert_refused(tmp_path, pk.RankError, message)


def test_a_folder_without_tensors_is_refused(tmp_path: Path) -> None:
    (saved_by_peft(tmp_path) / "adapter_model.safetensors").unlink()
    assert_refused(tmp_path, pk.ConfigError, r"adapter_model\.safetensors does not exist; a directory with")


def test_the_scale_of_a_layer_as_it_is_is_saved(tmp_path: Path) -> None:
    # A federated method may give the layers another scale and rank than they were injected with.
    model = Small()
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules=["proj", "lin"]))
    for layer in handle.layers.values():
        torch.nn.init.normal_(layer.lora_B)
    handle.layers["proj"].scale = 0.77
    pk.save_peft(handle, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alpha_pattern"].keys() == {"^proj"}
    torch.testing.assert_close(PeftModel.from_pretrained(Small(), tmp_path)(INPUTS), model(INPUTS))
