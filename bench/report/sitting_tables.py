"""The short table at the end of a sitting: the status of its steps, and the most important times of each case."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.harness.records import SIMULATION, Record, ResultsError, load_records
from bench.report.device_tables import CASE_HEADER, case_columns
from bench.report.runs import by_case

# Columns of time ÷ base; "default" is *fused* with the default blocks.
COLUMNS = ("fused", "default", "peft", "peft-compiled")
MOST_CASES = 24


def sitting_table(out: Path, steps: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of a sitting's steps and of the first cases of its results in a folder."""
    lines = [f"{'step':<10} {'status':>8} {'s':>6} {'of':>6}"]
    for step in steps:
        status = "stopped" if step["status"] is None else str(step["status"])
        lines.append(f"{step['step']:<10} {status:>8} {step['seconds']:>6.0f} {step['limit_s']:>6.0f}")
    for path in sorted(out.glob("*.json")):
        if path.name != "sitting.json" and not path.stem.endswith(("-defaults", "-before")):
            lines += _cases(path)
    return "\n".join(lines)


def _cases(path: Path) -> list[str]:
    try:
        meta, records = load_records(path)
        defaults = path.with_name(f"{path.stem}-defaults.json")
        default = load_records(defaults)[1] if defaults.is_file() else []
    except ResultsError as error:
        return [str(error)]
    cases = by_case([*records, *({**one, "provider": "default"} for one in default if one["provider"] == "fused")])
    lines = [str(meta["device_name"]), " ".join([CASE_HEADER, *(f"{name:>13}" for name in COLUMNS)])]
    for providers in cases[:MOST_CASES]:
        lines.append(" ".join([case_columns(providers), *(f"{_ratio(providers.get(name)):>13}" for name in COLUMNS)]))
    checks = [record for record in records if record["op"] == "check"]
    steps = [record for record in records if record["op"] == SIMULATION]
    wrong = sum(record.get("status") == "wrong" for record in [*records, *default])
    lines.append(
        f"{len(cases)} cases, {len(steps)} records of training steps, {len(checks)} checks; {wrong} of all are wrong"
    )
    return lines


def _ratio(record: Record | None) -> str:
    if record is None or record["ratio_to_base"] is None:
        return "–" if record is None else str(record.get("status"))
    return f"{record['ratio_to_base']:.3f}"
