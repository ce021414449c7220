"""The tables of training steps, from files of the suites or of `python -m bench.gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.records import Record, ResultsError
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.runs import Providers, Run, facts_of, load_any
from bench.simulation.cases import MODELS, PROMPT_SHARE, RANK, SHORTEST_SHARE

# The cohort size whose figures the table shows; if it was not measured, the largest that was.
COHORT = 10
OURS = "cohort"
LANGUAGE_MODELS = [name for name, shape in MODELS.items() if shape.family == "llama-lm"]
MIB = 2**20
NOTES = {
    "base": "*base* is the bare model on the cohort's whole batch, forward and backward to its first layer's input",
    "peft-loop": "*peft-loop* one PEFT model whose adapter and optimiser state are swapped from client to client",
    "vmap": "*vmap* `torch.func.vmap` over stacked adapters of that model",
    "sequential": "*sequential* the loop with this library's layers",
    "cohort": "*cohort* the simulator's cohort executor",
    "cohort-compiled": "*cohort-compiled* the same with `cohort_compile`, compiled before it is timed",
}

LANGUAGE_MODEL_NOTE = (
    f"Language models: {PROMPT_SHARE:.0%} of every row is a prompt, which does not count in the loss, and nothing but "
    "the adapter is trained. In half precision its factors are in fp32. Rows of unequal length, ≤, have between "
    f"{SHORTEST_SHARE:.0%} of the tokens and all; *base* and PEFT pad them to the longest of a batch. Tokens of all "
    "clients a second without padding, higher is faster; speed ÷ *base*'s and ÷ *peft-loop*'s; what one step allocates "
    "at most, in MiB."
)


@dataclass(frozen=True)
class Setting:
    """The model and each client's batch, which all cohort sizes of a curve share."""

    model: str
    batch: int
    length: int
    dtype: str
    unequal: bool = False

    @property
    def is_language_model(self) -> bool:
        return self.model in LANGUAGE_MODELS

    @property
    def label(self) -> str:
        dtype = f", {self.dtype}" if self.is_language_model else ""
        return f"{self.model}, {self.batch}×{'≤' if self.unequal else ''}{self.length}{dtype}"


def load_simulation(path: Path) -> Run:
    """Read a file that holds training steps; raises ResultsError if it holds none."""
    run = load_any(path)
    if not run.steps:
        command = f"pytest bench --benchmark-only -k simulation --benchmark-json={path}"
        raise ResultsError(f"{path} holds no training steps; `{command}` measures them")
    return run


def by_setting(run: Run) -> dict[Setting, dict[int, dict[str, Record]]]:
    """Return the training steps by setting, cohort size and provider, in the order measured, sizes ascending."""
    found: dict[Setting, dict[int, dict[str, Record]]] = {}
    for record in run.steps:
        model, batch, length, dtype = (record[name] for name in ("model", "batch", "length", "dtype"))
        setting = Setting(model, batch, length, dtype, record.get("unequal", False))
        found.setdefault(setting, {}).setdefault(record["cohort"], {})[record["provider"]] = record
    return {setting: dict(sorted(cohorts.items())) for setting, cohorts in found.items()}


def shown(run: Run) -> dict[Setting, dict[str, Record]]:
    """Return every setting's records by provider at the cohort size whose figures are shown."""
    return {setting: cohorts.get(COHORT) or cohorts[max(cohorts)] for setting, cohorts in by_setting(run).items()}


def simulation_markdown(run: Run) -> str:
    """Return a run as Markdown: the conditions and how to read it, then the table."""
    threads = f", {run.threads} CPU threads" if run.threads else ""
    versions, commit = versions_text(run.versions), commit_text(run.commit)
    conditions = f"{run.device_name}{threads}; {versions}; {commit}, {run.date[:10]}."
    return f"{conditions} {reading(run)}\n\n{simulation_table(run)}\n"


def simulation_table(run: Run) -> str:
    """Return the table of classifiers and, if some were measured, that of language models."""
    rows = shown(run)
    classifiers = {setting: records for setting, records in rows.items() if not setting.is_language_model}
    language_models = {setting: records for setting, records in rows.items() if setting.is_language_model}
    parts = []
    if classifiers:
        names = _providers(run)
        header = ["clients·steps/s", "clients", *names]
        if OURS in names:
            header.append(f"{OURS} ÷ peft-loop")
        cells = [_row(setting, records, names) for setting, records in classifiers.items()]
        parts.append(markdown_table(header, cells))
    if language_models:
        header = ["language model", "clients", "provider", "tokens/s", "÷ base", "÷ peft-loop", "peak MiB"]
        cells = [row for setting, records in language_models.items() for row in _provider_rows(setting, records)]
        parts.append(f"{LANGUAGE_MODEL_NOTE}\n\n{markdown_table(header, cells)}")
    return "\n\n".join(parts)


def _provider_rows(setting: Setting, records: Providers) -> list[list[str]]:
    """Return a row for each provider of a language model: tokens a second, speed relative to others, peak memory."""
    rows = []
    for name, record in records.items():
        if record["status"] == "timed":
            ratios = [f"{1 / record[key]:.2f}" for key in ("ratio_to_base", "ratio_to_peft_loop")]
            peak = f"{record['peak_bytes'] / MIB:.0f}" if record.get("peak_bytes") is not None else "–"
            cells = [f"{record['tokens_per_second']:.0f}", *ratios, peak]
        else:
            cells = [str(record["status"]), "–", "–", "–"]
        rows.append([setting.label, str(record["cohort"]), name, *cells])
    return rows


def _providers(run: Run) -> list[str]:
    """Return the providers of training steps, in the order measured."""
    return list(dict.fromkeys(record["provider"] for record in run.steps))


def _row(setting: Setting, records: Providers, names: Sequence[str]) -> list[str]:
    cells = [setting.label, str(facts_of(records)["cohort"]), *(_speed(records.get(name)) for name in names)]
    if OURS in names:
        ratio = records.get(OURS, {}).get("ratio_to_peft_loop")
        cells.append(f"{1 / ratio:.2f}" if ratio else "–")
    return cells


def _speed(record: Record | None) -> str:
    if record is None:
        return "–"
    if record["status"] != "timed":
        return str(record["status"])
    return f"{record['clients_steps_per_second']:.3g} ({1 / record['ratio_to_base']:.2f})"


def reading(run: Run) -> str:
    """Return how the table is to be read."""
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in run.steps))
    notes = "; ".join(NOTES[name] for name in _providers(run) if name in NOTES)
    return (
        f"Clients trained one step in a second, {dtypes}: forward, backward, AdamW; R {RANK} on every linear layer, "
        "the head trained; a client's batch is rows × tokens. Medians of interleaved rounds, in brackets the share of "
        f"*base*'s speed: {notes}. Every client's gradients were held to PEFT's in float64 before anything was timed."
    )
