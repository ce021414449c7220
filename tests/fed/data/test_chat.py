"""Conversations of chat models: what the checkpoint's chat template writes is what the model is trained on."""

from __future__ import annotations

import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fed.config import RunConfig
from fed.data import chat
from fed.data.federated_data import FederatedData, load
from fed.data.tables import InstructionTable
from fed.errors import FedError
from fed.models import base_model
from fed.simulation.evaluation import answer, evaluate
from tests.support.text_data import instruction_config, instructions, write_rows

# As ChatML, with a line end after the end of a turn; an answer is stripped.
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Mistral's: no line that the answer follows, a space before it, the tokenizer's end token after it.
BRACKETS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
# A model that thinks before it answers, here not at all; a second special token stands before the answer.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "thinking": THINKING, "no end": ENDLESS}
CLOSES = {"chatml": "<|im_end|>", "brackets": "</s>", "thinking": "<|im_end|>", "no end": "</s>"}


def chatting(llama: Path, folder: Path, template: str | None) -> Path:
    """Return a copy of a checkpoint with a chat template and the special tokens of one."""
    shutil.copytree(llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    return folder


def settings(folder: Path, checkpoint: Path, rows: Any = None, **data: Any) -> RunConfig:
    path = write_rows(folder / "rows.jsonl", instructions(24) if rows is None else rows)
    return instruction_config(path, checkpoint, **{"prompt": "chat", "cache": False, **data})


def table_of(data: FederatedData) -> InstructionTable:
    table = data.test.table
    assert isinstance(table, InstructionTable)
    return table


def parts(table: InstructionTable, row: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a row's prompt and of its answer."""
    batch = table.batch(torch.tensor([row]))
    labels = batch["labels"][0]
    size = int(table.prompt_lengths[row])
    assert (labels[:size] == -100).all()
    return batch["input_ids"][0, :size].tolist(), labels[size:].tolist()


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_are_the_tokens_of_the_whole_conversation(name: str, llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", TEMPLATES[name])
    said: list[str] = []
    table = table_of(load(settings(tmp_path, checkpoint), said.append))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    end = tokenizer.convert_tokens_to_ids(CLOSES[name])
    assert said == (
        ["the chat template ends an answer by no token; the tokenizer's end token comes after it"]
        if name == "no end" else []
    )  # fmt: skip
    assert table.tokenizer.eos_token_id == end
    for number, row in enumerate(instructions(24)):
        user = {"role": "user", "content": f"{row['instruction']}\n\n{row['input']}"}
        whole = [user, {"role": "assistant", "content": row["output"]}]
        ids = tokenizer.apply_chat_template(whole, tokenize=True, return_dict=False)
        asked = tokenizer.apply_chat_template([user], tokenize=True, add_generation_prompt=True, return_dict=False)
        prompt, answered = parts(table, number)
        kept = [*prompt, *answered]
        assert answered[-1] == end
        assert end not in answered[:-1]
        if name == "no end":
            assert kept[:-1] == ids[: len(kept) - 1]
            assert tokenizer.decode(ids[len(kept) - 1 :]) == "\n"
        else:
            assert kept == ids[: len(kept)]
            assert tokenizer.decode(ids[len(kept) :]) in ("", "\n")
        before = "<think>\n\n</think>\n\n" if name == "thinking" else ""
        assert tokenizer.decode(prompt) == tokenizer.decode(asked).rstrip(" ") + before
        space = " " if name in ("brackets", "no end") else ""  # which is in one token with the word after it
        assert tokenizer.decode(answered, skip_special_tokens=True) == space + row["output"]
        assert prompt.count(tokenizer.bos_token_id) == (name in ("chatml", "brackets"))


def test_system_and_user_messages_are_filled_in(llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", CHATML)
    rows = [{"q": f"which {i}", "s": "short" if i % 2 else "", "o": " cat \n"} for i in range(20)]
    constant = settings(tmp_path, checkpoint, rows, chat_user="Q: {q}", chat_system="Be kind.", output="o")
    table = table_of(load(constant))
    prompt, answered = parts(table, 3)
    assert table.tokenizer.decode(prompt).endswith(
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nQ: which 3<|im_end|>\n<|im_start|>assistant\n"
    )
    assert table.tokenizer.decode(answered) == "cat<|im_end|>"  # without the space around it
    filled = [row | {"s": "short"} for row in rows]
    config = settings(tmp_path, checkpoint, filled, chat_user="{q}", chat_system="Be {s}.", output="o")
    table = table_of(load(config))
    assert "system\nBe short.<|im_end|>" in table.tokenizer.decode(parts(table, 1)[0])
    table = table_of(load(settings(tmp_path, checkpoint, rows, chat_user="{q}", chat_system="{s}", output="o")))
    assert "<|im_start|>system\nshort<|im_end|>" in table.tokenizer.decode(parts(table, 1)[0])
    assert "system" not in table.tokenizer.decode(parts(table, 0)[0])  # a row that has none
    with pytest.raises(FedError, match=r"^data.chat_user names \{nothing\}; the columns of "):
        load(settings(tmp_path, checkpoint, rows, chat_user="{nothing}", output="o"))


@pytest.mark.parametrize("key", ["chat_system", "chat_user"])
def test_messages_without_a_chat_are_refused(key: str, tmp_path: Path) -> None:
    line = rf"^data.{key} is '{{q}}': it goes with data.task = 'instruction' and data.prompt = 'chat'$"
    for other in ({"prompt": "{instruction}"}, {"task": "classification"}):
        with pytest.raises(FedError, match=line):
            settings(tmp_path, tmp_path, **{key: "{q}"}, **other)


def test_a_prompt_where_none_is_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"^data.prompt is 'chat': it goes with data.task = 'instruction'$"):
        settings(tmp_path, tmp_path, task="classification")


def test_a_long_prompt_loses_the_beginning_of_the_users_message(llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", CHATML)
    rows = [row | {"input": "first " + "word " * 80 + "last"} for row in instructions(20)]
    said: list[str] = []
    table = table_of(load(settings(tmp_path, checkpoint, rows, max_length=64, max_new_tokens=8), said.append))
    prompt, answered = parts(table, 0)
    text = table.tokenizer.decode(prompt)
    assert len(prompt) == 56
    assert text.startswith(f"{table.tokenizer.bos_token}<|im_start|>user\n")
    assert text.endswith("word last<|im_end|>\n<|im_start|>assistant\n")
    assert "first" not in text
    assert answered[-1] == table.tokenizer.eos_token_id
    assert said == ["20 of 20 rows have more than data.max_length (64) tokens and are cut"]
    with pytest.raises(
        FedError, match=r"begins the conversation of .* with \d+ tokens, and there is room for 2 before"
    ):
        load(settings(tmp_path, checkpoint, rows, max_length=10, max_new_tokens=8))


def test_a_model_stops_at_the_end_of_its_turn(llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", CHATML)
    config = settings(tmp_path, checkpoint, max_new_tokens=6)
    data = load(config)
    table = table_of(data)
    model: Any = base_model.build(config, data).eval()
    output = model.get_output_embeddings()
    output.bias = torch.nn.Parameter(torch.zeros(output.out_features))
    output.bias.data[table.tokenizer.eos_token_id] = 1e6  # it says nothing else
    assert answer(model, table, data.test.rows[:3]) == ["", "", ""]
    assert evaluate(model, data.test)["accuracy"] == 0


@pytest.mark.parametrize("cache", [False, True])
def test_the_same_rows_come_from_the_cache(cache: bool, llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", CHATML)
    config = settings(tmp_path, checkpoint, cache=str(tmp_path / "cache") if cache else False)
    one, two = table_of(load(config)), table_of(load(config))
    assert torch.equal(one.tokens.values, two.tokens.values)
    assert one.tokenizer.eos_token == two.tokenizer.eos_token == "<|im_end|>"
    other = chatting(llama, tmp_path / "other", CHATML.replace("<|im_end|>\n", "<|im_end|>"))
    moved = settings(tmp_path, other, cache=config.data.cache)
    assert len(table_of(load(moved)).tokens.values) < len(one.tokens.values)


LAST = "{{ messages[-1].content }}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            None,
            r"^data.prompt is 'chat': model.path \('.*'\) has no chat template; a prompt with columns in braces would",
        ),
        ("{{ oh no }}", r"the chat template of model.path \('.*'\) fails on the first row: .*expected token"),
        ("{{ raise_exception('only in pairs') }}", r"fails on the first row: only in pairs$"),
        ("{{ messages.nothing.more }}", r"fails on the first row: .* has no attribute 'nothing'"),
        ("{{ ''.__class__.__mro__ }}", r"fails on the first row: access to attribute '__class__'"),
        ("always the same", r"does not continue the prompt by the answer; another checkpoint would be right$"),
        (LAST, r"does not continue the prompt by the answer; another checkpoint would be right$"),
        (
            CHATML.replace("m.content | trim", "m.content | replace('o', '0')"),
            r"does not write the answer of .*rows.jsonl.* as it stands there$",
        ),
    ],
)
def test_a_template_that_is_missing_or_does_not_work_is_one_line(
    template: str | None, message: str, llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(FedError, match=message) as caught:
        load(settings(tmp_path, chatting(llama, tmp_path / "chat", template)))
    assert "\n" not in str(caught.value)


def test_a_template_without_a_place_for_the_system_message_says_so(llama: Path, tmp_path: Path) -> None:
    checkpoint = chatting(llama, tmp_path / "chat", BRACKETS)
    with pytest.raises(FedError, match=r"fails on the first row: no system here$"):
        load(settings(tmp_path, checkpoint, chat_system="Be kind."))


def test_a_template_that_does_not_end_is_stopped(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{{ i * j }}{% endfor %}{% endfor %}"
    checkpoint = chatting(llama, tmp_path / "chat", loop)
    monkeypatch.setattr(chat, "_MOST_SECONDS", 0.2)
    handler, began = signal.getsignal(signal.SIGALRM), time.monotonic()
    with pytest.raises(FedError, match=r"fails on the first row: it takes more than 0.2 s$"):
        load(settings(tmp_path, checkpoint))
    assert time.monotonic() - began < 20
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_is_used_in_a_thread_as_well(llama: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, chatting(llama, tmp_path / "chat", CHATML))
    found: list[FederatedData] = []
    thread = threading.Thread(target=lambda: found.append(load(config)))
    thread.start()
    thread.join()
    assert torch.equal(table_of(found[0]).tokens.values, table_of(load(config)).tokens.values)


def test_messages_that_hold_special_tokens_are_counted(llama: Path, tmp_path: Path) -> None:
    rows = [*instructions(20), *(row | {"input": "a cat<|im_end|>"} for row in instructions(2))]
    said: list[str] = []
    load(settings(tmp_path, chatting(llama, tmp_path / "chat", CHATML), rows), said.append)
    assert said == [
        "2 of 22 rows have a special token in their messages, which is taken for one of the chat template's own"
    ]


def test_an_answer_that_holds_the_end_of_a_turn_is_refused(llama: Path, tmp_path: Path) -> None:
    rows = [*instructions(20), instructions(1)[0] | {"output": "cat<|im_end|>dog"}]
    checkpoint = chatting(llama, tmp_path / "chat", CHATML)
    with pytest.raises(FedError, match=r"line 21: its answer holds '<\|im_end\|>', by which the chat template ends an"):
        load(settings(tmp_path, checkpoint, rows))
