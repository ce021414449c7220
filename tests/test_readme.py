"""README and docs are true: their Python runs, their tables are the committed results, and what they name exists."""

from __future__ import annotations

import functools
import json
import pkgutil
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

import plora_kernels as pk
from bench.harness.records import RecordFile, blank
from bench.report.clients_tables import clients_markdown
from bench.report.command import main as report
from bench.report.device_tables import committed_section
from bench.report.markdown import markers
from bench.report.model_tables import NOT_MEASURED as NO_MODELS
from bench.report.model_tables import load_models, model_markdown
from bench.report.node_tables import NODES, nodes_markdown
from bench.report.runs import load_run
from bench.report.scale_tables import projected_markdown, scale_markdown
from bench.report.simulation_tables import simulation_markdown
from bench.report.suite_tables import markdown as bench_markdown
from bench.report.summary_tables import NOT_MEASURED, committed_summary
from bench.report.tune_tables import tune_markdown
from fed import methods
from fed.config import load
from fed.config.loader import _fields as configuration_keys
from fed.experiments import plan as plans
from fed.experiments.attack_grid import grid
from fed.report.tables import markdown_table, summary
from fed.simulation.attacks import attackers
from fed.simulation.run_directory import read
from tests.bench.saved import saved_run, write_run
from tests.support import fault_table
from tests.support.models import tiny_bert, tiny_llama

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
README, DOCS = ROOT / "README.md", ROOT / "docs"
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# The pages written by hand, but for the tables between markers.
PAGES = [
    *(README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", RESULTS / "README.md"),
    *sorted(DOCS.glob("*.md")),
    *sorted((DOCS / "api").glob("*.md")),
    *sorted(DOCS.rglob("README.md")),
]
PAGES = list(dict.fromkeys(PAGES))
TOP = ("plora_kernels", "fed", "bench", "tests", "docs", "examples")
# Files that pages name and commands write; they are not committed.
MADE = {"bench/results/latest.json", "bench/results/tune", "plora_kernels/tuning/tables"}
TABLES = r"model|data|clients|adapter|train|server|privacy|attack|hetlora|measure|compare"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def between(page: Path, mark: str) -> str:
    """Return a page's text between two markers, without the picture above a table."""
    match = re.search(rf"<!-- {mark}:begin -->\n(.*?)<!-- {mark}:end -->", text_of(page), re.DOTALL)
    assert match is not None, f"{named(page)} has no {mark} markers"
    return re.sub(r"^!\[.*\n\n", "", match[1].strip())


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's fenced blocks of a language."""
    return [
        code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```", text_of(page), re.DOTALL | re.M) if kind == language
    ]


def words(page: Path) -> Iterator[str]:
    """Yield the words of everything that a page shows as code, but for its Python, which is run."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.M))
    for span in [*spans, *blocks(page, "")]:
        for word in span.split():
            yield word.strip(",;:()[]\"'")


def slugs(page: Path) -> set[str]:
    """Return the anchors that the site makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# ------------------------------------------------------------------------------------------------------------- tables


def test_the_demo_table_is_the_committed_run() -> None:
    assert between(DOCS / "federated.md", "demo") == markdown_table(summary(read(DOCS / "results" / "demo")))


def test_the_benchmark_tables_are_the_committed_results() -> None:
    page = DOCS / "benchmarks.md"
    assert between(page, "bench") == bench_markdown(load_run(RESULTS / "cpu.json")).strip()
    assert between(page, "simulation") == simulation_markdown(load_run(RESULTS / "simulation-cpu.json")).strip()
    assert between(page, "mixed-cpu") == bench_markdown(load_run(RESULTS / "mixed-cpu.json")).strip()
    assert between(page, "text-cpu") == simulation_markdown(load_run(RESULTS / "text-cpu.json")).strip()
    models = RESULTS / "models-cpu.json"
    assert between(page, "models") == (model_markdown(load_models(models)).strip() if models.is_file() else NO_MODELS)
    assert between(page, "gpu") == committed_section(RESULTS).strip()
    for log in (RESULTS / "tune").glob("*.json"):
        assert between(DOCS / "kernels.md", f"tune-{log.stem}") == tune_markdown(log).strip()


def test_the_table_of_clients_is_the_committed_result() -> None:
    assert text_of(RESULTS / "clients-cpu.md") == clients_markdown(RESULTS / "clients-cpu.json")


def test_the_tables_of_costs_are_the_committed_result() -> None:
    page, results = DOCS / "scale.md", DOCS / "results" / "scale.json"
    assert between(page, "scale") == scale_markdown(results).strip()
    assert between(page, "scale-projected") == projected_markdown(results).strip()
    assert between(page, NODES) == nodes_markdown(DOCS / "results" / "flower" / "nodes.json").strip()


def test_the_summary_is_made_of_the_committed_results() -> None:
    assert between(README, "summary") == committed_summary(RESULTS)


def test_the_summary_s_means_are_those_of_the_files_by_hand() -> None:
    def cell(ratios: list[float]) -> str:
        mean = torch.tensor(ratios, dtype=torch.float64).log().mean().exp().item()
        return f"**{mean:.2f}** ({min(ratios):.2f} to {max(ratios):.2f}), {len(ratios)}"

    def saved(name: str) -> list[dict[str, Any]]:
        return [item["extra_info"] for item in json.loads(text_of(RESULTS / name))["benchmarks"]]

    rows = dict(re.findall(r"^\| (.*?) \| (.*?) \|", between(README, "summary"), re.M))
    layers = saved("cpu.json")
    for op, title in (("forward", "a layer's forward"), ("fold", "folding modules into a weight, in place")):
        of_op = [facts for facts in layers if (facts["op"], facts["provider"], facts["r"]) == (op, "fused", 16)]
        assert rows[title] == f"{cell([facts['ratio_to_peft'] for facts in of_op])} shapes"
    mixed = [facts for facts in saved("mixed-cpu.json") if (facts["op"], facts["provider"]) == ("mixed", "fused-mixed")]
    title = "forward + backward, bf16 with fp32 factors"
    assert rows[title] == f"{cell([facts['ratio_to_peft'] for facts in mixed])} shapes"
    texts = [facts["ratio_to_peft_loop"] for facts in saved("text-cpu.json") if facts["provider"] == "cohort"]
    assert rows["the same of language models"] == f"{cell(texts)} batches"
    shown: dict[tuple, dict[int, float]] = {}
    for facts in saved("simulation-cpu.json"):
        if facts["provider"] == "cohort":
            key = facts["model"], facts["batch"], facts["length"]
            shown.setdefault(key, {})[facts["cohort"]] = facts["ratio_to_peft_loop"]
    ratios = [sizes.get(10, sizes[max(sizes)]) for sizes in shown.values()]
    assert rows["a training step of many clients"] == f"{cell(ratios)} batches"


def test_the_summary_gets_a_column_a_device_and_says_what_is_not_measured(tmp_path: Path) -> None:
    assert "| CPU | GPU |" in committed_summary(tmp_path)
    write_run(tmp_path / "cpu.json", saved_run())
    meta = {"device_name": "Example GPU", "versions": {}, "commit": "0123456789abcdef+", "date": "2026-01-02T03:04:05"}
    shape = {"op": "projections", "model": "tiny", "m": 32, "k": 64, "n": 80, "r": 16, "dtype": "bfloat16"}
    records = [
        blank(**shape, provider=provider, status="timed", time_ms=ratio, ratio_to_base=ratio)
        for provider, ratio in (("base", 1.0), ("peft", 2.0), ("fused", 1.5))
    ]
    for name in ("example.json", "example-defaults.json"):
        RecordFile(tmp_path / name, meta).add(records)
    said = committed_summary(tmp_path)
    assert "| time ÷ PEFT's | CPU, float32 | Example GPU, bfloat16 |" in said
    assert (
        f"| projections of one input, forward + backward | {NOT_MEASURED} | **0.75** (0.75 to 0.75), 1 shape |" in said
    )
    assert "Example GPU, bfloat16: commit 0123456789ab with uncommitted changes, 2026-01-02." in " ".join(said.split())


def test_one_command_writes_a_result_s_section_and_the_summary_where_their_markers_stand(tmp_path: Path) -> None:
    results = write_run(tmp_path / "cpu.json", saved_run())
    page, readme = tmp_path / "docs" / "page.md", tmp_path / "README.md"
    page.parent.mkdir()
    page.write_text("<!-- bench:begin -->\nold\n<!-- bench:end -->\n", encoding="utf-8")
    begin, end = markers("summary")
    readme.write_text(f"{begin}\nold\n{end}\n", encoding="utf-8")
    png = tmp_path / "docs" / "bench.png"
    assert report([str(results), "--png", str(png), "--document", str(page), "--readme", str(readme)]) == 0
    assert bench_markdown(load_run(results)).strip() in text_of(page)
    assert "](bench.png)" in text_of(page)
    assert text_of(readme) == f"{begin}\n\n{committed_summary(tmp_path)}\n\n{end}\n"


def test_a_section_named_as_the_file_comes_before_that_of_its_kind(tmp_path: Path) -> None:
    results = write_run(tmp_path / "mixed-cpu.json", saved_run())
    page = tmp_path / "page.md"
    other = "<!-- bench:begin -->\nold\n<!-- bench:end -->\n"
    page.write_text(f"{other}<!-- mixed-cpu:begin -->\n<!-- mixed-cpu:end -->\n", encoding="utf-8")
    assert report([str(results), "--document", str(page)]) == 0
    assert text_of(page).startswith(other)
    assert between(page, "mixed-cpu") == bench_markdown(load_run(results)).strip()


def test_the_page_of_results_quotes_the_committed_comparisons() -> None:
    folder = DOCS / "results"
    said = "\n".join(text_of(path) for path in folder.glob("*/comparison.md")).splitlines()
    quoted = [line for line in text_of(folder / "README.md").splitlines() if line.startswith("- ")]
    assert quoted
    assert [line for line in quoted if line not in said] == []


def test_the_language_model_s_figures_are_those_of_its_run() -> None:
    folder = DOCS / "results" / "smollm2"
    rows = [json.loads(line) for line in text_of(folder / "rounds.jsonl").splitlines()]
    settings = load(str(folder / "smollm2.toml"), ["model.path=x", "data.path=x"])
    assert len(rows) == settings.rounds + 1
    table = dict(re.findall(r"^\| (\d+) \| (.*) \|$", text_of(folder / "README.md"), re.M))
    for number, said in table.items():
        row = rows[int(number)]
        exact = "–" if row["accuracy"] is None else f"{100 * row['accuracy']:.0f} %"
        assert said == f"{exact} | {row['loss']:.2f}"
    first, last = rows[0], rows[-1]
    assert {str(first["round"]), str(last["round"])} <= table.keys()
    said = " ".join(text_of(README).split())
    assert (
        f"{100 * last['accuracy']:.0f} of {settings.data.generated_rows} test rows are answered exactly, before it "
        f"{100 * first['accuracy']:.0f}; the loss of the answers' tokens falls from {first['loss']:.2f} to "
        f"{last['loss']:.2f}"
    ) in said


@pytest.mark.parametrize("name", ["comparison-digits", "comparison-instructions", "selection-digits"])
def test_a_committed_comparison_is_of_settings_there_are_and_its_words_of_its_figures(name: str) -> None:
    folder = DOCS / "results" / name
    plan = plans.plan(plans.read(folder))
    found = json.loads(text_of(folder / "comparison.json"))
    assert [variant["name"] for variant in found["variants"]] == [variant.name for variant in plan.variants]
    assert found["missing_runs"] == 0
    said = text_of(folder / "comparison.md")
    for variant in found["variants"]:
        figure = variant["figures"]["accuracy"]
        assert f"| {variant['label']} | {figure['mean']:.1f} ± {figure['std']:.1f} |" in said


# ------------------------------------------------------------------------------------------------------------- Python


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Change to a folder with two small models; return the one name that pages use without defining it, `batch`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    # The same graph without the seconds of a C++ compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    tiny_bert().save_pretrained("path/to/bert")
    tiny_llama().save_pretrained("path/to/llama")
    return {"batch": {"input_ids": torch.arange(12)[None], "labels": torch.tensor([1])}}


def run_python(page: Path, names: dict) -> None:
    """Run a page's Python, one block after the other."""
    code = blocks(page, "python")
    assert code
    for number, block in enumerate(code, 1):
        exec(compile(block, f"{named(page)}, block {number}", "exec"), names)


def test_the_readme_s_example_runs(ready: dict) -> None:
    run_python(README, ready)
    assert not any(isinstance(module, pk.FusedPLoRALinear) for module in ready["model"].modules())
    handle = pk.load_peft(ready["model"], "adapter/")
    moved = next(iter(handle.layers.values())).lora_B.abs().sum(0) > 0
    assert moved.nonzero().flatten().tolist() == [0, 3, 7, 12]


def test_the_drop_in_guide_runs(ready: dict) -> None:
    run_python(DOCS / "drop-in.md", ready)


def test_the_federated_guide_runs_and_a_run_leaves_what_it_says(ready: dict) -> None:
    page = DOCS / "federated.md"
    run_python(page, ready)
    section = text_of(page).split("## What a run leaves")[1].split("\n## ")[0]
    files = [name for line in re.findall(r"^\| (`.*?) \|", section, re.M) for name in re.findall(r"`(.*?)`", line)]
    elsewhere = {"base_delta.safetensors", "centralised.json"}  # other methods, comparisons
    assert elsewhere < set(files)
    left = {f"{path.name}/" if path.is_dir() else path.name for path in Path("runs/small").iterdir()}
    assert left == set(files) - elsewhere


def test_five_minutes_run_and_the_report_begins_as_shown(ready: dict, capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "quickstart.md"
    run_python(page, ready)
    (shown,) = blocks(page, "text")
    assert shown.removesuffix("…\n") in capsys.readouterr().out
    assert ready["last"]["round"] == 2


def test_the_page_on_extending_runs_a_method_of_its_own(ready: dict) -> None:
    run_python(DOCS / "extending.md", ready)
    assert [row["round"] for row in read(Path("runs/last")).rows] == [0, 1, 2]


def test_every_page_s_python_is_run() -> None:
    having = {named(page) for page in DOCS.parent.rglob("*.md") if blocks(page, "python") and is_ours(page)}
    run = ("README", "docs/drop-in", "docs/extending", "docs/federated", "docs/quickstart")
    assert having == {f"{page}.md" for page in run}


def is_ours(page: Path) -> bool:
    """Say whether a page is of the repository, not of an environment or an output beside it."""
    return page.relative_to(ROOT).parts[0] in (*TOP, page.name)


def test_what_the_differences_on_pages_show_is_in_the_examples() -> None:
    """A line of an example ends where its code does; "line one" and the like are comments in it."""
    code = [re.sub(r"  # .*", "", line).strip() for path in EXAMPLES for line in text_of(path).splitlines()]
    pages = [page for page in PAGES if blocks(page, "diff")]
    assert [named(page) for page in pages] == ["README.md", "docs/drop-in.md"]
    for page in pages:
        for shown in blocks(page, "diff"):
            assert re.search(r"^\+.*fuse_peft", shown, re.M)
            assert [line for line in shown.splitlines() if line[1:].strip() not in [*code, ""]] == []


def test_the_reference_has_every_public_name_once_and_no_other() -> None:
    pages = "\n".join(text_of(page) for page in DOCS.glob("api/*.md"))
    shown = re.findall(r"^::: ([\w.]+)$", pages, re.M)
    for name in shown:
        assert pkgutil.resolve_name(name).__doc__, name
    # Without its heading, `plora_kernels.backend` would be the module of that name.
    names = [*shown, *re.findall(r"heading: ([\w.]+)", pages)]
    assert len(names) == len(set(names))
    public = {name.removeprefix("plora_kernels.") for name in names if re.fullmatch(r"plora_kernels\.\w+", name)}
    assert public == set(pk.__all__)


# -------------------------------------------------------------------------------------------------- what is mentioned


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_path_it_names_is_there(page: Path) -> None:
    paths = {word.rstrip("/") for word in words(page) if re.fullmatch(r"[\w.-]+(/[\w.-]+)+/?", word)}
    ours = {path for path in paths if path.endswith(".py") or path.split("/")[0] in TOP}
    assert sorted(path for path in ours - MADE if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_module_and_name_it_mentions_is_there(page: Path) -> None:
    missing = []
    for word in words(page):
        name = re.sub(r"^pk\.", "plora_kernels.", word.split("(")[0])
        if re.fullmatch(r"(plora_kernels|fed|bench|tests)(\.\w+)+", name):
            try:
                pkgutil.resolve_name(name)
            except (ImportError, AttributeError):
                missing.append(name)
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_key_of_the_configuration_and_every_target_of_make_it_mentions_is_there(page: Path) -> None:
    keys = {word.split("=")[0] for word in words(page) if re.fullmatch(rf"({TABLES})\.[a-z_]+(=.*)?", word)}
    assert sorted(keys - set(configuration_keys())) == []
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.M))
    code = re.findall(r"`(make [^`]+)`", text_of(page)) + re.findall(r"^make .*$", "\n".join(blocks(page, "")), re.M)
    assert {command.split()[1] for command in code} <= targets


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_picture_page_and_heading_it_links_to_is_there(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in slugs(file)):
            missing.append(target)
    assert missing == []


def test_the_tour_s_names_are_defined_in_the_files_it_opens() -> None:
    steps = re.findall(r"`([\w/]+\.py)`[,:]\s`(\w+)`", text_of(DOCS / "tour.md"))
    assert len(steps) > 8
    defined = r"^\s*(?:def|class) {}\b"
    assert [step for step in steps if not re.search(defined.format(step[1]), text_of(ROOT / step[0]), re.M)] == []


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([^)]+)\)", text_of(DOCS / "README.md")))
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md"}
    assert pages | {"results/README.md", "api/README.md"} <= linked
    assert {f"../examples/{path.name}" for path in EXAMPLES} <= linked
    listed = set(re.findall(r"\]\(([^)]+)\)", text_of(DOCS / "api" / "README.md")))
    assert {page.name for page in DOCS.glob("api/*.md")} - {"README.md"} <= listed


