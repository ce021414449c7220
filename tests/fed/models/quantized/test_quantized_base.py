"""Runs over a quantised base: what they hold, that they go on, and that plain PEFT loads what they leave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig

import plora_kernels as pk
from fed.config import parse, write
from fed.data.federated_data import load as load_data
from fed.errors import FedError
from fed.experiments.initialisation_noise import measure
from fed.experiments.run import make_base
from fed.models import base_model, saved_base
from fed.models.head import head_names
from fed.simulation.evaluation import evaluate
from fed.simulation.inputs import model_digest
from fed.simulation.run_directory import BASE, CONFIG
from fed.simulation.simulate import simulate
from fed.training.memory import buffer_bytes
from fed.training.token_losses import slice_bytes
from tests.support.text_data import PETS, instruction_config, instructions, text_config, write_rows

KINDS = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}

pytestmark = [pytest.mark.usefixtures("bnb"), pytest.mark.filterwarnings("ignore")]


def answering(checkpoint: Path, folder: Path, form: str, **tables: Any) -> Any:
    rows = write_rows(folder / "rows.jsonl", instructions(24))
    found = instruction_config(rows, checkpoint, cache=False).model_dump(exclude_none=True)
    model = {"path": str(checkpoint), "quantize": form, **tables.pop("model", {})}
    clients = {"count": 2, "per_round": 2, "ranks": [2, 4]}
    return parse({**found, "clients": clients, "rounds": 2, "adapter": {"rank": 4}, **tables, "model": model}, "here")


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_run_trains_over_a_quantised_base_and_goes_on(
    form: str, execution: str, wide_llama: Path, tmp_path: Path
) -> None:
    size = {"execution": execution, "clients_per_pass": 2 if execution == "cohort" else 0}
    config = answering(wide_llama, tmp_path, form, **size)
    assert config.adapter.unselected == "frozen"
    data = load_data(config)
    out = tmp_path / "run"
    out.mkdir()
    model: Any = make_base(config, data, out / BASE)
    write(config, out / CONFIG)
    kinds = {type(module).__name__ for module in model.modules()}
    assert KINDS[form] in kinds
    assert type(model.get_output_embeddings()) is torch.nn.Linear
    assert not (out / BASE / "model.safetensors").exists()
    digest = model_digest(model)
    once = config.model_copy(update={"rounds": 1})
    simulate(once, data, model, (), out)
    assert model_digest(model) == digest
    again = saved_base.reopen(out / BASE, config=config)
    assert model_digest(again) == digest
    rows = simulate(config, data, again, (), out, resume=True)
    straight = simulate(config, data, model, (), tmp_path / "straight")
    assert [row["loss"] for row in rows] == [row["loss"] for row in straight]
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["init_noise"] == 0 for row in rows[1:])
    if form == "nf4":
        saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
        plain = AutoModelForCausalLM.from_pretrained(
            saved["base_model_name_or_path"],
            dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.float32,
            ),
        )
        plain.config.pad_token_id = AutoConfig.from_pretrained(out / BASE).pad_token_id
        values = plain.state_dict()
        assert all(torch.equal(value, values[name]) for name, value in again.state_dict().items())
        found = evaluate(PeftModel.from_pretrained(plain, out / "adapter"), data.test)
        # The weights are equal; the library's own product, on this CPU, is 3e-3 from that of the dequantised weight.
        assert found["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-2)


@pytest.mark.parametrize("form", ["nf4", "int8", "none"])
def test_estimates_know_the_largest_weight_that_is_dequantised(
    form: str, wide_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = answering(wide_llama, tmp_path, form, adapter={"rank": 4, "unselected": "frozen"})
    data = load_data(config)
    model, _ = base_model.make(config, data)
    shared: Any = SimpleNamespace(model=model, handle=pk.inject(model, pk.PLoRAConfig(rank=4)))
    largest = max(layer.in_features * layer.out_features for layer in shared.handle.layers.values())
    logits = slice_bytes(model, data.test.table, 1)
    assert buffer_bytes(shared, data.test.table, 1) == max(logits, 4 * largest if form != "none" else 0)
    monkeypatch.setattr("fed.training.memory.slice_bytes", lambda *_: 0)
    assert buffer_bytes(shared, data.test.table, 1) == (4 * largest if form != "none" else 0)


def classifying(checkpoint: Path, folder: Path, form: str) -> Any:
    """Return a configuration of a classifier over a copy of a checkpoint in bfloat16."""
    half = folder / "half"
    shutil.copytree(checkpoint, half)
    AutoModelForSequenceClassification.from_pretrained(checkpoint).bfloat16().save_pretrained(half)
    rows = [{"text": PETS[number % 8], "label": ("yes", "no")["cat" in PETS[number % 8]]} for number in range(48)]
    config = text_config(write_rows(folder / "rows.jsonl", rows), half, cache=False).model_dump(exclude_none=True)
    del config["adapter"]["unselected"]
    return parse({**config, "model": {"path": str(half), "quantize": form}, "rounds": 1}, "here")


def test_a_head_over_a_quantised_base_is_not_quantised(wide_bert: Path, tmp_path: Path) -> None:
    settings = classifying(wide_bert, tmp_path, "nf4")
    data = load_data(settings)
    made, drawn = base_model.make(settings, data)
    assert type(made.classifier) is torch.nn.Linear
    assert made.classifier.weight.dtype is torch.float32
    assert set(drawn) == {"classifier.weight", "classifier.bias"}
    assert type(made.bert.encoder.layer[0].attention.self.query).__name__ == "Linear4bit"
    assert made.bert.encoder.layer[0].attention.self.query.compute_dtype is torch.bfloat16
    rows_of_run = simulate(settings, data, made, head_names(made), tmp_path / "run")
    assert rows_of_run[-1]["loss"] == rows_of_run[-1]["loss"]


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_quantised_base_stays_the_one_that_was_loaded(form: str, wide_bert: Path, tmp_path: Path) -> None:
    settings = classifying(wide_bert, tmp_path, form)
    data = load_data(settings)
    model = make_base(settings, data, tmp_path / BASE)  # which tries the model on rows
    assert model_digest(saved_base.reopen(tmp_path / BASE, config=settings)) == model_digest(model)
    before = evaluate(model, data.test)
    assert model_digest(saved_base.reopen(tmp_path / BASE, config=settings)) == model_digest(model)
    assert evaluate(model, data.test) == before


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_layers_that_the_checkpoint_lacks_are_drawn_and_not_quantised(
    form: str, wide_bert: Path, tmp_path: Path
) -> None:
    settings = classifying(wide_bert, tmp_path, form)
    weights = Path(settings.model.path) / "model.safetensors"
    left = {name: value for name, value in load_file(weights).items() if "pooler" not in name}
    save_file(left, weights, {"format": "pt"})
    data = load_data(settings)
    said: list[str] = []
    model: Any = make_base(settings, data, tmp_path / BASE, on_event=said.append)
    assert said[0].endswith("the checkpoint has no 'bert.pooler.dense.bias' and 1 more; drawn from the seed")
    assert type(model.bert.pooler.dense) is torch.nn.Linear
    assert type(model.bert.encoder.layer[0].attention.self.query).__name__ == KINDS[form]
    again = saved_base.reopen(tmp_path / BASE, config=settings)
    assert model_digest(again) == model_digest(model)
    simulate(settings, data, again, head_names(again), tmp_path / "run")


def quantised_already(checkpoint: Path, target: Path) -> Path:
    shutil.copytree(checkpoint, target)
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=settings).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({}, r"adapter.unselected is 'folded' and {}: nothing can be folded into a quantised base; 'frozen' would be"),
        ({"model": {"copy_base": True}}, r"model.copy_base is true and {}: a quantised base is never copied$"),
        (
            {"method": "flora", "adapter": {"rank": 4, "unselected": "frozen"}},
            r"method is 'flora' and {}: FLoRA folds into the base, and nothing can be folded into a quantised one; met",
        ),
    ],
)
def test_what_a_checkpoint_that_is_quantised_already_does_not_take_is_one_line(
    tables: dict[str, Any], message: str, wide_llama: Path, tmp_path: Path
) -> None:
    own = quantised_already(wide_llama, tmp_path / "quantised")
    config = answering(own, tmp_path, "none", **tables)
    base = f"model.path {str(own)!r} a quantised checkpoint"
    with pytest.raises(FedError, match=f"^{message.format(base)}"):
        make_base(config, load_data(config), tmp_path / BASE)


def test_noise_of_a_run_over_a_checkpoint_that_is_quantised_already_is_refused(
    wide_llama: Path, tmp_path: Path
) -> None:
    own = quantised_already(wide_llama, tmp_path / "quantised")
    config = answering(own, tmp_path, "none", adapter={"rank": 4, "unselected": "frozen"}, rounds=1)
    data, out = load_data(config), tmp_path / "run"
    out.mkdir()
    model = make_base(config, data, out / BASE)
    write(config, out / CONFIG)
    simulate(config, data, model, (), out)
    with pytest.raises(FedError, match=r"run' is a run over a quantised checkpoint: noise is measured in other dtypes"):
        measure(out, print)


def test_a_checkpoint_that_is_quantised_already_is_taken_as_it_is(wide_llama: Path, tmp_path: Path) -> None:
    own = quantised_already(wide_llama, tmp_path / "quantised")
    config = answering(own, tmp_path, "none", adapter={"rank": 4, "unselected": "frozen"})
    data = load_data(config)
    model: Any = make_base(config, data, tmp_path / BASE)
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    assert model_digest(saved_base.reopen(tmp_path / BASE, config=config)) == model_digest(model)
    simulate(config, data, model, (), tmp_path / "run")
    with pytest.raises(FedError, match=r"^model.quantize is 'nf4': the checkpoint is quantised already; 'none' takes"):
        base_model.build(answering(own, tmp_path, "nf4"), data)
