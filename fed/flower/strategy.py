"""Flower's strategy of a federated run, around a method's `start`, `finish` and `aggregate`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from safetensors.torch import load_file

from fed import commands, interruption
from fed.config import RunConfig
from fed.data import federated_data as datasets
from fed.errors import FedError
from fed.experiments import run as running
from fed.flower.dispatch import Sent
from fed.flower.records import arrays_of, tensors_of
from fed.flower.round_in_play import RoundInPlay
from fed.flower.training import FlowerTraining
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation.client_store import flat_factors, group, group_factors
from fed.simulation.clients import drawn
from fed.simulation.finished import ADAPTER
from fed.simulation.inputs import input_digests
from fed.simulation.rounds import Federation, idle
from fed.simulation.run_directory import BASE, read
from fed.types import RunState, ServerState

_LOG = logging.getLogger("flwr")


class FederatedRun(Strategy):
    """A run of `config` as a strategy of Flower's Message API.

    `start` plays it whole, as `python -m fed run` does: rows, checkpoints, adapter and report go to `out`, and with
    `resume` the run there goes on. It draws clients, seeds and orders by (seed, round, client), so it does not use
    Flower's own sampling, which cannot be repeated.

    `configure_train` and `aggregate_train` are the same round for a loop of one's own, Flower's `Strategy.start` for
    example: arrays are the server's factors and head, and what else the server keeps (visits, what is folded into the
    base, moments) stays in the strategy. Use it within a `with` statement then; nothing but the base and the key by
    which machines know the run is written to `out`.

        strategy = FederatedRun(fed.config.load("digits"), Path("/data/runs/digits"))
        strategy.start(grid)
    """

    def __init__(
        self, config: RunConfig, out: Path, *, overwrite: bool = False, centralised: bool = True, resume: bool = False
    ) -> None:
        self.config, self.out = config, out
        self._overwrite, self._centralised, self._resume = overwrite, centralised, resume
        self._stack = ExitStack()
        self._federation: Federation | None = None
        self._training: FlowerTraining | None = None
        self._state: RunState | None = None
        self._sent: list[Sent] = []
        self._play: RoundInPlay | None = None

    def __enter__(self) -> FederatedRun:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Play the run, and return its adapter and the numbers of its rows.

        `num_rounds` and `timeout` stand for `rounds` and `engine.deadline`. What a run has no use for is refused: it
        begins with its own adapter, its settings are in its configuration, and the server evaluates it.
        """
        unused = {
            "initial_arrays": initial_arrays,
            "train_config": train_config,
            "evaluate_config": evaluate_config,
            "evaluate_fn": evaluate_fn,
        }
        if given := [name for name, value in unused.items() if value is not None]:
            raise FedError(f"{given[0]} is given, and a run takes none: its configuration says it")
        engine = self.config.engine
        if timeout is not None:
            engine = engine.model_copy(update={"deadline": float(timeout)})
        config = self.config.model_copy(update={"engine": engine.model_copy(update={"name": "flower"})})
        if num_rounds is not None:
            config = config.model_copy(update={"rounds": num_rounds})

        def make(directory: Callable[[], Path], tell: Callable[[str], object]) -> FlowerTraining:
            return FlowerTraining(grid, directory, tell)

        if self._resume:
            status = commands.resume(self.out, self._centralised, make)
        else:
            status = commands.run(config, self.out, self._overwrite, self._centralised, make)
        if status:
            raise FedError(f"the run in {self.out} ended early, with status {status}")
        return self._result()

    def _result(self) -> Result:
        result = Result()
        result.arrays = arrays_of(load_file(self.out / ADAPTER / "adapter_model.safetensors"))
        for row in read(self.out).rows:
            figures = {name: own for name, own in row.items() if type(own) in (int, float)}
            result.evaluate_metrics_serverapp[row["round"]] = MetricRecord(figures)
        return result

    def summary(self) -> None:
        """Log what is played."""
        clients = self.config.clients
        _LOG.info("%s: %d of %d clients a round", self.config.method, clients.per_round, clients.count)

    def initial_arrays(self, grid: Grid) -> ArrayRecord:
        """Wait for the machines, and return the factors and the head before the first round."""
        return arrays_of(_arrays(self._begun(grid)[2].server))

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return the messages that have a round's clients trained from the server's factors and head, `arrays`."""
        federation, training, state = self._begun(grid)
        if server_round != state.server.round + 1:
            raise FedError(f"round {server_round} is asked for; {state.server.round + 1} would be right")
        server = _with_arrays(state.server, arrays)
        self._state = state = replace(state, server=server)
        clients = drawn(federation.config, state.clients, server_round)
        self._play = training.begin(federation, state, clients)
        # Machines that are new are asked to join by the same messages; their clients train from the next round on.
        self._sent = self._play.looked(set(grid.get_node_ids()))
        return [one.message for one in self._sent]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the next factors and head, and how many updates were used, left out, or did not come.

        A round without a usable update keeps the server's state.
        """
        if self._federation is None or self._state is None or self._play is None:
            raise FedError("no round was configured; configure_train comes first")
        federation, state, play = self._federation, self._state, self._play
        waiting = {one.message.metadata.message_id: one for one in self._sent}
        for reply in replies:
            if (one := waiting.pop(reply.metadata.reply_to_message_id, None)) is not None:
                one.take(reply)
                play.ended(one)
        asked = drawn(federation.config, state.clients, server_round)
        results = [play.found[client.id] for client in asked if client.id in play.found]
        chosen, results = federation.aggregate(state, results)
        server = idle(state.server) if chosen is None else chosen.server
        self._state = federation.update_clients(state, server, results)
        left_out = sum(result.fault is not None for result in results)
        used = len(results) - left_out
        counts = {"used": used, "left_out": left_out, "late": len(asked) - len(results)}
        return arrays_of(_arrays(server)), MetricRecord({"round": server_round, **counts})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Return nothing: the server evaluates on its own held-out rows."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the server's metrics on its held-out rows, after the round."""
        if self._federation is None or self._state is None:
            return None
        metrics = self._federation.metrics.evaluate(self._state.server).metrics
        return MetricRecord({name: value for name, value in metrics.items() if value is not None})

    def _begun(self, grid: Grid) -> tuple[Federation, FlowerTraining, RunState]:
        """Return the federation, opened with the first call: data, base, adapter and the machines that joined."""
        if self._federation is None or self._training is None or self._state is None:
            config, stack = self.config, self._stack
            stack.enter_context(interruption.deferred())
            stack.enter_context(running.limits(config.threads, config.model.matmul_precision))
            data = datasets.load(config, _LOG.info)
            model = running.make_base(config, data, self.out / BASE)
            inputs = input_digests(data, model)
            shared = stack.enter_context(adapted(config, model, head_names(model)))
            self._training = FlowerTraining(grid, lambda: self.out, _LOG.warning)
            self._federation = Federation(
                config, data.to(shared.device), shared, _LOG.warning, executor=self._training, inputs=inputs
            )
            self._state = self._federation.beginning()
        return self._federation, self._training, self._state


def _arrays(server: ServerState) -> dict[str, torch.Tensor]:
    head = {f"head/{name}": value for name, value in server.head.items()}
    return flat_factors("adapter", server.adapter.factors) | head


def _with_arrays(server: ServerState, arrays: ArrayRecord) -> ServerState:
    """Return the server's state with these factors and this head; raise FedError if they are not its own kind."""
    own, found = _arrays(server), tensors_of(arrays, "arrays")
    if [(name, v.shape, v.dtype) for name, v in sorted(own.items())] != [
        (name, v.shape, v.dtype) for name, v in sorted(found.items())
    ]:
        raise FedError("the arrays are not this run's factors and head, with their names, shapes and dtypes")
    found = {name: value.to(own[name].device) for name, value in found.items()}
    adapter: Any = replace(server.adapter, factors=group_factors(found, "adapter"))
    return replace(server, adapter=adapter, head=group(found, "head"))
