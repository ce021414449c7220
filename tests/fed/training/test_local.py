"""Local training of one client: which parameters change, and which must not."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import plora_kernels as pk
from fed.data.tables import Split
from fed.errors import FedError
from fed.models.shared_model import SharedModel, adapted, find_device, started
from fed.seeding import ClientRandom
from fed.simulation.noise import start_noise
from fed.simulation.rounds import Federation
from fed.training.local import BatchOrder, Job, batch_rows, make_optimizer, train
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Factors, ServerState, TailPenalty
from tests.support.equality import assert_equal
from tests.support.tiny_federation import (
    HEAD,
    MATRICES,
    TinyClassifier,
    everything,
    make_config,
    make_data,
    make_factors,
)

SHAPES = {"body.first": (11, 7), "body.second": (5, 11)}
SELECTED = {"body.first": (1, 4), "body.second": (0, 5)}
CLIENT = Client(0, rank=2, n_samples=9)
KEEN = {"optimizer": "sgd", "learning_rate": 0.05, "momentum": 0.9, "weight_decay": 0.1}


def make_start(
    unselected: str = "folded", selected: dict[str, tuple[int, ...]] = SELECTED, factors_seed: int = 1
) -> ClientStart:
    return ClientStart(make_factors(6, factors_seed, SHAPES), selected, 2.0, unselected)


def head_of(shared: SharedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in shared.head.items()}


@pytest.fixture
def data() -> Split:
    return make_data().clients[0]


@pytest.fixture
def shared() -> Iterator[SharedModel]:
    with adapted(make_config(), TinyClassifier(), HEAD) as workplace:
        yield workplace


def visit(
    shared: SharedModel, start: ClientStart, data: Split, client: int = 0, head: Any = None, **changes: Any
) -> tuple[ClientUpdate, dict[str, Factors]]:
    """Train one client; return its update and all factors of the model after the selection is undone."""
    settings, head = make_config(train=changes).train, head or head_of(shared)
    with started(shared, start, head):
        key = ClientRandom(0, 1, client)
        job = Job(replace(CLIENT, id=client), start, head, data, settings.local_steps, settings.learning_rate, key)
        update = train(shared, job, settings)
    return update, shared.handle.factors()


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
@pytest.mark.parametrize("settings", [KEEN, {"optimizer": "adamw", "weight_decay": 0.5}])
def test_only_selected_modules_move_under_weight_decay_and_momentum(
    shared: SharedModel, data: Split, unselected: str, settings: dict[str, Any]
) -> None:
    start = make_start(unselected)
    update, after = visit(shared, start, data, local_steps=7, **settings)
    for matrix, (A, B) in start.factors.items():
        chosen, rest = list(SELECTED[matrix]), [n for n in range(6) if n not in SELECTED[matrix]]
        assert torch.equal(after[matrix][0][rest], A[rest])
        assert torch.equal(after[matrix][1][:, rest], B[:, rest])
        for index in chosen:
            assert not torch.equal(after[matrix][0][index], A[index])
            assert not torch.equal(after[matrix][1][:, index], B[:, index])
        assert torch.equal(update.factors[matrix][0], after[matrix][0][chosen])
        assert torch.equal(update.factors[matrix][1], after[matrix][1][:, chosen])
    assert update.selected == SELECTED


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
def test_a_step_is_the_gradient_step_of_plain_lora(shared: SharedModel, data: Split, unselected: str) -> None:
    """One SGD step on all nine samples, against autograd on the definition in fp64."""
    start, rate = make_start(unselected), 0.1
    update, _ = visit(
        shared, start, data, optimizer="sgd", learning_rate=rate, weight_decay=0.0, batch_size=9, local_steps=1
    )
    model = TinyClassifier().double()
    factors = {name: [f.double().requires_grad_() for f in pair] for name, pair in start.factors.items()}
    hidden = everything(data)["inputs"].double()
    for matrix in MATRICES:
        (A, B), linear = factors[matrix], model.get_submodule(matrix)
        hidden = torch.tanh(linear(hidden) + 2.0 * hidden @ A.T @ B.T)
    loss = nn.functional.cross_entropy(model.head(hidden), everything(data)["labels"])
    loss.backward()
    assert update.loss == pytest.approx(loss.item(), rel=1e-5)
    for matrix, pair in factors.items():
        A, B = (factor.detach() - rate * factor.grad for factor in pair)
        chosen = list(SELECTED[matrix])
        torch.testing.assert_close(update.factors[matrix][0].double(), A[chosen], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.factors[matrix][1].double(), B[:, chosen], rtol=1e-5, atol=1e-6)
    for name, parameter in model.head.named_parameters():
        moved = parameter.detach() - rate * parameter.grad
        torch.testing.assert_close(update.head[f"head.{name}"].double(), moved, rtol=1e-5, atol=1e-6)


def test_gradients_left_in_the_model_are_not_trained_on(data: Split) -> None:
    losses = []
    for stale in (False, True):
        model = TinyClassifier()
        if stale:
            model(**everything(data)).loss.backward()
        with adapted(make_config(), model, HEAD) as shared:
            losses.append(visit(shared, make_start(), data)[0].loss)
            assert all(parameter.grad is None for parameter in shared.head.values())
    assert losses[0] == losses[1]


def test_optimisers_are_set_as_the_run_says() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    settings = {"weight_decay": 0.2, "momentum": 0.7}
    sgd = make_optimizer(parameters, make_config(train={"optimizer": "sgd", **settings}).train, 0.3)
    adamw = make_optimizer(parameters, make_config(train={"optimizer": "adamw", **settings}).train, 0.3)
    assert isinstance(sgd, torch.optim.SGD)
    assert isinstance(adamw, torch.optim.AdamW)
    assert [sgd.defaults[name] for name in ("lr", "weight_decay", "momentum")] == [0.3, 0.2, 0.7]
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.3, 0.2)


def test_clipping_bounds_the_step(shared: SharedModel, data: Split) -> None:
    start = make_start()
    sgd = {"optimizer": "sgd", "learning_rate": 1.0, "weight_decay": 0.0, "local_steps": 1}
    before = head_of(shared)
    update, _ = visit(shared, start, data, max_grad_norm=0.01, **sgd)
    squares = sum((update.head[name] - before[name]).square().sum() for name in before)
    for matrix, (A, B) in start.factors.items():
        chosen = list(SELECTED[matrix])
        squares += (update.factors[matrix][0] - A[chosen]).square().sum()
        squares += (update.factors[matrix][1] - B[:, chosen]).square().sum()
    assert squares.sqrt().item() == pytest.approx(0.01, rel=1e-3)


def test_an_update_depends_on_its_key_not_on_who_trained_before(data: Split) -> None:
    """With dropout in the model, and with another client's training in between."""
    with adapted(make_config(), TinyClassifier(dropout=0.3), HEAD) as shared:
        head, start = head_of(shared), make_start()
        first, other = (visit(shared, start, data, client, head, local_steps=4)[0] for client in (0, 1))
        torch.rand(3)
        again, _ = visit(shared, start, data, 0, head, local_steps=4)
    assert first.loss == again.loss
    assert first.loss != other.loss
    assert_equal(first.factors, again.factors)


