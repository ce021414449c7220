"""Checkpoints in their own dtype or another: factors and heads in float32, attention, and what a device lacks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, RobertaConfig
from transformers import RobertaForSequenceClassification as Roberta

from fed.config import RunConfig, load, parse
from fed.data.federated_data import load as load_data
from fed.errors import FedError
from fed.experiments.run import limits, make_base
from fed.models import base_model, saved_base
from fed.models.devices import require_dtype
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation.simulate import simulate
from tests.support.equality import assert_equal
from tests.support.text_data import PETS, instruction_config, instructions, text_config, write_rows

BF16, FP32 = torch.bfloat16, torch.float32


def converted(checkpoint: Path, target: Path, kind: Any, dtype: torch.dtype) -> Path:
    """Return a copy of a checkpoint in another dtype."""
    shutil.copytree(checkpoint, target)
    kind.from_pretrained(checkpoint).to(dtype).save_pretrained(target)
    return target


@pytest.fixture
def half_llama(llama: Path, tmp_path: Path) -> Path:
    return converted(llama, tmp_path / "llama", AutoModelForCausalLM, BF16)


def answering(checkpoint: Path, folder: Path, **model: Any) -> RunConfig:
    rows = write_rows(folder / "rows.jsonl", instructions(40))
    found = instruction_config(rows, checkpoint, cache=False).model_dump(exclude_none=True)
    del found["adapter"]["unselected"]
    return parse({**found, "model": {"path": str(checkpoint), **model}}, "here")


def classifying(checkpoint: Path, folder: Path, labels: tuple[str, str] = ("yes", "no"), **tables: Any) -> RunConfig:
    rows = [{"text": PETS[number % 8], "label": labels["cat" in PETS[number % 8]]} for number in range(48)]
    found = text_config(write_rows(folder / "rows.jsonl", rows), checkpoint, cache=False).model_dump(exclude_none=True)
    model = {"path": str(checkpoint), **tables.pop("model", {})}
    clients = {"count": 2, "per_round": 2, "ranks": [2, 4]}
    return parse({**found, "clients": clients, "adapter": {"rank": 4}, **tables, "model": model}, "here")


@pytest.mark.parametrize(
    ("asked", "held"), [("auto", BF16), ("bfloat16", BF16), ("float32", FP32), ("float16", torch.float16)]
)
def test_a_checkpoint_is_held_in_its_own_dtype_or_the_one_asked_for(
    asked: str, held: torch.dtype, half_llama: Path, tmp_path: Path
) -> None:
    config = answering(half_llama, tmp_path, dtype=asked)
    model, drawn = base_model.make(config, load_data(config))
    assert {value.dtype for value in model.parameters()} == {held}
    assert drawn == frozenset()
    plain = AutoModelForCausalLM.from_pretrained(half_llama, dtype=held)
    assert all(torch.equal(value, plain.get_parameter(name)) for name, value in model.named_parameters())
    with adapted(config, model, head_names(model)) as shared:
        assert {layer.lora_A.dtype for layer in shared.handle.layers.values()} == {FP32}
    saved_base.save(model, config, tmp_path / "base", drawn)
    again = saved_base.reopen(tmp_path / "base")
    assert all(torch.equal(value, again.get_parameter(name)) for name, value in model.named_parameters())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_a_checkpoint_that_does_not_name_its_dtype_has_that_of_its_weights(
    suffix: str, half_llama: Path, tmp_path: Path
) -> None:
    architecture = json.loads((half_llama / "config.json").read_text())
    del architecture["dtype"]
    (half_llama / "config.json").write_text(json.dumps(architecture))
    config = answering(half_llama, tmp_path)
    weights, other = half_llama / "model.safetensors", half_llama / "pytorch_model.bin"
    if suffix == "bin":
        torch.save(load_file(weights), other)
        weights.unlink()
    data = load_data(config)
    built: Any = base_model.build(config, data)
    assert built.dtype == BF16
    (other if suffix == "bin" else weights).write_bytes(b"nonsense")
    with pytest.raises(FedError, match=r"^model.path is '.*': the checkpoint does not load: "):
        base_model.build(config, data)


def test_a_float32_checkpoint_stays_as_it_was(llama: Path, tmp_path: Path) -> None:
    config = answering(llama, tmp_path)
    model = base_model.build(config, load_data(config))
    assert {value.dtype for value in model.parameters()} == {FP32}


@pytest.mark.parametrize("dtype", ["auto", "bfloat16", "float32"])
def test_the_adapter_has_the_dtype_asked_for(dtype: str, half_llama: Path, tmp_path: Path) -> None:
    config = answering(half_llama, tmp_path)
    config = config.model_copy(update={"adapter": config.adapter.model_copy(update={"dtype": dtype})})
    model = base_model.build(config, load_data(config))
    with adapted(config, model, ()) as shared:
        found = {value.dtype for pair in shared.handle.factors().values() for value in pair}
    assert found == {BF16 if dtype == "bfloat16" else FP32}


def make_roberta(folder: Path, bert: Path) -> Path:
    """Save a RoBERTa, whose head is a module of several layers, with BERT's tokenizer."""
    shutil.copytree(bert, folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    Roberta(RobertaConfig(vocab_size=60, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["bert", "roberta"])
@pytest.mark.parametrize("execution", ["sequential", "cohort"])
def test_a_head_over_half_precision_is_drawn_trained_and_saved_in_float32(
    family: str, execution: str, bert: Path, tmp_path: Path
) -> None:
    whole = bert if family == "bert" else make_roberta(tmp_path / "roberta", bert)
    checkpoint = converted(whole, tmp_path / "half", AutoModelForSequenceClassification, BF16)
    settings = {"execution": execution, "clients_per_pass": 2 if execution == "cohort" else 0, "rounds": 2}
    config = classifying(checkpoint, tmp_path, train={"learning_rate": 1e-4}, **settings)
    data = load_data(config)
    model, drawn = base_model.make(config, data)
    names = head_names(model)
    head = {name: value.detach().clone() for name, value in model.named_parameters() if name.startswith(names)}
    assert {name for name in drawn if name.startswith(names)} == set(head)
    assert {value.dtype for value in head.values()} == {FP32}
    assert any((value != value.bfloat16().float()).any() for value in head.values())  # drawn, not rounded
    assert {value.dtype for name, value in model.named_parameters() if name not in head} == {BF16}
    assert model(**data.test.batch(torch.arange(2))).logits.dtype == FP32
    simulate(config, data, model, names, tmp_path / "run")
    assert all(torch.equal(model.get_parameter(name), value) for name, value in head.items())  # restored
    saved = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {FP32}
    moved = [
        (saved[f"base_model.model.{name}"] != value).double().mean().item() for name, value in head.items()
        if "weight" in name
    ]  # fmt: skip
    assert min(moved) > 0.9  # in bfloat16 most of these steps of 1e-4 would be lost


def test_cohorts_train_a_float32_head_as_clients_do_one_by_one(bert: Path, tmp_path: Path) -> None:
    checkpoint = converted(bert, tmp_path / "half", AutoModelForSequenceClassification, BF16)
    # The model's own dropout would draw other masks in a cohort.
    text = (checkpoint / "config.json").read_text()
    (checkpoint / "config.json").write_text(text.replace('_dropout_prob": 0.1', '_dropout_prob": 0.0'))
    results = []
    for execution in ("sequential", "cohort"):
        config = classifying(
            checkpoint, tmp_path, execution=execution, rounds=1, clients_per_pass=2 if execution == "cohort" else 0,
            adapter={"rank": 4, "unselected": "frozen"}, train={"learning_rate": 1e-3, "optimizer": "sgd"},
        )  # fmt: skip
        data = load_data(config)
        model = base_model.build(config, data)
        simulate(config, data, model, head_names(model), tmp_path / execution)
        results.append(load_file(tmp_path / execution / "adapter" / "adapter_model.safetensors"))
    one, other = results
    for name, value in one.items():
        assert (value - other[name]).norm() <= 3e-2 * value.norm()


@pytest.mark.parametrize("copied", [True, False], ids=["copied", "referred"])
@pytest.mark.parametrize("labels", [("yes", "no"), ("dog", "cat")], ids=["drawn", "its own"])
def test_a_base_with_a_float32_head_is_reopened_bit_for_bit(
    labels: tuple[str, str], copied: bool, bert: Path, tmp_path: Path
) -> None:
    checkpoint = converted(bert, tmp_path / "half", AutoModelForSequenceClassification, BF16)
    config = classifying(checkpoint, tmp_path, labels, model={"copy_base": copied})
    data = load_data(config)
    model = make_base(config, data, tmp_path / "base")
    again = saved_base.reopen(tmp_path / "base", data.label_names)
    values = again.state_dict()
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(value.dtype == values[name].dtype for name, value in model.state_dict().items())
    batch = data.test.batch(torch.arange(3))
    assert torch.equal(model(**batch).logits, again(**batch).logits)
    assert (tmp_path / "base" / "model.safetensors").exists() == copied
    assert (tmp_path / "base" / "drawn.safetensors").exists() == (not copied and labels[0] == "yes")


def test_a_cohort_with_factors_and_head_of_two_dtypes_is_refused_before_the_run(bert: Path, tmp_path: Path) -> None:
    checkpoint = converted(bert, tmp_path / "half", AutoModelForSequenceClassification, BF16)
    config = classifying(checkpoint, tmp_path, execution="cohort", adapter={"rank": 4, "dtype": "bfloat16"})
    line = r"^adapter.dtype is 'bfloat16' and execution 'cohort', which needs factors and head of one dtype; adapter"
    with pytest.raises(FedError, match=line):
        make_base(config, load_data(config), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_the_vit_is_pretrained_in_float32_and_then_converted(tmp_path: Path) -> None:
    settings = ["model.pretrain_steps=3", "train.local_steps=1", "clients.count=4", "clients.per_round=2", "rounds=1"]
    config = load("digits", [*settings, "model.dtype=bfloat16"])
    data = load_data(config)
    whole = make_base(load("digits", settings), data, tmp_path / "whole")
    model = make_base(config, data, tmp_path / "half")
    for name, value in model.named_parameters():
        assert torch.equal(value, whole.get_parameter(name).to(FP32 if name.startswith("classifier") else BF16))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), saved_base.reopen(tmp_path / "half").parameters(), strict=True)
    )
    simulate(config, data, model, head_names(model), tmp_path / "run")


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_attention_is_the_one_asked_for(name: str, llama: Path, tmp_path: Path) -> None:
    config = answering(llama, tmp_path, attention=name)
    model: Any = base_model.build(config, load_data(config))
    assert model.config._attn_implementation == name
    saved_base.save(model, config, tmp_path / "base", ())
    again: Any = saved_base.reopen(tmp_path / "base")
    assert again.config._attn_implementation == name
    copied = answering(llama, tmp_path, attention=name, copy_base=True)
    saved_base.save(model, copied, tmp_path / "copy", ())
    again = saved_base.reopen(tmp_path / "copy", config=copied)
    assert again.config._attn_implementation == name
    line = rf"base': the base of a run, which refers to a checkpoint; {str(llama)!r} would be right$"
    with pytest.raises(FedError, match=line):  # as a checkpoint for another run
        base_model.build(answering(tmp_path / "base", tmp_path), load_data(config))


