"""Compile every kernel for GPUs that need not be present, and read the machine code.

`python -m bench.audit` runs the operators on tensors without storage, compiles every launch they would make for each
target and prints registers, spills, shared memory, how many blocks fit on a multiprocessor, and the matrix and copy
instructions used. It needs Triton and the tools that ship inside it, no GPU and no driver; the interpreter must be off
(TRITON_INTERPRET unset). Cases called "mixed" have float32 factors beside half precision.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench.audit.jobs import DTYPES, SHAPES, Row, audit, design_jobs, shape_jobs, table_jobs
from bench.audit.offline import TARGETS, refuse_interpreter
from bench.harness.machine import usable_cores
from bench.harness.records import write_text


def show(rows: Iterable[Row]) -> None:
    """Print the table."""
    header = ("kernel", "case", "target", "regs", "spill", "shared", "blocks/SM")
    print("{:<33} {:<48} {:<7} {:>4} {:>5} {:>7} {:>9}  instructions".format(*header))
    for row in rows:
        figures = f"{row.registers:>4} {row.spill_bytes:>5} {row.shared_bytes:>7} {row.blocks_resident:>9}"
        end = f"FAILED {row.error}" if row.error else f"{figures}  {' '.join(row.instructions)}"
        print(f"{row.kernel:<33} {row.case:<48} {row.target:<7} {end}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and, if asked, write it as JSON; return 1 if a kernel does not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.audit", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"], choices=DTYPES)
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, the usual ones first")
    parser.add_argument(
        "--no-designs",
        action="store_true",
        help="leave out designs that are candidates only, and tables with mixed precision",
    )
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes to compile in (0: this one)")
    options = parser.parse_args(arguments)
    if refuse_interpreter():
        return 2
    targets = [TARGETS[name] for name in options.targets]
    jobs = [
        *shape_jobs(SHAPES[: options.shapes], options.dtypes, targets),
        *(() if options.no_designs else design_jobs(options.dtypes, targets)),
        *table_jobs(targets, mixed=not options.no_designs),
    ]
    rows = audit(jobs, options.workers)
    if options.json:
        write_text(options.json, json.dumps([asdict(row) for row in rows], indent=1))
    show(rows)
    return 1 if any(row.error for row in rows) else 0
