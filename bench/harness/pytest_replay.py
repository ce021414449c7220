"""Measured durations handed to pytest-benchmark, which by itself times one item after another."""

from collections.abc import Sequence

from pytest_benchmark.fixture import BenchmarkFixture


class RecordedClock:
    """A clock that stands still except while a recorded call is replayed."""

    now_s = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


_CLOCK = RecordedClock()


def recorded_time() -> float:
    """Return the recorded clock's time in seconds: the `timer` of every item that `replay` serves."""
    return _CLOCK.now_s


def replay(benchmark: BenchmarkFixture, seconds: Sequence[float]) -> None:
    """Give `benchmark` one round per measured duration.

    Providers are timed in turn, one round of all of them after another, while pytest-benchmark completes an
    item before it starts the next. So a case is measured once and each provider's item replays its own
    durations; its `benchmark` mark must set `timer=recorded_time`.
    """
    remaining = iter(seconds)

    def next_duration() -> tuple[tuple[float], dict[str, object]]:
        _CLOCK.now_s = 0.0
        return (next(remaining),), {}

    benchmark.pedantic(_CLOCK.advance, setup=next_duration, rounds=len(seconds))