def test_the_readme_is_read_in_minutes() -> None:
    assert len(text_of(README).splitlines()) <= 120


def test_the_guide_shows_the_faults_that_were_tried_and_none_came_out_wrong() -> None:
    counts = json.loads(fault_table.COUNTS.read_text(encoding="utf-8"))
    assert between(fault_table.GUIDE, "faults") == fault_table.table(counts)
    assert not any("WRONG" in outcomes for outcomes in counts.values())


@pytest.mark.parametrize("name", ["mixed-ranks", "equal-ranks"])
def test_the_tables_of_attacks_are_the_committed_runs(name: str) -> None:
    """The page shows the tables of attacks.md, whose command and figures are those of attacks.json."""
    folder = DOCS / "results" / "attacks" / name
    found, said = json.loads(text_of(folder / "attacks.json")), text_of(folder / "attacks.md")
    shown = between(DOCS / "robustness.md", f"attacks-{name}")
    assert shown == "\n\n".join(part for part in said.split("\n\n") if part.startswith("| "))
    assert f"fed attacks {found['source']} --seeds {','.join(map(str, found['seeds']))} --set" in said
    plan = grid(found["source"], found["settings"], found["seeds"])
    assert [own._asdict() | {"settings": list(own.settings)} for own in plan.defences] == found["defences"]
    assert {cell.variant.name for cell in plan.cells} == {
        f"{one['attack']}.{one['defence']}" for one in found["outcomes"]
    }
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in shown.splitlines()}
    for one in found["outcomes"]:
        mean = 100 * sum(one["accuracy"].values()) / len(one["accuracy"])
        title = {"none": "no attack", "nan": "NaN", "shape": "wrong shape"}.get(one["attack"], one["attack"])
        assert f"| {mean:.1f} " in lines[title]


