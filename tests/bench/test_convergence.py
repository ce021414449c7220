"""Training with PEFT and with fused layers from the same start on the same batches: equal losses but for rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import plora_kernels as pk
from tests.support.models import tiny_bert

TARGETS = ["query", "key", "value", "dense"]
HEAD = ["classifier"]
VOCABULARY = 64
FP64_BOUND = 1e-12


@dataclass(frozen=True)
class Training:
    """The settings of both trainings: their length, AdamW's and the adapters'."""

    steps: int
    batch_size: int = 64
    length: int = 8
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 3e-3


FULL, SHORT = Training(steps=50), Training(steps=8)


@dataclass(frozen=True)
class Curves:
    """The loss per step of PEFT and of the fused layers, in fp32 and fp64."""

    peft_fp32: list[float]
    fused_fp32: list[float]
    peft_fp64: list[float]
    fused_fp64: list[float]

    def errors(self) -> dict[str, float]:
        """Return the largest distance over the steps of each curve from PEFT's in fp64."""
        return {
            name: max(abs(one - other) for one, other in zip(getattr(self, name), self.peft_fp64, strict=True))
            for name in ("peft_fp32", "fused_fp32", "fused_fp64")
        }

    def bounds(self) -> dict[str, float]:
        """Return how far the fused curves may be from PEFT's in fp64 and still be equal within rounding.

        fp32: twice as far as PEFT's own fp32 curve, floor 16·eps·max(loss); fp64: 1e-12.
        """
        floor = 16 * torch.finfo(torch.float32).eps * max(self.peft_fp64)
        return {"fused_fp32": max(2 * self.errors()["peft_fp32"], floor), "fused_fp64": FP64_BOUND}

    def equal(self) -> bool:
        """Say whether both fused curves are within their bounds."""
        errors = self.errors()
        return all(errors[name] <= bound for name, bound in self.bounds().items())


def train_all(training: Training) -> Curves:
    """Train PEFT's and the fused model in fp32 and in fp64, from the same start on the same batches."""
    curves = {}
    for suffix, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        base = make_model().to(dtype)
        peft_model = with_peft(copy.deepcopy(base), training)
        fused_model = with_fused(base, training, peft_factors(peft_model))
        curves[f"peft_{suffix}"] = losses(peft_model, training)
        curves[f"fused_{suffix}"] = losses(fused_model, training)
    return Curves(**curves)


def make_model() -> BertForSequenceClassification:
    """Return a two-layer BERT classifier without dropout, always the same."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "max_position_embeddings": 32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tiny_bert(labels=2, vocab_size=VOCABULARY, **sizes)


def with_peft(model: nn.Module, training: Training) -> nn.Module:
    """Wrap a model with PEFT's LoRA, A drawn in fp32, B zero."""
    config = LoraConfig(
        r=training.rank, lora_alpha=training.alpha, lora_dropout=0.0, target_modules=TARGETS, modules_to_save=HEAD
    )
    wrapped: nn.Module = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for layer in peft_layers(wrapped).values():
        factor = layer.lora_A["default"].weight.data
        factor.copy_(torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5)
    return wrapped


def with_fused(model: nn.Module, training: Training, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Put fused layers with the given factors (A (R, K), B (N, R) by module name) into a model."""
    config = pk.PLoRAConfig(rank=training.rank, alpha=training.alpha, target_modules=TARGETS, modules_to_save=HEAD)
    handle = pk.inject(model, config)
    handle.set_factors(factors)
    return handle.model


def peft_layers(model: nn.Module) -> dict[str, PeftLinear]:
    """Return a PEFT model's layers by the base model's module names."""
    named = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    return {name: module for name, module in named.items() if isinstance(module, PeftLinear)}


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of a PEFT model's A (R, K) and B (N, R) by the base model's module names."""
    return {
        name: (layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone())
        for name, layer in peft_layers(model).items()
    }


def losses(model: nn.Module, training: Training) -> list[float]:
    """Train a model's trainable parameters with AdamW and return the loss of every step, before that step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.learning_rate, weight_decay=0.01)
    model.train()
    curve = []
    for tokens, labels in batches(training):
        loss = model(input_ids=tokens, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def batches(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw token ids (batch, length) and labels (batch,): whether the first id is in the vocabulary's lower half."""
    generator = torch.Generator().manual_seed(2)
    for _ in range(training.steps):
        tokens = torch.randint(VOCABULARY, (training.batch_size, training.length), generator=generator)
        yield tokens, (tokens[:, 0] < VOCABULARY // 2).long()


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth sharing out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_few_steps_give_peft_s_loss_curve_and_a_scale_off_by_a_thousandth_does_not() -> None:
    curves = train_all(SHORT)
    assert curves.equal(), (curves.errors(), curves.bounds())
    base = make_model()
    factors = peft_factors(with_peft(copy.deepcopy(base), SHORT))
    off = losses(with_fused(base, replace(SHORT, alpha=SHORT.alpha * 1.001), factors), SHORT)
    assert not replace(curves, fused_fp32=off).equal()


@pytest.mark.slow
def test_fifty_steps_give_peft_s_loss_curve_within_rounding() -> None:
    curves = train_all(FULL)
    assert curves.equal(), (curves.errors(), curves.bounds())
    # The model must learn: two models that do not move would agree too.
    assert sum(curves.fused_fp64[-5:]) / 5 < 0.2 * curves.fused_fp64[0]


def test_bounds_by_hand() -> None:
    curves = Curves(peft_fp32=[1.0, 2.5], fused_fp32=[1.0, 1.2], peft_fp64=[1.0, 2.0], fused_fp64=[1.0, 2.0])
    assert curves.errors() == {"peft_fp32": 0.5, "fused_fp32": pytest.approx(0.8), "fused_fp64": 0.0}
    assert curves.bounds()["fused_fp32"] == 1.0
    assert curves.equal()
