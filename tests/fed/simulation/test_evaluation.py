"""Evaluation of language models: the loss of the answers' tokens, and generated answers compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

from fed.config import RunConfig
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.data.tables import Split
from fed.models import base_model
from fed.simulation.evaluation import answer, evaluate, evaluate_held_out
from tests.support.text_data import instruction_config, instructions, write_rows


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> RunConfig:
    path = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", instructions(40))
    return instruction_config(path, llama, validation_fraction=0.2)


@pytest.fixture(scope="module")
def data(config: RunConfig) -> FederatedData:
    return load_data(config)


@pytest.fixture(scope="module")
def model(config: RunConfig, data: FederatedData) -> nn.Module:
    return base_model.build(config, data)


def one_by_one(model: Any, split: Split) -> tuple[float, list[str]]:
    """Return loss and answers row by row, without batches, masks or padding."""
    table, losses, texts = split.table, [], []
    for row in split.rows.tolist():
        start, end = table.tokens.offsets[row : row + 2].tolist()
        tokens = table.tokens.values[start:end].long()
        prompt = int(table.prompt_lengths[row])
        with torch.no_grad():
            predicted = model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        losses += [-predicted[place - 1, tokens[place]].item() for place in range(prompt, len(tokens))]
        written = tokens[:prompt].tolist()
        for _ in range(table.max_new_tokens):
            with torch.no_grad():
                following = int(model(input_ids=torch.tensor([written])).logits[0, -1].argmax())
            if following == table.tokenizer.eos_token_id:
                break
            written.append(following)
        texts.append(table.tokenizer.decode(written[prompt:], skip_special_tokens=True).strip())
    return sum(losses) / len(losses), texts


def test_loss_and_answers_are_those_of_the_definition_row_by_row(model: nn.Module, data: FederatedData) -> None:
    assert len({len(row) for row in data.test.table.answers}) == 1
    loss, texts = one_by_one(model, data.test)
    found = evaluate(model, data.test)
    assert found["loss"] == pytest.approx(loss, rel=1e-5)
    assert answer(model, data.test.table, data.test.rows) == texts
    right = [data.test.table.answers[row][0] for row in data.test.rows.tolist()]
    assert found["accuracy"] == sum(one == two for one, two in zip(texts, right, strict=True)) / len(right)


def test_the_loss_of_a_batch_is_the_models_own(model: nn.Module, data: FederatedData) -> None:
    """For one row the loss is that of transformers, which shifts and averages the same tokens."""
    alone = Split(data.test.table, data.test.rows[:1])
    with torch.no_grad():
        assert evaluate(model, alone)["loss"] == pytest.approx(
            model(**alone.batch(torch.tensor([0]))).loss.item(), rel=1e-5
        )


class Parrot(nn.Module):
    """Answers every prompt with its answer in the table, or with another one."""

    def __init__(self, table: Any, wrong: set[int]) -> None:
        super().__init__()
        self.table, self.wrong, self.seen = table, wrong, 0
        self.answers = {tuple(self.prompt(row)): self.answer(row) for row in range(len(table))}

    def prompt(self, row: int) -> list[int]:
        start = int(self.table.tokens.offsets[row])
        return self.table.tokens.values[start : start + int(self.table.prompt_lengths[row])].tolist()

    def answer(self, row: int) -> list[int]:
        text = "the fish" if row in self.wrong else f"The {self.table.answers[row][0]}!"
        return [*self.table.tokenizer(text, add_special_tokens=False).input_ids, self.table.tokenizer.eos_token_id]

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: Any) -> torch.Tensor:
        assert (generation_config.do_sample, generation_config.max_new_tokens) == (False, self.table.max_new_tokens)
        self.seen += len(input_ids)
        rows = []
        for tokens, mask in zip(input_ids, attention_mask, strict=True):
            answered = self.answers[tuple(tokens[mask.bool()].tolist())]
            rows.append(torch.cat([tokens, torch.tensor(answered)]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.table.tokenizer.pad_token_id)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 400)})


def test_answers_are_counted_by_hand(data: FederatedData) -> None:
    """ "The dog!" for "dog" is not exact and shares one word of three: ROUGE-L 2/3."""
    split = data.test
    wrong = set(split.rows[:2].tolist())
    found = evaluate(Parrot(split.table, wrong), split)
    rows = len(split)
    assert found["accuracy"] == 0.0
    assert found["rouge_1"] == found["rouge_l"] == pytest.approx((rows - 2) / rows * 2 / 3)
    assert found["loss"] == pytest.approx(torch.tensor(400.0).log().item())
    several = replace(split.table, answers=[[*texts, f"the {texts[0]}"] for texts in split.table.answers])
    parrot = Parrot(split.table, wrong)
    found = evaluate(parrot, Split(several, split.rows))
    assert found["accuracy"] == found["rouge_l"] - 2 / rows * 0.5 == pytest.approx((rows - 2) / rows)


def test_only_so_many_rows_are_answered(data: FederatedData) -> None:
    table = replace(data.test.table, most_generated=3)
    parrot = Parrot(table, set())
    assert len(data.test) > 3
    evaluate(parrot, Split(table, data.test.rows))
    assert parrot.seen == 3


def test_held_out_metrics_name_those_of_validation(model: nn.Module, data: FederatedData) -> None:
    found, names = evaluate_held_out(model, data), ["accuracy", "rouge_1", "rouge_l", "loss"]
    assert list(found) == [*names, *(f"validation_{name}" for name in names)]
    assert found["validation_loss"] == evaluate(model, data.validation)["loss"]
    assert set(evaluate_held_out(model, replace(data, validation=None))) == set(names)


def test_the_language_model_has_no_head_to_train_and_keeps_its_tokenizer(
    config: RunConfig, model: Any, tmp_path: Path
) -> None:
    assert base_model.head_names(model) == ()
    base_model.save(model, config, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base")("a cat").input_ids
