"""The examples in docstrings are run, and every public name of `plora_kernels` has one."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fed
import plora_kernels as pk

# Triton kernels have no examples in their docstrings.
MODULES = [
    name
    for package in (pk, fed)
    for _, name, _ in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    if not name.startswith("plora_kernels.kernels") and not name.endswith("__main__")
]


def test_every_example_gives_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    tried = 0
    for name in MODULES:
        with torch.random.fork_rng(devices=[]):
            result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, f"python -m doctest {name.replace('.', '/')}.py shows what failed"
        tried += result.attempted
    assert tried > 50


def test_every_public_name_has_an_example() -> None:
    for name in pk.__all__:
        public = getattr(pk, name)
        is_error = isinstance(public, type) and issubclass(public, Exception)
        assert is_error or ">>>" in (public.__doc__ or ""), f"{name} has no example"
