"""Interleaved timing: every provider runs in every round, so that a disturbance affects all of them."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

# The device is kept busy for this factor times the slowest call's host time, plus so many seconds.
LEAD_FACTOR, LEAD_SECONDS = 1.5, 100e-6
# More than any last-level cache of the devices in use.
CPU_FLUSH_BYTES = 96 * 2**20
CUDA_FLUSH_BYTES = 1024 * 2**20


def nothing() -> None:
    """Do nothing: for steps that need no preparation."""


@dataclass(frozen=True)
class Step:
    """One provider's call: `reset()` prepares it and is not timed, `run()` is."""

    run: Callable[[], object]
    reset: Callable[[], None] = nothing


@dataclass(frozen=True)
class Plan:
    """How long to measure: rounds fill `seconds_per_provider`, within `min_rounds` and `max_rounds`."""

    seconds_per_provider: float = 1.0
    min_rounds: int = 8
    max_rounds: int = 48
    warmup_rounds: int = 2

    def __post_init__(self) -> None:
        # The number of rounds is chosen by how long the last warm-up round took, unless it is fixed.
        least = 0 if self.min_rounds == self.max_rounds else 1
        if self.min_rounds < 2 or self.warmup_rounds < least:
            given = f"min_rounds={self.min_rounds}, warmup_rounds={self.warmup_rounds}"
            raise ValueError(f"Plan({given}): at least 2 rounds and 1 warm-up round are needed")

    def rounds(self, pass_s: float, providers: int) -> int:
        """Return the rounds to time when one pass over all providers takes `pass_s` seconds."""
        wanted = int(self.seconds_per_provider * providers / max(pass_s, 1e-9))
        return max(self.min_rounds, min(self.max_rounds, wanted))


class Timer(Protocol):
    """Times calls; `read` returns the seconds of all calls since it was last read, in order."""

    def call(self, run: Callable[[], object]) -> None: ...

    def read(self) -> list[float]: ...


class WallTimer:
    """A timer by the host's monotonic clock, for devices whose calls return when the work is done."""

    def __init__(self) -> None:
        self._seconds: list[float] = []

    def call(self, run: Callable[[], object]) -> None:
        start = time.perf_counter()
        run()
        self._seconds.append(time.perf_counter() - start)

    def read(self) -> list[float]:
        seconds, self._seconds = self._seconds, []
        return seconds


class CudaTimer:
    """A timer by events on the current stream; calls are queued, and `read` waits for them."""

    def __init__(self) -> None:
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def call(self, run: Callable[[], object]) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        self._events.append((start, end))

    def read(self) -> list[float]:
        torch.cuda.synchronize()
        seconds = [start.elapsed_time(end) / 1e3 for start, end in self._events]
        self._events = []
        return seconds


def timer_for(device: torch.device) -> Timer:
    """Return a timer that measures the device's own work."""
    return CudaTimer() if device.type == "cuda" else WallTimer()


def cache_flush(device: torch.device, *, cold: bool, lead_s: float = 0.0) -> Callable[[], None]:
    """Return a function to call, untimed, before each timed call.

    On CUDA a buffer larger than the L2 cache is overwritten before every call, repeatedly until the device is busy for
    `lead_s`, so that the host is ahead and launch latency is not timed. The cache is then full of the buffer's bytes,
    which are not yet written to memory; a call that writes must wait for them. On the CPU a buffer is overwritten only
    if the case is `cold` (a weight that is folded rarely is not in the cache); else the caches hold what the other
    providers' calls left there.
    """
    if device.type == "cuda":
        buffer, times = torch.empty(CUDA_FLUSH_BYTES, dtype=torch.int8, device=device), 1
        if lead_s > 0:
            timer = CudaTimer()
            for _ in range(5):
                timer.call(buffer.zero_)
            times = max(1, math.ceil(lead_s / statistics.median(timer.read())))
    elif cold:
        buffer, times = torch.empty(CPU_FLUSH_BYTES, dtype=torch.int8), 1
    else:
        return nothing

    def flush() -> None:
        for _ in range(times):
            buffer.zero_()

    return flush


def lead_seconds(host: Collection[float]) -> float:
    """Return for how long to keep the device busy before a timed call, so that the host, which takes `host` seconds per
    call, has launched it by then; 0 if no host time counts.
    """
    return LEAD_FACTOR * max(host) + LEAD_SECONDS if host else 0.0


def host_seconds(step: Step, calls: int = 15) -> float:
    """Return the median host seconds of a call's checks and launches, while the device works in parallel.

    The device's queue is empty at the start, so no call waits for room in it.
    """
    timer = WallTimer()
    torch.cuda.synchronize()
    for _ in range(calls):
        step.reset()
        timer.call(step.run)
    torch.cuda.synchronize()
    return statistics.median(timer.read())


def median_and_spread(seconds: Sequence[float]) -> tuple[float, float]:
    """Return the median and the interquartile range of a provider's rounds."""
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return median, third - first


def round_order(names: list[str], number: int) -> list[str]:
    """Return the providers' order in a round: each rotation once forwards and once backwards.

    Over 2·len(names) rounds every provider takes every place equally often and follows either neighbour.
    """
    shift = (number // 2) % len(names)
    order = names[shift:] + names[:shift]
    return order if number % 2 == 0 else order[::-1]


def interleave(
    steps: Mapping[str, Step],
    timer: Timer,
    flush: Callable[[], None],
    plan: Plan,
    after_round: Callable[[Mapping[str, list[float]]], None] | None = None,
) -> dict[str, list[float]]:
    """Time every step in every round and return each provider's seconds, one per round.

    All steps are warmed up first; the garbage collector is off while the clock runs. `after_round` is called between
    rounds with the durations so far.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}

    def one_round(number: int) -> None:
        order = round_order(list(steps), number)
        for name in order:
            steps[name].reset()
            flush()
            timer.call(steps[name].run)
        for name, duration in zip(order, timer.read(), strict=True):
            seconds[name].append(duration)

    collecting, pass_s = gc.isenabled(), 0.0
    gc.collect()
    gc.disable()
    try:
        for number in range(plan.warmup_rounds):
            start = time.perf_counter()
            one_round(number)
            pass_s = time.perf_counter() - start
        for durations in seconds.values():
            durations.clear()
        for number in range(plan.rounds(pass_s, len(steps))):
            one_round(number)
            if after_round is not None:
                after_round(seconds)
    finally:
        if collecting:
            gc.enable()
    return seconds
