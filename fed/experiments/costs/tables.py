"""The tables that `python -m fed estimate` prints: headings first, every cell a text."""

from __future__ import annotations

from collections.abc import Sequence

from fed.experiments.costs.estimate import Costs
from fed.experiments.costs.quantities import seconds, sized
from fed.experiments.costs.timing import Speeds, most_useful_machines, round_time

Table = list[tuple[str, ...]]


def model_table(costs: Costs) -> Table:
    """Return what is trained on what."""
    config, load = costs.config, costs.load
    row = "an image" if config.data.name == "digits" else f"{load.tokens} tokens"
    return [
        ("a run", ""),
        ("base, numbers", sized(costs.parameters, "").strip()),
        ("adapter, numbers", f"{sized(costs.trained, '').strip()} in {costs.matrices} matrices"),
        ("head, numbers", f"{costs.head:,} ({config.train.head})"),
        ("rows", f"{row} each, {load.client_rows} a client, {load.test_rows} to test on"),
        ("clients", f"{config.clients.count}, {config.clients.per_round} a round, {config.rounds} rounds"),
    ]


def client_table(costs: Costs) -> Table:
    """Return what the clients of each rank cost in a round."""
    lines: Table = [("a client of rank", "clients", "steps", "compute", "memory", "up", "down")]
    for cost in costs.by_rank:
        lines.append(
            (
                str(cost.rank),
                str(cost.clients),
                f"{cost.steps:g}",
                sized(cost.train_operations, "FLOP"),
                sized(cost.memory.total_bytes, "B"),
                sized(cost.upload_bytes, "B"),
                sized(cost.download_bytes, "B"),
            )
        )
    return lines


def server_table(costs: Costs) -> Table:
    """Return what the server and a cohort cost in a round."""
    server, cohort, size = costs.server, costs.cohort, costs.cohort_size
    return [
        ("a round", "compute", "memory"),
        ("training, all clients", sized(costs.train_operations, "FLOP"), ""),
        (f"training, {size} clients in a cohort", "", sized(cohort.total_bytes, "B")),
        ("  of it the base", "", sized(cohort.base_bytes, "B")),
        ("aggregation", sized(costs.aggregation_operations, "FLOP"), sized(server.working_bytes, "B")),
        ("evaluation", sized(costs.evaluation_operations, "FLOP"), ""),
        ("server: adapter, head, moments", "", sized(server.adapter_bytes, "B")),
        ("server: folded into the base", "", sized(server.folded_bytes, "B")),
        ("server: the round's updates", "", sized(server.updates_bytes, "B")),
    ]


def clients_table(costs: Costs) -> Table:
    """Return what changes with the number of clients."""
    lines: Table = [("clients", "up a round", "down a round", "run, up + down", "server's memory", "disk at the end")]
    for own in costs.populations:
        up, down = own.traffic.upload_bytes, own.traffic.download_bytes
        whole = costs.config.rounds * (up + down)
        if costs.traffic and own.clients == costs.config.clients.count:
            up, down = (sum(getattr(one, f"{way}load_bytes") for one in costs.traffic) for way in ("up", "down"))
            whole, up, down = up + down, up // len(costs.traffic), down // len(costs.traffic)
        lines.append(
            (
                f"{own.clients:,}",
                sized(up, "B"),
                sized(down, "B"),
                sized(whole, "B"),
                sized(own.population_bytes, "B"),
                sized(own.disk_bytes, "B"),
            )
        )
    return lines


def time_table(costs: Costs, speeds: Speeds, machines: Sequence[int]) -> Table:
    """Return the time of a round and of the run on some numbers of machines."""
    lines: Table = [("machines", "training", "network", "server", "a round", "server's share", "run")]
    traffic = costs.populations[0].traffic
    crossing = traffic.upload_bytes + traffic.download_bytes
    for number in machines:
        time = round_time(speeds, costs.config.clients.per_round, number, crossing)
        parts = time.train_seconds, time.network_seconds, time.server_seconds, time.total_seconds
        share = f"{100 * time.serial_share:.0f} %"
        lines.append((f"{number:,}", *map(seconds, parts), share, seconds(costs.config.rounds * time.total_seconds)))
    return lines


def notes(costs: Costs, speeds: Speeds | None) -> list[str]:
    """Return what the figures leave out or take for granted, a sentence each."""
    config, said = costs.config, []
    if not costs.load.test_rows:
        said.append("evaluation is not counted: --test-rows says how many rows the server tests on")
    if config.method == "hetlora" and config.hetlora.prune:
        said.append("hetlora.prune is true: clients that prune their rank cost less than this")
    if config.adapter.dropout:
        said.append("adapter.dropout draws masks, which are not counted")
    if not costs.traffic:
        said.append("bytes are expected ones: so many clients in so many rounds are not drawn one by one")
    if speeds is not None:
        crossing = costs.populations[0].traffic
        most = most_useful_machines(speeds, config.clients.per_round, crossing.upload_bytes + crossing.download_bytes)
        said.append(
            f"with {most:,} machines the server and its network take about as long as training: more of them shorten "
            "a round by less than half"
            if most < config.clients.per_round
            else f"up to {most:,} machines, one a client, training takes most of a round"
        )
    return said
