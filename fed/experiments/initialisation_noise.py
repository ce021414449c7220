"""Initialisation noise of several ways to start clients from one server state, in fp32 and bf16.

The ways are Fed-PLoRA's frozen and folded modules, and the truncated starts of other methods.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

import plora_kernels as pk
from fed.config import RunConfig
from fed.data import federated_data
from fed.errors import FedError
from fed.experiments import run as running
from fed.methods import fed_plora, flexlora
from fed.methods.low_rank import principal_modules, product_norm
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapted, started
from fed.seeding import ClientRandom
from fed.simulation.finished import ADAPTER, input_digests_of, why_not_finished
from fed.simulation.inputs import check_same, input_digests
from fed.simulation.noise import start_noise
from fed.simulation.rounds import Federation
from fed.simulation.run_directory import read
from fed.types import Client, ClientStart, Options, ServerState, Stack

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Start:
    """The result for one way to start clients in one dtype.

    `noise` is the mean of ‖ΔW_i(start) − ΔW_server‖_F over all clients, and `share` is `noise` / ‖ΔW_server‖_F, or None
    if the server's ΔW is 0.
    """

    name: str
    dtype: str
    noise: float
    share: float | None


def measure(directory: Path, on_event: Callable[[str], object]) -> list[Start]:
    """Measure the initialisation noise of all clients of a finished run, for every way to start them.

    Every way starts from the same ΔW, that of the run's final adapter; base and adapter are cast to each dtype. Noise
    is measured on the layers' actual weights, rounding included. Modules are selected at random. Raises FedError if
    the run is not finished, or its method folds into the base or holds more than R modules in a matrix.
    """
    run = read(directory)
    config = run.config
    if (why := why_not_finished(directory, config)) is not None:
        raise FedError(f"{str(directory)!r} is not over: {why}; python -m fed resume {directory} continues it")
    if config.model.quantize != "none":
        raise FedError(
            f"{str(directory)!r} has model.quantize = {config.model.quantize!r}: noise is measured in other dtypes, "
            "which a quantised base has none of; a run with 'none' would be right"
        )
    model: Any = running.reopen_base(directory, config)
    if getattr(model.config, "quantization_config", None) is not None:
        raise FedError(
            f"{str(directory)!r} is a run over a quantised checkpoint: noise is measured in other dtypes, which a "
            "quantised base has none of; a run over one that is not would be right"
        )
    loaded, head = federated_data.load(config, on_event), head_names(model)
    check_same(input_digests_of(directory), input_digests(loaded, model), f"the run in {str(directory)!r}")
    with adapted(config, model, head) as shared:
        federation = Federation(config, loaded, shared, on_event)
        if federation.method.folds:
            raise FedError(
                f"{str(directory)!r} is a run of {federation.method.title}, whose update is not in R modules; "
                "a run of 'fed-plora' would be right"
            )
        state = federation.beginning()
    server = _ended(state.server, pk.load_peft(model, directory / ADAPTER), run.rows[-1]["round"])
    found = []
    for name, dtype in DTYPES.items():
        with adapted(_with_factors_in(config, name), model.to(dtype), head) as shared:
            plain = _cast(server, dtype)
            ways = (
                ("Fed-PLoRA, frozen", _holding(plain, "frozen"), fed_plora.start),
                ("Fed-PLoRA, folded", _holding(plain, "folded"), fed_plora.start),
                ("FlexLoRA, raFLoRA", _principal(plain), flexlora.start),
                ("HETLoRA, FedIT cut to r_i", plain, flexlora.start),
            )
            for title, held, start in ways:
                noise = fmean(_noise(shared, held, start, client, config.seed) for client in state.clients)
                norm = _norm(held)
                found.append(Start(title, name, noise, noise / norm if norm else None))
    return found


def _with_factors_in(config: RunConfig, dtype: str) -> RunConfig:
    """Return the configuration with factors of a dtype, whatever the run's own were."""
    return config.model_copy(update={"adapter": config.adapter.model_copy(update={"dtype": dtype})})


def _ended(beginning: ServerState, handle: pk.Injected, number: int) -> ServerState:
    """Return the server with the final adapter of a run, which `handle` has loaded, and restore the model."""
    factors = handle.factors()
    handle.restore()
    return replace(beginning, adapter=replace(beginning.adapter, factors=factors), round=number, options=Options())


def table(found: Sequence[Start]) -> list[tuple[str, ...]]:
    """Return the results as a table, heading first: a line for each way, with noise and share for each dtype."""
    lines = [("clients start with", *(title for dtype in DTYPES for title in (dtype, "of ΔW")))]
    for name in dict.fromkeys(start.name for start in found):
        ours = [start for start in found if start.name == name]  # in the order of DTYPES
        lines.append((name, *(_shown(value) for start in ours for value in (start.noise, start.share))))
    return lines


def _shown(value: float | None) -> str:
    return "—" if value is None else f"{value:.2e}" if value else "0"


def _holding(server: ServerState, unselected: str) -> ServerState:
    """Return the server with clients that hold the modules that they do not train "frozen" or "folded"."""
    return replace(server, adapter=replace(server.adapter, unselected=unselected))


def _principal(server: ServerState) -> ServerState:
    """Return the server with the same ΔW as modules in order of decreasing singular value."""
    adapter = server.adapter
    factors = {}
    for matrix, (A, B) in adapter.factors.items():
        weights = torch.full((A.shape[0],), adapter.scale, dtype=torch.float64, device=A.device)
        factors[matrix] = principal_modules(Stack(A, B, weights), adapter.scale, A)
    return replace(server, adapter=replace(adapter, factors=factors))


def _noise(
    shared: SharedModel,
    server: ServerState,
    start: Callable[[ServerState, Client, ClientRandom], ClientStart],
    client: Client,
    seed: int,
) -> float:
    begun = start(server, client, ClientRandom(seed, server.round + 1, client.id))
    with started(shared, begun, server.head):
        return start_noise(server, begun, shared.base.changed())


def _norm(server: ServerState) -> float:
    """Return ‖ΔW_server‖_F over all matrices."""
    adapter = server.adapter
    norms = [product_norm(adapter.scale * B.double(), A.double()) for A, B in adapter.factors.values()]
    return torch.stack(norms).norm().item()


def _cast(server: ServerState, dtype: torch.dtype) -> ServerState:
    """Return the server with its factors and head in another dtype."""
    factors = {matrix: (A.to(dtype), B.to(dtype)) for matrix, (A, B) in server.adapter.factors.items()}
    head = {name: value.to(dtype) for name, value in server.head.items()}
    return replace(server, adapter=replace(server.adapter, factors=factors), head=head)
