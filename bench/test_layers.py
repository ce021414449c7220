"""One layer's operators, a test each, whose cases and providers `conftest.py` hands in.

One projection forward, forward and backward, and that under LoRA dropout; projections of one input, such as q, k and v;
all modules folded into the weight, in place, into a buffer and many at once. Each against the bare base operation, PEFT
and, where it applies, torch.compile'd PEFT.
"""

from collections.abc import Callable

import pytest

from bench.harness.pytest_replay import recorded_time

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)


def test_forward(record: Callable[[], None]) -> None:
    record()


def test_forward_backward(record: Callable[[], None]) -> None:
    record()


def test_dropout(record: Callable[[], None]) -> None:
    record()


def test_projections_forward(record: Callable[[], None]) -> None:
    record()


def test_projections(record: Callable[[], None]) -> None:
    record()


def test_fold(record: Callable[[], None]) -> None:
    record()


def test_fold_out(record: Callable[[], None]) -> None:
    record()


def test_fold_many(record: Callable[[], None]) -> None:
    record()
