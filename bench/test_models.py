"""A training step of one whole model: the bare base, PEFT, PEFT fused in place and this library's own layers."""

import functools
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from bench.conftest import HandOver, bench_device, recorded_time
from bench.models.cases import model_cases
from bench.models.measure import PLAN, measure
from bench.models.providers import providers_of
from bench.simulation.measure import Found

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)

Train = Callable[[str], dict[str, Found]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give one item per case and provider, a case's items one after another."""
    items = [
        pytest.param(case.name, provider, id=f"{case.name}-{provider}")
        for case in model_cases(bench_device().type)
        for provider in providers_of(case)
    ]
    metafunc.parametrize(("case_name", "provider"), items)


@pytest.fixture(scope="session")
def trained(pytestconfig: pytest.Config, device: torch.device) -> Train:
    """Measure a case with all its providers, once; for the first of its items; the others reuse the result."""
    share = float(pytestconfig.getoption("benchmark_max_time"))
    plan = replace(PLAN, seconds_per_provider=PLAN.seconds_per_provider * share)
    by_name = {case.name: case for case in model_cases(device.type)}
    return functools.cache(lambda name: measure(by_name[name], device, plan))


def test_model(hand_over: HandOver, trained: Train, case_name: str, provider: str) -> None:
    found = trained(case_name)[provider]
    hand_over(f"model {case_name}", found.record, found.seconds)
