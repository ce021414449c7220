"""Fixtures of the suites: the device, handing measurements to pytest-benchmark, and fields of the saved JSON."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.harness.machine import environment, usable_cores

# Takes a group of items, a provider's record and its rounds in seconds, none where it was not timed.
HandOver = Callable[[str, Mapping[str, object], Sequence[float]], None]
NOT_AVAILABLE = pytest.StashKey[list[Mapping[str, object]]]()


class RecordedClock:
    """A clock that advances only while a recorded call is replayed."""

    now_s = 0.0

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


_CLOCK = RecordedClock()


def recorded_time() -> float:
    """Return the recorded clock's time in seconds: the `timer` of every item that `replay` serves."""
    return _CLOCK.now_s


def bench_device() -> torch.device:
    """Return where the suites run: CUDA (or ROCm) if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The device, with as many CPU threads as there are cores this process may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    yield bench_device()
    torch.set_num_threads(threads)


@pytest.fixture
def hand_over(pytestconfig: pytest.Config, benchmark: BenchmarkFixture) -> HandOver:
    """Hand a provider's figures and measured rounds to pytest-benchmark, or skip with the reason if there are none.

    Providers are timed in turn, one round of all of them after another, while pytest-benchmark completes an item before
    it starts the next. So a case is measured once and each provider's item replays its own durations; its `benchmark`
    mark must set `timer=recorded_time`.
    """

    def hand_over(group: str, record: Mapping[str, object], seconds: Sequence[float]) -> None:
        benchmark.group = group
        if not seconds:
            pytestconfig.stash.setdefault(NOT_AVAILABLE, []).append(record)
            assert record.get("status") != "wrong", record["cause"]
            pytest.skip(f"not available: {record['cause']}")
        benchmark.extra_info.update(record)
        remaining = iter(seconds)

        def next_duration() -> tuple[tuple[float], dict[str, object]]:
            _CLOCK.now_s = 0.0
            return (next(remaining),), {}

        benchmark.pedantic(_CLOCK.advance, setup=next_duration, rounds=len(seconds))

    return hand_over


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Add device, threads and versions to the saved machine; leave out the host's name and kernel build."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info |= environment(bench_device(), threads=usable_cores())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, object]) -> None:
    """Set the project's name, which pytest-benchmark takes from the checkout's directory."""
    commit_info["project"] = "plora-kernels"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, object]) -> None:
    """Add the providers that could not run here."""
    output_json["not_available"] = config.stash.get(NOT_AVAILABLE, [])
