"""`pytest --benchmark`, run as a user runs it, and what it saves."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.cases import cases
from bench.providers import provider_names
from bench.report import markdown
from bench.results import load_run

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of one small fold, measured through the flag."""
    path = tmp_path_factory.mktemp("bench") / "fold.json"
    options = ["-k", "fold and bert-base-query", "--benchmark-max-time=0.01", f"--benchmark-json={path}"]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--benchmark", *options]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    every = sum(len(provider_names(case.op)) for case in cases("cuda" if torch.cuda.is_available() else "cpu"))
    assert f"collected {every} items / {every - 3} deselected / 3 selected" in finished.stdout
    assert "3 passed" in finished.stdout
    assert "warning" not in finished.stdout.lower()
    return path


@pytest.fixture(scope="module")
def content(saved: Path) -> dict[str, Any]:
    return json.loads(saved.read_text(encoding="utf-8"))


def configured(pytestconfig: pytest.Config, source: pytest.Config.ArgsSource, *, flag: bool) -> SimpleNamespace:
    """Return what the root conftest makes of a command line with `tests` as its path."""
    config = SimpleNamespace(
        option=SimpleNamespace(benchmark_only=False),
        getoption=lambda name: flag and name == "benchmark",
        args_source=source,
        args=["tests"],
        rootpath=ROOT,
    )
    pytestconfig.pluginmanager.get_plugin(str(ROOT / "conftest.py")).pytest_configure(config)
    return config


def test_the_flag_is_the_long_form(pytestconfig: pytest.Config) -> None:
    config = configured(pytestconfig, pytest.Config.ArgsSource.TESTPATHS, flag=True)
    assert config.option.benchmark_only
    assert config.args == [str(ROOT / "bench")]


def test_explicit_paths_stay(pytestconfig: pytest.Config) -> None:
    config = configured(pytestconfig, pytest.Config.ArgsSource.ARGS, flag=True)
    assert config.option.benchmark_only
    assert config.args == ["tests"]


def test_without_the_flag_nothing_changes(pytestconfig: pytest.Config) -> None:
    config = configured(pytestconfig, pytest.Config.ArgsSource.TESTPATHS, flag=False)
    assert not config.option.benchmark_only
    assert config.args == ["tests"]


def test_items_carry_the_measured_figures(content: dict[str, Any]) -> None:
    items = {item["extra_info"]["provider"]: item for item in content["benchmarks"]}
    assert set(items) == {"base", "peft", "fused"}
    for item in items.values():
        facts, stats = item["extra_info"], item["stats"]
        assert facts["time_ms"] == pytest.approx(stats["median"] * 1e3)
        assert facts["rounds"] == stats["rounds"] == len(stats["data"]) >= 8
        assert facts["ratio_to_base"] == pytest.approx(facts["time_ms"] / items["base"]["extra_info"]["time_ms"])
        assert facts["ratio_to_peft"] == pytest.approx(facts["time_ms"] / items["peft"]["extra_info"]["time_ms"])
        assert (facts["op"], facts["k"], facts["n"], facts["r"]) == ("fold", 768, 768, 16)
    assert len({item["stats"]["rounds"] for item in items.values()}) == 1, "providers were not timed together"


def test_the_run_is_described_without_naming_the_host(content: dict[str, Any]) -> None:
    machine = content["machine_info"]
    assert "node" not in machine
    assert machine["device"] in ("cpu", "cuda")
    assert machine["device_name"]
    assert machine["threads"] >= 1
    assert machine["versions"]["torch"]
    assert machine["versions"]["peft"]
    assert machine["versions"]["python"]
    assert content["commit_info"]["project"] == "plora-kernels"
    assert "dirty" in content["commit_info"]
    assert content["not_available"] == []


def test_the_report_reads_what_was_saved(saved: Path) -> None:
    assert "geometric mean, R 16" in markdown(load_run(saved))
