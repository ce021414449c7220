"""Saved steps of whole models turned into tables, a section of a document and a line of the summary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import RecordFile, ResultsError, blank
from bench.report.command import main
from bench.report.device_tables import device_markdown
from bench.report.markdown import markers
from bench.report.model_tables import load_models, model_markdown, model_table, step_ratios
from bench.report.runs import load_run
from bench.report.suite_tables import markdown
from bench.report.summary_tables import MODEL_TITLE, committed_summary
from tests.bench.saved import saved_run, write_run

MIB = 2**20
SECONDS = {"base": 0.5, "peft": 2.0, "fuse-peft": 1.5, "inject": 1.0, "peft-compiled": 4.0}
PEAKS = {"base": 10, "peft": 40, "fuse-peft": 30, "inject": 20, "peft-compiled": 60}
CAUSE = "target module 'h.0' is a Conv1D"


def step(provider: str, model: str = "bert-2-layers", dtype: str = "float32", factor: float = 1.0) -> dict[str, Any]:
    """Return a record of 4×128 tokens; PEFT takes 2 s, the others SECONDS times `factor`."""
    seconds = SECONDS[provider] * (1.0 if provider == "peft" else factor)
    facts = {"op": "model", "model": model, "batch": 4, "length": 128, "dtype": dtype, "provider": provider}
    figures = {
        "seconds": seconds,
        "tokens_per_second": 512 / seconds,
        "ratio_to_base": seconds / SECONDS["base"],
        "ratio_to_peft": seconds / SECONDS["peft"],
        "peak_bytes": PEAKS[provider] * MIB,
        "peak_ratio_to_peft": PEAKS[provider] / PEAKS["peft"],
    }
    return {**facts, "status": "timed", **figures}


def missing(provider: str, model: str, dtype: str = "float32") -> dict[str, Any]:
    found = {key: value for key, value in step("peft", model, dtype).items() if not isinstance(value, float)}
    del found["peak_bytes"]
    return {**found, "provider": provider, "status": "not available", "cause": CAUSE}


STEPS = [step(provider) for provider in SECONDS]
STEPS += [step(provider, "gpt2", "bfloat16", factor=0.64) for provider in ("base", "peft", "fuse-peft")]


def saved_models() -> dict[str, Any]:
    """Return a run of two models, in one of which `inject` was refused."""
    return saved_run() | {
        "benchmarks": [{"extra_info": record} for record in STEPS],
        "not_available": [missing("inject", "gpt2", "bfloat16")],
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_run(tmp_path / "models-cpu.json", saved_models())


def test_the_tables_hold_speed_memory_means_and_causes(results: Path) -> None:
    speed, memory = (part.splitlines() for part in model_table(load_models(results)).split("\n\n")[1:4:2])
    names = "base | peft | fuse-peft | inject | peft-compiled"
    assert speed[0] == f"| tokens/s | {names} |"
    assert speed[2] == (
        "| bert-2-layers, 4×128, float32 | 1024 (0.25) | 256 (1.00) | 341 (0.75) | 512 (0.50) | 128 (2.00) |"
    )
    assert speed[3] == "| gpt2, 4×128, bfloat16 | 1600 (0.16) | 256 (1.00) | 533 (0.48) | not available | – |"
    assert speed[4] == "| geometric mean | (0.20) | (1.00) | (0.60) | (0.50) of 1 | (2.00) of 1 |"
    assert memory[0] == f"| peak MiB | {names} |"
    assert memory[2] == (
        "| bert-2-layers, 4×128, float32 | 10 (0.25) | 40 (1.00) | 30 (0.75) | 20 (0.50) | 60 (1.50) |"
    )
    assert len(speed) == len(memory) == 5
    assert model_table(load_models(results)).splitlines()[-1] == f"- *inject* of gpt2: not available: {CAUSE}."
    assert step_ratios(load_models(results)) == pytest.approx([0.75, 0.48])


def test_the_text_says_what_it_ran_on_and_what_the_providers_are(results: Path) -> None:
    text = model_markdown(load_models(results))
    assert text.startswith("Example CPU, 2 CPU threads; ")
    assert "commit 0123456789ab with uncommitted changes, 2026-01-02" in text
    assert "*fuse-peft* the same after `fuse_peft`" in text
    assert "*-compiled* is the whole model" in text
    assert "fewer layers" in text
    assert "over half precision in fp32" in text


def test_what_was_not_measured_is_not_explained(tmp_path: Path) -> None:
    run = saved_models() | {
        "benchmarks": [{"extra_info": step(name, "gpt2")} for name in ("base", "peft", "fuse-peft")]
    }
    text = model_markdown(load_models(write_run(tmp_path / "some.json", run | {"not_available": []})))
    for word in ("*inject*", "compiled*", "fewer layers", "half precision", "not available", "geometric mean | –"):
        assert word not in text


def test_a_device_s_records_give_the_same_tables(results: Path, tmp_path: Path) -> None:
    meta = {"device_name": "Example", "versions": {"torch": "2.13.0"}, "commit": "abc", "date": "2026-01-02"}
    moved = [{**record, "commit": "fedcba98"} for record in load_models(results).records]
    steps = [blank(**record) for record in moved]
    path = tmp_path / "device.json"
    RecordFile(path, meta).add(steps)
    assert model_table(load_models(path)) == model_table(load_models(results))
    text = device_markdown(meta, steps)
    assert model_table(load_models(results)) in text
    assert "Measured before the rest, at commit fedcba98: whole models." in text


def test_the_command_writes_the_section_and_the_summary(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    (begin, end), (summary_begin, summary_end) = markers("models"), markers("summary")
    page.write_text(f"{begin}\nstale\n{end}\n{summary_begin}\nstale\n{summary_end}\n", encoding="utf-8")
    assert main([str(results), "--document", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert model_markdown(load_run(results)).strip() in text
    assert committed_summary(tmp_path) in text
    assert "stale" not in text
    assert main([str(results)]) == 0
    assert capsys.readouterr().out == model_markdown(load_run(results))


def test_the_summary_has_a_line_only_if_they_were_measured(results: Path, tmp_path: Path) -> None:
    text = committed_summary(tmp_path)
    assert f"| {MODEL_TITLE} | **0.60** (0.48 to 0.75), 2 cases | not yet measured |" in text
    assert "whole models, in float32 and bfloat16: Example CPU, 2 threads; commit" in text.replace("\n", " ")
    results.unlink()
    assert MODEL_TITLE not in committed_summary(tmp_path)
    assert "whole model" not in committed_summary(tmp_path)


def test_a_run_of_layers_and_models_shows_both_and_documents_get_the_layers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = saved_run()
    both["benchmarks"] = [*both["benchmarks"], *saved_models()["benchmarks"]]
    path = write_run(tmp_path / "both.json", both)
    page = tmp_path / "page.md"
    page.write_text("\n".join(markers("bench")), encoding="utf-8")
    assert main([str(path)]) == 0
    shown = capsys.readouterr().out
    run = load_run(path)
    assert shown == f"{markdown(run)}\n{model_markdown(run)}"
    assert main([str(path), "--document", str(page)]) == 0
    assert markdown(run).strip() in page.read_text(encoding="utf-8")
    assert "tokens/s" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("option", ["--keep", "--png"])
def test_there_is_no_picture_and_no_history_of_them(
    option: str, results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option, str(tmp_path / "x.png")] if option == "--png" else [option]
    assert main([str(results), *given]) == 2
    assert "holds whole models, which have tables alone" in capsys.readouterr().err


def test_a_file_without_them_is_refused_by_name(tmp_path: Path) -> None:
    path = write_run(tmp_path / "layers.json", saved_run())
    with pytest.raises(ResultsError, match=r"layers\.json holds no steps of whole models; `pytest bench .* -k models"):
        load_models(path)
    broken = saved_models()
    del broken["benchmarks"][0]["extra_info"]["batch"]
    path.write_text(json.dumps(broken), encoding="utf-8")
    with pytest.raises(ResultsError, match=r"layers\.json has no 'batch'"):
        load_models(path)