def test_the_page_on_flower_says_what_was_killed_and_how_the_long_run_went() -> None:
    folder = DOCS / "results" / "flower"
    page = " ".join(text_of(DOCS / "flower.md").split())
    runs = json.loads(text_of(folder / "kills.json"))
    killed: Counter[str] = sum((Counter(run["killed"]) for run in runs), Counter())
    assert all(run["same_as_never_killed"] for run in runs)
    assert f"{killed.total()} processes of {['no', 'one', 'two'][len(runs)]} runs" in page
    assert f"{killed['SuperLink']} SuperLinks, {killed['SuperNode']} SuperNodes, {killed['trainer']} trainers" in page
    assert f"and {killed['ClientApp']} of Flower's for a message" in page
    samples = json.loads(text_of(folder / "soak.json"))["samples"]
    assert samples[-1]["round"] == 1000
    later = [one for one in samples if 100 <= one["round"] < 1000]
    for role in ("SuperLink", "ServerApp", "SuperNode", "trainer"):
        memory, files = ([one[role][name] for one in later] for name in ("rss_mb", "files"))
        assert max(memory) - memory[0] < 5
        assert abs(median(files[-20:]) - median(files[:20])) <= 1
    assert "from round 100 on no process grew by more than 5 MB" in page


def test_the_page_on_robustness_says_how_large_the_attackers_ranks_are() -> None:
    page = " ".join(text_of(DOCS / "robustness.md").split())
    found = json.loads(text_of(DOCS / "results" / "attacks" / "mixed-ranks" / "attacks.json"))
    (under,) = [one["accuracy"] for one in found["outcomes"] if (one["attack"], one["defence"]) == ("scale", "median")]
    shares = []
    for seed in (1, 0):
        config = load("digits", [f"seed={seed}", "attack.kind=scale", f"attack.share={found['share']}"])
        ranks = [config.clients.ranks[client % len(config.clients.ranks)] for client in range(config.clients.count)]
        shares.append(sum(ranks[client] for client in attackers(config)) / sum(ranks))
    assert f"{100 * shares[0]:.0f} % of the sum of all, and the median is at {100 * under['1']:.1f} %" in page
    assert f"with seed 0 it is {100 * shares[1]:.0f} %" in page
    assert f"and the median is at {100 * under['0']:.1f} %" in page
