"""Settings of language models: what follows from quantisation, what it excludes, and runs of earlier versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fed.config import RunConfig, load, load_saved, parse, write
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.simulation.settings import changed_setting, fixed_settings

BASE: dict[str, Any] = {"model": {"path": "m"}, "data": {"path": "rows.jsonl", "task": "instruction"}}


def quantised(form: str = "nf4", **tables: Any) -> RunConfig:
    model = {"path": "m", "quantize": form, **tables.pop("model", {})}
    return parse({**BASE, **tables, "model": model}, "here")


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_over_a_quantised_base_modules_are_frozen_unless_another_form_is_asked_for(form: str, tmp_path: Path) -> None:
    config = quantised(form)
    assert config.adapter.unselected == "frozen"
    assert quantised(form, adapter={"rank": 32}).adapter.unselected == "frozen"
    assert parse(BASE, "here").adapter.unselected == "folded"
    write(config, tmp_path / "config.toml")
    assert load_saved(tmp_path / "config.toml") == config


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (
            {"adapter": {"unselected": "folded"}},
            r"^adapter.unselected is 'folded' and model.quantize 'nf4': nothing can be folded into a quantised base; "
            r"'frozen' would be right$",
        ),
        ({"method": "flora"}, r"^method is 'flora' and model.quantize 'nf4': FLoRA folds into the base, and nothing"),
        (
            {"method": "fedex-lora", "clients": {"ranks": [16]}},
            r"^method is 'fedex-lora' and model.quantize 'nf4': FedEx-LoRA folds into the base",
        ),
        ({"model": {"copy_base": True}}, r"^model.copy_base is true and model.quantize 'nf4'"),
        ({"model": {"quantize": "int4"}}, r"^model.quantize is 'int4': it should be 'none', 'nf4' or 'int8'$"),
        (
            {"model": {"dtype": "fp16"}},
            r"^model.dtype is 'fp16': it should be 'auto', 'float64', 'float32', 'bfloat16' or 'float",
        ),
        ({"adapter": {"dtype": "half"}}, r"^adapter.dtype is 'half': it should be 'auto', 'float32', 'bfloat16' or"),
        ({"model": {"matmul_precision": "tf32"}}, r"^model.matmul_precision is 'tf32': it should be 'highest', 'high'"),
        (
            {"adapter": {"dtype": "float16"}},
            r"^adapter.dtype is 'float16' and train.optimizer 'adamw': the squares of s",
        ),
        ({"model": {"attention": ""}}, r"^model.attention is ''"),
    ],
)
def test_what_does_not_go_together_is_one_line(tables: dict[str, Any], message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        quantised(**tables)
    assert "\n" not in str(caught.value)


def test_factors_in_float16_take_sgd() -> None:
    tables = {"adapter": {"dtype": "float16"}, "train": {"optimizer": "sgd"}}
    assert parse({**BASE, **tables}, "here").adapter.dtype == "float16"


@pytest.mark.parametrize("table", ["model", "adapter"])
def test_a_value_in_place_of_a_table_is_one_line(table: str) -> None:
    with pytest.raises(FedError, match=rf"^{table} is 3: a table belongs there$"):
        parse({**BASE, "model": {"path": "m", "quantize": "nf4"}, table: 3}, "here")


def test_the_embedded_vit_is_not_quantised() -> None:
    with pytest.raises(FedError, match=r"^model.quantize is 'int8': the embedded ViT takes 'none'"):
        load("digits", ["model.quantize=int8"])


def test_a_run_of_an_earlier_version_was_in_float32(tmp_path: Path) -> None:
    old = tmp_path / "config.toml"
    old.write_text('rounds = 3\n[model]\npath = "m"\n[data]\npath = "rows.jsonl"\ntask = "instruction"\n')
    config = load_saved(old)
    assert config.model.dtype == "float32"
    assert load(old).model.dtype == "auto"  # a new run of the same file
    settings = fixed_settings(config)
    new = ("model.dtype", "model.quantize", "model.attention", "adapter.dtype", "data.chat_user", "data.chat_system")
    before = {name: value for name, value in settings.items() if name not in new}
    assert changed_setting(before, settings) is None
    other = fixed_settings(
        load_saved(old).model_copy(update={"model": config.model.model_copy(update={"dtype": "auto"})})
    )
    assert changed_setting(before, other) == "model.dtype = 'float32', and the run has 'auto'"
    copied = fixed_settings(config.model_copy(update={"model": config.model.model_copy(update={"copy_base": True})}))
    # The base is there already, as it was saved.
    assert changed_setting(settings, copied) == "model.copy_base = False, and the run has True"


def test_dtypes_can_be_compared() -> None:
    asked = plans.request("digits", ["rounds=1"], vary="model.dtype=float32,bfloat16", seeds=[0])
    cells = plans.plan(asked).cells
    assert [cell.config.model.dtype for cell in cells] == ["float32", "bfloat16"]
    asked = plans.request("digits", ["rounds=1"], vary="adapter.dtype=auto,bfloat16", seeds=[0])
    assert len(plans.plan(asked).cells) == 2
