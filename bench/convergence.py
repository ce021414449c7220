"""Train the same small model with PEFT's LoRA and with the fused layers, and hold the loss curves together.

`python -m bench.convergence --out DIR` writes `convergence.json` and `convergence.png`.
"""

import argparse
import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import plora_kernels as pk
from bench.harness.records import write_text

TARGETS = ("query", "key", "value", "dense")
HEAD = "classifier"
VOCABULARY = 64
FLOOR_EPS = 16
FP64_BOUND = 1e-12


@dataclass(frozen=True)
class Training:
    """What both sides share: the seed of weights, factors and batches, and AdamW's settings."""

    seed: int = 0
    steps: int = 50
    batch_size: int = 64
    length: int = 8
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = 3e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Curves:
    """Loss per step of both sides in fp32 and fp64, in the order trained."""

    peft_fp32: list[float]
    fused_fp32: list[float]
    peft_fp64: list[float]
    fused_fp64: list[float]

    def errors(self) -> dict[str, float]:
        """Return the largest distance over the steps of each curve from PEFT's in fp64."""
        return {
            name: _largest_distance(getattr(self, name), self.peft_fp64)
            for name in ("peft_fp32", "fused_fp32", "fused_fp64")
        }

    def bounds(self) -> dict[str, float]:
        """Return how far the fused curves may be from PEFT's in fp64 and still be equal within rounding.

        fp32: twice as far as PEFT's own fp32 curve, floor 16·eps·max(loss); fp64: 1e-12.
        """
        floor = FLOOR_EPS * torch.finfo(torch.float32).eps * max(self.peft_fp64)
        return {"fused_fp32": max(2 * self.errors()["peft_fp32"], floor), "fused_fp64": FP64_BOUND}

    def equal(self) -> bool:
        """Say whether both fused curves are within their bounds."""
        errors = self.errors()
        return all(errors[name] <= bound for name, bound in self.bounds().items())


def train_all(training: Training) -> Curves:
    """Train PEFT's and the fused model in fp32 and in fp64, from the same start on the same batches."""
    curves = {}
    for suffix, dtype in (("fp32", torch.float32), ("fp64", torch.float64)):
        base = make_model(training.seed).to(dtype)
        peft_model = with_peft(copy.deepcopy(base), training)
        fused_model = with_fused(copy.deepcopy(base), training, peft_factors(peft_model))
        curves[f"peft_{suffix}"] = losses(peft_model, training)
        curves[f"fused_{suffix}"] = losses(fused_model, training)
    return Curves(**curves)


def make_model(seed: int) -> BertForSequenceClassification:
    """Return a two-layer BERT classifier without dropout, drawn from `seed` and from nothing else."""
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(config)


def with_peft(model: nn.Module, training: Training) -> nn.Module:
    """Wrap a model with PEFT's LoRA, A drawn from the seed in fp32, B zero."""
    config = LoraConfig(
        r=training.rank,
        lora_alpha=training.alpha,
        lora_dropout=0.0,
        target_modules=list(TARGETS),
        modules_to_save=[HEAD],
    )
    wrapped: nn.Module = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(training.seed + 1)
    with torch.no_grad():
        for layer in _peft_layers(wrapped).values():
            factor = layer.lora_A["default"].weight
            drawn = torch.randn(factor.shape, generator=generator) / factor.shape[1] ** 0.5
            factor.copy_(drawn)
    return wrapped


def with_fused(model: nn.Module, training: Training, factors: dict[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Put fused layers with the given factors (A (R, K), B (N, R) by module name) into a model."""
    config = pk.PLoRAConfig(
        rank=training.rank, alpha=training.alpha, target_modules=list(TARGETS), modules_to_save=[HEAD]
    )
    handle = pk.inject(model, config)
    handle.set_factors(factors)
    return handle.model


def peft_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of a PEFT model's A (R, K) and B (N, R) by the base model's module names."""
    return {
        name: (
            layer.lora_A["default"].weight.detach().clone(),
            layer.lora_B["default"].weight.detach().clone(),
        )
        for name, layer in _peft_layers(model).items()
    }


def losses(model: nn.Module, training: Training) -> list[float]:
    """Train a model's trainable parameters with AdamW and return the loss of every step, before that step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=training.learning_rate, weight_decay=training.weight_decay)
    model.train()
    curve = []
    for tokens, labels in batches(training):
        loss = model(input_ids=tokens, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        curve.append(loss.item())
    return curve


def batches(training: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Draw token ids (batch, length) and labels (batch,): whether the first id is in the vocabulary's lower half."""
    generator = torch.Generator().manual_seed(training.seed + 2)
    for _ in range(training.steps):
        tokens = torch.randint(VOCABULARY, (training.batch_size, training.length), generator=generator)
        yield tokens, (tokens[:, 0] < VOCABULARY // 2).long()


def draw(curves: Curves, path: Path) -> None:
    """Draw the fp32 curves over each other, and every curve's distance from PEFT's fp64 curve; write a PNG."""
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = range(1, len(curves.peft_fp64) + 1)
    left.plot(steps, curves.peft_fp32, color="#D55E00", linewidth=4, alpha=0.5, label="PEFT")
    left.plot(steps, curves.fused_fp32, color="#0072B2", linewidth=1.2, label="fused")
    left.set(xlabel="step", ylabel="loss (fp32)", title=f"{len(steps)}-step training loss")
    left.legend(frameon=False)
    smallest = torch.finfo(torch.float64).eps / 4
    styles = {"peft_fp32": ("#D55E00", "--"), "fused_fp32": ("#0072B2", "-"), "fused_fp64": ("#009E73", "-")}
    for name, (colour, line) in styles.items():
        pairs = zip(getattr(curves, name), curves.peft_fp64, strict=True)
        distances = [max(abs(one - other), smallest) for one, other in pairs]
        right.semilogy(steps, distances, line, color=colour, label=name.replace("_", " "), linewidth=1.2)
    right.set(xlabel="step", ylabel="|loss − PEFT's in fp64|", title="distance from PEFT in fp64")
    right.legend(frameon=False)
    partial = path.with_name(path.name + ".tmp")
    canvas.print_png(str(partial))
    partial.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0 if the curves are equal within rounding, else 1."""
    parser = argparse.ArgumentParser(prog="python -m bench.convergence", description="PEFT's loss curve and ours.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON and the PNG go")
    parser.add_argument("--steps", type=int, default=Training.steps, help="training steps (default %(default)s)")
    given = parser.parse_args(arguments)
    training = Training(steps=given.steps)
    torch.set_num_threads(1)  # matrices this small are not worth sharing out
    curves = train_all(training)
    found = {
        "training": asdict(training),
        "losses": asdict(curves),
        "errors": curves.errors(),
        "bounds": curves.bounds(),
    }
    write_text(given.out / "convergence.json", json.dumps(found, indent=1) + "\n")
    draw(curves, given.out / "convergence.png")
    for name, bound in curves.bounds().items():
        print(f"{name}: largest distance from PEFT in fp64 {curves.errors()[name]:.2g}, bound {bound:.2g}")
    return 0 if curves.equal() else 1


def _peft_layers(model: nn.Module) -> dict[str, PeftLinear]:
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, PeftLinear)
    }


def _largest_distance(curve: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(one - two) for one, two in zip(curve, other, strict=True))


if __name__ == "__main__":
    raise SystemExit(main())
