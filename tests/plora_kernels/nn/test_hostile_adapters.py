"""Adapters that are damaged or made to do harm load as in PEFT or are refused in one line; the model is not harmed."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import plora_kernels as pk
from tests.support.adapter_folders import INPUTS, PREFIX, Small, change_config, change_tensors, saved_by_peft
from tests.support.hostile_adapters import BUILDERS, Template, Tied, templates, write_hostile
from tests.support.limits import WITHOUT_END

Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> list[Template]:
    made = templates(tmp_path_factory.mktemp("valid"))
    pk.load_peft(Small(), saved_by_peft(tmp_path_factory.mktemp("first")))  # what is imported on first use
    return made


def state_of(model: nn.Module) -> list[object]:
    """Return all of a model that loading an adapter may not change: modules, hooks, parameters, flags, modes, bits."""
    modules = list(model.named_modules(remove_duplicate=False))
    hooks = [
        len(getattr(module, name))
        for _, module in modules
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    ]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    flags = [(name, id(tensor), tensor.data_ptr(), tensor.requires_grad, tensor.dtype) for name, tensor in tensors]
    bits = [tensor.detach().reshape(-1).view(torch.uint8).tolist() for _, tensor in tensors]
    return [[(name, id(module), module.training) for name, module in modules], hooks, flags, bits]


def check(builder: Callable[[], nn.Module], folder: Path, what: str, as_peft: bool) -> str:
    """Load an adapter, and return the kind of error that refused it, "loaded", or "as in PEFT" if PEFT loads it too."""
    model = builder().eval()
    if isinstance(model, Small):
        model.head.requires_grad_(False)
        model.blocks[0].train()
    before, began = state_of(model), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            handle = pk.load_peft(model, folder)
        except pk.PLoRAError as error:
            message = str(error)
            assert len(message.splitlines()) == 1, (what, message)
            assert message.isprintable(), (what, message)
            assert len(message) < 2000, what
            outcome = type(error).__name__
        else:
            outcome = "loaded"
            if as_peft and is_as_peft(builder, model, folder, what):
                outcome = "as in PEFT"
            handle.restore()
    assert time.process_time() - began < WITHOUT_END, what
    assert state_of(model) == before, what
    assert not (folder / "trace").exists(), what
    return outcome


def is_as_peft(builder: Callable[[], nn.Module], model: nn.Module, folder: Path, what: str) -> bool:
    """Assert that PEFT computes the same, and return True; return False if it does not load the adapter at all."""
    try:
        theirs = PeftModel.from_pretrained(builder(), folder).eval()
    except Exception:
        return False
    inputs = INPUTS.to(next(model.parameters()).dtype)
    modes = [(module, module.training) for module in model.modules()]
    with torch.no_grad():
        expected, found = theirs(inputs).float(), model.eval()(inputs).float()
    share = 1e-5 if inputs.dtype is torch.float32 else 0.1  # of the largest number
    largest = float(expected.nan_to_num(0, 0, 0).abs().max())
    torch.testing.assert_close(
        found, expected, rtol=share, atol=share * largest, equal_nan=True, msg=lambda text: f"{what}: {text}"
    )
    for module, mode in modes:
        module.training = mode
    return True


def run(valid: list[Template], folder: Path, seeds: range, every: int) -> dict[str, int]:
    """Check one adapter for each seed, every few of those that load against PEFT; return how often there was what."""
    outcomes: dict[str, int] = {}
    for seed in seeds:
        rng = Random(seed)
        template = rng.choice(valid)
        target = folder / str(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what = f"seed {seed}, {template.builder}: {write_hostile(rng, template, target)}"
        outcome = check(BUILDERS[template.builder], target, what, seed % every == 0)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return outcomes


def test_damaged_adapters_load_as_in_peft_or_are_refused(valid: list[Template], tmp_path: Path) -> None:
    outcomes = run(valid, tmp_path, range(150), every=3)
    assert outcomes["loaded"] >= 15
    assert outcomes["as in PEFT"] >= 5
    assert outcomes["ConfigError"] >= 40
    assert outcomes["TargetError"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_many_damaged_adapters(valid: list[Template], tmp_path: Path, part: int) -> None:
    outcomes = run(valid, tmp_path, range(1000 + 600 * part, 1600 + 600 * part), every=5)
    assert sum(outcomes.values()) == 600
    assert outcomes["as in PEFT"] >= 15


# ------------------------------------------------------------------------------------------------ one kind at a time


def refusal(folder: Path, kind: type[pk.PLoRAError], builder: Callable[[], nn.Module] = Small) -> str:
    """Return the message that an adapter is refused with; the model stays as it is."""
    model = builder()
    before = state_of(model)
    with pytest.raises(kind) as refused:
        pk.load_peft(model, folder)
    assert state_of(model) == before
    assert str(refused.value).isprintable()
    return str(refused.value)


def with_value(name: str, number: float, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        value = tensors[PREFIX + name].to(dtype)
        value.view(-1)[1] = number
        return tensors | {PREFIX + name: value}

    return change


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["proj.lora_A.weight", "blocks.1.lin.lora_B.weight", "head.bias"])
def test_what_is_no_finite_number_is_refused_by_name(tmp_path: Path, name: str, number: float) -> None:
    change_tensors(saved_by_peft(tmp_path, modules_to_save=["head"]), with_value(name, number))
    layer, _, factor = name.removesuffix(".weight").rpartition(".")
    what = f"{factor} of {layer!r}" if "lora" in name else "the adapter's 'head.bias'"
    assert f"{what} holds NaN or infinity; finite numbers are needed" in refusal(tmp_path, pk.ConfigError)


@pytest.mark.parametrize("name", ["proj.lora_A.weight", "head.weight"])
def test_numbers_that_the_model_s_dtype_cannot_hold_are_refused_by_name(tmp_path: Path, name: str) -> None:
    change_tensors(saved_by_peft(tmp_path / "fp32", modules_to_save=["head"]), with_value(name, -1e30))
    text = refusal(tmp_path / "fp32", pk.ConfigError, BUILDERS["half"])
    assert "holds 1e+30, and torch.float16 ends at 6.55e+04; load the model in a wider dtype" in text
    pk.load_peft(BUILDERS["bfloat16"](), tmp_path / "fp32")
    wide = with_value(name, 1e300, torch.float64)
    change_tensors(saved_by_peft(tmp_path / "fp64", modules_to_save=["head"]), wide)
    assert "holds 1e+300, and torch.float32 ends at 3.4e+38" in refusal(tmp_path / "fp64", pk.ConfigError)
    pk.load_peft(Small().double(), tmp_path / "fp64")


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.int8, torch.bool])
@pytest.mark.parametrize("name", ["proj.lora_A.weight", "head.weight"])
def test_numbers_of_another_kind_are_refused_by_name(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    saved_by_peft(tmp_path, modules_to_save=["head"])
    change_tensors(tmp_path, lambda tensors: tensors | {PREFIX + name: tensors[PREFIX + name].to(dtype)})
    text = refusal(tmp_path, pk.DTypeError)
    assert ("lora_A of 'proj'" if "lora" in name else "'head.weight'") in text
    assert f"is {dtype}" in text


@pytest.mark.parametrize("number", [2**40, True])
def test_integers_have_to_fit_the_model_s(tmp_path: Path, number: int) -> None:
    key = f"{PREFIX}norm.num_batches_tracked"

    def build() -> nn.Module:
        model = Tied()
        model.norm.num_batches_tracked = model.norm.num_batches_tracked.int()
        return model

    saved_by_peft(tmp_path, build, target_modules=["lin"], modules_to_save=["norm"])
    pk.load_peft(build(), change_tensors(tmp_path, lambda tensors: tensors | {key: torch.tensor(7, dtype=torch.int64)}))
    change_tensors(tmp_path, lambda tensors: tensors | {key: torch.tensor(number)})
    assert "'norm.num_batches_tracked' is torch." in refusal(tmp_path, pk.DTypeError, build)


@pytest.mark.parametrize("path", ["a\0b", "new\nline", 3, None, b"bytes", "nothing"], ids=repr)
def test_a_path_that_is_none_is_one_line(path: object) -> None:
    text = refusal(path, pk.ConfigError)  # type: ignore[arg-type]
    assert "does not exist" in text or "a path is needed" in text


def test_many_entries_are_refused_before_each_is_compared_with_each_module(tmp_path: Path) -> None:
    saved_by_peft(tmp_path)
    names = [f"name{number}" for number in range(100_000)]
    for field, value in (
        ("rank_pattern", dict.fromkeys(names, 4)),
        ("target_modules", names),
        ("exclude_modules", names),
        ("auto_mapping", {"deeper": [names]}),
    ):
        folder = change_config(saved_by_peft(tmp_path / field), **{field: value})
        text = refusal(folder, pk.ConfigError)
        assert re.search(rf"has 10000\d entries in '{field}'; the model has 10 modules", text)


def test_a_warning_that_is_raised_leaves_the_model_as_it_is(tmp_path: Path) -> None:
    def grown(tensors: Tensors) -> Tensors:
        return tensors | {f"{PREFIX}proj.bias": torch.ones(8)}

    tied, base = (
        saved_by_peft(tmp_path / name, Tied, target_modules=["lin"], **options)
        for name, options in (("tied", {"modules_to_save": ["head"]}), ("base", {}))
    )
    for folder, message in ((tied, "'head' is saved whole"), (change_tensors(base, grown), "replaces weights")):
        model = Tied()
        before = state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match=message):
                pk.load_peft(model, folder)
        assert state_of(model) == before
