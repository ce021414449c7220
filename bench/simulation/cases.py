"""The cases: models of public shapes, batches per client, and numbers of clients that train at once."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from bench.cases import DTYPES
from bench.harness.records import SIMULATION

RANK, ALPHA = 16, 32.0
COHORTS = (1, 2, 5, 10, 20, 50)


@dataclass(frozen=True)
class ModelShape:
    """A transformer's sizes. `vocabulary` counts tokens; an image model's is 0, and its images have one size.

    The families "llama-lm" and "gpt2" are causal language models with tied embeddings, `labels` 0, whose adapter alone
    is trained.
    """

    name: str
    family: Literal["vit", "bert", "llama", "llama-lm", "gpt2"]
    layers: int
    width: int
    inner: int
    heads: int
    key_heads: int
    vocabulary: int
    labels: int


# The simulator's embedded model, BERT-tiny, BERT-base and Llama 3.2 1B; as language models SmolLM2 135M and the latter.
DIGITS_VIT = ModelShape("digits-vit", "vit", 4, 64, 128, 4, 4, 0, 10)
BERT_TINY = ModelShape("bert-tiny", "bert", 2, 128, 512, 2, 2, 30_522, 2)
BERT_BASE = ModelShape("bert-base", "bert", 12, 768, 3072, 12, 12, 30_522, 2)
LLAMA_1B = ModelShape("llama-1b", "llama", 16, 2048, 8192, 32, 8, 128_256, 2)
SMOLLM2 = ModelShape("smollm2-135m", "llama-lm", 30, 576, 1536, 9, 3, 49_152, 0)
LLAMA_1B_LM = ModelShape("llama-1b-lm", "llama-lm", 16, 2048, 8192, 32, 8, 128_256, 0)
MODELS = {shape.name: shape for shape in (DIGITS_VIT, BERT_TINY, BERT_BASE, LLAMA_1B, SMOLLM2, LLAMA_1B_LM)}
# The share of a language model's row that is a prompt, which does not count in the loss.
PROMPT_SHARE = 0.75
# Rows of unequal length have between this share of a case's length and all of it.
SHORTEST_SHARE = 0.25
# An 8×8 image in patches of 2×2, and the class token.
IMAGE_TOKENS = 17


@dataclass(frozen=True)
class SimulationCase:
    """One training step of `cohort` clients, each on `batch` rows of `length` tokens.

    With `unequal` the rows of a language model have at most `length` tokens, and batches are padded to their longest.
    """

    model: ModelShape
    batch: int
    length: int
    cohort: int
    dtype: str
    unequal: bool = False

    @property
    def name(self) -> str:
        """A key unique among the cases, readable in a test id."""
        name = f"{self.model.name}-{self.batch}x{self.length}-c{self.cohort}-{self.dtype}"
        return f"{name}-unequal" if self.unequal else name

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def is_language_model(self) -> bool:
        return self.model.family == "llama-lm"

    @property
    def factor_dtype(self) -> torch.dtype:
        """The dtype of A and B: a language model in half precision has factors in fp32, PEFT's default."""
        mixed = self.is_language_model and self.torch_dtype.itemsize == 2
        return torch.float32 if mixed else self.torch_dtype

    @property
    def tokens(self) -> int:
        """The most tokens that the whole cohort's batch has."""
        return self.cohort * self.batch * self.length

    def facts(self) -> dict[str, object]:
        """Return the fields that identify the case in records."""
        facts: dict[str, object] = {
            "op": SIMULATION,
            "model": self.model.name,
            "cohort": self.cohort,
            "batch": self.batch,
            "length": self.length,
            "dtype": self.dtype,
        }
        return facts | {"unequal": True} if self.unequal else facts


def simulation_cases(device_type: str) -> tuple[SimulationCase, ...]:
    """List a device's cases, the most important first.

    On a GPU they are in bf16, elsewhere in fp32, a language model in both and also with rows of unequal length; none
    takes minutes.
    """
    sizes, dtype = (_GPU, "bfloat16") if device_type == "cuda" else (_CPU, "float32")
    cases = [
        SimulationCase(model, batch, length, cohort, dtype)
        for model, batch, length, cohorts in sizes
        for cohort in cohorts
    ]
    texts = [replace(case, dtype=other) for other in (dtype, "bfloat16") for case in cases if case.is_language_model]
    return tuple(dict.fromkeys([*cases, *texts, *(replace(case, unequal=True) for case in texts)]))


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
    (SMOLLM2, 4, 128, (4,)),
)
_TEXT_BATCHES = ((4, 32), (1, 16))
_GPU: Sizes = (
    (BERT_BASE, 16, 128, (10,)),
    (LLAMA_1B, 16, 128, (10,)),
    (LLAMA_1B_LM, 4, 512, (10,)),
    (DIGITS_VIT, 16, IMAGE_TOKENS, COHORTS),
    (BERT_BASE, 16, 128, COHORTS),
    (LLAMA_1B, 16, 128, (1, 2, 5, 10, 20)),  # 50 clients need more memory than a GPU has
    *((shape, *batch, COHORTS) for batch in _TEXT_BATCHES for shape in (BERT_BASE, LLAMA_1B)),
    *((BERT_TINY, *batch, COHORTS) for batch in ((16, 128), *_TEXT_BATCHES)),
    (LLAMA_1B_LM, 4, 512, (1, 4)),
)
