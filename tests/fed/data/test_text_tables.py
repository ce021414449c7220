"""From rows of text to labels, prompts, answers and tokens; texts are tokenized once."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import fed.data.tokenization
from fed.data.sources import Rows
from fed.data.text_tables import fill_in, instruction_table, make_labels
from fed.data.tokenization import instruction_tokens, text_tokens
from fed.errors import FedError
from tests.support.text_data import PETS, PROMPT, instruction_config, text_config

KNOWN = ("dog", "cat")


def rows_of(*rows: dict[str, Any], **more: Any) -> Rows:
    return Rows(rows, [f"row {number}" for number in range(1, len(rows) + 1)], **more)


def ignore(event: str) -> None:
    pass


def test_labels_are_numbered_as_the_checkpoint_the_source_or_the_alphabet_has_them(bert: Path) -> None:
    def made(*values: object, **more: Any) -> tuple[list[int], tuple[str, ...]]:
        labels, names = make_labels(text_config("f", bert), rows_of(*({"label": value} for value in values), **more))
        return labels.tolist(), names

    assert made("cat", "dog", "cat") == ([1, 0, 1], KNOWN)
    assert made("b", "a", True, 3) == ([3, 2, 1, 0], ("3", "True", "a", "b"))
    assert made(1, 0, label_names=["z", "a"]) == ([1, 0], ("z", "a"))
    assert made(1, 0, label_names=list(KNOWN[::-1])) == ([0, 1], KNOWN)
    with pytest.raises(FedError, match=r"row 2: its label is -1, so it has none"):
        made(1, -1, label_names=["z", "a"])
    with pytest.raises(FedError, match=r"the only label in f is 'x'; there should be two or more"):
        made("x", "x")


def test_a_prompt_leaves_out_lines_whose_columns_are_empty() -> None:
    rows = rows_of({"instruction": "Do.", "input": "it {x}"}, {"instruction": "Do.", "input": ""}, {"input": "it"})
    assert fill_in(PROMPT, rows) == ["Do.\nInput: it {x}\nOutput:\n", "Do.\nOutput:\n", "Input: it\nOutput:\n"]
    assert fill_in("{input}, {input}!", rows_of({"input": "a"})) == ["a, a!"]


@pytest.mark.parametrize(
    ("prompt", "row", "message"),
    [
        ("Say it", {"input": "a"}, r"data.prompt is 'Say it': it should name a column in braces"),
        ("{inputs}", {"input": "a"}, r"data.prompt names \{inputs\}; the columns of row 1 are input"),
        ("{input}", {"input": 3}, r"row 1: data.prompt 'input' holds 3; it should be a string"),
        ("{input}{more}", {"input": "", "more": None}, r"row 1: input, more are empty; a prompt needs one of them"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_refused(prompt: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(FedError, match=message):
        fill_in(prompt, rows_of(row))


def test_answers_may_be_several(llama: Path) -> None:
    row = {"instruction": "Count.", "input": "x"}
    rows = rows_of({**row, "output": ["one", "1"]}, {**row, "output": 2})
    table = instruction_table(instruction_config("f", llama), rows, ignore, None)
    assert table.answers == [("one", "1"), ("2",)]
    labels = table.batch(torch.arange(2))["labels"]
    assert [table.tokenizer.decode(row[row >= 0]) for row in labels] == ["one</s>", "2</s>"]
    for output in ("", [], ["a", ""], 0.5):
        with pytest.raises(FedError, match=r"row 1: data.output 'output' holds "):
            instruction_table(instruction_config("f", llama), rows_of({**row, "output": output}), ignore, None)


def test_a_row_is_prompt_answer_and_end(llama: Path) -> None:
    plain = AutoTokenizer.from_pretrained(llama)
    tokenizer, tokens, prompts, cut = instruction_tokens(
        instruction_config("f", llama), ["Name the animal.\n", ""], ["cat", "dog"], ignore, None
    )
    assert tokenizer.pad_token == "</s>"
    rows, inside = tokens.padded(torch.arange(2), -1)
    assert plain.decode(rows[0][inside[0]]) == "<s>Name the animal.\ncat</s>"
    assert plain.decode(rows[0][: prompts[0]]) == "<s>Name the animal.\n"
    assert plain.decode(rows[1][inside[1]]) == "<s>dog</s>"
    assert cut == 0


def test_long_prompts_lose_their_beginning_and_long_answers_their_end(llama: Path) -> None:
    config = instruction_config("f", llama, max_length=12, max_new_tokens=4)
    _, tokens, prompts, cut = instruction_tokens(
        config, ["a b c d e f g h i j", "a"], ["x", "x y z " * 9], ignore, None
    )
    plain = AutoTokenizer.from_pretrained(llama)
    assert prompts.tolist() == [8, 2]
    assert cut == 2
    (first, second), inside = tokens.padded(torch.arange(2), -1)
    start, *rest = first[inside[0]].tolist()
    assert start == plain.bos_token_id
    assert rest[:7] == plain("a b c d e f g h i j").input_ids[-7:]
    assert plain.decode(rest[7:]) == "x</s>"
    assert inside[1].sum() == 12
    assert plain.eos_token_id not in second.tolist()


def test_a_tokenizer_without_an_end_token_is_refused(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "endless")
    kept = PreTrainedTokenizerFast.from_pretrained(llama)
    kept.eos_token, kept.pad_token = None, "<s>"
    kept.save_pretrained(tmp_path / "endless")
    with pytest.raises(FedError, match=r"model.path is '.*endless': its tokenizer needs an end token"):
        instruction_tokens(instruction_config("f", tmp_path / "endless"), ["a"], ["b"], ignore, None)


def test_a_text_without_a_token_becomes_one_padding_token(llama: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(llama)
    assert tokenizer("", add_special_tokens=False).input_ids == []
    _, tokens = text_tokens(text_config("f", llama), ["", "a"], None, ignore, None)
    assert tokens["input_ids"].lengths(torch.arange(2)).min() == 1


class Count:
    """Counts the calls of the tokenizers a run loads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        load = fed.data.tokenization.load_tokenizer

        def loaded(config: object) -> Any:
            tokenizer = load(config)

            def call(*arguments: object, **named: object) -> Any:
                self.calls += 1
                return tokenizer(*arguments, **named)

            call.pad_token_id, call.eos_token_id = tokenizer.pad_token_id, tokenizer.eos_token_id
            return call

        monkeypatch.setattr(fed.data.tokenization, "load_tokenizer", loaded)


