"""Tables of a file of `python -m bench.gpu`: a short one for the terminal, one in Markdown for documents."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.cases import DROPOUT_P, MAIN_OPS, MIXED_OPS, OPS
from bench.gpu_cases import DECODE_ROWS, TABLE, TABLE_RANKS, TABLE_ROWS, TINY
from bench.harness.records import MODEL, SIMULATION, Record, holds_records, load_records
from bench.report.markdown import commit_text, markdown_table, versions_text
from bench.report.model_tables import model_reading, model_table
from bench.report.runs import (
    Providers,
    by_case,
    facts_of,
    other_ways,
    own_provider,
    ratio_of,
    ratio_text,
    run_of_device,
    size_of,
)
from bench.report.simulation_tables import reading, simulation_table
from bench.report.titles import TITLES

# The text of docs/benchmarks.md while no device's file is committed.
NOT_MEASURED = """\
GPU: not yet measured. The kernels pass their tests under Triton's interpreter and compile for sm_80, sm_90, sm_100 and
gfx942, by Triton 3.9 at the audit's shapes and default blocks without spills and with warpgroup MMA on sm_90; nothing
is known yet of their speed or of bfloat16 on a device."""

# A forward of few rows has a section of its own.
DECODE = "decode"
HEADS = {name: title.head for name, title in TITLES.items()} | {DECODE: "Decode"}
HEADS |= {SIMULATION: "Training steps", MODEL: "Whole models"}
# The sections in order, and the text that follows each heading.
NOTES = {
    "forward": ", M = {rows}.",
    "forward_backward": ", M = {rows}: the gradients of x, A and B; *base* has that of x alone.",
    "fold": ", in place; *base* copies W, *peft* is its `merge`.",
    DECODE: ": a forward of one row and of sixteen.",
    "dropout": f", p = {DROPOUT_P:g}, M = {{rows}}: forward + backward in training; *base* has none.",
    "mixed_forward": ", factors in fp32, M = {rows}; *peft* is PEFT's default, *fused* has factors in bfloat16.",
    "mixed": ", factors in fp32, M = {rows}: the gradients of x, A and B; *base* has that of x alone.",
    "projections_forward": ": *base* is the plain linears one after another, *fused-apart* this library's layers each "
    "alone, *fused* the same with `fuse_projections`.",
    "projections": ", M = {rows}: gradients of x, every A and B.",
    "fold_out": ", into a buffer; *base* copies W into it, *peft* does and merges there, *fused-inplace* is `fold_`.",
    "fold_many": ", in place; *peft* merges each, *fused-apart* is `fold_` of each, *fused* is `fold_many_`.",
}
# The terminal's columns of time ÷ base, under these names.
SUMMARY = {
    "fused": "fused",
    "fused-mixed": "mixed",
    "fused-apart": "apart",
    "fused-inplace": "place",
    "inplace": "inpl",
    "peft-compiled": "comp",
    "peft": "peft",
    "peft-autocast": "auto",
}
# *fused* with default blocks instead of tuned ones.
UNTUNED = "untuned"
CASE_HEADER = f"{'case':<52} {'base ms':>8}"


def device_markdown(meta: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return a device's figures as Markdown: the conditions, then the shapes that the kernels are designed for."""
    cases = by_case(records)
    parts = [conditions(meta, records)]
    for name, note in NOTES.items():
        chosen = [providers for providers in cases if table_of(facts_of(providers)) == name]
        if chosen:
            note = note.format(rows=facts_of(chosen[0])["m"])
            parts.append(f"**{HEADS[name]}**{note}\n\n{_table(chosen)}")
    run = run_of_device(meta, records)
    if run.steps:
        parts.append(f"**Training steps of many clients.** {reading(run)}\n\n{simulation_table(run)}")
    if run.models:
        parts.append(f"**Whole models.** {model_reading(run)}\n\n{model_table(run)}")
    return "\n\n".join(parts) + "\n"


def committed_section(results: Path) -> str:
    """Return the section on GPUs: the tables of the devices' files in a folder, or a note that there are none.

    A file of the same name in the folder's `defaults` holds the same cases with default blocks: its *fused* is shown as
    one more provider.
    """
    found = [_device_section(path) for path in sorted(results.glob("*.json")) if holds_records(path)]
    return "\n\n".join(text.strip() for text in found) or NOT_MEASURED


def _device_section(path: Path) -> str:
    meta, records = load_records(path)
    defaults = path.parent / "defaults" / path.name
    other, others = load_records(defaults) if defaults.is_file() else ({}, [])
    untuned = [{**one, "provider": UNTUNED, "commit": other["commit"]} for one in others if one["provider"] == "fused"]
    return device_markdown(meta, [*records, *untuned])


