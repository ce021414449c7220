"""The tables of whole models' training steps, from files of the suites or of `python -m bench.gpu`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.harness.records import Record, ResultsError, case_key
from bench.models.providers import COMPILED, PROVIDERS
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.runs import Providers, Run, facts_of, geometric_mean, load_any, timed
from bench.simulation.cases import RANK

OURS = "fuse-peft"
MIB = 2**20
# The text between the markers while no file of whole models is committed.
NOT_MEASURED = "Not yet measured: `make bench-models` measures it and writes the tables here."
NOTES = {
    "base": "*base* is the bare model, forward and backward to the output of its embeddings, without an adapter",
    "peft": "*peft* PEFT's model",
    "fuse-peft": "*fuse-peft* the same after `fuse_peft`",
    "inject": "*inject* the model with this library's layers",
}


def load_models(path: Path) -> Run:
    """Read a file that holds whole models' steps; raises ResultsError if it holds none."""
    run = load_any(path)
    if not run.models:
        command = f"pytest bench --benchmark-only -k models --benchmark-json={path}"
        raise ResultsError(f"{path} holds no steps of whole models; `{command}` measures them")
    return run


def model_markdown(run: Run) -> str:
    """Return a run as Markdown: the conditions and how to read it, then the tables."""
    threads = f", {run.threads} CPU threads" if run.threads else ""
    versions, commit = versions_text(run.versions), commit_text(run.commit)
    conditions = f"{run.device_name}{threads}; {versions}; {commit}, {run.date[:10]}."
    return f"{conditions} {model_reading(run)}\n\n{model_table(run)}\n"


def by_model(run: Run) -> list[Providers]:
    """Return the records of whole models by case and provider, in the order measured."""
    cases: dict[tuple[object, ...], dict[str, Record]] = {}
    for record in run.models:
        cases.setdefault(case_key(record), {})[record["provider"]] = record
    return list(cases.values())


def model_reading(run: Run) -> str:
    """Return how the tables are to be read."""
    present = {record["provider"] for record in run.models}
    notes = [note for name, note in NOTES.items() if name in present]
    if any(name.endswith(COMPILED) for name in present):
        notes.append("*-compiled* is the whole model through `torch.compile`, compiled before it is timed")
    half = any(record["dtype"] != "float32" for record in run.models)
    precision = ", over half precision in fp32 as PEFT makes it" if half else ""
    shortened = (
        "Models in whose names layers are counted have the public one's widths and vocabulary and fewer layers, so "
        "that a language model's output weighs more in them. "
        if any(record["model"].endswith("-layers") for record in run.models)
        else ""
    )
    return (
        f"One training step of one model: forward, backward, AdamW of the adapter; R {RANK} on every linear of "
        f"attention and MLP{precision}, all else frozen; a batch is rows × tokens. {shortened}"
        f"Medians of interleaved rounds: {'; '.join(notes)}. Losses and gradients were held to float64, with twice the "
        "error of PEFT's, before anything was timed."
    )


def model_table(run: Run) -> str:
    """Return the table of speed and that of memory, and what was not available."""
    cases = by_model(run)
    names = [name for name in PROVIDERS if any(name in providers for providers in cases)]
    speed, memory = (
        markdown_table(
            [title, *names],
            [
                *([_label(facts_of(one)), *(cell(one.get(name)) for name in names)] for one in cases),
                ["geometric mean", *(_mean(cases, name, ratio) for name in names)],
            ],
        )
        for title, cell, ratio in (("tokens/s", _speed, "ratio_to_peft"), ("peak MiB", _peak, "peak_ratio_to_peft"))
    )
    parts = [
        f"Tokens a second, in brackets the step's time ÷ *peft*'s, below 1 is faster:\n\n{speed}",
        f"What one step allocates at most beyond what lives before it, in brackets ÷ *peft*'s:\n\n{memory}",
    ]
    return "\n\n".join([*parts, *_absences(run.models)])


def step_ratios(run: Run) -> list[float]:
    """Return the step's time ÷ PEFT's, both in eager mode, of PEFT's model after `fuse_peft` in every case."""
    found = (timed(providers, OURS) for providers in by_model(run))
    return [record["ratio_to_peft"] for record in found if record]


def _label(record: Record) -> str:
    return f"{record['model']}, {record['batch']}×{record['length']}, {record['dtype']}"


def _speed(record: Record | None) -> str:
    return _cell(record, "tokens_per_second", "ratio_to_peft", 1.0)


def _peak(record: Record | None) -> str:
    return _cell(record, "peak_bytes", "peak_ratio_to_peft", MIB)


def _cell(record: Record | None, figure: str, ratio: str, unit: float) -> str:
    if record is None:
        return "–"
    if record["status"] != "timed":
        return str(record["status"])
    value = record[figure] / unit
    return f"{f'{value:.3g}' if value < 100 else f'{value:.0f}'} ({record[ratio]:.2f})"


def _mean(cases: Sequence[Providers], name: str, ratio: str) -> str:
    """Return the geometric mean of a ratio over the cases in which a provider was timed; if some lack it, how many."""
    ratios = [record[ratio] for providers in cases if (record := timed(providers, name))]
    if not ratios:
        return "–"
    over = f" of {len(ratios)}" if len(ratios) < len(cases) else ""
    return f"({geometric_mean(ratios):.2f}){over}"


def _absences(records: Iterable[Record]) -> list[str]:
    """Return a paragraph on the providers that have no figures and why, or nothing."""
    causes: dict[str, dict[str, None]] = {}
    for record in records:
        if record["status"] != "timed":
            where = f"*{record['provider']}* of {record['model']}"
            causes.setdefault(f"{record['status']}: {record['cause']}", {})[where] = None
    return ["\n".join(f"- {', '.join(where)}: {cause}." for cause, where in causes.items())] if causes else []
