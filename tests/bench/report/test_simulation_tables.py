"""Saved training steps turned into a table, a picture and a section of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import RecordFile, ResultsError, blank
from bench.report.command import main
from bench.report.figures import draw_simulation
from bench.report.history import keep
from bench.report.markdown import markers
from bench.report.runs import load_run
from bench.report.simulation_tables import load_simulation, simulation_markdown, simulation_table
from tests.bench.saved import saved_run, write_run

SECONDS = {"base": 0.5, "peft-loop": 2.0, "vmap": 1.0, "cohort": 0.625}


def step(cohort: int, provider: str, model: str = "tiny", **changes: Any) -> dict[str, Any]:
    """Return a record of a step that takes every client of a cohort a tenth of SECONDS."""
    seconds = SECONDS[provider] * cohort / 10
    facts = {"op": "simulation", "model": model, "cohort": cohort, "batch": 4, "length": 32, "dtype": "float32"}
    figures = {
        "seconds": seconds,
        "clients_steps_per_second": cohort / seconds,
        "ratio_to_base": SECONDS[provider] / SECONDS["base"],
        "ratio_to_peft_loop": SECONDS[provider] / SECONDS["peft-loop"],
    }
    return {**facts, "provider": provider, "status": "timed", **figures, **changes}


STEPS = [step(cohort, provider) for cohort in (10, 1) for provider in SECONDS]
STEPS += [step(4, provider, "wide") for provider in ("base", "peft-loop", "cohort")]


def saved_steps() -> dict[str, Any]:
    """Return a run of two models, one of them measured at one size and without vmap."""
    missing = {key: value for key, value in step(4, "vmap", "wide").items() if not isinstance(value, float)}
    return saved_run() | {
        "benchmarks": [{"extra_info": record} for record in STEPS],
        "not_available": [missing | {"status": "not available", "cause": "RuntimeError: no rule"}],
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_run(tmp_path / "steps.json", saved_steps())


def test_the_table_has_a_line_a_setting_at_ten_clients_or_the_most_there_are(results: Path) -> None:
    lines = simulation_table(load_simulation(results)).splitlines()
    assert lines[0] == "| clients·steps/s | clients | base | peft-loop | vmap | cohort | cohort ÷ peft-loop |"
    assert lines[2] == "| tiny, 4×32 | 10 | 20 (1.00) | 5 (0.25) | 10 (0.50) | 16 (0.80) | 3.20 |"
    assert lines[3] == "| wide, 4×32 | 4 | 20 (1.00) | 5 (0.25) | not available | 16 (0.80) | 3.20 |"
    assert len(lines) == 4


def test_the_text_says_what_it_ran_on_and_what_the_providers_are(results: Path) -> None:
    text = simulation_markdown(load_simulation(results))
    assert text.startswith("Example CPU, 2 CPU threads; ")
    assert "commit 0123456789ab with uncommitted changes, 2026-01-02" in text
    assert "*peft-loop* one PEFT model" in text
    assert "*sequential*" not in text


def test_without_our_executor_the_table_has_no_ratio_of_it(tmp_path: Path) -> None:
    run = saved_steps()
    run["benchmarks"] = [item for item in run["benchmarks"] if item["extra_info"]["provider"] != "cohort"]
    lines = simulation_table(load_simulation(write_run(tmp_path / "steps.json", run))).splitlines()
    assert lines[0] == "| clients·steps/s | clients | base | peft-loop | vmap |"


def test_a_device_s_records_give_the_same_table(results: Path, tmp_path: Path) -> None:
    meta = {"device_name": "Example CPU", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-02"}
    layers = [blank(op="forward", provider="base", status="timed")]
    steps = [blank(**record) for record in load_simulation(results).records]
    path = tmp_path / "device.json"
    RecordFile(path, meta).add([*layers, *steps])
    assert simulation_table(load_simulation(path)) == simulation_table(load_simulation(results))


def test_the_command_writes_table_picture_and_readme(results: Path, tmp_path: Path) -> None:
    readme, png = tmp_path / "README.md", tmp_path / "docs" / "steps.png"
    begin, end = markers("simulation")
    readme.write_text(f"# Title\n\n{begin}\nold\n{end}\n", encoding="utf-8")
    assert main([str(results), "--png", str(png), "--readme", str(readme)]) == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    text = readme.read_text(encoding="utf-8")
    assert simulation_markdown(load_run(results)).strip() in text
    assert "](docs/steps.png)" in text
    assert "old" not in text
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_run_of_everything_is_reported_as_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = saved_run()
    layers = load_run(write_run(tmp_path / "layers.json", saved_run()))
    both["benchmarks"] = [*both["benchmarks"], *saved_steps()["benchmarks"]]
    path = write_run(tmp_path / "both.json", both)
    assert load_run(path).cases() == layers.cases()
    assert main([str(path)]) == 0
    assert "**Forward.**" in capsys.readouterr().out
    assert len(load_simulation(path).steps) == len(STEPS)


def test_the_history_keeps_layers_alone(results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results), "--keep"]) == 2
    assert "the history keeps ratios of layers" in capsys.readouterr().err
    meta = {"device_name": "Example", "versions": {}, "commit": "abc", "date": "2026-01-02T03:04:05"}
    path = tmp_path / "device.json"
    RecordFile(path, meta).add([blank(**record) for record in STEPS])
    assert json.loads(keep(path, tmp_path / "history").read_text(encoding="utf-8"))["ratios"] == []


@pytest.mark.parametrize("lost", ["machine_info", "not_available", "status"])
def test_a_file_of_another_kind_is_refused_by_name(lost: str, tmp_path: Path) -> None:
    run = saved_steps()
    if lost == "status":
        del run["benchmarks"][0]["extra_info"]["status"]
    else:
        del run[lost]
    path = write_run(tmp_path / "broken.json", run)
    with pytest.raises(ResultsError, match=rf"broken\.json.*{lost}"):
        load_simulation(path)


def test_layers_alone_hold_no_training_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "layers.json", saved_run())
    with pytest.raises(ResultsError, match=r"layers\.json holds no training steps"):
        load_simulation(path)
    with pytest.raises(ResultsError, match=r"absent\.json does not exist"):
        load_simulation(tmp_path / "absent.json")


def test_one_size_is_nothing_to_draw(tmp_path: Path) -> None:
    run = saved_steps()
    run["benchmarks"] = [item for item in run["benchmarks"] if item["extra_info"]["model"] == "wide"]
    loaded = load_simulation(write_run(tmp_path / "steps.json", run))
    with pytest.raises(ResultsError, match="two cohort sizes"):
        draw_simulation(loaded, tmp_path / "steps.png")
