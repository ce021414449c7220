"""Interleaved timing: the order of providers, whose duration is whose, and what runs before and after each call."""

import gc
from collections.abc import Callable

import pytest
import torch

from bench.harness.timing import Plan, Step, WallTimer, cache_flush, interleave, round_order


class CountingTimer:
    """A timer by which each provider's call takes another time, so that a mix-up shows."""

    def __init__(self, durations: dict[str, float], calls: list[str]) -> None:
        self.durations, self.calls, self.pending = durations, calls, []

    def call(self, run: Callable[[], object]) -> None:
        run()
        self.pending.append(self.durations[self.calls[-1]])

    def read(self) -> list[float]:
        pending, self.pending = self.pending, []
        return pending


def test_the_order_rotates_and_turns_round() -> None:
    orders = ["".join(round_order(["a", "b", "c"], number)) for number in range(4)]
    assert orders == ["abc", "cba", "bca", "acb"]


@pytest.mark.parametrize("place", range(4))
def test_every_provider_takes_every_place_equally_often(place: int) -> None:
    names = ["a", "b", "c", "d"]
    there = [round_order(names, number)[place] for number in range(8)]
    assert all(there.count(name) == 2 for name in names)


def test_durations_belong_to_their_provider_and_resets_are_not_timed() -> None:
    events: list[str] = []
    calls: list[str] = []

    def step(name: str) -> Step:
        def run() -> None:
            assert not gc.isenabled()
            calls.append(name)
            events.append(f"run {name}")

        return Step(run, lambda: events.append(f"reset {name}"))

    durations = {"base": 1.0, "peft": 2.0, "fused": 3.0}
    plan = Plan(seconds_per_provider=0.0, min_rounds=5, warmup_rounds=2)
    timer = CountingTimer(durations, calls)
    seconds = interleave({name: step(name) for name in durations}, timer, lambda: events.append("flush"), plan)
    assert seconds == {name: [duration] * 5 for name, duration in durations.items()}
    assert len(calls) == 3 * (5 + 2)
    for place in range(0, len(events), 3):
        name = events[place].removeprefix("reset ")
        assert events[place : place + 3] == [f"reset {name}", "flush", f"run {name}"]
    assert gc.isenabled()


def test_the_collector_is_on_again_after_a_failure() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        interleave({"base": Step(fail, lambda: None)}, WallTimer(), lambda: None, Plan())
    assert gc.isenabled()


@pytest.mark.parametrize(("pass_s", "rounds"), [(100.0, 8), (0.5, 8), (0.1, 40), (0.0, 48), (1e-6, 48)])
def test_rounds_fill_the_time_within_limits(pass_s: float, rounds: int) -> None:
    assert Plan(seconds_per_provider=1.0, min_rounds=8, max_rounds=48).rounds(pass_s, providers=4) == rounds


@pytest.mark.parametrize("wrong", [{"min_rounds": 1}, {"warmup_rounds": 0}])
def test_a_plan_without_spread_or_warmup_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Plan(**wrong)


def test_the_wall_timer_reads_in_order_and_forgets() -> None:
    timer = WallTimer()
    timer.call(lambda: None)
    timer.call(lambda: torch.zeros(10))
    assert len(timer.read()) == 2
    assert timer.read() == []


def test_flushing_a_cold_cpu_case_touches_a_buffer_and_a_warm_one_none() -> None:
    cache_flush(torch.device("cpu"), cold=True)()
    cache_flush(torch.device("cpu"), cold=False)()
