"""Tables and sentences on a run or a comparison: gains, mean ± deviation, and differences paired by seed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import floor, log10
from statistics import fmean, stdev

from fed import methods
from fed.config import RunConfig, settings_of
from fed.experiments.variants import resolved
from fed.report.comparison import Comparison
from fed.report.summary import COST, NOISE, OUTCOME, SCORES, Metric
from fed.simulation.run_directory import Run
from fed.types import Metrics

Table = list[tuple[str, ...]]

_WORDS = {"above": "ahead", "below": "behind"}


def table(comparison: Comparison, names: Sequence[str]) -> Table:
    """Return a table of the named metrics, mean ± standard deviation over seeds: a heading, then a line per variant."""
    metrics = comparison.metrics(names)
    lines: Table = [(heading(comparison), *(titled(metric) for metric in metrics))]
    for variant in comparison.plan.variants:
        cells = (spread(list(comparison.values(variant, metric).values()), metric) for metric in metrics)
        lines.append((variant.label, *cells))
    return lines


def paired_tables(comparison: Comparison) -> list[Table]:
    """Return a table of differences for each score that was measured, or none if there is only one variant."""
    if not comparison.others:
        return []
    return [paired_table(comparison, metric) for metric in SCORES if metric in comparison.metrics(OUTCOME)]


def paired_table(comparison: Comparison, metric: Metric) -> Table:
    """Return each variant's difference from the reference, paired by seed, with its 95 % interval and a verdict."""
    reference = comparison.plan.reference.label
    lines: Table = [(f"{metric.title} less {reference}'s", "difference", "95 % interval", "seeds", "verdict")]
    for variant in comparison.others:
        found = comparison.paired(variant, metric)
        if found is None:
            lines.append((variant.label, "—", "—", "0", "no seed in common"))
            continue
        ends = "—" if found.low is None else f"{found.low:+.2f} to {found.high:+.2f}"
        verdict = _WORDS.get(found.verdict, found.verdict)
        lines.append((variant.label, f"{found.mean:+.2f} points", ends, str(found.n), verdict))
    return lines


def verdicts(comparison: Comparison) -> list[str]:
    """Return a sentence for each variant that compares its accuracy with the reference's."""
    reference = comparison.plan.reference.label
    sentences = []
    for variant in comparison.others:
        found = comparison.paired(variant)
        if found is None:
            sentences.append(f"{variant.label} and {reference} have no finished seed in common.")
        elif found.low is None or found.high is None:
            sentences.append(
                f"{variant.label} is {_apart(found.mean, reference)} on one seed, which says nothing of chance."
            )
        elif found.verdict == "tie":
            sentences.append(
                f"{variant.label} and {reference} tie: the difference of {found.mean:+.2f} points lies in an interval "
                f"({found.low:+.2f} to {found.high:+.2f}) that holds 0."
            )
        else:
            sentences.append(
                f"{variant.label} is {_apart(found.mean, reference)} "
                f"(95 % interval {found.low:+.2f} to {found.high:+.2f}, {found.n} seeds)."
            )
    return sentences


def _apart(points: float, reference: str) -> str:
    return f"{abs(points):.2f} points {'ahead of' if points > 0 else 'behind'} {reference}"


def notes(comparison: Comparison) -> list[str]:
    """Return what a reader of the tables must know: ranks that were made equal, missing runs, the use of intervals."""
    lines = list(dict.fromkeys(f"{note}." for variant in comparison.plan.variants for note in variant.notes))
    if comparison.missing:
        lines.append(f"{comparison.missing} of {len(comparison.plan.cells)} runs are not finished and are left out.")
    same = "share base weights, split, shards and order of batches"
    lines.append(
        f"All variants of a seed {same if _same_data(comparison) else 'do not have the same data or base model'}; "
        "± is the standard deviation over seeds."
    )
    if comparison.others:
        lines.append(
            "A difference whose interval holds 0 is a tie. Intervals are Student's t, each for one pair alone: of "
            "many, one in twenty misses by chance."
        )
    return lines


def _same_data(comparison: Comparison) -> bool:
    """Return whether all variants have the same base model, data and partition among clients."""
    common = comparison.plan.common()
    every = settings_of(comparison.plan.cells[0].config)
    return not any(
        key.startswith(("model.", "data.")) or key in ("clients.count", "clients.dirichlet_alpha")
        for key in every.keys() - common.keys()
    )


def heading(comparison: Comparison) -> str:
    """Return the number of seeds in words."""
    count = max(len(runs) for runs in comparison.runs.values())
    return f"{count} seeds" if count > 1 else "1 seed"


def titled(metric: Metric) -> str:
    """Return a metric's title with its unit."""
    return f"{metric.title} ({metric.unit})" if metric.unit else metric.title


def spread(values: Sequence[float], metric: Metric) -> str:
    """Return mean ± sample standard deviation as text; for one value only the mean, for no values a dash.

    If the metric has no `digits`, the deviation gets two significant digits and the mean as many decimals.
    """
    if not values:
        return "—"
    mean = fmean(values)
    shown = _number(mean, metric.digits)
    if len(values) < 2:
        return shown
    deviation = stdev(values)
    if deviation == 0:
        return shown
    digits = metric.digits
    if digits is None and 1e-3 <= abs(mean) < 1e9 and deviation > 1e-6 * abs(mean):
        digits = max(0, 1 - floor(log10(deviation)))
        return f"{mean:,.{digits}f} ± {deviation:,.{digits}f}"
    return f"{shown} ± {_number(deviation, digits, significant=2)}"