def test_attention_that_is_not_known_or_that_is_code_is_refused(llama: Path, tmp_path: Path) -> None:
    config = answering(llama, tmp_path, attention="spda")
    with pytest.raises(FedError, match=r"^model.attention is 'spda'; 'auto' or one of eager, .*sdpa.* would be right$"):
        base_model.build(config, load_data(config))
    with pytest.raises(FedError, match=r"^model.attention is 'someone/kernel'"):
        answering(llama, tmp_path, attention="someone/kernel")
    with pytest.raises(FedError, match=r"^model.attention is 'sdpa': the embedded ViT takes 'auto'$"):
        load("digits", ["model.attention=sdpa"])


def test_attention_that_does_not_train_here_is_refused_before_the_run(llama: Path, bert: Path, tmp_path: Path) -> None:
    data = load_data(plain := answering(llama, tmp_path))
    asked = answering(llama, tmp_path, attention="eager")
    tried, untried = base_model.build(asked, data), base_model.build(plain, data)
    assert_equal(tried.state_dict(), untried.state_dict())
    assert not tried.training
    assert all(value.requires_grad and value.grad is None for value in tried.parameters())
    line = r"^model.attention is 'sdpa': the model does not compute with it here: no backward on this device$"

    def without_backward(*arguments: Any, **options: Any) -> torch.Tensor:
        if any(value.requires_grad for value in arguments):
            raise RuntimeError("no backward on this device")
        return torch.zeros_like(arguments[0])

    for make in (lambda: answering(llama, tmp_path, attention="sdpa"), lambda: classifying(
        bert, tmp_path, model={"attention": "sdpa"}
    )):  # fmt: skip
        data = load_data(config := make())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("torch.nn.functional.scaled_dot_product_attention", without_backward)
            with pytest.raises(FedError, match=line):
                base_model.build(config, data)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_dtype_that_the_device_does_not_compute_in_is_one_line(dtype: torch.dtype) -> None:
    with pytest.raises(FedError, match=r"^model.dtype is 'x': the device 'cpu' does not compute in \w+; bfloat16 or "):
        require_dtype(dtype, torch.device("cpu"), "model.dtype is 'x'")


