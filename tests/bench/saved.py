"""A saved benchmark file, small enough to work out by hand."""

import json
from pathlib import Path
from typing import Any

from bench.cases import FOLDS, MIXED_OPS

TIMES_MS = {
    ("forward", 16): {"base": 2.0, "peft": 4.0, "peft-compiled": 3.0, "fused": 2.2},
    ("forward", 32): {"base": 2.0, "peft": 8.0, "peft-compiled": 8.0, "fused": 4.0},
    ("fold", 16): {"base": 1.0, "peft": 9.0, "fused": 1.5},
}
# Bytes beyond those of one projection: for one weight, and for three weights 64, 32 and 32 wide.
MORE_MS = {
    "dropout": {"base": 2.0, "peft": 5.0, "peft-compiled": 4.0, "fused": 3.0},
    "mixed_forward": {
        "base": 2.0,
        "peft": 8.0,
        "peft-autocast": 6.0,
        "peft-compiled": 5.0,
        "fused": 3.0,
        "fused-mixed": 3.0,
    },
    "mixed": {"base": 4.0, "peft": 20.0, "peft-autocast": 10.0, "fused": 5.0, "fused-mixed": 6.0},
    "projections_forward": {"base": 2.0, "peft": 6.0, "peft-compiled": 4.0, "fused-apart": 4.0, "fused": 3.0},
    "projections": {"base": 4.0, "peft": 12.0, "peft-compiled": 8.0, "fused-apart": 8.0, "fused": 6.0},
    "fold_out": {"base": 1.0, "peft": 8.0, "fused-inplace": 1.6, "fused": 2.0},
    "fold_many": {"base": 4.0, "peft": 16.0, "fused-apart": 10.0, "fused": 5.0},
}
SECOND_FORWARD_MS = {"base": 100.0, "peft": 400.0, "fused": 440.0}


def saved_run(commit: str = "0123456789abcdef") -> dict[str, Any]:
    """Return a run of three forward shapes (one lacks compiled PEFT, one is of rank 32) and one fold."""
    items = []
    for (op, rank), times in TIMES_MS.items():
        items += [_item(op, "query", rank, provider, times) for provider in times]
    items += [_item("forward", "up", 16, provider, SECOND_FORWARD_MS) for provider in SECOND_FORWARD_MS]
    missing = {**_facts("forward", "up", 16), "provider": "peft-compiled", "cause": "no C++ compiler | none"}
    return {
        "machine_info": {
            "device": "cpu",
            "device_name": "Example CPU",
            "threads": 2,
            "backend": "torch",
            "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": None},
        },
        "commit_info": {"id": commit, "dirty": True},
        "datetime": "2026-01-02T03:04:05+00:00",
        "benchmarks": items,
        "not_available": [missing],
    }


def saved_run_of_every_op() -> dict[str, Any]:
    """Return the same run with the operators that newer files also hold."""
    run = saved_run()
    for op, times in MORE_MS.items():
        for provider in times:
            item = _item(op, "query", 16, provider, times)
            if op not in ("dropout", "fold_out", *MIXED_OPS):
                item["extra_info"] |= {"projection": "q, k, v", "widths": [64, 32, 32]}
            run["benchmarks"].append(item)
    return run


def write_run(path: Path, run: dict[str, Any]) -> Path:
    path.write_text(json.dumps(run), encoding="utf-8")
    return path


def _item(op: str, projection: str, rank: int, provider: str, times: dict[str, float]) -> dict[str, Any]:
    return {
        "name": "test_x",
        "extra_info": {
            **_facts(op, projection, rank),
            "provider": provider,
            "time_ms": times[provider],
            "iqr_ms": 0.1,
            "rounds": 9,
            "ratio_to_base": times[provider] / times["base"],
            "ratio_to_peft": times[provider] / times["peft"],
            "peak_bytes": 3 * 2**20,
        },
    }


def _facts(op: str, projection: str, rank: int) -> dict[str, Any]:
    return {
        "op": op,
        "model": "tiny",
        "projection": projection,
        "m": 0 if op in FOLDS else 512,
        "k": 64,
        "n": 128,
        "r": rank,
        "dtype": "float32",
        "device": "cpu",
    }
