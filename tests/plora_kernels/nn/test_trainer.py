"""transformers' Trainer with adapted models: whole checkpoints, and those that hold the adapter alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import plora_kernels as pk
from tests.support.adapter_folders import saved_by_peft
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert, tiny_llama
from tests.support.tiers import slow

ROWS = [{"input_ids": (ids := torch.arange(12) * (row + 3) % 60), "labels": ids} for row in range(8)]
TOKENS = torch.arange(24).reshape(2, 12)
ADAPTER = {"adapter_config.json", "adapter_model.safetensors"}
WHOLE = {"config.json", "generation_config.json", "model.safetensors"}
STATE = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"}


class AdapterTrainer(pk.AdapterCheckpoints, Trainer):
    """A Trainer whose checkpoints hold the adapter."""


def llama(**options: Any) -> pk.Injected:
    """Return a small Llama with an adapter, the same every time."""
    torch.manual_seed(3)
    options = {"rank": 6, "alpha": 12.0, "target_modules": ["q_proj", "down_proj"], **options}
    return pk.inject(tiny_llama(), pk.PLoRAConfig(**options))


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Return settings of eight steps, with a checkpoint every three."""
    options = {
        **{"num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 0.02, "weight_decay": 0.1},
        **{"save_steps": 3, "logging_steps": 1, "eval_steps": 3, "seed": 5, "report_to": [], "disable_tqdm": True},
        **{"use_cpu": True, "lr_scheduler_type": "cosine", "dataloader_pin_memory": False, **options},
    }
    return TrainingArguments(str(folder), **options)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Interrupt(TrainerCallback):
    """Stop after a number of steps, as a machine that is taken away."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.steps


def whole(handle: pk.Injected, *rest: Any, **options: Any) -> Trainer:
    return Trainer(handle.model, *rest, **options)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "head": {"modules_to_save": ["lm_head"]},
    "fused": {"target_modules": ["q_proj", "k_proj", "v_proj"], "fuse_projections": True},
    "half": {"half": True},
}
SELECTIONS = [None, ([0, 2, 5], "folded"), ([1, 4], "frozen")]


def prepared(form: str, selection: tuple | None) -> pk.Injected:
    options = dict(FORMS[form])
    half = options.pop("half", False)
    handle = llama(**options)
    if half:
        handle.restore()
        handle = pk.inject(handle.model.bfloat16(), handle.config)
    if selection is not None:
        handle.select(*selection)
    return handle


CASES = [*((form, None) for form in FORMS), *(("dropout", each) for each in SELECTIONS[1:])]
FEW = [("plain", None), ("half", None), ("dropout", SELECTIONS[1])]


@pytest.mark.parametrize("make", [AdapterTrainer, *slow(whole)], ids=["adapter", "whole"])
@pytest.mark.parametrize(
    ("form", "selection"),
    [pytest.param(*each, marks=() if each in FEW else pytest.mark.slow) for each in CASES],
    ids=str,
)
def test_it_resumes_as_if_it_had_not_stopped(
    tmp_path: Path, make: Callable[..., Trainer], form: str, selection: tuple | None
) -> None:
    handle = prepared(form, selection)
    through = make(handle, arguments(tmp_path / "through"), train_dataset=ROWS)
    through.train()
    expected = {name: value.clone() for name, value in handle.model.state_dict().items()}

    stopped = make(prepared(form, selection), arguments(tmp_path / "cut"), train_dataset=ROWS, callbacks=[Interrupt(4)])
    stopped.train()
    kept = ADAPTER if make is AdapterTrainer else WHOLE
    assert {path.name for path in (tmp_path / "cut" / "checkpoint-3").iterdir()} - {"README.md"} == kept | STATE
    again = prepared(form, selection)
    parameters = [id(parameter) for parameter in again.model.parameters() if parameter.requires_grad]
    resumed = make(again, arguments(tmp_path / "cut"), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-3"))
    assert [id(parameter) for parameter in again.model.parameters() if parameter.requires_grad] == parameters
    assert losses(resumed) == losses(through)
    assert len(losses(through)) == 8
    assert_equal(again.model.state_dict(), expected)
    assert {layer.selected for layer in again.layers.values()} == {selection and tuple(selection[0])}


def test_a_checkpoint_is_an_adapter_for_peft_and_load_peft(tmp_path: Path) -> None:
    handle = llama(modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    AdapterTrainer(handle, arguments(tmp_path), train_dataset=ROWS).train()
    expected = handle.model.eval()(TOKENS).logits
    for folder in (tmp_path / "checkpoint-8",):
        theirs = PeftModel.from_pretrained(llama().restore(), folder).eval()
        torch.testing.assert_close(theirs(TOKENS).logits, expected)
        ours = llama().restore()
        pk.load_peft(ours, folder, trainable=False)
        torch.testing.assert_close(ours(TOKENS).logits, expected)


def test_the_best_adapter_is_loaded_at_the_end(tmp_path: Path) -> None:
    handle = llama()
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "metric_for_best_model": "eval_loss"}
    # The first checkpoint is the best: that of the greatest loss.
    trainer = AdapterTrainer(
        handle,
        arguments(tmp_path, greater_is_better=True, **options),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert trainer.state.global_step > trainer.state.best_global_step
    expected = llama().restore()
    pk.load_peft(expected, best)
    assert torch.equal(handle.model.eval()(TOKENS).logits, expected(TOKENS).logits)


def test_save_model_writes_the_adapter_and_the_tokenizer(tmp_path: Path) -> None:
    class Processor:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    class Collator:
        tokenizer = Processor()

        def __call__(self, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            return {key: torch.stack([row[key] for row in rows]) for key in rows[0]}

    for options in ({"processing_class": Processor()}, {"data_collator": Collator()}):
        name = next(iter(options))
        trainer = AdapterTrainer(llama(), arguments(tmp_path / name), train_dataset=ROWS, **options)
        trainer.save_model(str(tmp_path / name / "last"))
        files = {path.name for path in (tmp_path / name / "last").iterdir()}
        assert files == {*ADAPTER, "tokenizer.json", "training_args.bin"}


def test_a_whole_checkpoint_is_resumed_from_too(tmp_path: Path) -> None:
    handle = llama()
    through = whole(handle, arguments(tmp_path), train_dataset=ROWS)
    through.train()
    again = llama()
    resumed = AdapterTrainer(again, arguments(tmp_path), train_dataset=ROWS)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses(through)
    assert_equal(again.model.state_dict(), handle.model.state_dict())


def test_models_that_are_none_of_transformers_are_saved_too(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lin, self.head = nn.Linear(6, 6), nn.Linear(6, 1)

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            y = self.head(torch.tanh(self.lin(x)))
            return {"loss": (y - labels).square().mean(), "logits": y}

    rows = [{"x": torch.linspace(-1, 1, 6) * row, "labels": torch.tensor([0.1 * row])} for row in range(8)]

    def run(folder: str, **resume: Any) -> tuple[pk.Injected, Trainer]:
        handle = pk.inject(Model(), pk.PLoRAConfig(rank=2, target_modules=["lin"], modules_to_save=["head"]))
        trainer = AdapterTrainer(handle, arguments(tmp_path / folder), train_dataset=rows)
        trainer.train(**resume)
        return handle, trainer

    handle, through = run("through")
    again, resumed = run("through", resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-6"))
    assert losses(resumed) == losses(through)
    assert_equal(again.model.state_dict(), handle.model.state_dict())
    loaded = pk.load_peft(Model(), tmp_path / "through" / "checkpoint-8")
    assert_equal(loaded.model.state_dict(), handle.model.state_dict())


def test_gradient_checkpointing_and_merging_afterwards(tmp_path: Path) -> None:
    states = []
    for checkpointing in (False, True):
        handle = llama()
        AdapterTrainer(
            handle, arguments(tmp_path, gradient_checkpointing=checkpointing, save_strategy="no"), train_dataset=ROWS
        ).train()
        states.append(handle.merged_state_dict())
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value)


def test_what_an_adapter_s_files_do_not_hold_is_refused_before_training(tmp_path: Path) -> None:
    handle = llama()
    handle.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(pk.StateError, match=r"model\.norm\.weight are trained, but an adapter's files do not hold"):
        AdapterTrainer(handle, arguments(tmp_path), train_dataset=ROWS)
    trainer = AdapterTrainer(llama(), arguments(tmp_path), train_dataset=ROWS)
    trainer.model.model.norm.weight.requires_grad_(True)
    with pytest.raises(pk.StateError, match=r"model\.norm\.weight are trained"):
        trainer.save_model()
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    handle = pk.inject(model, pk.PLoRAConfig(rank=1, target_modules=["0"], modules_to_save=["2"]))
    with pytest.warns(pk.PLoRAWarning, match=r"^1 keep running statistics") as found:
        AdapterTrainer(handle, arguments(tmp_path), train_dataset=ROWS)
    assert found[0].filename == __file__


def test_what_is_no_handle_or_not_first_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pk.ConfigError, match="the trainer got a LlamaForCausalLM for a model; give it what inject"):
        AdapterTrainer(tiny_llama(), arguments(tmp_path))
    merged = llama()
    merged.merge()
    with pytest.raises(pk.StateError, match=r"taken out by restore\(\) or merge\(\)"):
        AdapterTrainer(merged, arguments(tmp_path))
    with pytest.raises(pk.ConfigError, match="Second names Trainer before AdapterCheckpoints"):

        class Second(Trainer, pk.AdapterCheckpoints):
            pass

    class Replacing(Trainer):
        def __init__(self, model: nn.Module, *rest: Any) -> None:
            super().__init__(tiny_llama(), *rest)

    class Mixed(pk.AdapterCheckpoints, Replacing):
        pass

    with pytest.raises(pk.StateError, match="another model in place of the adapted one"):
        Mixed(llama(), arguments(tmp_path))


@pytest.mark.parametrize("division", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_divided_models_are_refused(tmp_path: Path, division: str) -> None:
    class Divided(Trainer):
        def __init__(self, *rest: Any) -> None:
            super().__init__(*rest)
            setattr(self, division, True)

    class Mixed(pk.AdapterCheckpoints, Divided):
        pass

    with pytest.raises(pk.UnsupportedError, match="FSDP and DeepSpeed divide the model"):
        Mixed(llama(), arguments(tmp_path))


def test_another_adapter_is_not_resumed_from_and_nothing_changes(tmp_path: Path) -> None:
    trainer = AdapterTrainer(llama(), arguments(tmp_path / "first", max_steps=3), train_dataset=ROWS)
    trainer.train()
    checkpoint = tmp_path / "first" / "checkpoint-3"
    (tmp_path / "later").mkdir()
    for options, message in (
        ({"rank": 5}, "has rank 5 and scale 2.4, but PEFT would give it rank 6 and scale 2"),
        ({"alpha": 6.0}, "has rank 6 and scale 1, but"),
        ({"target_modules": ["q_proj"]}, r"down_proj' is not adapted, but PEFT would adapt it"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "up_proj' is adapted, but PEFT would not"),
        ({"modules_to_save": ["lm_head"]}, "with the whole modules none; the model's has lm_head"),
    ):
        handle = llama(**options)
        before = {name: value.clone() for name, value in handle.model.state_dict().items()}
        trainer = AdapterTrainer(handle, arguments(tmp_path / "later"), train_dataset=ROWS)
        with pytest.raises(pk.TargetError, match=message):
            trainer.train(resume_from_checkpoint=str(checkpoint))
        assert_equal(handle.model.state_dict(), before)


def test_a_diverged_checkpoint_is_named(tmp_path: Path) -> None:
    handle = llama()
    with torch.no_grad():
        next(iter(handle.layers.values())).lora_B.fill_(float("nan"))
    trainer = AdapterTrainer(handle, arguments(tmp_path), train_dataset=ROWS)
    trainer.save_model(str(tmp_path / "checkpoint-1"))
    with pytest.raises(pk.ConfigError, match="holds NaN"):
        trainer._load_from_checkpoint(str(tmp_path / "checkpoint-1"))


def test_a_loaded_adapter_trains_on_and_restores_its_base(tmp_path: Path) -> None:
    base = tiny_bert()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    saved_by_peft(tmp_path / "peft", tiny_bert, target_modules=["query"], modules_to_save=["classifier"])
    handle = pk.load_peft(base, tmp_path / "peft")
    rows = [{"input_ids": row["input_ids"], "labels": n % 3} for n, row in enumerate(ROWS)]
    AdapterTrainer(handle, arguments(tmp_path / "run"), train_dataset=rows).train()
    trained = {name: value.clone() for name, value in base.state_dict().items()}
    again = AdapterTrainer(handle, arguments(tmp_path / "run"), train_dataset=rows)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-8"))
    assert_equal(base.state_dict(), trained)
    handle.restore()
    assert_equal(base.state_dict(), before)
    assert json.loads((tmp_path / "run" / "checkpoint-8" / "adapter_config.json").read_text())["r"] == 4
