"""The training steps `python -m bench.gpu` measures, each in a process that may crash without ending the run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.records import Record, blank
from bench.simulation.cases import DIGITS_VIT, IMAGE_TOKENS, SimulationCase, simulation_cases
from bench.simulation.measure import measure
from bench.workers import Outcome

SECONDS_EACH = 150.0


@dataclass(frozen=True)
class Simulation:
    """A case on a device, as it is sent to a process."""

    case: SimulationCase
    device: str


def device_simulations(device_type: str) -> tuple[SimulationCase, ...]:
    """List a device's cases, what matters most first; on the CPU a tiny one that tries everything."""
    if device_type == "cuda":
        return simulation_cases("cuda")
    return (SimulationCase(DIGITS_VIT, 2, IMAGE_TOKENS, 2, "float32"),)


def simulate(work: Simulation) -> list[Record]:
    """Measure one case."""
    try:
        found = measure(work.case, torch.device(work.device))
        return [blank(**one.record) for one in found.values()]
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def simulation_records(work: Simulation, outcome: Outcome) -> list[Record]:
    """Return what a process found, or one record that says why there is nothing: what is divided by did not run."""
    if outcome.value is not None:
        return list(outcome.value)
    facts = {**work.case.facts(), "device": work.device, "provider": "base"}
    return [blank(**facts) | {"status": "not available", "cause": outcome.error}]
