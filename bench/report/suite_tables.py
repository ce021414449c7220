"""The suites' results as Markdown: what they ran on, then one table an operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from bench.cases import DROPOUT_P
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.suite_results import OTHER_WAYS, PROVIDERS, BenchmarkRun, Entry, Shape, geometric_mean
from bench.report.titles import TITLES

# What an operator's table shows, as it stands behind the title.
NOTES = {
    "forward": "y = x Wᵀ + s (x Aᵀ) Bᵀ without a graph; *base* is x Wᵀ alone.",
    "forward_backward": "The same with the gradients of x, A and B; *base* has the gradient of x alone.",
    "fold": "W += s B A in place, caches cold; *base* copies W, *peft* is its `merge`.",
    "dropout": f"Forward + backward in training, p = {DROPOUT_P:g}, another mask at every call; *base* drops nothing.",
    "projections_forward": "Every projection of one x without a graph; *base* is the plain linears one after another, "
    "*fused-apart* this library's layers each alone, *fused* the same with `fuse_projections`.",
    "projections": "The same with the gradients of x and of every A and B.",
    "fold_out": "W + s B A into a buffer, W left as it is, caches cold; *base* copies W into it, *peft* does and "
    "merges there, *fused-inplace* is `fold_`.",
    "fold_many": "All weights of an attention in place, caches cold; *base* copies each, *peft* merges each, "
    "*fused-apart* is `fold_` of each, *fused* is `fold_many_`.",
}
MIB = 2**20


def mean_ratios(run: BenchmarkRun, op: str, rank: int) -> dict[str, tuple[float, float]]:
    """Return each provider's geometric means over one op's shapes of one rank: time ÷ base, time ÷ PEFT."""
    means = {}
    for provider in PROVIDERS:
        entries = [
            run.entries[shape][provider]
            for shape in run.shapes(op)
            if shape.r == rank and provider in run.entries.get(shape, {})
        ]
        if entries:
            means[provider] = (
                geometric_mean(entry.ratio_to_base for entry in entries),
                geometric_mean(entry.ratio_to_peft for entry in entries),
            )
    return means


def common_rank(run: BenchmarkRun, op: str) -> int:
    """Return the rank most of an op's shapes were measured at, the one its geometric mean is taken over."""
    return Counter(shape.r for shape in run.shapes(op)).most_common(1)[0][0]


def markdown(run: BenchmarkRun) -> str:
    """Return the run as Markdown: what it ran on, then one table per op with geometric means."""
    parts = [conditions(run)]
    parts += [_op_section(run, op) for op in run.ops]
    return "\n\n".join(parts) + "\n"


def conditions(run: BenchmarkRun) -> str:
    """Return one paragraph on device, versions, commit and how to read the figures."""
    machine = run.machine
    rows = sorted({shape.m for shape in run.shapes() if shape.m})
    dtypes = sorted({shape.dtype for shape in run.shapes()})
    return (
        f"{machine['device_name']}, {machine['threads']} CPU threads, {machine['backend']} backend; "
        f"{versions_text(machine['versions'])}; {commit_text(run.commit)}, {run.date[:10]}. "
        f"M = {', '.join(map(str, rows)) or '–'} rows, {', '.join(dtypes)}. Medians of interleaved rounds in ms, in "
        "brackets time ÷ *base*; peak is what one call allocates at most, in MiB."
    )


def _op_section(run: BenchmarkRun, op: str) -> str:
    shapes = run.shapes(op)
    providers = [name for name in PROVIDERS if any(name in _measured_or_not(run, shape) for shape in shapes)]
    others = [name for name in OTHER_WAYS if name in providers]
    ratios = ["fused ÷ peft", *(OTHER_WAYS[name] for name in others)]
    header = ["shape", *providers, *ratios, "peak peft", "peak fused"]
    rows = [_row(run, shape, providers, others) for shape in shapes]
    rows.append(_mean_row(run, op, providers, others))
    return f"**{TITLES[op].head}.** {NOTES[op]}\n\n{markdown_table(header, rows)}"


def _row(run: BenchmarkRun, shape: Shape, providers: Sequence[str], others: Sequence[str]) -> list[str]:
    entries = run.entries.get(shape, {})
    causes = run.not_available.get(shape, {})
    times = [_time(entries.get(name), causes.get(name)) for name in providers]
    fused = entries.get("fused")
    ratios = [f"{fused.ratio_to_peft:.2f}" if fused else "–"]
    for name in others:
        ratios.append(f"{fused.time_ms / entries[name].time_ms:.2f}" if fused and name in entries else "–")
    return [shape.label, *times, *ratios, _peak(entries.get("peft")), _peak(fused)]


def _mean_row(run: BenchmarkRun, op: str, providers: Sequence[str], others: Sequence[str]) -> list[str]:
    rank = common_rank(run, op)
    means = mean_ratios(run, op, rank)
    cells = [f"({means[name][0]:.2f})" if name in means else "–" for name in providers]
    against = [f"{means['fused'][1]:.2f}" if "fused" in means else "–"]
    for name in others:
        against.append(f"{means['fused'][0] / means[name][0]:.2f}" if {"fused", name} <= means.keys() else "–")
    return [f"geometric mean, R {rank}", *cells, *against, "", ""]


def _time(entry: Entry | None, cause: str | None) -> str:
    if entry is not None:
        digits = f"{entry.time_ms:.3g}" if entry.time_ms < 100 else f"{entry.time_ms:.0f}"
        return f"{digits} ({entry.ratio_to_base:.2f})"
    return f"not available: {cause}".replace("|", "\\|") if cause else "not measured"


def _peak(entry: Entry | None) -> str:
    return f"{entry.peak_bytes / MIB:.1f}" if entry else "–"


def _measured_or_not(run: BenchmarkRun, shape: Shape) -> set[str]:
    return {*run.entries.get(shape, {}), *run.not_available.get(shape, {})}