def test_what_the_device_lacks_ends_a_run_before_it_begins(
    half_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError('"LayerNormKernelImpl" not implemented for "BFloat16"')

    config = answering(half_llama, tmp_path)
    data = load_data(config)
    monkeypatch.setattr("torch.nn.functional.layer_norm", lacking)
    line = r"^model.dtype is 'auto': the device 'cpu' does not compute in bfloat16; float32 would be right$"
    with pytest.raises(FedError, match=line):
        base_model.build(config, data)


def test_products_are_as_exact_as_asked_for_and_as_before_at_the_end() -> None:
    before = torch.get_float32_matmul_precision()
    with limits(1, "high"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before
    with pytest.raises(FedError), limits(1, "medium"):
        raise FedError("here")
    assert torch.get_float32_matmul_precision() == before


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_library_of_quantisation_that_is_missing_is_named_with_its_extra(
    form: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fed.models.checkpoint.find_spec", lambda name: None)
    config = answering(llama, tmp_path, quantize=form)
    data, extra = load_data(config), r"pip install plora-kernels\[quantized\] brings it$"
    line = rf"^model.quantize is {form!r}: that needs the library bitsandbytes, which is not installed; {extra}"
    with pytest.raises(FedError, match=line):
        base_model.build(config, data)
    own = json.loads((llama / "config.json").read_text())
    shutil.copytree(llama, tmp_path / "quantised")
    own["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "quantised" / "config.json").write_text(json.dumps(own))
    quantised = answering(tmp_path / "quantised", tmp_path).model_dump(exclude_none=True)
    with pytest.raises(FedError, match=rf"quantised', a quantised checkpoint: that needs the library bits.*{extra}"):
        base_model.build(parse({**quantised, "adapter": {"unselected": "frozen"}}, "here"), data)


def damaged(change: Callable[[Path], object], base: Path) -> Path:
    change(base)
    (base / "digests.json").unlink()  # as if it were older, so that what it holds is looked at
    return base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda base: (base / "drawn.safetensors").unlink(),
            r"neither drawn.safetensors nor the checkpoint has 'class",
        ),
        (lambda base: (base / "checkpoint.json").write_text("[]"), "checkpoint.json is not what a run writes"),
        (
            lambda base: (base / "checkpoint.json").write_text(
                (base / "checkpoint.json").read_text().replace('"float32"', '"float3"')
            ),
            "checkpoint.json is not what a run writes",
        ),
        (lambda base: (base / "checkpoint.json").write_text('{"path": 1}'), "checkpoint.json is not what a run writes"),
        (lambda base: (base / "drawn.safetensors").write_bytes(b"x" * 9), "is damaged: drawn.safetensors: "),
    ],
)
def test_a_damaged_reference_is_named(
    change: Callable[[Path], object], message: str, bert: Path, tmp_path: Path
) -> None:
    config = classifying(bert, tmp_path, ("a", "b"))
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows + [rows[0].replace('"b"', '"c"').replace('"a"', '"c"')] * 9))
    data = load_data(config)
    make_base(config, data, tmp_path / "base")
    assert saved_base.reopen(tmp_path / "base", data.label_names) is not None
    with pytest.raises(FedError, match=message):
        saved_base.reopen(damaged(change, tmp_path / "base"), data.label_names)