@pytest.mark.parametrize("unselected", ["folded", "frozen"])
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_held_fixed_does_not_move(shared: SharedModel, data: Split, side: str, unselected: str) -> None:
    start = replace(make_start(unselected), trained=side)
    update, _ = visit(shared, start, data, local_steps=5, **KEEN)
    assert update.sent == side
    for matrix, (A, B) in start.factors.items():
        chosen = list(SELECTED[matrix])
        kept = torch.equal(update.factors[matrix][0], A[chosen]), torch.equal(update.factors[matrix][1], B[:, chosen])
        assert kept == (side == "B", side == "A")


def test_a_penalty_pulls_on_the_last_modules_alone(shared: SharedModel, data: Split) -> None:
    """One SGD step with and without: the difference is −η λ times the gradient of ‖A[1:]‖ ‖B[:, 1:]‖."""
    settings = {"optimizer": "sgd", "weight_decay": 0.0, "learning_rate": 0.1, "local_steps": 1}
    starts = [replace(make_start(), penalty=penalty) for penalty in (None, TailPenalty(first=1, weight=2.0))]
    head = head_of(shared)
    plain, pulled = (visit(shared, start, data, head=head, **settings)[0] for start in starts)
    assert pulled.loss == plain.loss
    for matrix, (A, B) in make_start().factors.items():
        last = SELECTED[matrix][1]
        a, b = A[last], B[:, last]
        moved = [one - other for one, other in zip(pulled.factors[matrix], plain.factors[matrix], strict=True)]
        torch.testing.assert_close(moved[0][1], -0.2 * a / a.norm() * b.norm(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(moved[1][:, 1], -0.2 * b / b.norm() * a.norm(), rtol=1e-4, atol=1e-6)
        assert not moved[0][0].any()
        assert not moved[1][:, 0].any()


def test_lora_dropout_is_keyed_by_client_and_step(data: Split) -> None:
    seeds: dict[int, list[int]] = {}
    with adapted(make_config(adapter={"dropout": 0.5}), TinyClassifier(), HEAD) as shared:
        head, start, layer = head_of(shared), make_start(), shared.handle.layers["body.first"]

        def run(client: int) -> ClientUpdate:
            hook = layer.register_forward_pre_hook(lambda *_: seeds.setdefault(client, []).append(layer.dropout_seed))
            update, _ = visit(shared, start, data, client, head)
            hook.remove()
            return update

        first, other = run(0), run(1)
        torch.rand(3)
        again = run(0)
    with adapted(make_config(), TinyClassifier(), HEAD) as shared:
        without, _ = visit(shared, start, data, head=head)
    assert first.loss == again.loss != without.loss
    assert_equal(first.factors, again.factors)
    assert len(set(seeds[0][:3]) | set(seeds[1])) == 6
    assert seeds[0][:3] == seeds[0][3:]
    assert other.loss != first.loss


def test_what_training_takes_is_measured(shared: SharedModel, data: Split) -> None:
    """Ranks 2 and 2: 2·(7 + 11) + 2·(11 + 5) = 68 factors, 18 of the head; AdamW keeps two of each and a step count."""
    config = make_config()
    with started(shared, make_start(), head_of(shared)):
        arguments = (shared, Job(CLIENT, make_start(), {}, data, 2, 2e-2, ClientRandom(0, 1, 0)), config.train)
        footprint = train(*arguments, measure=True).footprint
        assert footprint.trainable_parameters == 68 + 18
        assert footprint.optimizer_bytes == 4 * (2 * (68 + 18) + 6)
    with started(shared, make_start(), head_of(shared)):
        assert train(*arguments).footprint is None
    # Batches of 4: x (7), tanh's output (11) which is the next x, S of both (2 each), tanh's output (5), and of the
    # loss log-probabilities (3), a label, a total weight and how many labels count.
    assert footprint.activation_bytes == 4 * 4 * (7 + 11 + 2 + 2 + 5 + 3) + 4 * 8 + 4 + 8


def test_weights_of_an_update(shared: SharedModel, data: Split) -> None:
    assert visit(shared, make_start(), data, weighting="uniform")[0].weight == 1.0
    assert visit(shared, make_start(), data, weighting="samples")[0].weight == 9.0


def test_held_updates_are_the_servers_exactly_when_frozen_and_to_rounding_when_folded(shared: SharedModel) -> None:
    noise, server = {}, ServerState(Adapter(make_factors(6, 1, SHAPES), 2.0))
    for unselected in ("folded", "frozen"):
        start = make_start(unselected)
        with started(shared, start, head_of(shared)):
            noise[unselected] = start_noise(server, start, shared.base.changed())
    nothing = {name: (A * 0, B) for name, (A, B) in start.factors.items()}
    size = start_noise(server, replace(start, factors=nothing))
    assert noise["frozen"] == 0.0
    assert 0.0 < noise["folded"] < 1e-6 * size


def test_the_model_comes_back_as_it_was(data: Split) -> None:
    model = TinyClassifier()
    model.body["second"].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def work_until_interrupted() -> None:
        with adapted(make_config(), model, HEAD) as shared:
            for unselected in ("folded", "frozen"):
                visit(shared, make_start(unselected), data)
            with started(shared, make_start(), head_of(shared)):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        work_until_interrupted()
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])] == []
    assert model.state_dict().keys() == before.keys()
    assert type(model.body["first"]) is nn.Linear
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, True, True]


