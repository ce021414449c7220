"""The quantisation library of runs, under the same condition as for layers."""

from __future__ import annotations

from pathlib import Path

import pytest

from examples.small_llama import Recipe, make
from tests.plora_kernels.nn.quantized.conftest import bnb
from tests.support.text_data import PETS, PROMPT, instructions
from tests.support.tiny_bert import make_tiny_bert

__all__ = ["bnb"]


@pytest.fixture(scope="session")
def wide_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model with layers as wide as a block of 64 quantised weights, as bitsandbytes needs."""
    directory = tmp_path_factory.mktemp("llama")
    texts = [PROMPT.format(**row) + row["output"] for row in instructions(24)]
    make(texts, Recipe(layers=1, width=64, vocabulary=400, length=64, steps=30, batch_size=8), directory)
    return directory


@pytest.fixture(scope="session")
def wide_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of the same width."""
    return make_tiny_bert(tmp_path_factory.mktemp("bert"), PETS, hidden=64, layers=1, labels=("dog", "cat"))
