"""The results of a round from machines' replies, which may be broken, hostile, late or sent twice.

Every client that a reply is of gets a result: its update if that can be used, and else the reason why it cannot.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from flwr.app import RecordDict
from torch import Tensor

from fed.errors import printable
from fed.flower.answers import answer_of, with_fixed
from fed.flower.bundles import unbundled
from fed.flower.records import FACTS, RecordError, facts_of
from fed.seeding import ClientRandom
from fed.simulation.clients import local_steps
from fed.simulation.noise import factor_noise
from fed.simulation.rounds import Federation
from fed.simulation.update_checks import MOST_POSITIONS
from fed.simulation.update_checks import Asked as Counts
from fed.training.local import Job, weight_of
from fed.types import Client, ClientResult, ClientUpdate, RunState

LEAST_SECONDS, MOST_SECONDS = 1e-6, 1e9  # of a machine's work on a message, beyond which it is not believed
_LONGEST = 400  # characters of a fault


@dataclass(frozen=True)
class Asked:
    """What a message asked of a machine; `nonce` is a random number that the reply to it repeats."""

    run: str
    round: int
    nonce: str
    clients: Sequence[Client]


def why_lacking(content: RecordDict) -> str:
    """Return what a machine says that it lacks to train, or "" if its reply is none of that kind."""
    try:
        facts = facts_of(content)
    except RecordError:
        return ""
    return printable(str(facts["lacks"]))[:_LONGEST] if "lacks" in facts else ""


class Reply(NamedTuple):
    """What came of a message: a result for each client that it asked for.

    `answers` says whether it is the reply to the message at all, and `speed` how many local steps a second the machine
    says that it took, None if it says nothing of use.
    """

    results: list[ClientResult]
    answers: bool
    speed: float | None


def reply_of(content: RecordDict, asked: Asked, federation: Federation, state: RunState) -> Reply:
    """Read a machine's reply; one that answers another message, of an earlier round for example, is a fault of all."""
    try:
        facts = facts_of(content, FACTS)
        _check(facts, asked)
        content = unbundled(content, len(asked.clients) * _most_tensors(state))
    except RecordError as error:
        fault = f"its reply cannot be used: {error}"
        return Reply([left_out(federation, state, client, fault) for client in asked.clients], False, None)
    results = []
    for client in asked.clients:
        try:
            results.append(_result(content, client, federation, state))
        except RecordError as error:
            results.append(left_out(federation, state, client, str(error)))
    seconds, steps = facts.get("seconds"), sum(local_steps(federation.config, client) for client in asked.clients)
    if isinstance(seconds, float) and LEAST_SECONDS <= seconds <= MOST_SECONDS:
        return Reply(results, True, steps / seconds)
    return Reply(results, True, None)


def left_out(federation: Federation, state: RunState, client: Client, fault: str) -> ClientResult:
    """Return the result of a client that took part and whose update cannot be read: it has none, and this fault."""
    if federation.method.selects and federation.config.adapter.selection == "gradient":
        factors = state.server.adapter.factors
        nothing = {matrix: torch.zeros(len(A), dtype=torch.float64) for matrix, (A, _) in factors.items()}
        client = replace(client, gradients=nothing)  # they are unknown, and not to be computed on the server's data
    job = _job(federation, state, client)
    update = ClientUpdate(job.client, {}, {}, {}, weight=0.0, steps=0, loss=0.0)
    return ClientResult(job.client, job.start, update, job.steps, None, None, None, 0.0, 0.0, _line(fault))


def _most_tensors(state: RunState) -> int:
    """Return how many tensors a client sends at most: A, B and gradient norms of every matrix, and the head."""
    return 3 * len(state.server.adapter.factors) + len(state.server.head)


def _check(facts: Mapping[str, Any], asked: Asked) -> None:
    """Raise RecordError unless a reply is to this message: not an earlier round's, and not sent before."""
    if facts.get("run") != asked.run:
        raise RecordError("it is of another run")
    if type(facts.get("round")) is not int or facts["round"] != asked.round:
        raise RecordError(f"it is of round {str(facts.get('round'))[:20]}, and this is round {asked.round}")
    if facts.get("nonce") != asked.nonce:
        raise RecordError("it answers another message of this round, or was sent before")


def _result(content: RecordDict, client: Client, federation: Federation, state: RunState) -> ClientResult:
    """Return the checked result of one client; raise RecordError if its part of the reply is not whole."""
    config, method = federation.config, federation.method
    deployed, device = config.engine.mode == "deployment", federation.shared.device
    if method.selects and config.adapter.selection == "gradient":
        client = replace(client, gradients=_gradients(answer_of(content, client, device).gradients, state))
    job = _job(federation, state, client)
    answer = answer_of(content, client, device, job.start.trained)
    if answer.update is None:
        raise RecordError(f"its machine could not train it: {answer.fault}")
    update = replace(with_fixed(answer.update, job.start), client=job.client, memory=job.client.memory)
    ends, moved = state.ends.get(client.id), answer.factor_noise if deployed and config.measure.noise else None
    if ends is not None and not deployed:
        moved = factor_noise(job.start.factors, ends)
    noise = answer.noise if config.measure.noise else None
    counts = None
    if client.own_rows:  # how long they are is not known here
        counts = Counts(job.steps, weight_of(job.client, config.train), 0, MOST_POSITIONS)
    seconds = answer.fold_seconds, answer.train_seconds
    result = federation.checked(state, job, update, noise, moved, *seconds, counts)
    if result.fault is not None:
        return replace(result, fault=_line(result.fault))
    # What a client keeps follows from its update; it is not left to a message to say.
    kept = method.finish(state.server, job.start, update)
    if kept.selected != update.selected:
        return replace(result, fault=f"it holds modules that {method.title} drops")
    memory = {} if deployed and method.personal else kept.memory
    return replace(result, update=replace(update, memory=memory))


def _job(federation: Federation, state: RunState, client: Client) -> Job:
    return federation.job(state, client, ClientRandom(federation.config.seed, state.server.round + 1, client.id))


def _gradients(found: Mapping[str, Tensor], state: RunState) -> Mapping[str, Tensor]:
    """Return a client's gradient norms, by which it selected its modules; raise RecordError unless they can be."""
    norms = {}
    for matrix, (A, _) in state.server.adapter.factors.items():
        own = found.get(matrix)
        if own is None or own.shape != A.shape[:1] or own.dtype != torch.float64 or not _are_norms(own):
            raise RecordError(f"its gradients of {matrix} are not {len(A)} numbers of float64, of at least 0")
        norms[matrix] = own.cpu()
    return norms


def _line(fault: str) -> str:
    return printable(fault)[:_LONGEST]


def _are_norms(values: Tensor) -> bool:
    return bool((values.isfinite() & (values >= 0)).all())
