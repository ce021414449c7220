"""The part of `python -m bench.gpu` that measures training steps of many clients."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from bench.device.jobs import perform
from bench.device.state import LEAST_SECONDS, Run
from bench.harness.processes import Outcome, Workers
from bench.harness.records import Record
from bench.simulation.cases import SimulationCase
from bench.simulation.measure import SECONDS_EACH, Simulation, blamed, simulation_records
from bench.simulation.providers import COMPILED


def time_simulations(run: Run, cases: Sequence[SimulationCase]) -> None:
    """Time training steps of many clients until the time is up: compiled ones after all others."""
    items = []
    for compiled in (False, True):
        for case in cases:
            names = tuple(name for name in run.missing_steps(case) if (name == COMPILED) is compiled)
            if names:
                items.append(Simulation(case, run.device, names))
    answer = partial(perform, defaults=run.defaults)
    with Workers(answer, min(run.workers, len(items), 1), SECONDS_EACH) as workers:
        for position, outcome in workers.outcomes(items, run.end - LEAST_SECONDS, run.end):
            item = items[position]
            ran = blamed(outcome)
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
            speeds = ", ".join(map(_speed, records))
            run.say(f"[{position + 1}/{len(items)}] {item.case.name}: {speeds} clients·steps/s")
            for record in records:
                if record["status"] != "timed":
                    run.say(f"    {str(record['status']).upper()} {record['provider']}: {record['cause']}")


def _speed(record: Record) -> str:
    speed = record.get("clients_steps_per_second")
    return f"{record['provider']} {f'{speed:.4g}' if speed else '–'}"
