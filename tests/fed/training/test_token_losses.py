"""Losses of language models' tokens without most of their logits: values, gradients, memory, and models' own ways."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import plora_kernels as pk
from fed.data.tables import IGNORED, InstructionTable, Sequences, TextTable
from fed.training import token_losses as subject
from fed.training.losses import client_losses
from fed.training.memory import SavedTensors
from fed.training.token_losses import (
    LogitChange,
    counted_positions,
    counts_alone,
    find_change,
    slice_bytes,
    token_losses,
)

VOCABULARY, ROWS, LENGTH = 97, 4, 9
SIZES = [2, 1, 1]  # the second client's row has no label that counts
COUNTS = torch.tensor([9.0, 1.0, 1.0])  # labels that count, at least one
SMALL = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}
SMALL |= {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16, "max_position_embeddings": 40}
SETTINGS = {name: value for name, value in SMALL.items() if name not in ("num_key_value_heads", "intermediate_size")}
MODELS: dict[str, tuple[Callable[[], nn.Module], LogitChange | None]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)), LogitChange()),
    "llama-tied": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(tie_word_embeddings=True, **SMALL)), LogitChange()),
    "gemma2": (
        lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=8, final_logit_softcapping=20.0, **SMALL)),
        LogitChange(cap=20.0),
    ),
    "cohere": (lambda: tf.CohereForCausalLM(tf.CohereConfig(logit_scale=0.25, **SMALL)), LogitChange(0.25)),
    "granite": (lambda: tf.GraniteForCausalLM(tf.GraniteConfig(logits_scaling=8.0, **SMALL)), LogitChange(0.125)),
    "phi": (lambda: tf.PhiForCausalLM(tf.PhiConfig(**SMALL)), LogitChange()),  # its output layer has a bias
    "gpt2": (lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)), LogitChange()),
    "opt": (lambda: tf.OPTForCausalLM(tf.OPTConfig(**OPT, **SETTINGS)), LogitChange()),
    "own": (lambda: Unknown(), None),
}


class Unknown(nn.Module):
    """A causal language model without any of transformers' methods, whose logits are not a product alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.output = nn.Embedding(VOCABULARY, 16), nn.Linear(16, VOCABULARY)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.output(self.embedding(input_ids).cumsum(1)).sinh())


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a slice of three tokens, so that every case has several, the last one shorter."""
    monkeypatch.setitem(subject.SLICE_BYTES, "cpu", 3 * 4 * VOCABULARY)


def make(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MODELS[name][0]().to(dtype).eval()
        for parameter in model.requires_grad_(False).parameters():
            parameter.mul_(3)
    return model


def make_batch() -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's arguments and labels: rows of unequal length, and prompts that do not count."""
    tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(LENGTH) < torch.tensor([6, 9, 8, 4])[:, None]).long()
    labels = tokens.masked_fill(mask == 0, IGNORED)
    labels[:, :3], labels[2] = IGNORED, IGNORED
    return {"input_ids": tokens, "attention_mask": mask}, labels


def from_all_logits(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
    """Return the clients' mean losses from the model's own logits of all positions."""
    logits = model(**inputs).logits[:, :-1]
    losses = cross_entropy(logits.mT, labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)
    return torch.stack([part.sum() for part in losses.split(SIZES)]) / COUNTS


def first_norm(model: nn.Module) -> nn.Parameter:
    """Return a parameter of the first layer, which every hidden state depends on."""
    return next(own for name, own in model.named_parameters() if "embed" not in name and "wte" not in name)


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_those_of_the_models_own_logits(name: str) -> None:
    model, (inputs, labels) = make(name), make_batch()
    if MODELS[name][1] is not None:
        assert counts_alone(model.get_output_embeddings())  # type: ignore[operator]
    parameter = first_norm(model).requires_grad_()
    wanted = from_all_logits(model, inputs, labels)
    (gradient,) = torch.autograd.grad(wanted @ torch.tensor([1.0, 2.0, 3.0]).double(), parameter)
    found = client_losses(model, {**inputs, "labels": labels}, SIZES)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert found[1] == 0
    (got,) = torch.autograd.grad(found @ torch.tensor([1.0, 2.0, 3.0]).double(), parameter)
    assert gradient.abs().max() > 0
    torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12 * gradient.abs().max().item())
    assert find_change(model, inputs) == MODELS[name][1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "granite"])
