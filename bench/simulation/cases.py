"""The cases: models of public shapes, batches per client, and numbers of clients that train at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from bench.cases import DTYPES
from bench.harness.records import SIMULATION

RANK, ALPHA = 16, 32.0
COHORTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class ModelShape:
    """A transformer's sizes. `vocabulary` counts tokens; an image model's is 0, and its images have one size."""

    name: str
    family: Literal["vit", "bert", "llama"]
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    labels: int


# The simulator's embedded model, BERT-tiny, BERT-base and Llama 3.2 1B.
DIGITS_VIT = ModelShape("digits-vit", "vit", 4, 64, 128, 4, 4, 0, 10)
BERT_TINY = ModelShape("bert-tiny", "bert", 2, 128, 512, 2, 2, 30_522, 2)
BERT_BASE = ModelShape("bert-base", "bert", 12, 768, 3072, 12, 12, 30_522, 2)
LLAMA_1B = ModelShape("llama-1b", "llama", 16, 2048, 8192, 32, 8, 128_256, 2)
MODELS = {shape.name: shape for shape in (DIGITS_VIT, BERT_TINY, BERT_BASE, LLAMA_1B)}
# An 8×8 image in patches of 2×2, and the class token.
IMAGE_TOKENS = 17


@dataclass(frozen=True)
class SimulationCase:
    """One training step of `cohort` clients, each on `batch` rows of `length` tokens."""

    model: ModelShape
    batch: int
    length: int
    cohort: int
    dtype: str

    @property
    def name(self) -> str:
        """A key unique among the cases, readable in a test id."""
        return f"{self.model.name}-{self.batch}x{self.length}-c{self.cohort}-{self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def tokens(self) -> int:
        """Tokens of the whole cohort's batch."""
        return self.cohort * self.batch * self.length

    def facts(self) -> dict[str, object]:
        """Return the fields that identify the case in records."""
        return {
            "op": SIMULATION,
            "model": self.model.name,
            "cohort": self.cohort,
            "batch": self.batch,
            "length": self.length,
            "dtype": self.dtype,
        }


def simulation_cases(device_type: str) -> tuple[SimulationCase, ...]:
    """List a device's cases: bf16 on a GPU, the most important first; elsewhere fp32, and none that takes minutes."""
    sizes, dtype = (_GPU, "bfloat16") if device_type == "cuda" else (_CPU, "float32")
    cases = (
        SimulationCase(model, batch, length, cohort, dtype)
        for model, batch, length, cohorts in sizes
        for cohort in cohorts
    )
    return tuple(dict.fromkeys(cases))


# A model, the rows and tokens of a client's batch, and the cohorts.
Sizes = tuple[tuple[ModelShape, int, int, tuple[int, ...]], ...]
_CPU: Sizes = (
    (DIGITS_VIT, 16, IMAGE_TOKENS, COHORTS),
    (BERT_TINY, 1, 16, COHORTS),
    (BERT_TINY, 4, 32, COHORTS),
    (BERT_TINY, 16, 128, (1, 2, 5, 10)),
    (BERT_BASE, 1, 16, (1, 2, 4, 10)),
    (BERT_BASE, 4, 32, (1, 2, 4, 10)),
    (BERT_BASE, 16, 128, (1,)),
)
_TEXT_BATCHES = ((4, 32), (1, 16))
_GPU: Sizes = (
    (BERT_BASE, 16, 128, (10,)),
    (LLAMA_1B, 16, 128, (10,)),
    (DIGITS_VIT, 16, IMAGE_TOKENS, COHORTS),
    (BERT_BASE, 16, 128, COHORTS),
    (LLAMA_1B, 16, 128, (1, 2, 5, 10, 20)),  # 50 clients need more memory than a GPU has
    *((shape, *batch, COHORTS) for batch in _TEXT_BATCHES for shape in (BERT_BASE, LLAMA_1B)),
    *((BERT_TINY, *batch, COHORTS) for batch in ((16, 128), *_TEXT_BATCHES)),
)
