"""The costs of a run, put together from its configuration: `python -m fed estimate`."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean

from fed.config import RunConfig
from fed.errors import FedError
from fed.experiments.costs.compute import (
    evaluation_operations,
    fold_operations,
    server_operations,
    step_operations,
    trace,
)
from fed.experiments.costs.memory import (
    Disk,
    ServerMemory,
    TrainingMemory,
    client_memory,
    cohort_bytes,
    disk,
    population_bytes,
    server_memory,
)
from fed.experiments.costs.timing import Speeds
from fed.experiments.costs.traffic import Messages, Traffic, expected_traffic, round_traffic
from fed.experiments.costs.workload import Workload
from fed.models.weightless import weightless
from fed.simulation.clients import Estimate, local_steps, ranks_within
from fed.types import Client

# The factors that clients train, in odd and in even rounds; in other methods both.
_SIDES = {"ffa-lora": ("B",), "rolora": ("B", "A")}
EXACT_DRAWS = 20_000_000  # clients times rounds up to which every round's clients are drawn; it takes a few seconds


@dataclass(frozen=True)
class ClientCost:
    """What the clients of one rank cost: operations of training in a round, memory, and bytes in a usual round."""

    rank: int
    clients: int
    steps: float
    train_operations: int
    memory: TrainingMemory
    upload_bytes: int
    download_bytes: int


@dataclass(frozen=True)
class Population:
    """What depends on the number of clients: a round's mean bytes, the server's memory for clients, the disk."""

    clients: int
    traffic: Traffic
    population_bytes: int
    disk: Disk
    kept: int

    @property
    def disk_bytes(self) -> int:
        """The bytes on the disk at the end of the run."""
        return self.disk.total_bytes(self.kept)


@dataclass(frozen=True)
class Costs:
    """The costs of a run. `parameters` are those of the base, `trained` the numbers of the adapter, `head` the head's.

    `cohort` is the memory of `cohort_size` clients together. `traffic` are the bytes of every round, or empty where
    drawing them all would take long. Operations are a round's: of all clients' training, of aggregation, of
    evaluation. `populations` are the configured number of clients and others that were asked for.
    """

    config: RunConfig
    load: Workload
    matrices: int
    parameters: int
    trained: int
    head: int
    by_rank: tuple[ClientCost, ...]
    cohort_size: int
    cohort: TrainingMemory
    server: ServerMemory
    traffic: tuple[Traffic, ...]
    train_operations: int
    aggregation_operations: int
    evaluation_operations: int
    populations: tuple[Population, ...]

    def server_seconds(self, speeds: Speeds) -> float:
        """Return the server's seconds a round at the speed in operations at which a machine trains clients."""
        a_client = self.train_operations / self.config.clients.per_round
        per_second = speeds.clients_per_second * a_client
        return (self.aggregation_operations + self.evaluation_operations) / per_second


def costs(config: RunConfig, load: Workload, clients: Sequence[int] = ()) -> Costs:
    """Return the costs of a run, and those that change with the number of clients also for the numbers `clients`.

    Raises FedError for a number below `clients.per_round`, a model that cannot be described, and a method whose traffic
    is not known.
    """
    for count in clients:
        if count < config.clients.per_round:
            raise FedError(
                f"--clients is {count}: it should be at least clients.per_round ({config.clients.per_round})"
            )
    with weightless(config, load.labels) as shared:
        traced = trace(shared, load)
        messages = Messages.of(config, shared)
        layers = [(layer.in_features, layer.out_features) for layer in shared.handle.layers.values()]
        full, frozen = config.adapter.rank, config.adapter.unselected == "frozen"
        selects = config.method == "fed-plora"
        width, count = load.width(config), config.clients.count
        ranks = list(config.clients.ranks)
        if config.clients.memory_mib:
            budgets = config.clients.memory_mib
            small, large = (client_memory(config, shared, load, rank).total_bytes for rank in (1, full))
            module = (large - small) // max(1, full - 1) or small
            ranks = ranks_within(budgets, Estimate(small - module, module), full)
        steps_of = _steps_by_rank(config, ranks, load)
        sides = _SIDES.get(config.method, ("AB",))
        again = config.train.gradient_checkpointing
        by_rank = []
        for rank, (having, steps) in steps_of.items():
            held = (full if selects else rank) if frozen or config.execution == "cohort" else 0
            step = fmean(step_operations(traced, load, width, rank, held, side, again).total for side in sides)
            folding = fold_operations(layers, full - rank) if selects and not held else 0
            sent = messages.of_client(rank, 1, 0)
            by_rank.append(
                ClientCost(
                    rank,
                    having,
                    steps,
                    round(steps * step) + folding,
                    client_memory(config, shared, load, rank),
                    sent.upload_bytes,
                    sent.download_bytes,
                )
            )
        per_round = config.clients.per_round
        in_round = _typical(steps_of, per_round)
        head = sum(tensor.numel() for tensor in shared.head.values())
        cohort_size = config.clients_per_pass or per_round
        exact = count * config.rounds <= EXACT_DRAWS
        traffic = tuple(round_traffic(messages, ranks, config.rounds)) if exact else ()
        populations = []
        for number in dict.fromkeys((count, *clients)):
            kept = round(number * (1 - (1 - per_round / number) ** config.rounds))
            populations.append(
                Population(
                    number,
                    expected_traffic(messages, ranks, number, per_round, config.rounds),
                    population_bytes(config, shared, load, number),
                    disk(config, shared, in_round, number, kept, config.rounds),
                    kept,
                )
            )
        own = {id(factor) for layer in shared.handle.layers.values() for factor in (layer.lora_A, layer.lora_B)}
        return Costs(
            config=config,
            load=load,
            matrices=len(layers),
            parameters=sum(value.numel() for value in shared.model.parameters() if id(value) not in own),
            trained=full * sum(K + N for K, N in layers),
            head=head,
            by_rank=tuple(by_rank),
            cohort_size=cohort_size,
            cohort=cohort_bytes(config, shared, load, cohort_size),
            server=server_memory(config, shared, in_round),
            traffic=traffic,
            train_operations=round(per_round * sum(cost.clients * cost.train_operations for cost in by_rank) / count),
            aggregation_operations=server_operations(config, layers, sum(in_round), per_round * head),
            evaluation_operations=evaluation_operations(traced, load, full),
            populations=tuple(populations),
        )


def _steps_by_rank(config: RunConfig, ranks: Sequence[int], load: Workload) -> dict[int, tuple[int, float]]:
    """Return the number of clients of each rank, the smallest first, and their mean number of local steps."""
    count, steps = config.clients.count, max(1, len(config.train.client_steps))
    cycle = math.lcm(len(ranks), steps)  # after so many clients their ranks and steps come again
    found: dict[int, list[tuple[int, int]]] = {}
    for place in range(min(cycle, count)):
        client = Client(place, ranks[place % len(ranks)], load.client_rows)
        found.setdefault(client.rank, []).append((-(-(count - place) // cycle), local_steps(config, client)))
    totals = {rank: (sum(times for times, _ in found[rank]), found[rank]) for rank in sorted(found)}
    return {
        rank: (having, sum(times * own for times, own in parts) / having) for rank, (having, parts) in totals.items()
    }


def _typical(steps_of: Mapping[int, tuple[int, float]], per_round: int) -> list[int]:
    """Return the ranks of a round's clients if each rank has its share in it, the largest ones first."""
    ranks = sorted(steps_of, reverse=True)
    ends = [*accumulate(steps_of[rank][0] for rank in ranks)]
    return [ranks[bisect_right(ends, place * ends[-1] // per_round)] for place in range(per_round)]
