"""A machine's part of a run: it joins with the same data and base, and trains the clients that it is sent."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import RecordDict

from fed import config as configuration
from fed.config import RunConfig
from fed.data import federated_data as datasets
from fed.data.federated_data import FederatedData
from fed.data.sources import read_local
from fed.errors import FedError
from fed.experiments import run as running
from fed.flower.answers import Answer, answer_records
from fed.flower.bundles import bundled, unbundled
from fed.flower.kept import KeptStates
from fed.flower.protocol import versions, why_other_version
from fed.flower.records import FACTS, facts_of, facts_record, server_of, tensors_of
from fed.models import saved_base
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapted
from fed.simulation.client_store import ClientState, group
from fed.simulation.clients import estimate, ranks_within
from fed.simulation.inputs import BASE, CALLED, LABELS, TOKENIZER, input_digests
from fed.simulation.rounds import Federation, first_state
from fed.simulation.run_directory import BASE as BASE_FOLDER
from fed.training.cohort import check_cohorts
from fed.types import Client, ClientResult, RunState

# What a SuperNode's config may say, beside what Flower itself reads.
OPTIONS = (
    "partition-id",
    "num-partitions",
    "rank",
    "memory-mib",
    "device",
    "threads",
    "model",
    "data",
    "rows",
    "state",
)

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # the name of a file of the base, which no path is


@dataclass
class Machine:
    """A machine that has joined a run: the run's data and base, its one model, and what is folded into that."""

    key: str
    config: RunConfig
    federation: Federation
    kept: KeptStates
    stack: ExitStack
    base_delta: Mapping[str, torch.Tensor]
    first_head: Mapping[str, torch.Tensor]  # which clients with heads of their own begin with
    base_round: int = -1  # the last round that folded something into it

    def close(self) -> None:
        """Restore the model and give the run's resources back."""
        self.stack.close()


def join(
    content: RecordDict, node: Mapping[str, Any], folder: Path, tell: Callable[[str], object]
) -> tuple[Machine | None, RecordDict]:
    """Load what a run needs, as its server's message says, and return the machine with the reply.

    `node` is the SuperNode's config, `folder` an empty directory of this machine. Whatever is not as it is on the
    server, such as the version, the data or the base, is a reason to refuse: then there is no machine, and the reply
    says why.
    """
    stack = ExitStack()
    try:
        machine, facts = _joined(content, node, folder, tell, stack)
    except (FedError, ValueError) as error:
        stack.close()
        return None, RecordDict({FACTS: facts_record({"refused": str(error), "versions": versions()})})
    except BaseException:
        stack.close()
        raise
    return machine, RecordDict({FACTS: facts_record(facts)})


def _joined(
    content: RecordDict, node: Mapping[str, Any], folder: Path, tell: Callable[[str], object], stack: ExitStack
) -> tuple[Machine, dict[str, Any]]:
    facts = facts_of(content)
    own = versions()
    if why := why_other_version(facts["versions"], own):
        raise FedError(why.replace("it has", "the run's server has").replace("the server", "this machine"))
    config = _config(facts["settings"], node)
    base = folder / BASE_FOLDER
    _write_base(content, base)
    running_limits = running.limits(config.threads, config.model.matmul_precision)
    stack.enter_context(running_limits)
    data = datasets.load(_reading(config, base, node), tell)
    model = saved_base.reopen(base, data.label_names, config)
    _check_inputs(facts["inputs"], input_digests(data, model), own_rows="rows" in node)
    shared = stack.enter_context(adapted(config, model, head_names(model)))
    data = data.to(shared.device)
    client = None
    if config.engine.mode == "deployment":
        client = _client(config, data, shared, node)
        if "rows" in node:
            data = replace(data, clients=_at(client["id"], data))
    federation = Federation(config, data, shared, tell)
    if config.execution == "cohort":
        check_cohorts(shared)
    # Beside the run's folder, because a machine that joins again has another one.
    place = Path(str(node["state"])) if "state" in node else folder.parent / "kept"
    kept = KeptStates(place / facts["run"], shared.device)
    first_head = first_state(shared, config).head if config.train.head == "personal" else {}
    machine = Machine(facts["run"], config, federation, kept, stack, {}, first_head)
    return machine, {
        "run": facts["run"],
        "versions": own,
        "client": client,
        "unread": sorted(node.keys() - {*OPTIONS}),  # perhaps another app's, or a slip
    }


