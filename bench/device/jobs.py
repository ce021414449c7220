"""The work that `python -m bench.gpu` gives to worker processes: checks, warm-ups, timings and training steps."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from bench.cases import Case
from bench.checks.inputs import CheckShape
from bench.checks.operators import run_checks
from bench.harness.timing import Plan
from bench.measure import Warmup, measure_on_device, warm_up
from bench.models.measure import ModelStep, train_model
from bench.simulation.measure import Simulation, simulate
from plora_kernels.tuning import lookup


@dataclass(frozen=True)
class Check:
    """Some forms of a shape to check."""

    shape: CheckShape
    forms: tuple[str, ...]


@dataclass(frozen=True)
class Timing:
    """Providers of a case to time in turn; those that `failed` ahead, and why, are recorded and not run."""

    case: Case
    device: str
    plan: Plan
    providers: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def perform(work: Check | Warmup | Timing | Simulation | ModelStep, *, defaults: bool = False) -> Any:
    """Do one piece of work, with blocks from the tables or with the default ones, and return its result."""
    # Compiling runs in as many processes as there are cores already.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        with default_blocks_alone() if defaults else nullcontext():
            match work:
                case Check():
                    return run_checks(work.shape, work.forms)
                case Warmup():
                    return warm_up(work)
                case Timing(device=device):
                    return measure_on_device(work.case, torch.device(device), work.plan, work.providers, work.failed)
                case Simulation():
                    return simulate(work)
                case ModelStep():
                    return train_model(work)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # other processes need the memory


@contextmanager
def default_blocks_alone() -> Iterator[None]:
    """Make every launch use the default blocks of its shape instead of those in tables."""
    no_tables = functools.cache(lambda device: ())
    with mock.patch.object(lookup, "_tables_of", no_tables):
        lookup.forget_tables()
        try:
            yield
        finally:
            lookup.forget_tables()