def _number(value: float, digits: int | None, significant: int = 3) -> str:
    """Return a number with `digits` decimals, or with `significant` digits if that is None."""
    if digits is not None:
        return f"{value:.{digits}f}"
    return f"{value:,.0f}" if 10**significant <= abs(value) < 1e9 else f"{value:.{significant}g}"


def as_markdown(comparison: Comparison, pictures: Sequence[str] = ()) -> str:
    """Return a comparison as Markdown: command, tables, verdicts, notes and pictures."""
    parts = [
        f"# {title(comparison)}",
        lead(comparison),
        f"```\n{command(comparison)}\n```",
        markdown_table(table(comparison, OUTCOME)),
    ]
    if comparison.others:
        parts += [
            *map(markdown_table, paired_tables(comparison)),
            "\n".join(f"- {line}" for line in verdicts(comparison)),
        ]
    for names in (NOISE, COST):
        if comparison.metrics(names):
            parts.append(markdown_table(table(comparison, names)))
    parts += notes(comparison)
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def title(comparison: Comparison) -> str:
    """Return the comparison's title: the variants, or the setting that varies, and the task."""
    asked, labels = comparison.plan.request, [variant.label for variant in comparison.plan.variants]
    task = comparison.plan.cells[0].config.data.title
    if asked.vary and len(asked.methods) == 1:
        return f"{methods.find(asked.methods[0].partition('@')[0]).title} by {asked.vary.partition('=')[0]} on {task}"
    names = f"{', '.join(labels[:-1])} and {labels[-1]}" if len(labels) > 1 else labels[0]
    return f"{names} on {task}"


def lead(comparison: Comparison) -> str:
    """Return a sentence on what all runs share: clients, rounds and local work, and on the number of seeds."""
    config = resolved(comparison.plan.request.table, ("method=fed-plora",))
    return f"{population(config)}; {config.rounds} rounds of {local_work(config)}; {heading(comparison)}."


def markdown_table(lines: Table) -> str:
    """Return a table, whose first line is the heading, in Markdown."""
    first, *rest = lines
    rule = ("---", *["---:"] * (len(first) - 1))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (first, rule, *rest))


def command(comparison: Comparison) -> str:
    """Return the command line that makes this comparison."""
    asked = comparison.plan.request
    words = ["python", "-m", "fed", "compare", asked.source, "--methods", ",".join(asked.methods)]
    words += ["--seeds", ",".join(map(str, asked.seeds))]
    words += ["--vary", asked.vary] if asked.vary else []
    words += ["--reference", asked.reference] if asked.reference else []
    words += ["--set", *asked.settings] if asked.settings else []
    return shlex.join(words)


def summary(run: Run) -> list[tuple[str, ...]]:
    """Return a table, heading first: accuracy before and after the run with the gain, and that of centralised LoRA."""
    config, rounds, reached = run.config, run.rows[-1]["round"], run.gain_of(run.rows[-1])
    federated = f"{methods.find(config.method).title}, {rounds} rounds × {local_work(config)}"
    lines: list[tuple[str, ...]] = [
        (f"test data: {config.data.title}", "accuracy", "gain", "ratio"),
        ("unadapted model", percent(run.rows[0]), "", ""),
        (federated, percent(run.rows[-1]), "" if reached is None else f"{reached:+.1f} points", ""),
    ]
    for row in run.centralised:
        gain = run.gain_of(row) or 0.0  # centralised training is measured in any case, as is round 0
        ratio = f"{reached / gain:.2f}" if gain > 0 and reached is not None else "—"
        lines.append((f"centralised LoRA, {row['steps']} steps", percent(row), f"{gain:+.1f} points", ratio))
    return lines


def memory_in_use(run: Run) -> str:
    """Return a sentence on the peak memory of a run, or an empty string if it was not measured."""
    peaks = [peak for row in run.rows if (peak := row.get("peak_memory_bytes"))]
    return f"At most {max(peaks) / 1e6:.0f} MB of memory were in use." if peaks else ""


def percent(row: Metrics) -> str:
    """Return a row's accuracy as text, in per cent, or a dash if it was not measured."""
    return "—" if row["accuracy"] is None else f"{100 * row['accuracy']:.1f} %"


def local_work(config: RunConfig) -> str:
    """Return in words how many local steps or epochs a client trains in a round."""
    train = config.train
    if train.local_epochs:
        return f"{train.local_epochs:g} local epochs"
    if train.client_steps:
        return f"{min(train.client_steps)} to {max(train.client_steps)} local steps"
    return f"{train.local_steps} local steps"


def population(config: RunConfig) -> str:
    """Return a short description of the clients: their number, label skew and ranks."""
    clients = config.clients
    skew = "iid" if clients.dirichlet_alpha == "iid" else f"Dirichlet {clients.dirichlet_alpha:g}"
    ranks = f"ranks {', '.join(str(rank) for rank in sorted(set(clients.ranks[: clients.count])))}"
    if clients.memory_mib:
        ranks = "ranks by memory"
    return f"{clients.count} clients, {clients.per_round} a round, {skew}, {ranks} of R = {config.adapter.rank}"
