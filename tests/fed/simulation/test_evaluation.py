"""Evaluation of language models: the loss of the answers' tokens, and generated answers compared."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer

import plora_kernels as pk
from fed.config import RunConfig
from fed.console import round_note
from fed.data.federated_data import FederatedData
from fed.data.federated_data import load as load_data
from fed.data.tables import Split
from fed.errors import FedError, StoppedError
from fed.models import base_model, saved_base
from fed.models.head import head_names
from fed.report import figure
from fed.report.run_figures import panels
from fed.report.tables import summary
from fed.simulation.evaluation import answer, evaluate, evaluate_held_out, folded_adapters
from fed.simulation.run_directory import Run
from fed.simulation.simulate import simulate
from tests.support.architectures import stir
from tests.support.equality import assert_equal
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
    assert head_names(model) == ()
    saved_base.save(model, config, tmp_path / "base", ())
    assert AutoTokenizer.from_pretrained(tmp_path / "base")("a cat").input_ids


def test_answers_are_generated_with_adapters_folded_and_all_is_as_before(
    config: RunConfig, data: FederatedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layers are folded while answers are made, and the answers are those of layers that are not."""
    model = base_model.build(config, data)
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules="all-linear"))
    stir(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = answer(model, data.test.table, data.test.rows)
    seen: list[set[bool]] = []
    generate = model.generate

    def noting(**arguments: Any) -> Any:
        seen.append({layer.selected == () for layer in handle.layers.values()})
        return generate(**arguments)

    monkeypatch.setattr(model, "generate", noting)
    done: list[tuple[str, int, int]] = []
    found = evaluate(model, data.test, progress=lambda *step: done.append(step))
    assert {True} in seen
    assert all(folded == {True} for folded in seen)
    exact = [text == right[0] for text, right in zip(plain, answers_of(data.test), strict=True)]
    assert found["accuracy"] == pytest.approx(sum(exact) / len(exact))
    assert done[-1] == ("answers", len(data.test), len(data.test))
    assert_equal(model.state_dict(), before)
    assert all(layer.selected is None for layer in handle.layers.values())


def answers_of(split: Split) -> list[Any]:
    return [split.table.answers[row] for row in split.rows.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_an_adapter_below_a_weights_rounding_is_not_lost(dtype: torch.dtype) -> None:
    """Changes of 2⁻⁹ are rounded away in weights of 1 in bfloat16; beside them 512 of them make 1."""
    model = nn.Sequential(nn.Linear(512, 3, bias=False, dtype=dtype))
    nn.init.ones_(model[0].weight)
    handle = pk.inject(model, pk.PLoRAConfig(rank=1, alpha=1.0, target_modules=["0"]))
    (layer,) = handle.layers.values()
    layer.set_factors(torch.ones(1, 512), torch.full((3, 1), torch.finfo(torch.bfloat16).eps / 4))
    x = torch.ones(1, 512, dtype=dtype)
    x[:, 256:] = -1  # the weights' own part is 0
    layer.lora_A.data[:, 256:] = -1
    with folded_adapters(model), torch.no_grad():
        assert torch.equal(model(x), torch.ones(1, 3, dtype=dtype))
        assert (layer.selected == ()) is (dtype is torch.float32)


def test_a_layer_that_cannot_be_folded_keeps_its_adapter(config: RunConfig, data: FederatedData) -> None:
    model = base_model.build(config, data)
    handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules="all-linear"))
    first, *others = handle.layers.values()
    first.weight_is_tied = True
    with folded_adapters(model):
        assert first.selected is None
        assert all(layer.selected == () for layer in others)
    handle.select([1], unselected="frozen")
    with folded_adapters(model):  # a selection that stands is left alone
        assert all(layer.selected == (1,) for layer in others)


def test_answers_of_the_first_and_the_last_round_alone(config: RunConfig, data: FederatedData, tmp_path: Path) -> None:
    last = config.model_copy(
        update={
            "rounds": 3,
            "measure": config.measure.model_copy(update={"generate": "last", "similarity": False}),
            "train": config.train.model_copy(update={"local_steps": 1}),
        }
    )
    every = last.model_copy(update={"measure": last.measure.model_copy(update={"generate": "every"})})
    found, wanted = (
        simulate(one, data, base_model.build(one, data), (), tmp_path / one.measure.generate) for one in (last, every)
    )
    names = [f"{kind}{name}" for kind in ("", "validation_") for name in ("accuracy", "rouge_1", "rouge_l")]
    for row, other in zip(found, wanted, strict=True):
        assert row.keys() == other.keys()
        assert row["loss"] == other["loss"]
        answered = row["round"] in (0, 3)
        assert [row[name] for name in names] == [other[name] if answered else None for name in names]
    run = Run(last, found, [])
    assert [run.gain_of(row) is None for row in found] == [False, True, True, False]
    assert round_note(found[1]).startswith("accuracy      —  loss")
    assert len(figure.sheet(panels(run)[:1])) > 1000
    assert summary(replace(run, rows=found[:2]))[2][1:3] == ("—", "")


def test_a_run_does_not_end_with_a_round_that_was_played_without_answers(
    config: RunConfig, data: FederatedData, tmp_path: Path
) -> None:
    measure = config.measure.model_copy(update={"generate": "last", "similarity": False})
    train = config.train.model_copy(update={"local_steps": 1})
    longer = config.model_copy(update={"rounds": 3, "checkpoint_every": 1, "measure": measure, "train": train})
    shorter = longer.model_copy(update={"rounds": 1})

    def stop(row: Any) -> None:
        if row["round"] == 1:
            raise StoppedError("enough")

    with pytest.raises(StoppedError, match="enough"):
        simulate(longer, data, base_model.build(longer, data), (), tmp_path, stop)
    with pytest.raises(FedError, match=r"^rounds is 1, and '[^']+' has played that round without generating answers"):
        simulate(shorter, data, base_model.build(shorter, data), (), tmp_path, resume=True)
    rows = simulate(longer, data, base_model.build(longer, data), (), tmp_path, resume=True)
    assert [row["accuracy"] is None for row in rows] == [False, True, True, False]
