"""Memory by the number of clients, and time by the number drawn each round, each measured in a process of its own.

`python -m bench.clients --out bench/results` writes `clients-<device>.json`; `python -m bench.report` tabulates it.
Every client has taken part before and keeps state, because only kept state can grow.
"""

import argparse
import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from bench.harness.machine import commit_of, device_slug, environment, timestamp
from bench.harness.memory import tensor_bytes
from bench.harness.processes import outcomes
from bench.harness.records import ResultsError, write_text
from bench.report.clients_tables import KIND

if TYPE_CHECKING:
    from fed.simulation.rounds import Federation
    from fed.types import RunState

SETTINGS = (
    "method=fedsa-lora",
    "clients.ranks=[16]",
    "train.head=personal",
    "data.rows_per_client=16",
    "measure.noise=false",
)
ROUNDS = 3
SECONDS_EACH = 600.0


@dataclass(frozen=True)
class Point:
    """A number of clients, a number drawn each round, and whether clients' states are on "disk" or in "memory".

    `execution` is the run's: "sequential", or "cohort" in cohorts of the size that measures fastest.
    """

    clients: int
    per_round: int
    kept: str = "disk"
    execution: str = "sequential"


@dataclass(frozen=True, kw_only=True)
class Measured(Point):
    """Medians over rounds of wall-clock and processor seconds; bytes at the end, and the process's peak.

    `tensor_bytes` are those of every tensor alive between two rounds, `kept_bytes` what all clients keep.
    """

    seconds_per_round: float
    cpu_seconds_per_round: float
    tensor_bytes: int
    process_bytes: int
    kept_bytes: int


POINTS = (
    *(Point(clients, 10) for clients in (100, 1000, 10_000)),
    *(Point(1000, drawn) for drawn in (50, 100)),
    *(Point(1000, drawn, execution="cohort") for drawn in (10, 50, 100)),
    Point(10_000, 10, kept="memory"),
)


def measure_point(point: Point, folder: Path, rounds: int = ROUNDS, settings: Sequence[str] = ()) -> Measured:
    """Play rounds of the embedded task with so many clients; what they keep goes to a directory in `folder`."""
    from fed.config import load
    from fed.data import federated_data
    from fed.experiments.run import limits
    from fed.models import base_model
    from fed.models.head import head_names
    from fed.models.shared_model import adapted
    from fed.simulation import checkpoint
    from fed.simulation.client_store import ClientStore
    from fed.simulation.inputs import input_digests
    from fed.simulation.rounds import Federation
    from fed.simulation.rows import RowFile
    from fed.training.memory import peak_bytes

    counts = (f"clients.count={point.clients}", f"clients.per_round={point.per_round}", f"rounds={rounds}")
    config = load("digits", [*SETTINGS, *counts, f"execution={point.execution}", *settings])
    rows = federated_data.load(config)
    model = base_model.build(config, rows)
    adapter, kept_below = adapted(config, model, head_names(model)), tempfile.TemporaryDirectory(dir=folder)
    inputs = input_digests(rows, model)
    with limits(config.threads), adapter as shared, kept_below as name, closing(RowFile(Path(name))) as file:
        directory = Path(name)
        store = ClientStore(directory / checkpoint.FOLDER, shared.device) if point.kept == "disk" else None
        federation = Federation(config, rows.to(shared.device), shared, print, store)
        state = with_past(federation, federation.beginning())
        clock, cpu = [], []
        began = time.perf_counter(), time.process_time()
        for played in federation.play(state):
            state = played.state
            if store is not None:
                file.append(played.row)
                checkpoint.save(directory, config, state, store, file.seal, inputs)
            clock.append(time.perf_counter() - began[0])
            cpu.append(time.process_time() - began[1])
            began = time.perf_counter(), time.process_time()
        del played
        return Measured(
            **asdict(point),
            seconds_per_round=median(clock[2:]),  # rows 0 and 1 warm up
            cpu_seconds_per_round=median(cpu[2:]),
            tensor_bytes=tensor_bytes(),
            process_bytes=peak_bytes(shared.device),
            kept_bytes=kept_bytes(state),
        )


def with_past(federation: "Federation", state: "RunState") -> "RunState":
    """Give every client the state that it would have from an earlier round: its own B and head."""
    from fed.simulation.client_store import ClientState

    server, clients = state.server, []
    for client in state.clients:
        memory = {matrix: torch.full_like(B, 1e-3) for matrix, (_, B) in server.adapter.factors.items()}
        head = {name: value.clone() for name, value in server.head.items()}
        kept = ClientState(memory, head, {})
        if federation.store is not None:
            kept = federation.store.keep(client.id, 0, kept)
        clients.append(replace(client, memory=kept.memory, head=kept.head))
    return replace(state, clients=tuple(clients))


def kept_bytes(state: "RunState") -> int:
    """Return the bytes that one client keeps times the number of clients: all keep the same shapes."""
    first = state.clients[0]
    tensors = [*first.memory.values(), *first.head.values()]
    return len(state.clients) * sum(tensor.nbytes for tensor in tensors)


def measure_all(points: Sequence[Point], folder: Path) -> list[Measured]:
    """Measure every point in a process of its own; raise ResultsError for one that fails."""
    found = []
    for point in points:
        measure = functools.partial(measure_point, folder=folder)
        ((_, outcome),) = outcomes(measure, [point], workers=1, seconds_each=SECONDS_EACH)
        if outcome.error is not None:
            raise ResultsError(f"{point} was not measured: {outcome.error}")
        found.append(outcome.value)
        print(
            f"{point.clients} clients, {point.per_round} a round, {point.execution}, kept on {point.kept}: "
            f"{outcome.value.seconds_per_round:.2f} s a round, {outcome.value.process_bytes / 2**20:.0f} MiB",
            file=sys.stderr,
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.clients", description="Memory and time by clients.")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the JSON goes")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    device, commit = torch.device("cpu"), commit_of(Path.cwd())
    try:
        measured = measure_all(POINTS, given.out)
    except ResultsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    found = {
        "kind": KIND,
        "machine": environment(device, threads=1),
        "commit": commit,
        "date": timestamp(),
        "settings": SETTINGS,
        "points": [asdict(point) for point in measured],
    }
    write_text(given.out / f"clients-{device_slug(device)}.json", json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
