"""What is written from the files of a run or a comparison: pictures, tables, and a page that stands alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fed import curves, heatmaps, pictures, wording
from fed.comparison import Comparison, as_json
from fed.grid import settings_of
from fed.heatmaps import similarity_panels
from fed.initialisation import Start, table
from fed.metrics import COST, NOISE, OUTCOME
from fed.page import Section, page
from fed.report import Run, memory_in_use, population, read, summary, task_name

PAGE, JSON, MARKDOWN = "report.html", "comparison.json", "comparison.md"


def publish_run(directory: Path) -> list[Path]:
    """Write a run's pictures and `report.html` anew and return their paths."""
    run = read(directory)
    settings = "\n".join(f"{key} = {value!r}" for key, value in settings_of(run.config).items())
    sections = [
        Section("Result", tables=[summary(run)]),
        Section("Over the rounds", panels=pictures.panels(run)),
        *([Section("Cosines between modules", panels=maps)] if (maps := similarity_panels(directory)) else []),
        Section("Settings", code=f"seed = {run.config.seed}\n{settings}"),
    ]
    lead = "Round 0 is the unadapted model; noise is measured on effective weights, in fp64."
    document = page(pictures.headline(run.config), f"{lead} {memory_in_use(run)}".strip(), sections)
    drawn = [pictures.draw(directory), heatmaps.draw(directory)]
    return [*(path for path in drawn if path is not None), _write(document, directory / PAGE)]


def publish_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Write a comparison's pictures, `comparison.json`, `comparison.md` and `report.html` and return their paths."""
    drawn = curves.draw(comparison, directory)
    summed_up = json.dumps(as_json(comparison), indent=2, ensure_ascii=False) + "\n"
    return [
        *drawn,
        _write(summed_up, directory / JSON),
        _write(wording.as_markdown(comparison, [path.name for path in drawn]), directory / MARKDOWN),
        _write(comparison_page(comparison), directory / PAGE),
    ]


def publish_initialisation(run: Run, found: Sequence[Start], directory: Path) -> list[Path]:
    """Write how far clients start from the server as `initialisation.json` and `initialisation.md`."""
    config = run.config
    facts = {
        "task": task_name(config),
        "population": population(config),
        "seed": config.seed,
        "after_round": run.rows[-1]["round"],
        "starts": [asdict(start) for start in found],
    }
    return [
        _write(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", directory / "initialisation.json"),
        _write(initialisation_markdown(facts), directory / "initialisation.md"),
    ]


def initialisation_markdown(facts: dict[str, Any]) -> str:
    """Return what `initialisation.json` holds as Markdown."""
    found = [Start(**values) for values in facts["starts"]]
    return (
        f"# How far clients start from the server: {facts['task']}\n\n"
        f"{facts['population']}; seed {facts['seed']}, after round {facts['after_round']}.\n\n"
        f"{wording.markdown_table(table(found))}\n\n"
        "‖ΔW_i(start) − ΔW_server‖_F over all matrices, mean over all clients, in fp64 on what the layers really\n"
        "hold; *of ΔW*: divided by ‖ΔW_server‖_F. Base and factors are cast to the dtype first, and every line starts\n"
        "from the same ΔW. Fed-PLoRA's clients get all R modules and train r_i; those of FlexLoRA and raFLoRA get the\n"
        "best approximation of rank r_i, those of HETLoRA the first r_i modules, as FedIT's would if they were cut.\n"
    )


def comparison_page(comparison: Comparison) -> str:
    """Return a comparison as one HTML document."""
    sheets = curves.sheets(comparison)
    shared = "\n".join(f"{key} = {value!r}" for key, value in comparison.plan.common().items())
    sections = [
        Section(
            "Accuracy",
            items=wording.verdicts(comparison),
            tables=[wording.table(comparison, OUTCOME), *wording.paired_tables(comparison)],
            panels=sheets["accuracy"],
        ),
        Section("Cost", tables=[wording.table(comparison, COST)], panels=sheets["cost"]),
    ]
    if "noise" in sheets:
        noise = Section("Noise", tables=[wording.table(comparison, NOISE)], panels=sheets["noise"])
        sections.insert(1, noise)
    sections.append(Section("How to read this", paragraphs=wording.notes(comparison)))
    sections.append(Section("Command", code=wording.command(comparison)))
    sections.append(Section("Settings all runs share", code=shared))
    return page(wording.title(comparison), wording.lead(comparison), sections)


def _write(content: str, path: Path) -> Path:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
    return path
