"""Turn saved benchmark results into a Markdown table and a picture, and put both into the README.

`python -m bench.report RESULTS.json [--markdown PATH] [--png PATH] [--readme README.md] [--keep]`, where RESULTS.json
is what the suites save, of layers or of training steps, or what `python -m bench.gpu` writes: each has a section of the
README to itself. What `python -m bench.clients` writes is tabulated too. `--keep` adds a run of the suites to the
history; `python -m bench.report --history [--png PATH]` shows that.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench.cases import DROPOUT_P
from bench.clients_table import clients_markdown, holds_clients
from bench.device_table import committed_section, device_markdown
from bench.history import HISTORY, draw_history, history_markdown, keep, load_history
from bench.picture import draw
from bench.records import holds_records, load_records
from bench.results import (
    OTHER_WAYS,
    PROVIDERS,
    BenchmarkRun,
    Entry,
    ResultsError,
    Shape,
    geometric_mean,
    load_run,
    write_text,
)
from bench.simulation.picture import draw_simulation
from bench.simulation.saved import holds_simulation_alone, load_simulation
from bench.simulation.table import simulation_markdown
from bench.tables import markdown_table

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
GPU_BEGIN, GPU_END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
STEPS_BEGIN, STEPS_END = "<!-- simulation:begin -->", "<!-- simulation:end -->"

OP_TITLES = {
    "forward": "Forward",
    "forward_backward": "Forward + backward",
    "fold": "Fold",
    "dropout": "LoRA dropout",
    "projections_forward": "Projections of one input, forward",
    "projections": "Projections of one input, forward + backward",
    "fold_out": "Fold out of place",
    "fold_many": "Fold of many weights",
}
OP_NOTES = {
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
    machine, commit = run.machine, run.commit
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items() if version)
    rows = sorted({shape.m for shape in run.shapes() if shape.m})
    dtypes = sorted({shape.dtype for shape in run.shapes()})
    state = " with uncommitted changes" if commit.get("dirty") else ""
    return (
        f"{machine['device_name']}, {machine['threads']} CPU threads, {machine['backend']} backend; {versions}; "
        f"commit {str(commit['id'])[:12]}{state}, {run.date[:10]}. M = {', '.join(map(str, rows)) or '–'} rows, "
        f"{', '.join(dtypes)}. Medians of interleaved rounds in ms, in brackets time ÷ *base*; peak is what one "
        "call allocates at most, in MiB."
    )


def _op_section(run: BenchmarkRun, op: str) -> str:
    shapes = run.shapes(op)
    providers = [name for name in PROVIDERS if any(name in _measured_or_not(run, shape) for shape in shapes)]
    others = [name for name in OTHER_WAYS if name in providers]
    ratios = ["fused ÷ peft", *(OTHER_WAYS[name] for name in others)]
    header = ["shape", *providers, *ratios, "peak peft", "peak fused"]
    rows = [_row(run, shape, providers, others) for shape in shapes]
    rows.append(_mean_row(run, op, providers, others))
    return f"**{OP_TITLES[op]}.** {OP_NOTES[op]}\n\n{markdown_table(header, rows)}"


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


def rewrite_section(text: str, section: str, begin: str = BEGIN, end: str = END) -> str:
    """Return `text` with what stands between the two markers replaced by `section`.

    Raises ResultsError if the markers are not there, once each and in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ResultsError(f"the README needs the lines {begin} and {end}, once each and in this order")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n\n{section.strip()}\n\n{end}{after}"


def update_readme(
    readme: Path,
    section: str,
    png: Path | None,
    begin: str = BEGIN,
    end: str = END,
    title: str = "Time of each provider divided by the base matmul's",
) -> None:
    """Rewrite what stands between a README's markers, with a link to the picture where there is one."""
    if not readme.is_file():
        raise ResultsError(f"{readme} does not exist; --readme needs a file with {begin} and {end}")
    if png is not None:
        link = Path(os.path.relpath(png, readme.parent)).as_posix()
        section = f"![{title}]({link})\n\n{section}"
    write_text(readme, rewrite_section(readme.read_text(encoding="utf-8"), section, begin, end))


def report_suites(given: argparse.Namespace) -> str:
    """Report what the suites saved; return the table."""
    run = load_run(given.results)
    text = markdown(run)
    if given.png:
        draw(run, given.png)
    if given.readme:
        update_readme(given.readme, text, given.png)
    return text


def report_simulation(given: argparse.Namespace) -> str:
    """Report the training steps the suites saved; return the table."""
    run = load_simulation(given.results)
    if given.keep:
        raise ResultsError(f"{given.results} holds training steps; the history keeps ratios of layers")
    text = simulation_markdown(run)
    if given.png:
        draw_simulation(run, given.png)
    if given.readme:
        update_readme(given.readme, text, given.png, STEPS_BEGIN, STEPS_END, "What a client's step costs in a cohort")
    return text


def report_device(given: argparse.Namespace) -> str:
    """Report what `python -m bench.gpu` wrote; return the table."""
    if given.png:
        raise ResultsError(f"{given.results} holds a device's records; --png draws what the suites save")
    text = device_markdown(*load_records(given.results))
    if given.readme:  # it shows every device of the folder
        update_readme(given.readme, committed_section(given.results.parent), None, GPU_BEGIN, GPU_END)
    return text


def report_clients(given: argparse.Namespace) -> str:
    """Report what `python -m bench.clients` wrote; return the table."""
    if given.png or given.readme or given.keep:
        raise ResultsError(f"{given.results} is about clients: it has a table, for --markdown, and nothing else")
    return clients_markdown(given.results)


def report(given: argparse.Namespace) -> str:
    """Report a results file, whoever wrote it; return the table."""
    if holds_records(given.results):
        return report_device(given)
    if holds_clients(given.results):
        return report_clients(given)
    # A file with layers and training steps is shown as layers.
    return report_simulation(given) if holds_simulation_alone(given.results) else report_suites(given)


def report_history(given: argparse.Namespace) -> str:
    """Report the kept runs; return the table."""
    if given.readme or given.keep:
        raise ResultsError("--history shows what was kept; --readme and --keep need a results file instead")
    runs = load_history(given.history)
    if given.png:
        draw_history(runs, given.png)
    return history_markdown(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Table and picture of saved results.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("results", type=Path, nargs="?", help="what the suites saved or `python -m bench.gpu` wrote")
    what.add_argument("--history", type=Path, nargs="?", const=HISTORY, metavar="DIR", help="the kept runs, over time")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table here")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw the ratios here")
    parser.add_argument("--readme", type=Path, metavar="PATH", help=f"rewrite what stands between {BEGIN} and {END}")
    parser.add_argument("--keep", action="store_true", help="add the run to the history")
    given = parser.parse_args(arguments)
    try:
        text = report_history(given) if given.history else report(given)
        if given.keep:
            print(f"kept: {keep(given.results)}", file=sys.stderr)
        if given.markdown:
            write_text(given.markdown, text)
    except (ResultsError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not given.markdown and not given.readme:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
