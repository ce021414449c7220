"""The quantisation libraries: tests that ask for one are skipped without it, unless `--quantized` says it must be."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import pytest


def library(name: str, config: pytest.Config) -> Any:
    """Import a quantisation library; skip the test without it, or fail under `--quantized`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they deprecate among themselves as they are imported
        try:
            return importlib.import_module(name)
        except ImportError as error:
            if config.getoption("quantized"):
                pytest.fail(f"--quantized, but {name} cannot be imported: {error}")
    pytest.skip(f"{name} is not installed; `make test-quantized` installs it")


@pytest.fixture
def bnb(pytestconfig: pytest.Config) -> Any:
    """Return bitsandbytes."""
    return library("bitsandbytes", pytestconfig)


@pytest.fixture
def torchao(pytestconfig: pytest.Config) -> Any:
    """Return torchao's module of quantisation."""
    return library("torchao.quantization", pytestconfig)
