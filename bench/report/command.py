"""Turn saved benchmark results into a Markdown table and a picture, and put both into documents.

`python -m bench.report RESULTS.json [--markdown PATH] [--png PATH] [--document PATH]… [--keep]`, where RESULTS.json is
what the suites save, of layers, of training steps or of whole models, or what `python -m bench.gpu` writes: each has
its own section between markers, in docs/benchmarks.md, that of its kind or one named as the file is. A document with
the summary's markers, such as the README, gets the summary of all files beside RESULTS.json. A log of `python -m
bench.tune` has a table of designs, in docs/kernels.md; the files of `python -m bench.scale` and of `python -m
bench.flower` have theirs in docs/scale.md. Files of `python -m bench.clients` are tabulated too. `--keep` adds a run of
the suites to the history; `python -m bench.report --history [--png PATH]` shows that.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.harness.options import exit_status
from bench.harness.records import ResultsError, load_records, read_json, write_text
from bench.report.clients_tables import KIND, clients_markdown
from bench.report.device_tables import committed_section, device_markdown
from bench.report.figures import draw, draw_history, draw_simulation
from bench.report.history import HISTORY, history_markdown, keep, load_history
from bench.report.markdown import markers, update_document
from bench.report.model_tables import model_markdown
from bench.report.node_tables import NODES, nodes_markdown
from bench.report.runs import Run, load_run, suites_command
from bench.report.scale_figures import draw_scale
from bench.report.scale_tables import KIND as SCALE
from bench.report.scale_tables import load_scale, projected_markdown, scale_markdown
from bench.report.simulation_tables import simulation_markdown
from bench.report.suite_tables import markdown
from bench.report.summary_tables import committed_summary
from bench.report.tune_tables import holds_log, tune_markdown


def update_documents(given: argparse.Namespace, name: str, section: str, title: str = "") -> None:
    """Rewrite a result's section, and the summary of the folder's results, in every document with their markers.

    The section is that of the result file, such as mixed-cpu, if a document has its markers, else the one of its kind.
    """
    kind = name
    for document in given.documents:
        text = document.read_text(encoding="utf-8") if document.is_file() else ""
        name = given.results.stem if markers(given.results.stem)[0] in text else kind
        summarised = markers("summary")[0] in text
        if markers(name)[0] in text or not summarised:  # raises an error for a file with neither
            update_document(document, name, section, given.png, title)
        if summarised:
            update_document(document, "summary", committed_summary(given.results.parent))


def report_suites(given: argparse.Namespace) -> str:
    """Report a file of the suites; return the table.

    Documents get what the file is about: layers if it holds any, else steps of many clients, else of whole models.
    """
    run = load_run(given.results)
    if run.models and not run.ops and not run.steps:
        return report_models(given, run)
    steps = bool(run.steps) and not run.ops
    if steps and given.keep:
        raise ResultsError(f"{given.results} holds training steps; the history keeps ratios of layers")
    text = simulation_markdown(run) if steps else markdown(run)
    if given.png:
        (draw_simulation if steps else draw)(run, given.png)
    if steps:
        update_documents(given, "simulation", text, "What a client's step costs in a cohort")
    else:
        update_documents(given, "bench", text, "Time of each provider divided by the base matmul's")
    return f"{text}\n{model_markdown(run)}" if run.models else text


def report_models(given: argparse.Namespace, run: Run) -> str:
    """Report a file of whole models; return the tables."""
    if given.keep or given.png:
        raise ResultsError(f"{given.results} holds whole models, which have tables alone: no --keep, no --png")
    text = model_markdown(run)
    update_documents(given, "models", text)
    return text


def report_device(given: argparse.Namespace) -> str:
    """Report a file of `python -m bench.gpu` or a log of `python -m bench.tune`; return the table."""
    if given.png:
        raise ResultsError(f"{given.results} holds a device's records; --png draws what the suites save")
    meta, records = load_records(given.results)
    if holds_log(records):
        text = tune_markdown(given.results)
        for document in given.documents:
            update_document(document, f"tune-{given.results.stem}", text)
        return text
    text = device_markdown(meta, records)
    if given.documents:  # documents show every device of the folder
        update_documents(given, "gpu", committed_section(given.results.parent))
    return text


def report_clients(given: argparse.Namespace) -> str:
    """Report a file of `python -m bench.clients`; return the table."""
    if given.png or given.documents or given.keep:
        raise ResultsError(f"{given.results} is about clients: it has a table, for --markdown, and nothing else")
    return clients_markdown(given.results)


def report_scale(given: argparse.Namespace) -> str:
    """Report a file of `python -m bench.scale`; return the tables."""
    if given.keep:
        raise ResultsError(f"{given.results} is about the cost model; the history keeps ratios of layers")
    text, projected = scale_markdown(given.results), projected_markdown(given.results)
    if given.png:
        draw_scale(load_scale(given.results), given.png)
    for document in given.documents:
        update_document(document, "scale", text, given.png, "The cost model beside what was measured")
        update_document(document, "scale-projected", projected)
    return f"{text}\n{projected}\n"


def report_nodes(given: argparse.Namespace) -> str:
    """Report a file of `python -m bench.flower`; return the table."""
    if given.png or given.keep:
        raise ResultsError(f"{given.results} is about machines: it has a table, for --document, and nothing else")
    text = nodes_markdown(given.results)
    for document in given.documents:
        update_document(document, NODES, text)
    return text


def report(given: argparse.Namespace) -> str:
    """Report a results file of any kind; return the table."""
    saved = read_json(given.results, suites_command(given.results))
    if isinstance(saved, list):
        return report_device(given)
    kind = saved.get("kind") if isinstance(saved, dict) else None
    own = {KIND: report_clients, SCALE: report_scale, NODES: report_nodes}
    return own.get(str(kind), report_suites)(given)


def report_history(given: argparse.Namespace) -> str:
    """Report the kept runs; return the table."""
    if given.documents or given.keep:
        raise ResultsError("--history shows what was kept; --document and --keep need a results file instead")
    runs = load_history(given.history)
    if given.png:
        draw_history(runs, given.png)
    return history_markdown(runs)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status, 2 for invalid input."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Table and picture of saved results.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("results", type=Path, nargs="?", help="what the suites saved or `python -m bench.gpu` wrote")
    what.add_argument("--history", type=Path, nargs="?", const=HISTORY, metavar="DIR", help="the kept runs, over time")
    parser.add_argument("--markdown", type=Path, metavar="PATH", help="write the table here")
    parser.add_argument("--png", type=Path, metavar="PATH", help="draw the ratios here")
    parser.add_argument(
        *("--document", "--readme"),
        dest="documents",
        type=Path,
        metavar="PATH",
        action="append",
        default=[],
        help=f"rewrite what stands between markers, such as {' and '.join(markers('bench'))}; repeatable",
    )
    parser.add_argument("--keep", action="store_true", help="add the run to the history")
    return exit_status(_report, parser.parse_args(arguments))


def _report(given: argparse.Namespace) -> int:
    text = report_history(given) if given.history else report(given)
    if given.keep:
        print(f"kept: {keep(given.results)}", file=sys.stderr)
    if given.markdown:
        write_text(given.markdown, text)
    if not given.markdown and not given.documents:
        print(text, end="")
    return 0