@pytest.mark.parametrize("nested", [False, True])
def test_a_frozen_head_is_neither_trained_nor_adapted(data: Split, nested: bool) -> None:
    config = make_config(train={"head": "freeze"}, adapter={"target_modules": "all-linear"})
    model = TinyClassifier()
    if nested:
        model.head = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    with adapted(config, model, HEAD) as shared:
        assert tuple(shared.handle.layers) == MATRICES
        before = [parameter.clone() for parameter in model.head.parameters()]
        update, _ = visit(shared, make_start(), data)
        assert update.head == {}
        assert all(map(torch.equal, model.head.parameters(), before))


def test_the_adapter_is_drawn_from_the_seed_and_leaves_the_global_stream_alone() -> None:
    state = torch.get_rng_state()
    drawn = []
    for seed in (1, 1, 2):
        with adapted(make_config(seed=seed), TinyClassifier(), HEAD) as shared:
            drawn.append(shared.handle.factors()["body.first"][0])
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(torch.get_rng_state(), state)


def test_an_adapter_that_does_not_fit_leaves_the_model_alone() -> None:
    config = make_config(adapter={"target_modules": ["query"]})
    with pytest.raises(pk.TargetError, match="'query' is not in the model"), adapted(config, TinyClassifier(), HEAD):
        pytest.fail("the body ran")


