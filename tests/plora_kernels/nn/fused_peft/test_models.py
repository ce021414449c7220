"""Whole models whose PEFT layers are fused: trained, generated from, compiled, and over processes, as with PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import plora_kernels as pk
from tests.plora_kernels.nn.test_distributed import agree, in_two_processes
from tests.support.architectures import ARCHITECTURES, SIZES, SPECIAL, T5, TOKENS
from tests.support.peft_layers import assert_as_exact, fused_calls, reasons, stirred
from tests.support.tiers import slow


def without_dropout(model: nn.Module) -> nn.Module:
    """Return the model in training mode, with nothing random in it."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_have_pefts_logits_and_gradients(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = get_peft_model(architecture.model(), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
    stirred(model).eval()  # many models drop elements by functions
    report, results = None, []
    for _ in range(2):
        model.zero_grad()
        found = model(**architecture.inputs)
        logits = found.logits if "logits" in found else found.start_logits
        logits.square().mean().backward()
        results.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        report = pk.fuse_peft(model)
    torch.testing.assert_close(*results)
    assert report is not None
    assert fused_calls(model) > 0
    assert reasons(model) == set()
    assert report.fused == len(report.layers)


LLAMA = {"num_key_value_heads": 2, "max_position_embeddings": 64}
TRAINED: dict[str, tuple[Callable[[], Any], dict[str, Tensor]]] = {
    "llama": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **LLAMA)), {"input_ids": TOKENS, "labels": TOKENS}),
    "bert": (
        lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)),
        {"input_ids": TOKENS, "labels": torch.tensor([0, 1])},
    ),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16)),
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, **SPECIAL, dropout_rate=0.0)),
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(
            tf.MixtralConfig(**SIZES, **LLAMA, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0)
        ),
        {"input_ids": TOKENS, "labels": TOKENS},
    ),
}