def test_tokens_are_made_once_for_the_same_texts_tokenizer_and_settings(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, cache = Count(monkeypatch), str(tmp_path / "cache")

    def made(texts: list[str], model: Path = bert, **data: Any) -> int:
        before = count.calls
        settings = {"cache": cache, **data}
        _, tokens = text_tokens(text_config("f", model, **settings), texts, None, ignore, None)
        assert len(tokens["input_ids"]) == len(texts)
        return count.calls - before

    assert [made(PETS), made(PETS)] == [1, 0]
    # Tokenized again: other texts, other settings, another tokenizer, no cache, another cache.
    assert made(PETS[:-1]) == 1
    assert made(["".join(PETS[:2]), *PETS[2:]]) == 1
    assert made(PETS, max_length=4) == 1
    other = shutil.copytree(bert, tmp_path / "other")
    assert made(PETS, other) == 0
    (other / "tokenizer_config.json").write_text((bert / "tokenizer_config.json").read_text() + " ")
    assert made(PETS, other) == 1
    assert [made(PETS, cache=False), made(PETS, cache=False)] == [1, 1]
    assert [made(PETS, cache=str(tmp_path / "elsewhere")), made(PETS)] == [1, 0]


def test_kept_tokens_are_the_same_as_fresh_ones(llama: Path, tmp_path: Path) -> None:
    config = instruction_config("f", llama, cache=str(tmp_path))
    fresh, kept = (instruction_tokens(config, PETS, PETS, ignore, None)[1:] for _ in range(2))
    assert torch.equal(fresh[0].values, kept[0].values)
    assert torch.equal(fresh[0].offsets, kept[0].offsets)
    assert torch.equal(fresh[1], kept[1])
    assert fresh[2] == kept[2]


def test_many_texts_show_how_far_they_are(bert: Path) -> None:
    seen: list[tuple[int, str]] = []

    @contextmanager
    def stage(name: str, total: int) -> Iterator[Any]:
        assert total == 5
        yield lambda done, note: seen.append((done, note))

    config = text_config("f", bert, cache=False)
    _, tokens = text_tokens(config, ["a cat"] * 4500, None, ignore, stage)
    assert [done for done, _ in seen] == [2, 4, 5]
    assert len(tokens["input_ids"]) == 4500
