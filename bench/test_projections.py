"""Projections of one input, such as q, k and v: one after another, by PEFT, compiled, each alone and in one launch."""

from collections.abc import Callable

import pytest

from bench.recorded import recorded_time

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)


def test_projections_forward(record: Callable[[], None]) -> None:
    record()


def test_projections(record: Callable[[], None]) -> None:
    record()
