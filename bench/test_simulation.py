"""A training step of many clients: the bare base, a PEFT loop, vmap and this library, one by one and at once."""

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import NOT_AVAILABLE, bench_device
from bench.harness.pytest_replay import recorded_time, replay
from bench.harness.timing import Plan
from bench.simulation.cases import simulation_cases
from bench.simulation.measure import PLAN, Found, measure
from bench.simulation.providers import providers_of

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)

Simulate = Callable[[str], dict[str, Found]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give one item per case and provider, a case's items one after another."""
    items = [
        pytest.param(case.name, provider, id=f"{case.name}-{provider}")
        for case in simulation_cases(bench_device().type)
        for provider in providers_of(case)
    ]
    metafunc.parametrize(("case_name", "provider"), items)


@pytest.fixture(scope="session")
def simulated(pytestconfig: pytest.Config, device: torch.device) -> Simulate:
    """Measure a case with all its providers, once; the first of its items does, the others get the same."""
    plan = Plan(
        seconds_per_provider=PLAN.seconds_per_provider * float(pytestconfig.getoption("benchmark_max_time")),
        min_rounds=PLAN.min_rounds,
        max_rounds=PLAN.max_rounds,
        warmup_rounds=PLAN.warmup_rounds,
    )
    by_name = {case.name: case for case in simulation_cases(device.type)}
    return functools.cache(lambda name: measure(by_name[name], device, plan))


def test_simulation(
    pytestconfig: pytest.Config, benchmark: BenchmarkFixture, simulated: Simulate, case_name: str, provider: str
) -> None:
    found = simulated(case_name)[provider]
    benchmark.group = f"simulation {case_name}"
    if not found.seconds:
        pytestconfig.stash.setdefault(NOT_AVAILABLE, []).append(found.record)
        assert found.record["status"] != "wrong", found.record["cause"]
        pytest.skip(f"not available: {found.record['cause']}")
    benchmark.extra_info.update(found.record)
    replay(benchmark, found.seconds)
