"""The training steps `python -m bench.gpu` measures, each in a process that may crash without ending the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from bench.records import Record, blank
from bench.simulation.cases import DIGITS_VIT, IMAGE_TOKENS, SimulationCase, simulation_cases
from bench.simulation.measure import measure
from bench.workers import Outcome

SECONDS_EACH = 120.0
# Whom every loop has, for the others are divided by them.
REFERENCES = ("base", "peft-loop")


@dataclass(frozen=True)
class Simulation:
    """A case on a device, as it is sent to a process: whom to measure, and why others are not (any more)."""

    case: SimulationCase
    device: str
    providers: tuple[str, ...]
    failed: Mapping[str, str] = field(default_factory=dict)


def device_simulations(device_type: str) -> tuple[SimulationCase, ...]:
    """List a device's cases, what matters most first; on the CPU a tiny one that tries everything."""
    if device_type == "cuda":
        return simulation_cases("cuda")
    return (SimulationCase(DIGITS_VIT, 2, IMAGE_TOKENS, 2, "float32"),)


def simulate(work: Simulation) -> list[Record]:
    """Measure one case."""
    wanted = [name for name in work.providers if name not in work.failed]
    found = measure(work.case, torch.device(work.device), wanted=wanted)
    return [one.record for one in found.values()]


def simulation_records(work: Simulation, outcome: Outcome) -> list[Record]:
    """Return a record per wanted provider: what a process found or, where it was stopped, had found by then.

    Where it found nothing that is one record, which says why: what is divided by did not run.
    """
    found: list[Record] | None = outcome.value
    if found is None:
        found = next((told for told in reversed(outcome.notes) if isinstance(told, list)), None)
    if found is None:
        return [_lost(work, "base", outcome.error)]
    named: dict[str, Record] = {record["provider"]: blank(**record) for record in found}
    named |= {name: _lost(work, name, cause) for name, cause in work.failed.items()}
    return [named[name] for name in work.providers if name in named]


def blamed(outcome: Outcome) -> str | None:
    """Return the provider that ran alone when its process was stopped, if one did."""
    last = outcome.notes[-1] if outcome.notes and not outcome.cut else None
    return last if isinstance(last, str) and last not in REFERENCES else None


def _lost(work: Simulation, provider: str, cause: str | None) -> Record:
    facts = {**work.case.facts(), "device": work.device, "provider": provider}
    return blank(**facts) | {"status": "not available", "cause": cause}