def _config(settings: str, node: Mapping[str, Any]) -> RunConfig:
    """Return the run's configuration with what is this machine's own: paths, device and threads."""
    table = configuration.parse_toml(settings, "the run's settings")
    places = {"model": ("model", "path"), "data": ("data", "path")}
    for name, (section, key) in places.items():
        if name in node:
            table.setdefault(section, {})[key] = str(node[name])
    for name in ("device", "threads"):
        if name in node:
            table[name] = node[name]
    return configuration.parse(table, where="the run's settings")


def _reading(config: RunConfig, base: Path, node: Mapping[str, Any]) -> RunConfig:
    """Return the configuration to read rows with: by the tokenizer and labels of the base, perhaps this node's rows."""
    if config.model.path is not None:
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(base)})})
    if "rows" not in node:
        return config
    if config.model.path is None:
        raise FedError("its node config has rows, and the run's data are images; a run of text would be right")
    rows = str(node["rows"])
    # All rows are to train on, and the server has those to test on; this one, of a copy, only stands in for them.
    stand_in = base.parent / "test.jsonl"
    stand_in.write_text(json.dumps(read_local(rows, "rows of its node config").rows[0], default=str), encoding="utf-8")
    own = {"name": "files", "path": rows, "test_path": str(stand_in), "test_rows": 0, "validation_fraction": 0.0}
    own |= {"partition": "iid", "partition_by": None, "train_rows": 0, "rows_per_client": 0}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=own),
            "clients": config.clients.model_copy(update={"count": 1, "per_round": 1}),
        }
    )


def _write_base(content: RecordDict, base: Path) -> None:
    base.mkdir(parents=True)
    for name, value in tensors_of(content.get("base"), "base").items():
        if not _FILE.fullmatch(name):
            raise FedError(f"the run's base has a file {name!r}; a plain name would be right")
        (base / name).write_bytes(value.numpy().tobytes())


def _check_inputs(wanted: Mapping[str, str], found: Mapping[str, str], own_rows: bool) -> None:
    """Raise FedError if this machine's data or base are not the run's; its own rows need only the same labels."""
    for name in (LABELS, TOKENIZER, BASE) if own_rows else wanted:
        if name in wanted and found.get(name) != wanted[name]:
            raise FedError(f"{CALLED[name]} on this machine differs from what the run's server has")


def _client(config: RunConfig, data: FederatedData, shared: SharedModel, node: Mapping[str, Any]) -> dict[str, Any]:
    """Return which client this node is: its id, its rank, its number of rows, and whether it alone has these."""
    number = node.get("partition-id")
    if type(number) is not int or not 0 <= number < config.clients.count:
        raise FedError(
            f"its node config has partition-id = {number!r}; in a deployment of {config.clients.count} clients an "
            f"integer from 0 to {config.clients.count - 1} would be right"
        )
    split = data.clients[0 if "rows" in node else number]
    if len(split) == 0:
        raise FedError(f"client {number} has no rows to train on; other data would be right")
    rank = node.get("rank", config.clients.ranks[number % len(config.clients.ranks)])
    if "memory-mib" in node and "rank" not in node:
        budget = node["memory-mib"]
        if type(budget) not in (int, float) or not 0 < budget < math.inf:
            raise FedError(f"its node config has memory-mib = {budget!r}; a number of MiB above 0 would be right")
        (rank,) = ranks_within([float(budget)], estimate(shared, config, split), shared.rank)
    if type(rank) is not int or not 1 <= rank <= shared.rank:
        raise FedError(f"its node config has rank = {rank!r}; an integer from 1 to {shared.rank} would be right")
    return {"id": number, "rank": rank, "rows": len(split), "own_rows": "rows" in node}


