"""Folding every module into the weight, in place: fused, PEFT's merge, a bare copy of the weight."""

from collections.abc import Callable

import pytest

from bench.recorded import recorded_time

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)


def test_fold(record: Callable[[], None]) -> None:
    record()
