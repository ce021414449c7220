"""`pytest --benchmark` run as a user would, and what it saves; `pytest --triton`, which refuses other versions."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench.cases import cases
from bench.models.cases import model_cases
from bench.models.providers import PROVIDERS
from bench.providers.registry import provider_names
from bench.report.runs import load_run
from bench.report.suite_tables import markdown
from bench.simulation.cases import simulation_cases
from bench.simulation.providers import providers_of
from tests.conftest import pytest_sessionstart

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of one small fold and one forward, measured by `--benchmark` where no C++ compiler is found."""
    directory = tmp_path_factory.mktemp("bench")
    path = directory / "saved.json"
    options = [
        "-k",
        "bert-base-query and (forward or fold) and not backward and not out and not mixed",
        "--benchmark-max-time=0.01",
        f"--benchmark-json={path}",
    ]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", *options]
    # With pytest-xdist's environment variables pytest-benchmark would not time anything.
    environment = {
        name: value for name, value in os.environ.items() if name != "CXX" and not name.startswith("PYTEST_XDIST")
    }
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PATH": str(directory)}
    # With an empty cache torch.compile needs the compiler.
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(directory / "compiled")
    finished = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    every = sum(len(provider_names(case.op)) for case in cases("cpu"))
    every += sum(len(providers_of(case)) for case in simulation_cases("cpu"))
    every += len(model_cases("cpu")) * len(PROVIDERS)
    assert f"collected {every} items / {every - 7} deselected / 7 selected" in finished.stdout
    assert "6 passed, 1 skipped" in finished.stdout
    assert "warning" not in finished.stdout.lower()
    return path


@pytest.fixture(scope="module")
def content(saved: Path) -> dict[str, Any]:
    return json.loads(saved.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("source", "flag", "paths"),
    [
        (pytest.Config.ArgsSource.TESTPATHS, True, [str(ROOT / "bench")]),
        (pytest.Config.ArgsSource.ARGS, True, ["tests"]),  # paths that are given stay
        (pytest.Config.ArgsSource.TESTPATHS, False, ["tests"]),
    ],
)
def test_the_flag_is_the_long_form(
    source: pytest.Config.ArgsSource, flag: bool, paths: list[str], pytestconfig: pytest.Config
) -> None:
    """The command line gives the path `tests`."""
    config = SimpleNamespace(
        option=SimpleNamespace(benchmark_only=False),
        getoption=lambda name: flag and name == "benchmark",
        args_source=source,
        args=["tests"],
        rootpath=ROOT,
    )
    pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).pytest_configure(config)
    assert (config.option.benchmark_only, config.args) == (flag, paths)


def test_another_triton_than_the_one_asked_for_is_refused() -> None:
    session: Any = SimpleNamespace(config=SimpleNamespace(getoption={"triton": "3.6.0.dev1"}.get))
    with pytest.raises(pytest.UsageError, match=r"--triton 3\.6\.0\.dev1: found \d"):
        pytest_sessionstart(session)


@pytest.mark.slow
@pytest.mark.parametrize("op", ["forward", "fold"])
def test_items_carry_the_measured_figures(content: dict[str, Any], op: str) -> None:
    items = {item["extra_info"]["provider"]: item for item in content["benchmarks"] if item["extra_info"]["op"] == op}
    assert set(items) == {"base", "peft", "fused"}
    for item in items.values():
        facts, stats = item["extra_info"], item["stats"]
        assert facts["time_ms"] == pytest.approx(stats["median"] * 1e3)
        assert facts["rounds"] == stats["rounds"] == len(stats["data"]) >= 8
        assert facts["ratio_to_base"] == pytest.approx(facts["time_ms"] / items["base"]["extra_info"]["time_ms"])
        assert facts["ratio_to_peft"] == pytest.approx(facts["time_ms"] / items["peft"]["extra_info"]["time_ms"])
        assert (facts["k"], facts["n"], facts["r"]) == (768, 768, 16)
    assert len({item["stats"]["rounds"] for item in items.values()}) == 1, "providers were not timed together"


@pytest.mark.slow
def test_the_run_is_described_without_naming_the_host(content: dict[str, Any]) -> None:
    machine = content["machine_info"]
    assert "node" not in machine
    assert machine["device"] == "cpu"
    assert machine["device_name"]
    assert machine["threads"] >= 1
    assert machine["versions"]["torch"]
    assert machine["versions"]["peft"]
    assert machine["versions"]["python"]
    assert content["commit_info"]["project"] == "plora-kernels"
    assert "dirty" in content["commit_info"]


@pytest.mark.slow
def test_a_provider_that_cannot_run_is_listed_with_its_cause(content: dict[str, Any], saved: Path) -> None:
    (missing,) = content["not_available"]
    assert (missing["provider"], missing["op"]) == ("peft-compiled", "forward")
    assert "compiler" in missing["cause"].lower()
    assert f"| not available: {missing['cause']}" in markdown(load_run(saved))
