"""What a server does beside training, by the number of its clients, each measured in a process of its own."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from bench.clients import with_past
from fed.config import load
from fed.data import federated_data
from fed.experiments.run import limits
from fed.models import base_model
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation import checkpoint
from fed.simulation.client_store import ClientStore
from fed.simulation.clients import drawn
from fed.simulation.inputs import input_digests
from fed.simulation.rounds import Federation
from fed.simulation.rows import RowFile

SETTINGS = (
    "clients.per_round=10",
    "data.rows_per_client=16",
    "data.test_rows=10",
    "train.local_steps=1",
    "measure.noise=false",
    "measure.clients=false",
)
KEEPING = ("method=fedsa-lora", "train.head=personal", "clients.ranks=[16]")
ROUNDS = 3


@dataclass(frozen=True)
class Point:
    """A number of clients, and whether each of them has taken part before and keeps a file."""

    clients: int
    keep: bool = False


@dataclass(frozen=True)
class Server:
    """Seconds at the start of a run and in every round outside of training, and bytes, for so many clients.

    `dealing_seconds` are those of dealing out rows, `digest_seconds` of taking the inputs' digests, `first_seconds` of
    making the first state; then those of drawing a round's clients, of the next state of all clients, and of a
    checkpoint, whose text has `text_bytes` and whose tensors have `tensors_bytes`. `client_bytes` is how much the
    process grew by with all clients.
    """

    clients: int
    keep: bool
    dealing_seconds: float
    digest_seconds: float
    first_seconds: float
    draw_seconds: float
    update_seconds: float
    checkpoint_seconds: float
    text_bytes: int
    tensors_bytes: int
    client_bytes: int


def measure(point: Point) -> Server:
    """Play a few rounds of the embedded task with so many clients, and measure everything but training."""
    config = load("digits", [*SETTINGS, *(KEEPING if point.keep else ()), f"clients.count={point.clients}"])
    few = config.model_copy(update={"clients": config.clients.model_copy(update={"count": 10})})
    with limits(1), TemporaryDirectory() as name:
        federated_data.load(few)  # what is imported for it is not of the clients
        before, began = resident_bytes(), time.perf_counter()
        data = federated_data.load(config)
        dealing = time.perf_counter() - began
        model = base_model.build(config, data)
        began = time.perf_counter()
        inputs = input_digests(data, model)
        digesting = time.perf_counter() - began
        with adapted(config, model, head_names(model)) as shared, closing(RowFile(Path(name))) as file:
            store = ClientStore(Path(name) / checkpoint.FOLDER, shared.device)
            federation = Federation(config, data.to(shared.device), shared, print, store)
            began = time.perf_counter()
            state = federation.beginning()
            first = time.perf_counter() - began
            if point.keep:
                state = with_past(federation, state)
            grown = resident_bytes() - before
            saving: list[float] = []
            for _ in range(ROUNDS):
                played = federation.round(state)
                state = played.state
                file.append({**played.row, "round": state.server.round})
                began = time.perf_counter()
                checkpoint.save(Path(name), config, state, store, file.seal, inputs)
                saving.append(time.perf_counter() - began)
            last = Path(name) / checkpoint.FOLDER / f"round-{state.server.round}"
            sizes = [(last / part).stat().st_size for part in (checkpoint.FACTS, checkpoint.TENSORS)]
            updating = _seconds(lambda: federation.update_clients(state, state.server, []))
            drawing = _seconds(lambda: drawn(config, state.clients, state.server.round + 1))
    # The first checkpoint flushes the files that clients were given before, which is no round's work.
    return Server(**asdict(point), dealing_seconds=dealing, digest_seconds=digesting, first_seconds=first,
                  draw_seconds=drawing, update_seconds=updating, checkpoint_seconds=median(saving[1:]),
                  text_bytes=sizes[0], tensors_bytes=sizes[1], client_bytes=grown)  # fmt: skip


def resident_bytes() -> int:
    """Return the memory that this process takes now."""
    with Path("/proc/self/statm").open(encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


def _seconds(run: Callable[[], object], repeats: int = 5) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return median(taken)
