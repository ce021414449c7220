"""What the tests of `fed` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.support.command_line import Outcome


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


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Models here are so small that a second thread only makes them wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
