"""Writing the reports of a run or a comparison: pictures, tables, and a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fed.config import settings_of
from fed.experiments.initialisation_noise import Start, table
from fed.files import write_atomically
from fed.report import comparison_figures, run_figures, tables
from fed.report.comparison import Comparison, as_json
from fed.report.html import Section, page
from fed.report.left_out import left_out_table
from fed.report.run_figures import similarity_panels
from fed.report.summary import COST, NOISE, OUTCOME
from fed.report.tables import memory_in_use, population, summary
from fed.simulation.run_directory import Run, read

PAGE, JSON, MARKDOWN = "report.html", "comparison.json", "comparison.md"


def publish_run(directory: Path) -> list[Path]:
    """Write a run's pictures and `report.html`, replacing old ones, and return their paths."""
    run = read(directory)
    settings = "\n".join(f"{key} = {value!r}" for key, value in settings_of(run.config).items())
    sections = [
        Section("Result", tables=[summary(run)]),
        Section("Over the rounds", panels=run_figures.panels(run)),
        *([Section("Updates left out or clipped", tables=[lines])] if (lines := left_out_table(run.rows)) else []),
        *([Section("Cosines between modules", panels=maps)] if (maps := similarity_panels(directory)) else []),
        Section("Settings", code=f"seed = {run.config.seed}\n{settings}"),
    ]
    lead = "Round 0 is the unadapted model; noise is measured on effective weights, in fp64."
    document = page(run_figures.headline(run.config), f"{lead} {memory_in_use(run)}".strip(), sections)
    drawn = [run_figures.draw(directory), run_figures.draw_similarity(directory)]
    return [*(path for path in drawn if path is not None), write_atomically(directory / PAGE, document)]


def publish_comparison(comparison: Comparison, directory: Path) -> list[Path]:
    """Write a comparison's pictures, `comparison.json`, `comparison.md` and `report.html` and return their paths."""
    drawn = comparison_figures.draw(comparison, directory)
    summed_up = json.dumps(as_json(comparison), indent=2, ensure_ascii=False) + "\n"
    return [
        *drawn,
        write_atomically(directory / JSON, summed_up),
        write_atomically(directory / MARKDOWN, tables.as_markdown(comparison, [path.name for path in drawn])),
        write_atomically(directory / PAGE, comparison_page(comparison)),
    ]


def publish_initialisation(run: Run, found: Sequence[Start], directory: Path) -> list[Path]:
    """Write a run's initialisation noise to `initialisation.json` and `initialisation.md`; return their paths."""
    config = run.config
    facts = {
        "task": config.data.title,
        "population": population(config),
        "seed": config.seed,
        "after_round": run.rows[-1]["round"],
        "starts": [asdict(start) for start in found],
    }
    return [
        write_atomically(directory / "initialisation.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n"),
        write_atomically(directory / "initialisation.md", initialisation_markdown(facts)),
    ]


def initialisation_markdown(facts: dict[str, Any]) -> str:
    """Return the contents of `initialisation.json` as Markdown."""
    found = [Start(**values) for values in facts["starts"]]
    return (
        f"# How far clients start from the server: {facts['task']}\n\n"
        f"{facts['population']}; seed {facts['seed']}, after round {facts['after_round']}.\n\n"
        f"{tables.markdown_table(table(found))}\n\n"
        "‖ΔW_i(start) − ΔW_server‖_F over all matrices, mean over all clients, in fp64 on what the layers really\n"
        "hold; *of ΔW*: divided by ‖ΔW_server‖_F. Base and factors are cast to the dtype first, and every line starts\n"
        "from the same ΔW. Fed-PLoRA's clients get all R modules and train r_i; those of FlexLoRA and raFLoRA get the\n"
        "best approximation of rank r_i, those of HETLoRA the first r_i modules, as FedIT's would if they were cut.\n"
    )


def comparison_page(comparison: Comparison) -> str:
    """Return the report of a comparison as one HTML document."""
    sheets = comparison_figures.sheets(comparison)
    shared = "\n".join(f"{key} = {value!r}" for key, value in comparison.plan.common().items())
    sections = [
        Section(
            "Accuracy",
            items=tables.verdicts(comparison),
            tables=[tables.table(comparison, OUTCOME), *tables.paired_tables(comparison)],
            panels=sheets["accuracy"],
        ),
    ]
    if "noise" in sheets:
        sections.append(Section("Noise", tables=[tables.table(comparison, NOISE)], panels=sheets["noise"]))
    sections += [
        Section("Cost", tables=[tables.table(comparison, COST)], panels=sheets["cost"]),
        Section("How to read this", paragraphs=tables.notes(comparison)),
        Section("Command", code=tables.command(comparison)),
        Section("Settings all runs share", code=shared),
    ]
    return page(tables.title(comparison), tables.lead(comparison), sections)
