"""The README's table: this library's time divided by PEFT's, in geometric means over the measured cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import NamedTuple

from bench.cases import MIXED_OPS, RANK
from bench.harness.records import holds_records
from bench.report.device_tables import table_of
from bench.report.markdown import commit_text, markdown_table
from bench.report.model_tables import load_models, step_ratios
from bench.report.runs import Run, facts_of, geometric_mean, load_any, load_run, own_provider, ratio_of, timed
from bench.report.simulation_tables import COHORT, OURS, load_simulation, shown

# The suites' files of a CPU in the folder of results, the last three with what others may lack: layers in mixed
# precision, language models, and whole models.
LAYERS, STEPS, MIXED, TEXTS = "cpu.json", "simulation-cpu.json", "mixed-cpu.json", "text-cpu.json"
MODELS = "models-cpu.json"
# Endings of files beside a device's own: measured with default blocks, or set aside by a later sitting.
BESIDE = ("-defaults", "-before")
NOT_MEASURED = "not yet measured"
# The names of what a mean is over, singular and plural.
SHAPES, BATCHES, CASES = ("shape", "shapes"), ("batch", "batches"), ("case", "cases")
TITLES = {
    "forward": "a layer's forward",
    "forward_backward": "a layer's forward + backward",
    "dropout": "the same with LoRA dropout",
    "mixed": "forward + backward, bf16 with fp32 factors",
    "projections": "projections of one input, forward + backward",
    "fold": "folding modules into a weight, in place",
}
STEP_TITLE, TEXT_TITLE = "a training step of many clients", "the same of language models"
MODEL_TITLE = "a training step of one whole PEFT model, after `fuse_peft`"
WIDTH = 120


class Measured(NamedTuple):
    """The results of one kind of machine: time ÷ PEFT's by op, for training steps and for those of whole models."""

    title: str
    conditions: str
    layers: Mapping[str, Sequence[float]]
    steps: Sequence[float] = ()
    texts: Sequence[float] = ()
    models: Sequence[str] = ()
    wholes: Sequence[float] = ()


def committed_summary(results: Path) -> str:
    """Return the table of a folder's result files, a column for the CPU and one for every GPU, and how to read it."""
    devices = [_of_device(path) for path in sorted(results.glob("*.json")) if _is_device(path)]
    columns = [_of_cpu(results), *(devices or [Measured("GPU", "", {})])]
    rows = [[title, *(_cell(one.layers.get(op, ()), SHAPES) for one in columns)] for op, title in TITLES.items()]
    rows.append([STEP_TITLE, *(_cell(one.steps, BATCHES) for one in columns)])
    rows.append([TEXT_TITLE, *(_cell(one.texts, BATCHES) for one in columns)])
    wholes = ""
    if any(one.wholes for one in columns):
        rows.append([MODEL_TITLE, *(_cell(one.wholes, CASES) for one in columns)])
        wholes = " A whole model: eager against eager, over models, batches and dtypes."
    models = ", ".join(dict.fromkeys(model for one in columns for model in one.models))
    projections = f"projections of {models}," if models else "projections"
    reading = (
        "Time divided by PEFT's, below 1 is faster: geometric means, in brackets the least and the greatest. Layers "
        f"and folds: over {projections} at R {RANK}. Training steps: clients in one pass "
        "against one PEFT model whose adapter and optimiser state are swapped from client to client, over models and "
        f"batches, each at {COHORT} clients or, where that was not measured, at the most that were.{wholes}"
    )
    where = " ".join(f"{one.title}: {one.conditions}." for one in columns if one.conditions)
    table = markdown_table(["time ÷ PEFT's", *(one.title for one in columns)], rows)
    return "\n\n".join(part for part in (fill(reading, WIDTH), table, fill(where, WIDTH)) if part)