def adapted(name: str, dtype: torch.dtype) -> Any:
    """Return one of the models with a base in `dtype` and PEFT's adapter, whose B is zero, without dropout."""
    torch.manual_seed(0)
    inner = TRAINED[name][0]().to(dtype)
    own: dict[str, dict[str, Any]] = {
        "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
        "mixtral": {
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    }
    config = LoraConfig(r=8, lora_alpha=16, **own.get(name, {"target_modules": "all-linear"}))
    return without_dropout(get_peft_model(inner, config))


def results_of(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a batch's logits and loss, and the gradients of the model's parameters."""
    model.zero_grad()
    found = model(**batch)
    found.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": found.logits.detach(), "loss": found.loss.detach(), **gradients}


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_losses_and_gradients_are_as_exact_as_pefts(name: str, dtype: torch.dtype) -> None:
    model, batch = stirred(adapted(name, dtype), std=0.05), TRAINED[name][1]
    theirs = results_of(model, batch)
    wide = copy.deepcopy(model).double()
    wide.get_base_model().set_experts_implementation("eager")  # the others take no float64
    exact = results_of(wide, batch)
    pk.fuse_peft(model)
    ours = results_of(model, batch)
    assert reasons(model) == set()
    if dtype is torch.float32:
        assert_as_exact(ours, theirs, exact, dtype)
        return
    # Half precision rounds after every layer, so single gradients are off by luck, up to four times as far as PEFT's
    # or a quarter: all of them together are not.
    errors = [
        [(found[key].double() - exact[key]).norm() / exact[key].norm() for key in exact] for found in (ours, theirs)
    ]
    error, known = (torch.stack(each).mean().item() for each in errors)
    assert error <= max(2 * known, 4 * torch.finfo(dtype).eps), (error, known)


def trained(name: str, dtype: torch.dtype, fuse: bool) -> tuple[list[float], Any]:
    """Return the losses of fifty steps of training, and the model."""
    model, batch = adapted(name, dtype), TRAINED[name][1]
    if fuse:
        pk.fuse_peft(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(50):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("name", TRAINED)
@pytest.mark.parametrize("dtype", [torch.float32, *slow(torch.bfloat16)])
def test_fifty_steps_of_training_have_pefts_losses(name: str, dtype: torch.dtype) -> None:
    theirs, _ = trained(name, dtype, fuse=False)
    ours, model = trained(name, dtype, fuse=True)
    assert reasons(model) == set()
    assert fused_calls(model) >= 50 * 8
    assert theirs[-1] < 0.9 * theirs[0]  # it did train
    # What the first step rounds apart, the steps after it multiply: Adam divides small gradients by their size.
    near = 1e-3 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(ours[0], theirs[0], rtol=4 * torch.finfo(dtype).eps, atol=0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=near * theirs[0])


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "gpt2"))])
def test_compiled_models_are_one_graph_of_fused_layers(name: str) -> None:
    model = stirred(adapted(name, torch.float32))
    batch = {"input_ids": TOKENS}  # transformers' losses write to a log, which a graph cannot hold
    expected = model(**batch).logits
    report, backend = pk.fuse_peft(model), EagerAndRecordGraphs()
    found = torch.compile(model, fullgraph=True, backend=backend)(**batch).logits
    torch.testing.assert_close(found, expected)
    operators = [node for graph in backend.graphs for node in graph.graph.nodes if "plora.linear" in str(node.target)]
    assert len(operators) == report.fused > 0


@pytest.mark.slow
def test_a_model_that_was_compiled_before_is_fused_all_the_same() -> None:
    model, backend = stirred(adapted("llama", torch.float32)), EagerAndRecordGraphs()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    expected = compiled(TOKENS).logits
    pk.fuse_peft(compiled)
    torch.testing.assert_close(compiled(TOKENS).logits, expected)
    assert any("plora.linear" in str(node.target) for node in backend.graphs[-1].graph.nodes)


def test_generation_and_checkpointing_with_dropout() -> None:
    torch.manual_seed(0)
    inner = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **LLAMA, bos_token_id=1, eos_token_id=2, pad_token_id=0))
    model = stirred(get_peft_model(inner, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1)))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.eval().generate(TOKENS, **options)
    pk.fuse_peft(model)
    assert torch.equal(model.generate(TOKENS, **options), expected)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        torch.manual_seed(5)
        model(input_ids=TOKENS, labels=TOKENS).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)
    assert reasons(model) == set()


def parallel_model(fuse: bool) -> Any:
    torch.manual_seed(0)
    inner = tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **LLAMA))
    model = stirred(get_peft_model(inner, LoraConfig(r=4, target_modules="all-linear")))
    if fuse:
        pk.fuse_peft(model)
    return model


def step_of(model: nn.Module, rank: int) -> Tensor:
    """Take a step on rows of this process's own, and return the loss before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tokens = (TOKENS + 3 * rank) % 64
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    return loss.detach()


def in_parallel(kind: str, rank: int) -> None:
    """Check that a step of a fused model is PEFT's under DistributedDataParallel or `fully_shard`."""
    results = []
    for fuse in (False, True):
        model = parallel_model(fuse)
        wrapped: nn.Module = model
        if kind == "sharded":
            for layer in model.base_model.model.model.layers:
                fully_shard(layer)
            fully_shard(model)
        else:
            wrapped = DistributedDataParallel(model)
        losses = torch.stack([step_of(wrapped, rank), step_of(wrapped, rank)])
        whole = [p.full_tensor() if kind == "sharded" else p for p in model.parameters() if p.requires_grad]
        results.append([losses, *(p.detach().clone() for p in whole)])
        if fuse:
            assert reasons(model) == set()
            assert fused_calls(model) == 2 * 14
            assert agree(*results[-1][1:])
    torch.testing.assert_close(*results)
    dist.barrier()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_two_processes_train_as_with_peft(tmp_path: Path, kind: str) -> None:
    in_two_processes(partial(in_parallel, kind), tmp_path)


def test_shards_with_hooks_on_the_factors_are_pefts() -> None:
    """`fully_shard` on lora_A itself puts hooks on it: the layer must not read its parameters without them."""
    model = parallel_model(fuse=True)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A["default"].register_forward_pre_hook(lambda module, args: None)
    model(TOKENS)
    assert reasons(model) == {"its lora_A has hooks"}


def test_trained_models_are_copies_of_each_other() -> None:
    """Two fused copies do not share anything."""
    model = parallel_model(fuse=True)
    other = copy.deepcopy(model)
    step_of(model, 0)
    torch.testing.assert_close(other(TOKENS).logits, parallel_model(fuse=False)(TOKENS).logits)
