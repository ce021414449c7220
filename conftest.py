"""`--benchmark`, as `pytest bench --benchmark-only`, and what tests run with: `--triton`, `--quantized`, `--faults`."""

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark",
        action="store_true",
        help="run the benchmark suites; the same as `pytest bench --benchmark-only`",
    )
    parser.addoption("--triton", metavar="VERSION", help="refuse to run the tests with any other Triton")
    parser.addoption("--quantized", action="store_true", help="fail without the quantisation libraries; do not skip")
    parser.addoption("--faults", metavar="FILE", help="write what came of the faults that tests/fed/faults tries")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Turn `--benchmark` into its long form before pytest-benchmark reads its options."""
    if not config.getoption("benchmark"):
        return
    config.option.benchmark_only = True
    if config.args_source is not pytest.Config.ArgsSource.ARGS:
        config.args = [str(Path(config.rootpath, "bench"))]
        config.args_source = pytest.Config.ArgsSource.ARGS
