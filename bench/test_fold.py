"""Folding every module into the weight, in place, into a buffer and many at once: fused, PEFT's merge, a bare copy."""

from collections.abc import Callable

import pytest

from bench.recorded import recorded_time

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)


def test_fold(record: Callable[[], None]) -> None:
    record()


def test_fold_out(record: Callable[[], None]) -> None:
    record()


def test_fold_many(record: Callable[[], None]) -> None:
    record()
