"""The README says what is so: its example runs, its tables are the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import plora_kernels as pk
from bench.report.clients_tables import clients_markdown
from bench.report.device_tables import committed_section
from bench.report.simulation_tables import committed_simulation
from bench.report.suite_results import load_run
from bench.report.suite_tables import markdown as bench_markdown
from fed.experiments import plan as plans
from fed.report.tables import markdown as demo_markdown
from fed.simulation.run_directory import read
from tests.support.models import tiny_bert

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def between(mark: str) -> str:
    """Return the README's text between two markers."""
    match = re.search(rf"<!-- {mark}:begin -->\n(.*?)<!-- {mark}:end -->", README, re.DOTALL)
    assert match is not None, f"README.md has no {mark} markers"
    return match[1].strip()


def test_the_demo_table_is_the_committed_run() -> None:
    assert between("demo") == demo_markdown(read(ROOT / "docs" / "results" / "demo")).strip()


def test_the_benchmark_table_is_the_committed_result() -> None:
    table = re.sub(r"^!\[.*\n\n", "", between("bench"))  # the picture stands above it
    assert table == bench_markdown(load_run(ROOT / "bench" / "results" / "cpu.json")).strip()


def test_the_table_of_training_steps_is_the_committed_result() -> None:
    table = re.sub(r"^!\[.*\n\n", "", between("simulation"))  # the picture stands above it
    assert table == committed_simulation(ROOT / "bench" / "results" / "simulation-cpu.json")


def test_the_gpu_table_is_the_committed_result() -> None:
    assert between("gpu") == committed_section(ROOT / "bench" / "results").strip()


def test_the_table_of_clients_is_the_committed_result() -> None:
    results = ROOT / "bench" / "results"
    assert (results / "clients-cpu.md").read_text(encoding="utf-8") == clients_markdown(results / "clients-cpu.json")


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_bert().save_pretrained("path/to/bert")
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)
    assert code is not None
    batch = "input_ids=torch.arange(12)[None], labels=torch.tensor([1])"
    training = f"model({batch}).loss.backward()\noptimizer.step()"
    assert "...  # train as ever" in code[1]
    names: dict = {}
    exec(compile(code[1].replace("...  # train as ever", training), "README.md", "exec"), names)
    assert not any(isinstance(module, pk.FusedPLoRALinear) for module in names["model"].modules())
    handle = pk.load_peft(names["model"], "adapter/")
    moved = next(iter(handle.layers.values())).lora_B.abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == [0, 3, 7, 12]


def test_every_picture_and_page_it_names_is_there() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert targets
    assert missing == []


def test_the_page_of_results_quotes_the_committed_comparisons() -> None:
    folder = ROOT / "docs" / "results"
    said = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*/comparison.md")).splitlines()
    page = (folder / "README.md").read_text(encoding="utf-8")
    quoted = [line for line in page.splitlines() if line.startswith("- ")]
    assert quoted
    assert [line for line in quoted if line not in said] == []
    targets = re.findall(r"\]\(([^)#]+)\)", page)
    assert [target for target in targets if "://" not in target and not (folder / target).exists()] == []


@pytest.mark.parametrize("name", ["comparison-digits", "comparison-instructions", "selection-digits"])
def test_a_committed_comparison_is_of_settings_there_are_and_its_words_of_its_figures(name: str) -> None:
    folder = ROOT / "docs" / "results" / name
    plan = plans.plan(plans.read(folder))
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    assert [variant["name"] for variant in found["variants"]] == [variant.name for variant in plan.variants]
    assert found["missing_runs"] == 0
    words = (folder / "comparison.md").read_text(encoding="utf-8")
    for variant in found["variants"]:
        figure = variant["figures"]["accuracy"]
        assert f"| {variant['label']} | {figure['mean']:.1f} ± {figure['std']:.1f} |" in words