def _of_cpu(results: Path) -> Measured:
    title, conditions, models = "CPU", list[str](), list[str]()
    layers: dict[str, list[float]] = {}
    steps, texts, wholes = list[float](), list[float](), list[float]()
    machines = list[str]()

    def note(what: str, run: Run) -> None:
        machine = _machine(run)
        where = "" if machines[-1:] == [machine] else f"{machine}; "
        machines.append(machine)
        conditions.append(f"{what}{where}{_when(run)}")

    if (results / LAYERS).is_file():
        run = load_run(results / LAYERS)
        every = [facts_of(providers) for op in run.ops if op not in MIXED_OPS for providers in run.cases(op)]
        title, models = _titled("CPU", [facts["dtype"] for facts in every]), [facts["model"] for facts in every]
        layers = _of_layers(run)
        note("", run)
    if (results / MIXED).is_file():
        run = load_run(results / MIXED)
        layers |= {op: ratios for op, ratios in _of_layers(run).items() if ratios}
        note("mixed precision: ", run)
    if (results / STEPS).is_file():
        run = load_simulation(results / STEPS)
        steps, texts = _of_steps(run)
        note("training steps: ", run)
    if (results / TEXTS).is_file():
        run = load_simulation(results / TEXTS)
        texts = _of_steps(run)[1]
        dtypes = " and ".join(dict.fromkeys(record["dtype"] for record in run.steps))
        note(f"language models, in {dtypes}: ", run)
    if (results / MODELS).is_file():
        run = load_models(results / MODELS)
        wholes = step_ratios(run)
        dtypes = " and ".join(dict.fromkeys(record["dtype"] for record in run.models))
        note(f"whole models, in {dtypes}: ", run)
    return Measured(title, "; ".join(conditions), layers, steps, texts, models, wholes)


def _of_layers(run: Run) -> dict[str, list[float]]:
    """Return the time ÷ PEFT's of this library's provider in every case of the usual rank, by op."""
    found: dict[str, list[float]] = {}
    for op in TITLES:
        cases = [providers for providers in run.cases(op) if facts_of(providers)["r"] == RANK]
        own = own_provider(op)
        found[op] = [ours["ratio_to_peft"] for providers in cases if (ours := timed(providers, own))]
    return found


def _of_device(path: Path) -> Measured:
    run = load_any(path)
    layers: dict[str, list[float]] = {}
    dtypes, models = list[str](), list[str]()
    for providers in run.cases():
        record = facts_of(providers)
        op, ratio = table_of(record), ratio_of(providers, own_provider(record["op"]), "peft")
        if record["r"] == RANK and op in TITLES and ratio is not None:
            layers.setdefault(op, []).append(ratio)
            dtypes.append(record["dtype"])
            models += [record["model"]] if "model" in record else []
    return Measured(_titled(run.device_name, dtypes), _when(run), layers, *_of_steps(run), models, step_ratios(run))


def _is_device(path: Path) -> bool:
    return holds_records(path) and not path.stem.endswith(BESIDE)


def _of_steps(run: Run) -> tuple[list[float], list[float]]:
    """Return the time ÷ the PEFT loop's of every model and batch, at the clients its table shows; language models'."""
    found: tuple[list[float], list[float]] = ([], [])
    for setting, records in shown(run).items():
        if ratio := records.get(OURS, {}).get("ratio_to_peft_loop"):
            found[setting.is_language_model].append(ratio)
    return found


def _titled(name: str, dtypes: Sequence[str]) -> str:
    """Return a column's title: the device and the layers' dtype."""
    return ", ".join([name, *dict.fromkeys(dtypes)])


def _machine(run: Run) -> str:
    return f"{run.device_name}, {run.threads} threads" if run.threads else run.device_name


def _when(run: Run) -> str:
    """Return the commit and the day."""
    return f"{commit_text(run.commit)}, {run.date[:10]}"


def _cell(ratios: Sequence[float], over: tuple[str, str]) -> str:
    if not ratios:
        return NOT_MEASURED
    count = f"{len(ratios)} {over[len(ratios) > 1]}"
    return f"**{geometric_mean(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}), {count}"
