"""Fixtures of the tests of `fed`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples.small_llama import Recipe, make
from tests.support.command_line import Call, outcome_of
from tests.support.text_data import PETS, PROMPT, instructions
from tests.support.tiny_bert import make_tiny_bert


@pytest.fixture
def fed_cli(capsys: pytest.CaptureFixture[str]) -> Call:
    """Call the command line in this process."""
    from fed.cli import main

    return lambda *arguments: outcome_of(lambda: main(list(arguments)), capsys)


def draw_nothing(patch: pytest.MonkeyPatch) -> None:
    for module in ("comparison_figures", "html", "run_figures"):
        patch.setattr(f"fed.report.{module}.sheet", lambda *panels, **options: b"no picture")


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not draw a run's pictures: drawing takes longer than these runs."""
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def undrawn_throughout() -> Iterator[None]:
    """Do not draw the pictures of any run of a file."""
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        yield


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What torch traces, which then runs as it was traced instead of compiled."""
    graphs: list[object] = []
    monkeypatch.setattr(
        "torch._dynamo.lookup_backend", lambda name: lambda graph, inputs: graphs.append(graph) or graph.forward
    )
    torch.compiler.reset()
    return graphs


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread: models here are so small that a second one makes them slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep cached tokens in a folder of the test."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLORA_KERNELS_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with the words of PETS and the labels dog and cat."""
    return make_tiny_bert(tmp_path_factory.mktemp("bert"), PETS, hidden=32, labels=("dog", "cat"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model trained on a few sentences about animals."""
    directory = tmp_path_factory.mktemp("llama")
    texts = [PROMPT.format(**row) + row["output"] for row in instructions(24)]
    recipe = Recipe(layers=1, width=32, vocabulary=400, length=64, steps=60, batch_size=8)
    make(texts, recipe, directory)
    return directory
