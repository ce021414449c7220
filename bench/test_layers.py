"""One layer's operators, an item per case and provider.

One projection forward, forward and backward, and that under LoRA dropout; projections of one input, such as q, k and v;
all modules folded into the weight, in place, into a buffer and many at once. Each against the bare base operation, PEFT
and, where it applies, torch.compile'd PEFT.
"""

import functools
from collections.abc import Callable

import pytest
import torch

from bench.cases import Op, cases
from bench.conftest import HandOver, bench_device, recorded_time
from bench.harness.timing import Plan
from bench.measure import Measurement, measure
from bench.providers.registry import provider_names

pytestmark = pytest.mark.benchmark(timer=recorded_time, disable_gc=True)

Measure = Callable[[Op, str], Measurement]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give one item per case and provider, a case's items one after another."""
    items = [
        pytest.param(case.op, case.name, provider, id=f"{case.op}-{case.name}-{provider}")
        for case in cases(bench_device().type)
        for provider in provider_names(case.op)
    ]
    metafunc.parametrize(("op", "case_name", "provider"), items)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config, device: torch.device) -> Measure:
    """Measure a case with all its providers, once; for the first of its items; the others reuse the result."""
    plan = Plan(
        seconds_per_provider=float(pytestconfig.getoption("benchmark_max_time")),
        min_rounds=max(Plan.min_rounds, pytestconfig.getoption("benchmark_min_rounds")),
    )
    by_key = {(case.op, case.name): case for case in cases(device.type)}
    return functools.cache(lambda op, name: measure(by_key[op, name], device, plan))


def test_layer(hand_over: HandOver, measured: Measure, op: Op, case_name: str, provider: str) -> None:
    found = measured(op, case_name)
    record = found.missing(provider) if provider in found.not_available else found.entry(provider)
    hand_over(f"{op} {case_name}", record, found.seconds.get(provider, ()))
