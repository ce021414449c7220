"""A training step of many clients: the bare base, a PEFT loop, vmap and this library, one by one and at once."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.conftest import HandOver, bench_device, recorded_time
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
    """Measure a case with all its providers, once; for the first of its items; the others reuse the result."""
    share = float(pytestconfig.getoption("benchmark_max_time"))
    plan = replace(PLAN, seconds_per_provider=PLAN.seconds_per_provider * share)
    by_name = {case.name: case for case in simulation_cases(device.type)}
    return functools.cache(lambda name: measure(by_name[name], device, plan))


def test_simulation(hand_over: HandOver, simulated: Simulate, case_name: str, provider: str) -> None:
    found = simulated(case_name)[provider]
    hand_over(f"simulation {case_name}", found.record, found.seconds)