@pytest.mark.parametrize("trained", ["weight", "adapter"])
def test_an_output_layer_that_trains_gets_its_gradients(name: str, trained: str) -> None:
    model, (inputs, labels) = make(name), make_batch()
    if trained == "adapter":
        handle = pk.inject(model, pk.PLoRAConfig(rank=3, target_modules=["lm_head"], exclude_modules=None))
        (layer,) = handle.layers.values()
        layer.set_factors(torch.randn(3, 32).double(), torch.randn(VOCABULARY, 3).double())
        parameters = [layer.lora_A, layer.lora_B]
    else:
        parameters = [model.get_output_embeddings().weight.requires_grad_()]  # type: ignore[operator]
    wanted = torch.autograd.grad(from_all_logits(model, inputs, labels).sum(), parameters)
    found = torch.autograd.grad(client_losses(model, {**inputs, "labels": labels}, SIZES).sum(), parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_with_all_logits_in_fp32(dtype: torch.dtype) -> None:
    model, (inputs, labels) = make("llama", dtype), make_batch()
    found = client_losses(model, {**inputs, "labels": labels}, SIZES)
    assert found.dtype is torch.float32
    logits = model(**inputs).logits[:, :-1].float()
    losses = cross_entropy(logits.mT, labels[:, 1:], ignore_index=IGNORED, reduction="none").sum(1)
    wanted = torch.stack([part.sum() for part in losses.split(SIZES)]) / COUNTS
    torch.testing.assert_close(found, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0.0)


def test_a_client_that_is_not_finite_touches_no_other() -> None:
    model, (inputs, labels) = make("llama"), make_batch()
    states: list[Tensor] = []

    def spoil(module: nn.Module, arguments: Any, result: Any) -> Any:
        spoiled = result.last_hidden_state.clone()
        spoiled[3] = torch.nan
        states.append(result.last_hidden_state.detach().requires_grad_())
        result.last_hidden_state = torch.where(spoiled.isnan(), spoiled, states[-1])
        return result

    find = client_losses(model, {**inputs, "labels": labels}, SIZES)
    hook = model.model.register_forward_hook(spoil)
    losses = client_losses(model, {**inputs, "labels": labels}, SIZES)
    hook.remove()
    assert torch.equal(losses[:2], find[:2])
    assert losses[2].isnan()
    losses.sum().backward()
    assert states[-1].grad[:3].isfinite().all()


def test_a_batch_without_labels_that_count_costs_nothing() -> None:
    model, (inputs, labels) = make("llama"), make_batch()
    parameter = first_norm(model).requires_grad_()
    losses = client_losses(model, {**inputs, "labels": torch.full_like(labels, IGNORED)}, SIZES)
    (gradient,) = torch.autograd.grad(losses.sum(), parameter)
    assert losses.tolist() == [0.0, 0.0, 0.0]
    assert not gradient.any()


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that an operator returns."""

    most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_nothing_of_the_size_of_all_logits_is_made_or_kept(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With eight times as many prompt tokens the loss makes no larger tensor of logits, and keeps none."""
    vocabulary = 5000
    with torch.random.fork_rng(devices=[]):
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**{**SMALL, "vocab_size": vocabulary}))
    model.requires_grad_(False)
    first_norm(model).requires_grad_()
    model.lm_head.weight.requires_grad_(trained)
    monkeypatch.setitem(subject.SLICE_BYTES, "cpu", 8 * 4 * vocabulary)  # eight tokens
    kept = []
    for prompt in (4, 32):
        tokens = torch.randint(vocabulary, (4, prompt + 6))
        labels = torch.where(torch.arange(prompt + 6) < prompt, IGNORED, tokens)
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        saved, largest = SavedTensors(model), Largest()
        token_losses(model, batch, labels, counted_positions(labels))  # the model is looked at once
        with largest, saved.watching(True):
            losses = token_losses(model, batch, labels, counted_positions(labels))
            losses.sum().backward()
        assert len(losses) == 24
        assert largest.most <= max(8 * vocabulary, model.lm_head.weight.numel())
        kept.append(saved.size_bytes)
    assert max(kept) < 24 * vocabulary * 4  # the answers' logits alone


def test_a_table_knows_the_positions_that_count() -> None:
    """Rows 'p p a a', 'p a' and 'a a a': each answer token is predicted by the position before it, if there is one."""
    rows = [[5, 6, 7, 8], [5, 6], [5, 6, 7]]
    table = InstructionTable(
        Sequences.of(rows), torch.tensor([2, 1, 0]), [("",)] * 3, SimpleNamespace(pad_token_id=0), 4
    )
    assert table.counted(torch.tensor([0, 1, 2])).tolist() == [1, 2, 4, 8, 9]
    for order in ([0], [1, 0], [2, 1, 0], [1, 1]):
        chosen = torch.tensor(order)
        assert torch.equal(table.counted(chosen), counted_positions(table.batch(chosen)["labels"]))


@pytest.fixture
def capped() -> nn.Module:
    return make("gemma2", torch.float32)


def test_a_change_that_the_configuration_does_not_name_is_not_guessed(capped: Any) -> None:
    """The model then runs as it is, with all logits."""
    inputs, labels = make_batch()
    del capped.config.final_logit_softcapping
    forward = capped.forward

    def own(**arguments: Any) -> SimpleNamespace:
        capped.config.final_logit_softcapping = None
        return SimpleNamespace(logits=7.0 * torch.tanh(forward(**arguments).logits / 7.0))

    capped.forward = own
    assert find_change(capped, inputs) is None
    wanted = from_all_logits(capped, inputs, labels)
    torch.testing.assert_close(client_losses(capped, {**inputs, "labels": labels}, SIZES), wanted)


def test_a_slice_of_a_small_batch_takes_its_own_logits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers of 2 and 3 tokens, the first of which may be a row's first: two rows have at most 2 · 3 that count."""
    tokenizer = SimpleNamespace(pad_token_id=0)
    rows = Sequences.of([[1, 2, 3, 4, 5, 6], [1, 2, 3], [1, 2, 3, 4, 5, 6, 7]])
    table = InstructionTable(rows, torch.tensor([4, 0, 4]), [("",)] * 3, tokenizer, 4)
    model = make("llama")
    monkeypatch.setitem(subject.SLICE_BYTES, "cpu", 7 * 4 * VOCABULARY)
    assert slice_bytes(model, table, 2) == 2 * 6 * 4 * VOCABULARY
    assert slice_bytes(model, table, 3) == 2 * 7 * 4 * VOCABULARY  # as many as a slice may have, of 9
    model.get_output_embeddings().weight.requires_grad_()  # type: ignore[operator]
    assert slice_bytes(model, table, 1) == 2 * 7 * 4 * VOCABULARY  # all columns of the longest row
    one_label = TextTable({"input_ids": rows}, torch.zeros(3, dtype=torch.int64), pad=0)
    assert slice_bytes(model, one_label, 2) == 0
