"""The cases: models of public shapes, their batches and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from bench.cases import DTYPES
from bench.harness.records import MODEL
from bench.simulation.cases import BERT_BASE, LLAMA_1B_LM, SMOLLM2, ModelShape

GPT2 = ModelShape("gpt2", "gpt2", 12, 768, 3072, 12, 12, 50_257, 0)


def shortened(shape: ModelShape, layers: int) -> ModelShape:
    """Return a model of the same widths and vocabulary with fewer layers, which its name says."""
    return replace(shape, name=f"{shape.name}-{layers}-layers", layers=layers)


@dataclass(frozen=True)
class ModelCase:
    """One training step of a model on `batch` rows of `length` tokens, its adapter on every linear of the layers.

    Over half precision the adapter is in fp32, as PEFT makes it. `compiled` says whether the compiled providers are
    measured too.
    """

    model: ModelShape
    batch: int
    length: int
    dtype: str
    compiled: bool = True

    @property
    def name(self) -> str:
        """A key unique among the cases, readable in a test id."""
        return f"{self.model.name}-{self.batch}x{self.length}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def facts(self) -> dict[str, object]:
        """Return the fields that identify the case in records."""
        return {
            "op": MODEL,
            "model": self.model.name,
            "batch": self.batch,
            "length": self.length,
            "dtype": self.dtype,
        }


# A CPU takes minutes to compile a model of all its layers, and seconds for a step.
CPU_MODELS = (shortened(SMOLLM2, 6), shortened(BERT_BASE, 4), shortened(GPT2, 4))
CPU_BATCHES = ((4, 128), (1, 32))
GPU_MODELS = (LLAMA_1B_LM, BERT_BASE, GPT2)
GPU_BATCH = (4, 512)
TINY_MODELS = (
    ModelShape("tiny-bert", "bert", 2, 32, 48, 2, 2, 97, 2),
    ModelShape("tiny-gpt2", "gpt2", 2, 32, 48, 2, 2, 97, 0),
)


def model_cases(device_type: str) -> tuple[ModelCase, ...]:
    """List a device's cases, the most important first.

    On a GPU models have all their layers and are in bf16; elsewhere they are shorter, and in fp32 too.
    """
    if device_type == "cuda":
        return tuple(ModelCase(shape, *GPU_BATCH, "bfloat16") for shape in GPU_MODELS)
    return tuple(
        ModelCase(shape, *batch, dtype)
        for batch in CPU_BATCHES
        for shape in CPU_MODELS
        for dtype in ("float32", "bfloat16")
    )


def device_models(device_type: str) -> tuple[ModelCase, ...]:
    """List the cases of `python -m bench.gpu`: on the CPU two tiny ones, one of which `inject` refuses."""
    if device_type == "cuda":
        return model_cases("cuda")
    return tuple(ModelCase(shape, 2, 8, "float32", compiled=False) for shape in TINY_MODELS)
