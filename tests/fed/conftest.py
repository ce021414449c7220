"""What the tests of `fed` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from examples.small_llama import Recipe, make
from tests.support.command_line import Outcome
from tests.support.text_data import PROMPT, instructions


@pytest.fixture
def fed_cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Call the command line in this process."""

    def call(*arguments: str) -> Outcome:
        from fed.cli import main

        with pytest.raises(SystemExit) as exit_:
            main(list(arguments))
        captured = capsys.readouterr()
        return Outcome(exit_.value.code or 0, captured.out, captured.err)

    return call


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out a run's pictures where nothing looks at them: drawing takes longer than these runs."""
    for module in ("fed.report.html", "fed.report.run_figures"):
        monkeypatch.setattr(f"{module}.sheet", lambda *panels, **options: b"no picture")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models here are so small that a second thread only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep tokens where no other run looks for them."""
    directory = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLORA_KERNELS_CACHE", str(directory))
        yield directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny causal language model that has read a few sentences on animals."""
    directory = tmp_path_factory.mktemp("llama")
    texts = [PROMPT.format(**row) + row["output"] for row in instructions(24)]
    recipe = Recipe(layers=1, width=32, vocabulary=400, length=64, steps=60, batch_size=8)
    make(texts, recipe, directory)
    return directory
