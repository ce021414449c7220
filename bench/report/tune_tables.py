"""The tuner's log as a table: how fast each design was at the layer it was tuned for."""

from collections.abc import Sequence
from pathlib import Path

from bench.harness.records import Record, load_records
from bench.report.markdown import commit_text, markdown_table

# What the tuner times for each of these ops; the other ops have no designs to compare.
TITLES = {"forward": "Forward", "input_gradient": "Backward: dX, dA and dB"}


def tune_markdown(path: Path) -> str:
    """Return the times of each design and overlap in a log of `python -m bench.tune`, the fastest first.

    Shown are the first forward and the first backward of the log, those of the most important layer.
    """
    meta, records = load_records(path)
    head = f"{meta['device_name']}, {commit_text(meta.get('commit'))}, {meta['date'][:10]}."
    first: dict[str, list[Record]] = {}
    for own in _classes(records):
        first.setdefault(own[0]["op"], own)
    return "\n\n".join([head, *(_class_table(first[op]) for op in TITLES if op in first)]) + "\n"


def holds_log(records: Sequence[Record]) -> bool:
    """Say whether records are of the tuner: it marks the best of each class."""
    return any(record.get("status") == "best" for record in records)


def _classes(records: Sequence[Record]) -> list[list[Record]]:
    found: dict[tuple[object, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record[key] for key in ("op", "m", "k", "n", "r", "dtype")), []).append(record)
    return list(found.values())


def _class_table(records: Sequence[Record]) -> str:
    first = records[0]
    ways: dict[tuple[str, str, str], list[Record]] = {}
    for record in records:
        ways.setdefault(_way(record), []).append(record)
    rows = []
    for way, own in ways.items():
        times = [record["time_ms"] for record in own if record["time_ms"] is not None]
        wrong = sum(record.get("status") == "wrong" for record in own)
        best = min(own, key=lambda record: record["time_ms"] or float("inf"))["blocks"]
        tiled = times and not way[0].startswith("algebra")
        size = "×".join(str(best[name]) for name in ("block_m", "block_n", "block_k")) if tiled else "–"
        count = f"{len(times)}" if not wrong else f"{len(times)}, {wrong} wrong"
        rows.append((min(times, default=float("inf")), [*way, count, size, _microseconds(times)]))
    sizes = ", ".join(f"{key.upper()} {first[key]}" for key in ("m", "k", "n", "r"))
    lines = [line for _, line in sorted(rows, key=lambda row: row[0])]
    title = f"**{TITLES[first['op']]}**, {sizes}, {first['dtype']}"
    return f"{title}:\n\n{markdown_table(['design', 'overlap', 'beside', 'tried', 'best tile', 'best, µs'], lines)}"


def _way(record: Record) -> tuple[str, str, str]:
    """Return the design, the overlap of tiles, and the launches that run beside each other."""
    blocks = record["blocks"]
    beside = [name for name, key in (("side product", "dependent"), ("dA", "gradient_beside")) if blocks.get(key)]
    earlier = blocks.get("overlap", "").replace("none", "")  # ways to overlap tiles that are deleted since
    resident = "two programs" if blocks.get("resident") == 2 else ""
    overlap = ", ".join(filter(None, [earlier, resident]))
    return blocks["design"], overlap, ", ".join(beside)


def _microseconds(times: Sequence[float]) -> str:
    return f"{1e3 * min(times):.1f}" if times else "–"