def test_batches_are_whole_epochs_in_a_keyed_order() -> None:
    rows = batch_rows(10, 4, 5, ClientRandom(0, 1, 2))
    assert rows.shape == (5, 4)
    flat = rows.flatten()
    assert sorted(flat[:10].tolist()) == sorted(flat[10:].tolist()) == list(range(10))
    assert flat[:10].tolist() != flat[10:].tolist()
    assert torch.equal(rows, batch_rows(10, 4, 5, ClientRandom(0, 1, 2)))
    for other in (ClientRandom(1, 1, 2), ClientRandom(0, 2, 2), ClientRandom(0, 1, 3)):
        assert not torch.equal(rows, batch_rows(10, 4, 5, other))


def test_a_client_with_fewer_samples_than_a_batch_uses_all_of_them_each_step() -> None:
    rows = batch_rows(3, 8, 2, ClientRandom(0, 1, 2))
    assert [sorted(row) for row in rows.tolist()] == [[0, 1, 2], [0, 1, 2]]


def test_batches_are_drawn_as_they_are_asked_for() -> None:
    """In any order they are the same, and however many steps there are, no more than two epochs are held."""
    order, rows = BatchOrder(10, 4, ClientRandom(0, 1, 2)), batch_rows(10, 4, 6, ClientRandom(0, 1, 2))
    for step in (5, 0, 3, 2, 1, 4, 2):
        assert torch.equal(order.rows(step), rows[step])
    tracemalloc.start()
    far = BatchOrder(1, 16, ClientRandom(0, 1, 2)), BatchOrder(7, 4, ClientRandom(0, 1, 2))
    shapes = [order.rows(10**6 + step).shape for step in range(50) for order in far]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert shapes == [(1,), (4,)] * 50
    assert peak < 100_000


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_client_that_runs_out_of_memory_alone_is_named(
    shared: SharedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def train(*given: object) -> None:
        raise error

    monkeypatch.setattr("fed.simulation.rounds.train", train)
    federation = Federation(make_config(), make_data(), shared, pytest.fail)
    with pytest.raises(FedError, match=r"^round 1: client \d runs out of memory in training; a smaller train.batch"):
        federation.round(federation.beginning())


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(FedError, match="device is 'cuda', which is not available here; 'cpu' or 'auto'"):
        find_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"
    assert find_device("cpu").type == "cpu"
