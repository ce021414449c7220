"""The suites' results as Markdown: the conditions, then one table per operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.cases import DROPOUT_P, MIXED_OPS
from bench.harness.records import Record
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.runs import (
    Providers,
    Run,
    facts_of,
    geometric_mean,
    other_ways,
    own_provider,
    ratio_of,
    ratio_text,
    size_of,
    timed,
)
from bench.report.titles import TITLES

# The suites' providers, in the order of a table's columns.
PROVIDERS = ("base", "peft", "peft-autocast", "peft-compiled", "fused-apart", "fused-inplace", "fused", "fused-mixed")
# The text that follows the title of an operator's table.
NOTES = {
    "forward": "y = x Wᵀ + s (x Aᵀ) Bᵀ without a graph; *base* is x Wᵀ alone.",
    "forward_backward": "The same with the gradients of x, A and B; *base* has the gradient of x alone.",
    "fold": "W += s B A in place, caches cold; *base* copies W, *peft* is its `merge`.",
    "dropout": f"Forward + backward in training, p = {DROPOUT_P:g}, another mask at every call; *base* drops nothing.",
    "mixed_forward": "Factors in fp32 over a weight in bfloat16, without a graph: *peft* is PEFT's default, without "
    "autocast, *peft-compiled* the same; *fused-mixed* has the same factors, *fused* factors in bfloat16.",
    "mixed": "The same with the gradients of x, A and B; *base* has the gradient of x alone.",
    "projections_forward": "Every projection of one x without a graph; *base* is the plain linears one after another, "
    "*fused-apart* this library's layers each alone, *fused* the same with `fuse_projections`.",
    "projections": "The same with the gradients of x and of every A and B.",
    "fold_out": "W + s B A into a buffer, W left as it is, caches cold; *base* copies W into it, *peft* does and "
    "merges there, *fused-inplace* is `fold_`.",
    "fold_many": "All weights of an attention in place, caches cold; *base* copies each, *peft* merges each, "
    "*fused-apart* is `fold_` of each, *fused* is `fold_many_`.",
}
MIB = 2**20


def markdown(run: Run) -> str:
    """Return the run as Markdown: the conditions, then one table per op with geometric means."""
    rows, dtypes = rows_and_dtypes(run)
    are_mixed = [op in MIXED_OPS for op in run.ops]
    mixed = ", in mixed precision bfloat16" if any(are_mixed) and not all(are_mixed) else ""
    conditions = (
        f"{run.device_name}, {run.threads} CPU threads, {run.backend} backend; "
        f"{versions_text(run.versions)}; {commit_text(run.commit)}, {run.date[:10]}. "
        f"M = {rows or '–'} rows, {dtypes}{mixed}. Medians of interleaved rounds in ms, in "
        "brackets time ÷ *base*; peak is what one call allocates at most, in MiB."
    )
    return "\n\n".join([conditions, *(_op_section(run, op) for op in run.ops)]) + "\n"


def rows_and_dtypes(run: Run) -> tuple[str, str]:
    """Return the layers' M and dtypes, those of mixed precision apart if there are others."""
    every = [facts_of(providers) for providers in run.cases()]
    every = [facts for facts in every if facts["op"] not in MIXED_OPS] or every
    rows, dtypes = ({facts[name] for facts in every if facts[name]} for name in ("m", "dtype"))
    return ", ".join(map(str, sorted(rows))), ", ".join(sorted(dtypes))


def case_label(record: Record) -> str:
    """Return a case's label: model, projection, K×N and the rank."""
    return f"{record['model']} {record['projection']} {size_of(record)}, R {record['r']}"


def mean_ratios(run: Run, op: str, rank: int) -> dict[str, tuple[float, float]]:
    """Return each provider's geometric means over one op's shapes of one rank: time ÷ base, time ÷ PEFT."""
    cases = [providers for providers in run.cases(op) if facts_of(providers)["r"] == rank]
    means = {}
    for name in PROVIDERS:
        records = [record for providers in cases if (record := timed(providers, name))]
        if records:
            to_base, to_peft = (
                geometric_mean(record[ratio] for record in records) for ratio in ("ratio_to_base", "ratio_to_peft")
            )
            means[name] = (to_base, to_peft)
    return means


def common_rank(run: Run, op: str) -> int:
    """Return the rank that most of an op's shapes were measured at; its geometric mean is taken over those."""
    return Counter(facts_of(providers)["r"] for providers in run.cases(op)).most_common(1)[0][0]


def _op_section(run: Run, op: str) -> str:
    cases = run.cases(op)
    names = [name for name in PROVIDERS if any(name in providers for providers in cases)]
    own, others = own_provider(op), other_ways(op, names)
    header = ["shape", *names, f"{_short(own)} ÷ peft", *others.values(), "peak peft", f"peak {_short(own)}"]
    rows = [_row(providers, names, own, list(others)) for providers in cases]
    rows.append(_mean_row(run, op, names, list(others)))
    return f"**{TITLES[op].head}.** {NOTES[op]}\n\n{markdown_table(header, rows)}"


def _short(provider: str) -> str:
    return provider.removeprefix("fused-")


def _row(providers: Providers, names: Sequence[str], own: str, others: Sequence[str]) -> list[str]:
    times = [_time(providers.get(name)) for name in names]
    peft, ours = timed(providers, "peft"), timed(providers, own)
    ratios = [ours["ratio_to_peft"] if ours else None, *(ratio_of(providers, own, name) for name in others)]
    peaks = [f"{record['peak_bytes'] / MIB:.1f}" if record else "–" for record in (peft, ours)]
    return [case_label(facts_of(providers)), *times, *map(ratio_text, ratios), *peaks]


def _mean_row(run: Run, op: str, names: Sequence[str], others: Sequence[str]) -> list[str]:
    rank, own = common_rank(run, op), own_provider(op)
    means = mean_ratios(run, op, rank)
    cells = [f"({means[name][0]:.2f})" if name in means else "–" for name in names]
    against = [means[own][1] if own in means else None]
    against += [means[own][0] / means[name][0] if {own, name} <= means.keys() else None for name in others]
    return [f"geometric mean, R {rank}", *cells, *map(ratio_text, against), "", ""]


def _time(record: Record | None) -> str:
    if record is None:
        return "not measured"
    if record["status"] != "timed":
        return f"not available: {record['cause']}".replace("|", "\\|")
    digits = f"{record['time_ms']:.3g}" if record["time_ms"] < 100 else f"{record['time_ms']:.0f}"
    return f"{digits} ({record['ratio_to_base']:.2f})"
