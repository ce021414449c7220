"""The example that trains a small Llama on local text: its files load, it learns, runs repeat, errors are clear."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.small_llama import Recipe, app, make
from fed.cli import run_app
from fed.errors import FedError
from tests.support.command_line import Call, outcome_of
from tests.support.equality import assert_equal
from tests.support.text_data import instructions, write_rows

TEXTS = [f"the {animal} ate the {food} at noon" for animal in ("cat", "dog") for food in ("fish", "bone", "cake")] * 8
SMALL = Recipe(layers=1, width=32, vocabulary=300, length=16, steps=30, learning_rate=1e-2)
SIZE = ("--layers", "1", "--width", "32", "--vocabulary", "300", "--length", "32", "--steps", "4", "--threads", "1")


def test_a_model_loads_with_plain_transformers_and_goes_on_as_its_texts_do(tmp_path: Path) -> None:
    losses: list[float] = []
    numbers, tokens = make(TEXTS, SMALL, tmp_path, lambda step, loss: losses.append(loss))
    assert len(losses) == 30
    assert losses[-1] < 0.5 * losses[0]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(parameter.numel() for parameter in model.parameters()) == numbers
    assert sum(len(tokenizer(text).input_ids) + 1 for text in TEXTS) == tokens
    assert tokenizer.decode(tokenizer("Çedilla, 北").input_ids, skip_special_tokens=True) == "Çedilla, 北"
    prompt = tokenizer("the cat ate the fish at", return_tensors="pt").input_ids
    answer = tokenizer.decode(model(prompt).logits[0, -1].argmax())
    assert answer.strip() == "noon"[: len(answer.strip())] != ""


def test_the_same_recipe_makes_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    weights = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        make(TEXTS, Recipe(**{**vars(SMALL), "seed": seed, "steps": 2}), tmp_path / name)
        weights.append(load_file(tmp_path / name / "model.safetensors"))
    first, again, other = weights
    assert_equal(first, again)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_sizes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match="--width is 48: it should be a multiple of 32"):
        make(TEXTS, Recipe(**{**vars(SMALL), "width": 48}), tmp_path)
    with pytest.raises(FedError, match=r"--length is 4096: the texts have \d+ tokens, which fill no such row"):
        make(TEXTS, Recipe(**{**vars(SMALL), "length": 4096}), tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the example's command line in this process."""
    program = "python examples/small_llama.py"
    return lambda *arguments: outcome_of(lambda: run_app(app, program, list(arguments)), capsys)


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A folder of two tasks."""
    (tmp_path / "tasks").mkdir()
    for name in ("task1_animals", "task2_animals"):
        write_rows(tmp_path / "tasks" / f"{name}.jsonl", [{**row, "input": name} for row in instructions(12)])
    return tmp_path / "tasks"


def test_the_command_makes_a_model_of_a_folder_less_what_is_left_out(
    tasks: Path, tmp_path: Path, command: Call
) -> None:
    out = tmp_path / "model"
    outcome = command(str(tasks), *SIZE, "--without", "task2", "--out", str(out))
    assert (outcome.status, outcome.err) == (0, "")
    assert "step 4/4  training loss" in outcome.out
    assert "12 texts of" in outcome.out
    assert f"--set model.path={out}" in outcome.out
    words = AutoTokenizer.from_pretrained(out).get_vocab()
    assert any("1_animals" in word for word in words) or "task" in "".join(words)
    assert {path.name for path in tmp_path.iterdir()} == {"tasks", "model"}


def test_a_text_takes_the_first_of_several_answers_and_loses_half_characters(tmp_path: Path, command: Call) -> None:
    instances = [{"input": f"cat {number} \ud83d", "output": [f"answer {number}", "dog"]} for number in range(20)]
    task = tmp_path / "task1.json"
    task.write_text(json.dumps({"Definition": ["Name it."], "Instances": instances}))
    outcome = command(str(task), *SIZE, "--out", str(tmp_path / "model"))
    assert outcome.status == 0
    assert outcome.err == (
        "warning: 20 of 20 rows hold half a surrogate pair, which is no character and becomes U+FFFD; "
        f"the first is {task} row 1\n"
    )
    assert "20 texts of" in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--without", "task3"), "--without names 'task3'; there are task1_animals, task2_animals"),
        (("--without", "task1,task2"), "no file is left of task1_animals, task2_animals"),
        (("--text", "{story}"), "--text names {story}; the columns of"),
        (("--width", "40"), "--width is 40: it should be a multiple of 32"),
        (("--steps", "0"), "--steps"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    options: tuple[str, ...], message: str, tasks: Path, tmp_path: Path, command: Call
) -> None:
    outcome = command(str(tasks), *SIZE, *options, "--out", str(tmp_path / "model"))
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"tasks"}


def test_what_is_there_is_not_replaced(tasks: Path, tmp_path: Path, command: Call) -> None:
    outcome = command(str(tasks), *SIZE, "--out", str(tmp_path))
    assert outcome.status == 2
    assert "which exists" in outcome.err
