"""Text tasks on the command line: instructions from rows of text to a saved adapter, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fed import config as configuration
from fed.data.federated_data import load as load_data
from fed.simulation.evaluation import evaluate
from tests.support.command_line import Call, assert_refused, rows_of
from tests.support.text_data import instructions, write_rows

ANSWERED = ("accuracy", "rouge_1", "rouge_l")
SETTINGS = """
rounds = 3
[data]
task = "instruction"
prompt = "{instruction}\\nInput: {input}\\nOutput:\\n"
max_length = 64
max_new_tokens = 4
partition = "natural"
partition_by = "category"
validation_fraction = 0.2
[clients]
count = 3
per_round = 3
ranks = [2, 4]
[adapter]
rank = 4
[train]
learning_rate = 0.01
local_steps = 8
"""


@pytest.fixture
def animals(tmp_path: Path, llama: Path) -> tuple[str, ...]:
    """The arguments of `fed` for a run on rows to answer, but for the output directory.

    The model was trained to name the animal of a sentence; in these rows the other animal is right.
    """
    other = {"cat": "dog", "dog": "cat"}
    write_rows(tmp_path / "animals.jsonl", [{**row, "output": other[row["output"]]} for row in instructions(60)])
    (tmp_path / "my.toml").write_text(SETTINGS)
    settings = (f"model.path={llama}", f"data.path={tmp_path / 'animals.jsonl'}", f"data.cache={tmp_path / 'cache'}")
    return ("run", str(tmp_path / "my.toml"), "--no-centralised", "--set", *settings, "--out")


@pytest.mark.usefixtures("undrawn")
def test_a_language_model_learns_to_answer_and_its_adapter_loads_with_plain_peft(
    animals: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    out = tmp_path / "out"
    outcome = fed_cli(*animals, str(out))
    assert (outcome.status, outcome.err) == (0, "")
    first, *_, last = rows_of(out)
    assert {"rouge_l", "validation_accuracy", "validation_rouge_l", "validation_loss"} <= set(first)
    assert last["loss"] < 0.7 * first["loss"]
    assert last["accuracy"] > 0.6 > 0.2 > first["accuracy"]
    data = load_data(configuration.load(out / "config.toml"))
    assert (len(data.validation), len(data.test)) == (12, 15)
    saved = json.loads((out / "adapter" / "adapter_config.json").read_text())
    base = AutoModelForCausalLM.from_pretrained(saved["base_model_name_or_path"])  # the checkpoint
    base.config.pad_token_id = AutoConfig.from_pretrained(out / "base").pad_token_id
    assert evaluate(base, data.test)["loss"] == pytest.approx(first["loss"], rel=1e-6)
    model = PeftModel.from_pretrained(base, out / "adapter")
    found = evaluate(model, data.test)
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert [found[name] for name in ANSWERED] == [last[name] for name in ANSWERED]
    assert AutoTokenizer.from_pretrained(out / "base").eos_token == "</s>"
    assert re.search(r"animals.jsonl +accuracy", outcome.out)


@pytest.mark.usefixtures("undrawn")
def test_what_a_person_should_know_of_the_data_is_a_warning_each(
    animals: tuple[str, ...], tmp_path: Path, fed_cli: Call
) -> None:
    short = ("rounds=1", "train.local_steps=1", "data.max_length=12")
    assert fed_cli(*animals, str(tmp_path / "one"), *short).err == (
        "warning: 60 of 60 rows have more than data.max_length (12) tokens and are cut\n"
    )
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-1])
    again = fed_cli(*animals, str(tmp_path / "two"), *short)
    assert again.status == 0
    assert re.match(rf"warning: {kept} is damaged and is made anew: [^\n]+\nwarning: 60 of 60 [^\n]+\n$", again.err)
    assert [row["loss"] for row in rows_of(tmp_path / "two")] == [row["loss"] for row in rows_of(tmp_path / "one")]


BAD = {
    "no column to go by": ("data.partition_by=kind", r"line 1: data.partition_by is 'kind'; the columns there are"),
    "too many clients": ("clients.count=4", r"clients.count is 4: 'category' has 3 values, and a natural client"),
    "no prompt": ("data.prompt=Say it", r"data.prompt is 'Say it': it should name a column in braces"),
    "no answer column": ("data.output=answer", r"line 1: data.output is 'answer'; the columns there are category"),
    "an answer too long": ("data.max_new_tokens=64", r"data.max_new_tokens is 64: it should leave room for a prompt"),
    "numbers": ("data.path=numbers.json", r"numbers.json line 1: data.prompt 'input' holds 1; it should be a string"),
    "no such partition": ("data.partition=natual", r"data.partition is 'natual': it should be 'dirichlet', 'iid'"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_bad_instructions_are_one_line_and_leave_nothing(
    change: str, message: str, animals: tuple[str, ...], tmp_path: Path, fed_cli: Call,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "numbers.json", [{"category": "c", "instruction": "Add.", "input": 1, "output": 2}] * 20)
    outcome = fed_cli(*animals, "out", change)
    assert_refused(outcome, message)
    assert not (tmp_path / "out").exists()
