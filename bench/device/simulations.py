"""The part of `python -m bench.gpu` that measures training steps: of many clients, and of whole models."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from bench.device.jobs import perform
from bench.device.state import LEAST_SECONDS, Run
from bench.harness.processes import Outcome, Workers
from bench.harness.records import Record
from bench.models.cases import ModelCase
from bench.models.measure import REFERENCES as MODEL_REFERENCES
from bench.models.measure import SECONDS_EACH as MODEL_SECONDS
from bench.models.measure import ModelStep
from bench.models.providers import is_compiled
from bench.simulation.cases import SimulationCase
from bench.simulation.measure import REFERENCES, SECONDS_EACH, Simulation, blamed, simulation_records
from bench.simulation.providers import COMPILED


def time_simulations(run: Run, cases: Sequence[SimulationCase]) -> None:
    """Time training steps of many clients until the time is up: compiled ones after all others."""
    items = []
    for compiled in (False, True):
        for case in cases:
            names = tuple(name for name in run.missing_steps(case) if (name == COMPILED) is compiled)
            if names:
                items.append(Simulation(case, run.device, names))
    _time(run, items, SECONDS_EACH, REFERENCES, "clients·steps/s")


def time_models(run: Run, cases: Sequence[ModelCase]) -> None:
    """Time whole models until the time is up: compiled ones after all others, each by itself as it takes long."""
    items = []
    for case in cases:
        names = tuple(name for name in run.missing_steps(case) if not is_compiled(name))
        if names:
            items.append(ModelStep(case, run.device, names))
    for case in cases:
        items += [ModelStep(case, run.device, (name,)) for name in run.missing_steps(case) if is_compiled(name)]
    _time(run, items, MODEL_SECONDS, MODEL_REFERENCES, "tokens/s")


def _time(run: Run, items: list[Any], seconds_each: float, references: Sequence[str], unit: str) -> None:
    """Time cases in turn and record the results; what ended a process is left out, and the rest timed again."""
    answer = partial(perform, defaults=run.defaults)
    with Workers(answer, min(run.workers, len(items), 1), seconds_each) as workers:
        for position, outcome in workers.outcomes(items, run.end - LEAST_SECONDS, run.end):
            item = items[position]
            ran = blamed(outcome, references)
            if outcome.value is None and ran is not None:
                run.say(f"    FAILED {item.case.name}: {ran}: {outcome.error}")
                item = replace(item, failed={**item.failed, ran: str(outcome.error)})
                if not set(item.providers) <= set(item.failed):
                    items.append(item)
                    continue
                outcome = Outcome([])
            if outcome.cut and not any(isinstance(noted, list) for noted in outcome.notes):
                continue
            records = simulation_records(item, outcome)
            run.file.add(records)
            speeds = ", ".join(_speed(record, unit) for record in records)
            run.say(f"[{position + 1}/{len(items)}] {item.case.name}: {speeds} {unit}")
            for record in records:
                if record["status"] != "timed":
                    run.say(f"    {str(record['status']).upper()} {record['provider']}: {record['cause']}")


def _speed(record: Record, unit: str) -> str:
    speed = record.get("tokens_per_second" if unit == "tokens/s" else "clients_steps_per_second")
    return f"{record['provider']} {f'{speed:.4g}' if speed else '–'}"
