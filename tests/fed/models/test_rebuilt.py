"""The guide's way to make a run's result of its checkpoint and its files, with plain transformers and PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fed.config import RunConfig, parse
from fed.data.federated_data import load as load_data
from fed.experiments.run import make_base
from fed.models.head import head_names
from fed.simulation.evaluation import evaluate
from fed.simulation.run_directory import BASE
from fed.simulation.simulate import simulate
from tests.support.text_data import PETS, instruction_config, instructions, text_config, write_rows

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "federated.md"


def rebuilt(*arguments: Any, **options: Any) -> Any:
    found = re.search(r"```python\n(.*?def rebuilt.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    return names["rebuilt"](*arguments, **options)


def of_three_labels(checkpoint: Path, folder: Path) -> RunConfig:
    rows = [{"text": PETS[number % 8], "label": "abc"[number % 8 % 3]} for number in range(60)]
    return text_config(write_rows(folder / "rows.jsonl", rows), checkpoint, cache=False)


def of_answers(checkpoint: Path, folder: Path) -> RunConfig:
    return instruction_config(write_rows(folder / "rows.jsonl", instructions(40)), checkpoint, cache=False)


@pytest.mark.parametrize("dtype", ["auto", "float16"])
@pytest.mark.parametrize("method", ["fed-plora", "flora"])
@pytest.mark.parametrize("task", ["answers", "labels"])
def test_a_run_is_rebuilt_as_the_guide_says(
    task: str, method: str, dtype: str, bert: Path, llama: Path, tmp_path: Path
) -> None:
    asked = of_answers(llama, tmp_path) if task == "answers" else of_three_labels(bert, tmp_path)
    table = asked.model_dump(exclude_none=True)
    table["model"]["dtype"] = dtype
    table["train"] = {"learning_rate": 1e-2, "local_steps": 6}
    config = parse({**table, "method": method, "rounds": 2}, "here")
    data, run = load_data(config), tmp_path / "run"
    run.mkdir()
    model = make_base(config, data, run / BASE)
    rows = simulate(config, data, model, head_names(model), run)
    assert (run / "base_delta.safetensors").exists() == (method == "flora")
    checkpoint = json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    kind = AutoModelForCausalLM if task == "answers" else AutoModelForSequenceClassification
    again = rebuilt(str(run), checkpoint, kind)
    assert next(again.parameters()).dtype == (torch.float16 if dtype == "float16" else torch.float32)
    found, last = evaluate(again, data.test)["loss"], rows[-1]["loss"]
    assert found == pytest.approx(last, rel=1e-5 if dtype == "auto" else 2e-3)
    assert abs(last - rows[0]["loss"]) > 4 * abs(last - found)
