"""What the suites share: the device, one measurement per case, and what goes into the saved JSON."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.cases import Op, cases
from bench.harness.machine import environment, usable_cores
from bench.harness.pytest_replay import replay
from bench.harness.timing import Plan
from bench.measure import Measurement, measure
from bench.providers.registry import provider_names

NOT_AVAILABLE = pytest.StashKey[list[dict[str, object]]]()


def bench_device() -> torch.device:
    """Return where the suites run: CUDA (or ROCm) if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give `test_<op>` one item per case of that op and provider, a case's items one after another."""
    if "record" not in metafunc.fixturenames:
        return
    op = metafunc.function.__name__.removeprefix("test_")
    items = [
        pytest.param(op, case.name, provider, id=f"{case.name}-{provider}")
        for case in cases(bench_device().type)
        if case.op == op
        for provider in provider_names(case.op)
    ]
    metafunc.parametrize(("op", "case_name", "provider"), items)


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """The device, with as many CPU threads as there are cores this process may use."""
    threads = torch.get_num_threads()
    torch.set_num_threads(usable_cores())
    yield bench_device()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def measured(pytestconfig: pytest.Config, device: torch.device) -> Callable[[Op, str], Measurement]:
    """Measure a case with all its providers, once; the first of its items does, the others get the same."""
    plan = Plan(
        seconds_per_provider=float(pytestconfig.getoption("benchmark_max_time")),
        min_rounds=max(Plan.min_rounds, pytestconfig.getoption("benchmark_min_rounds")),
    )
    by_key = {(case.op, case.name): case for case in cases(device.type)}
    return functools.cache(lambda op, name: measure(by_key[op, name], device, plan))


@pytest.fixture
def record(
    pytestconfig: pytest.Config,
    benchmark: BenchmarkFixture,
    measured: Callable[[Op, str], Measurement],
    op: Op,
    case_name: str,
    provider: str,
) -> Callable[[], None]:
    """Hand the provider's measured rounds to pytest-benchmark, or skip with the reason why there are none."""

    def hand_over() -> None:
        measurement = measured(op, case_name)
        benchmark.group = f"{op} {case_name}"
        if provider in measurement.not_available:
            missing = measurement.missing(provider)
            pytestconfig.stash.setdefault(NOT_AVAILABLE, []).append(missing)
            pytest.skip(f"not available: {missing['cause']}")
        benchmark.extra_info.update(measurement.entry(provider))
        replay(benchmark, measurement.seconds[provider])

    return hand_over


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    """Add device, threads and versions to the saved machine; leave the host's name and kernel build out."""
    for private in ("node", "release"):
        machine_info.pop(private, None)
    machine_info |= environment(bench_device(), threads=usable_cores())


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(commit_info: dict[str, object]) -> None:
    """Name the project, whatever the checkout's directory is called."""
    commit_info["project"] = "plora-kernels"


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, object]) -> None:
    """List the providers that could not run here beside those that did."""
    output_json["not_available"] = config.stash.get(NOT_AVAILABLE, [])