def conditions(meta: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return one paragraph: device, versions, commit, peak rates, the checks, and how to read the figures."""
    checks = [record for record in records if record["op"] == "check"]
    dtypes = ", ".join(dict.fromkeys(record["dtype"] for record in checks))
    wrong = [record for record in records if record.get("status") == "wrong"]
    limits = meta.get("ceilings", {})
    measured = [f"copies {limits['copy_gbps'] / 1e3:.2f} TB/s"] if "copy_gbps" in limits else []
    if "matmul_tflops_bfloat16" in limits:
        measured.append(f"multiplies bfloat16 at {limits['matmul_tflops_bfloat16']:.3g} TFLOP/s")
    forms = ", ".join(dict.fromkeys(str(record.get("form") or record["provider"]) for record in wrong))
    found = "nothing was wrong" if not wrong else f"{len(wrong)} results were wrong and not timed ({forms})"
    checked = f"{len(checks)} checks ({dtypes}), and every" if checks else "every"
    blocks = ", *untuned* is *fused* with default blocks" if any(one["provider"] == UNTUNED for one in records) else ""
    return (
        f"{meta['device_name']}; {versions_text(meta['versions'])}; {commit_text(meta.get('commit'))}, "
        f"{meta['date'][:10]}. "
        f"It {' and '.join(measured)}. Held to float64: {checked} provider of every shape before it was timed; "
        f"{found}. Medians in ms of the device's time, caches flushed and providers interleaved, in brackets time ÷ "
        f"*base*{blocks}; *host* is what a call keeps the host, in µs.{_of_other_commits(records)}"
    )


def _of_other_commits(records: Sequence[Record]) -> str:
    """Return a sentence on the figures that were taken at other commits than the file's own, if there are any."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if "commit" in record:
            shared = record["op"] in OPS and record["provider"] in (UNTUNED, "peft-compiled", "peft-autocast")
            what = f"*{record['provider']}*" if shared else HEADS[record["op"]].lower()
            found.setdefault(record["commit"], {})[what] = None
    each = [f"{commit_text(commit)}: {', '.join(names)}" for commit, names in found.items()]
    return f" Measured before the rest, at {'; '.join(each)}." if each else ""


def summary(meta: Mapping[str, Any], records: Sequence[Record]) -> str:
    """Return a table for the terminal: a line a case, times ÷ base, the host time of PEFT and fused."""
    header = " ".join(f"{name:>6}" for name in SUMMARY.values())
    lines = [f"{CASE_HEADER} {header} {'host µs':>11}"]
    for providers in by_case(records):
        ratios = " ".join(f"{_ratio(providers.get(provider)):>6}" for provider in SUMMARY)
        lines.append(f"{case_columns(providers)} {ratios} {_hosts(providers):>11}".rstrip())
    checks = [record for record in records if record["op"] == "check"]
    wrong = [record for record in checks if record.get("status") == "wrong"]
    return "\n".join([*lines, f"checks: {len(checks)}, wrong: {len(wrong)}"])


def case_columns(providers: Providers) -> str:
    """Return the first columns of a case's line in the terminal: the case and the base's time."""
    record = facts_of(providers)
    name = " ".join(str(record[key]) for key in ("op", "m", "k", "n", "r", "dtype"))
    base = providers.get("base", {}).get("time_ms")
    return f"{name:<52} {f'{base:.4g}' if base else '–':>8}"


def table_of(record: Record) -> str | None:
    """Return the table that shows a case, or None, because the file holds more than is shown."""
    if record["op"] not in MAIN_OPS and record["op"] not in MIXED_OPS:
        return record["op"]
    shape = (record["k"], record["n"])
    tiny = shape == (TINY.k, TINY.n)
    if not tiny and (record["dtype"] == "float32" or shape not in {(one.k, one.n) for one in TABLE}):
        return None
    if record["op"] == "fold":
        return "fold"
    if record["m"] in DECODE_ROWS:
        return DECODE
    wanted = tiny or (record["m"] == TABLE_ROWS and record["r"] in TABLE_RANKS and record["dtype"] == "bfloat16")
    return record["op"] if wanted else None


def _table(cases: Sequence[Providers]) -> str:
    names = list(dict.fromkeys(name for providers in cases for name in providers))
    op = facts_of(cases[0])["op"]
    own, others = own_provider(op), other_ways(op, names)
    rows = []
    for providers in cases:
        record = facts_of(providers)
        m = f"M {record['m']}, " if record["m"] in DECODE_ROWS else ""
        times = [_time(providers.get(name)) for name in names]
        ratios = [ratio_text(ratio_of(providers, own, name)) for name in ("peft", *others)]
        rows.append([f"{size_of(record)}, {m}R {record['r']}", *times, *ratios, _hosts(providers)])
    short = own.removeprefix("fused-")
    header = ["shape", *names, f"{short} ÷ peft", *others.values(), f"host peft / {short}"]
    return markdown_table(header, rows)


def _time(record: Record | None) -> str:
    if record is None:
        return "–"
    if record["time_ms"] is None:
        return str(record.get("status", "–"))
    return f"{record['time_ms']:.3g} ({record['ratio_to_base']:.2f})"


def _ratio(record: Record | None) -> str:
    if record is None or record["time_ms"] is None:
        return "–" if record is None or record.get("status") != "wrong" else "WRONG"
    return f"{record['ratio_to_base']:.3f}"


def _hosts(providers: Providers) -> str:
    own = own_provider(facts_of(providers)["op"])
    hosts = [providers.get(name, {}).get("host_us") for name in ("peft", own)]
    return " / ".join(f"{host:.0f}" if isinstance(host, float) else "–" for host in hosts)
