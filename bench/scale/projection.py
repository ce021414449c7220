"""What the cost model says of ten thousand and a million clients, with the speeds that were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers

from fed.config import load
from fed.experiments.costs.estimate import Costs, costs
from fed.experiments.costs.timing import Speeds, round_time
from fed.experiments.costs.workload import workload

POPULATIONS, SHARE, MACHINES = (10_000, 1_000_000), 100, (1, 8, 64)  # clients, of which a hundredth is drawn
NETWORK_BITS = 10e9  # of the server's link, in a second
# Of a machine that trains clients of a 7B model, in operations a second: a GPU of 1,000 peak at two fifths.
LARGE_MACHINE = 4e14
LARGE = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


@dataclass(frozen=True)
class Projected:
    """A round of `per_round` of `clients` clients: bytes and seconds. `train_seconds` are those on each of MACHINES.

    `updates_bytes` are the round's updates, held at once; `population_bytes` the server's memory for all clients;
    `text_bytes` that of a checkpoint's text; `disk_bytes` the files of the clients that have taken part by the end.
    """

    model: str
    method: str
    clients: int
    per_round: int
    round_bytes: int
    updates_bytes: int
    population_bytes: int
    text_bytes: int
    disk_bytes: int
    network_seconds: float
    population_seconds: float
    server_seconds: float
    train_seconds: list[float]


def project(line: Mapping[str, Any], servers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what follows for the embedded ViT and a Llama of 7B numbers, as `Projected`.

    `line` is the embedded ViT's of steps, and `servers` what was measured of servers by their clients.
    """
    from bench.report.scale_tables import per_client

    found = []
    with TemporaryDirectory() as folder:
        architecture = transformers.LlamaConfig(vocab_size=32_000, **LARGE)
        architecture.dtype = torch.bfloat16
        architecture.save_pretrained(Path(folder))
        large = ["model.path=" + folder, "data.path=" + folder, "device=cpu", "train.local_epochs=0", "rounds=40"]
        for model, preset, settings, rows in (
            ("the embedded ViT", "digits", ["data.rows_per_client=16"], None),
            ("Llama, 7B", "flan-fedrora", [*large, "train.local_steps=10", "adapter.dropout=0"], 64),
        ):
            for method in ("fed-plora", "flora"):
                for clients in POPULATIONS:
                    counts = [f"clients.count={clients}", f"clients.per_round={clients // SHARE}", f"method={method}"]
                    config = load(preset, [*settings, *counts])
                    of_run = costs(config, workload(config, client_rows=rows, test_rows=449 if rows is None else 0))
                    keeps = of_run.populations[0].disk.client_bytes > 0
                    own = [one for one in servers if one["keep"] == keeps]
                    each = sum(per_client(own, f"{name}_seconds") for name in ("draw", "update", "checkpoint"))
                    speed = LARGE_MACHINE
                    if rows is None:
                        step = of_run.train_operations / config.clients.per_round / config.train.local_steps
                        speed = step / line["each_seconds"]
                    found.append(asdict(_projected(model, of_run, speed, clients * each)))
    return found


def _projected(model: str, of_run: Costs, operations_per_second: float, population_seconds: float) -> Projected:
    config, population = of_run.config, of_run.populations[0]
    per_round = config.clients.per_round
    crossing = population.traffic.upload_bytes + population.traffic.download_bytes
    speeds = Speeds(operations_per_second * per_round / of_run.train_operations, 0.0, NETWORK_BITS / 8)
    times = [round_time(speeds, per_round, machines, crossing) for machines in MACHINES]
    return Projected(
        model=model,
        method=config.method,
        clients=config.clients.count,
        per_round=per_round,
        round_bytes=crossing,
        updates_bytes=of_run.server.updates_bytes,
        population_bytes=population.population_bytes,
        text_bytes=population.disk.text_bytes,
        disk_bytes=population.kept * population.disk.client_bytes,
        network_seconds=times[0].network_seconds,
        population_seconds=population_seconds,
        server_seconds=of_run.server_seconds(speeds),
        train_seconds=[time.train_seconds for time in times],
    )