def _at(number: int, data: FederatedData) -> tuple[Any, ...]:
    """Return the clients' rows of a run of which this machine has those of one client alone."""
    (own,) = data.clients
    nothing = type(own)(own.table, own.rows[:0])
    return (*[nothing] * number, own)


def train(machine: Machine, content: RecordDict) -> RecordDict:
    """Train the clients of a message from the server's state in it, and return the reply."""
    content = unbundled(content)
    facts = facts_of(content)
    if facts["run"] != machine.key:
        return RecordDict({FACTS: facts_record({"lacks": "the run"})})
    began = time.perf_counter()
    federation = machine.federation
    device = federation.shared.device
    if facts["base_before"] not in (None, machine.base_round):
        return RecordDict({FACTS: facts_record({"lacks": "the base"})})
    server = server_of(content, device, machine.base_delta)
    machine.base_delta, machine.base_round = server.base_delta, facts["base_round"]
    clients, ends = [], {}
    for known in facts["clients"]:
        client = Client(**known)
        if facts["keeps"]:
            copy = content.get(f"own-{client.id}.round-{client.kept_round}")
            own = machine.kept.read(client.id, client.kept_round, copy)
            if own is None:
                return RecordDict({FACTS: facts_record({"lacks": f"what client {client.id} kept"})})
            client = replace(client, memory=own.memory, head=own.head or machine.first_head)
            if own.ends:
                ends[client.id] = own.ends
        elif (held := content.get(f"kept-{client.id}")) is not None:
            tensors = {name: value.to(device) for name, value in tensors_of(held, f"kept-{client.id}").items()}
            client = replace(client, memory=group(tensors, "memory"), head=group(tensors, "head"))
        clients.append(client)
    state = RunState(server, (), ends)
    records, kept = RecordDict(), RecordDict()
    for client, result in _results(federation, state, clients):
        if isinstance(result, str):
            records.update(answer_records(client.id, Answer(None, fault=result)))
            continue
        if facts["keeps"] and not facts["trial"]:
            own = ClientState(*federation.state_to_keep(result))
            number, before = server.round + 1, client.kept_round
            since = _goes_back_to(machine.config, server.round)
            record = machine.kept.write(client.id, number, before, since, own)
            kept[f"own-{client.id}.round-{number}.from-{before}"] = record  # it does not leave the machine
        answer = Answer(
            result.update,
            result.start_noise,
            result.factor_noise,
            result.fold_seconds,
            result.train_seconds,
            result.client.gradients,
        )
        records.update(answer_records(client.id, answer, result.start.trained))
    reply = {name: facts[name] for name in ("run", "round", "nonce")}
    reply["clients"] = [client.id for client in clients]
    reply["seconds"] = time.perf_counter() - began
    return RecordDict({FACTS: facts_record(reply), **bundled(records), **kept})


def _goes_back_to(config: RunConfig, played: int) -> int:
    """Return the round that a server goes back to at the farthest after `played` rounds, to play on from there.

    It is that of the last checkpoint but one, in case the last is damaged; without checkpoints it never goes back.
    """
    every = config.checkpoint_every
    return max(0, (played // every - 1) * every) if every else played


def _results(
    federation: Federation, state: RunState, clients: Sequence[Client]
) -> list[tuple[Client, ClientResult | str]]:
    """Train clients, in cohorts together and else each by itself; in place of a result there may be what failed."""
    together = [list(clients)] if federation.config.execution == "cohort" else [[client] for client in clients]
    found: list[tuple[Client, ClientResult | str]] = []
    for group_of_clients in together:
        try:
            results: list[ClientResult | str] = [*federation.train_here(state, group_of_clients)]
        except FedError as error:  # for example for want of memory
            results = [str(error)] * len(group_of_clients)
        found += zip(group_of_clients, results, strict=True)
    return found
