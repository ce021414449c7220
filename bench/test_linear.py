"""Forward, forward+backward and that under LoRA dropout of one projection: base, PEFT, compiled PEFT, fused."""

from collections.abc import Callable

import pytest

from bench.recorded import recorded_time

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)


def test_forward(record: Callable[[], None]) -> None:
    record()


def test_forward_backward(record: Callable[[], None]) -> None:
    record()


def test_dropout(record: Callable[[], None]) -> None:
    record()
