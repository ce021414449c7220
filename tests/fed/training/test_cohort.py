"""Clients trained in one pass get the updates that they get when trained one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fed import methods
from fed.data.federated_data import FederatedData
from fed.data.tables import DenseTable, InstructionTable, Sequences, Split, TextTable
from fed.errors import FedError
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapted, started
from fed.seeding import ClientRandom
from fed.simulation.rounds import Federation
from fed.training.cohort import train_together
from fed.training.compiled_loss import CompiledLosses
from fed.training.local import Job, train
from fed.types import ClientUpdate
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert, tiny_llama
from tests.support.tiny_federation import HEAD, LABELS, TinyClassifier, jobs_of, make_config, make_data

TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}
EQUAL = {"clients": {"ranks": [6]}}  # for methods that need them
# The last client has fewer rows than a batch; numbers of steps and learning rates differ.
UNLIKE = {"client_steps": [3, 1, 4, 2], "client_learning_rates": [2e-2, 5e-3]}


def double(data: FederatedData) -> FederatedData:
    table = data.test.table
    table = DenseTable({name: values.double() for name, values in table.inputs.items()}, table.labels)
    return replace(
        data, clients=tuple(Split(table, split.rows) for split in data.clients), test=Split(table, data.test.rows)
    )


def alone(shared: SharedModel, job: Job, settings: Any, measure: bool = False) -> ClientUpdate:
    with started(shared, job.start, job.head):
        return train(shared, job, settings, measure)


def assert_same(found: ClientUpdate, wanted: ClientUpdate, **tolerance: float) -> None:
    assert (found.client.id, found.selected, found.steps, found.sent) == (
        wanted.client.id,
        wanted.selected,
        wanted.steps,
        wanted.sent,
    )
    assert found.weight == wanted.weight
    tolerance = tolerance or TOLERANCE
    assert found.loss == pytest.approx(wanted.loss, rel=tolerance["rtol"] * 100)
    torch.testing.assert_close(dict(found.factors), dict(wanted.factors), **tolerance)
    torch.testing.assert_close(dict(found.head), dict(wanted.head), **tolerance)


def train_and_compare(shared: SharedModel, jobs: list[Job], settings: Any, **options: Any) -> list[ClientUpdate]:
    """Train clients together, and compare each with its training alone."""
    updates = train_together(shared, jobs, settings, **options)
    for job, update in zip(jobs, updates, strict=True):
        wanted = alone(shared, job, settings, options.get("measure", False))
        assert_same(update, wanted)
        if options.get("measure"):
            assert update.footprint[:2] == wanted.footprint[:2]
    return updates


def drawn_b(job: Job) -> Job:
    """Return the job with a nonzero B, so that no gradient is zero."""
    generator = torch.Generator().manual_seed(job.client.id)
    factors = {
        matrix: (A, torch.randn(B.shape, generator=generator, dtype=torch.float64).to(B.dtype))
        for matrix, (A, B) in job.start.factors.items()
    }
    return job._replace(start=replace(job.start, factors=factors))


@pytest.mark.parametrize("selection", ["folded", "frozen"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        UNLIKE | {"weight_decay": 0.1, "max_grad_norm": 0.3},
        UNLIKE | {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1, "weighting": "samples"},
        {"head": "freeze", "max_grad_norm": 1e-2},
    ],
    ids=["adamw", "unlike", "sgd", "no head"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_cohort_ends_where_each_client_would_alone(settings: dict[str, Any], selection: str, dropout: float) -> None:
    config = make_config(train=settings, adapter={"dropout": dropout, "unselected": selection})
    data = double(make_data())
    with adapted(config, TinyClassifier().double(), HEAD) as shared:
        jobs = [drawn_b(job) for job in jobs_of(shared, config, data)]
        train_and_compare(shared, jobs, config.train, measure=True)


def play(method: str, execution: str, dtype: torch.dtype, rounds: int, **changes: Any) -> tuple[list[dict], Any]:
    """Return a run's rows and its state at the end."""
    ranks = EQUAL if methods.find(method).equal_ranks else {}
    config = make_config(method=method, execution=execution, rounds=rounds, **ranks, **changes)
    data = double(make_data()) if dtype is torch.float64 else make_data()
    with adapted(config, TinyClassifier().to(dtype), HEAD) as shared:
        played = list(
            Federation(config, data, shared, pytest.fail).play(Federation(config, data, shared, print).beginning())
        )
    return [one.row for one in played], played[-1].state


def assert_same_numbers(found: Mapping[str, Any], wanted: Mapping[str, Any], rel: float) -> None:
    times = {"fold_seconds", "train_seconds", "clients_per_pass", "activation_bytes", "init_noise", "peak_memory_bytes"}
    for key, value in wanted.items():
        if key not in times and isinstance(value, float):
            assert found[key] == pytest.approx(value, rel=rel, abs=1e-9 if rel < 1e-6 else 1e-4), key


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3, "head": "personal"}], ids=["plain", "dropout, own heads"])
@pytest.mark.parametrize("method", list(methods.METHODS))
def test_every_method_gives_the_sequential_rounds(method: str, changes: dict[str, Any]) -> None:
    settings: dict[str, Any] = {
        "adapter": {"dropout": changes.get("dropout", 0.0)},
        "train": {"head": changes.get("head", "train"), **(UNLIKE if changes else {})},
    }
    for dtype, rounds, rel, tolerance in (
        (torch.float64, 1, 1e-9, TOLERANCE),
        (torch.float32, 3, 2e-3, {"rtol": 1e-3, "atol": 1e-4}),
    ):
        together, stands = play(method, "cohort", dtype, rounds, clients_per_pass=2, **settings)
        apart, wanted = play(method, "sequential", dtype, rounds, **settings)
        assert [row["clients"] for row in together] == [row["clients"] for row in apart]
        for one, other in zip(together, apart, strict=True):
            assert_same_numbers(one, other, rel)
        ours, theirs = (
            {matrix: one.server.adapter.scale * B @ A for matrix, (A, B) in one.server.adapter.factors.items()}
            for one in (stands, wanted)
        )
        torch.testing.assert_close(ours, theirs, **tolerance)
        torch.testing.assert_close(stands.server.head, wanted.server.head, **tolerance)
        torch.testing.assert_close(dict(stands.server.base_delta), dict(wanted.server.base_delta), **tolerance)


# torch ignores this warning itself where a graph breaks, as it does at this model's namespace.
@pytest.mark.parametrize(
    "method",
    ["fed-plora", "hetlora", *(pytest.param(name, marks=pytest.mark.slow) for name in ("flora", "fedsa-lora"))],
)
def test_compiled_rounds_are_the_sequential_ones(method: str, traced: list[Any]) -> None:
    settings = {"train": UNLIKE | {"weight_decay": 0.1, "max_grad_norm": 0.3}, "measure": {"memory": False}}
    if method == "hetlora":
        settings["hetlora"] = {"weighting": "norm", "prune": True, "decay": 0.5, "penalty": 10.0}
    _, together = play(method, "cohort", torch.float64, 2, clients_per_pass=2, cohort_compile=True, **settings)
    _, apart = play(method, "sequential", torch.float64, 2, **settings)
    assert traced
    for ours, theirs in (
        (together.server.adapter.factors, apart.server.adapter.factors),
        (together.server.head, apart.server.head),
        (together.server.base_delta, apart.server.base_delta),
    ):
        torch.testing.assert_close(dict(ours), dict(theirs), **TOLERANCE)


def test_hetloras_penalty_and_pruning() -> None:
    table = {"prune": True, "decay": 0.5, "penalty": 10.0, "weighting": "norm"}
    _, together = play("hetlora", "cohort", torch.float64, 2, hetlora=table, clients_per_pass=4)
    _, apart = play("hetlora", "sequential", torch.float64, 2, hetlora=table)
    memories = [{name: int(value) for name, value in client.memory.items()} for client in together.clients]
    assert memories == [{name: int(value) for name, value in client.memory.items()} for client in apart.clients]
    assert any(memories)
    ours, theirs = together.server.adapter.factors, apart.server.adapter.factors
    torch.testing.assert_close(dict(ours), dict(theirs), rtol=1e-9, atol=1e-11)


def texts(table: type, count: int = 24) -> tuple[Split, ...]:
    """Rows of 1 to 9 tokens for three clients, to be classified or continued."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(1, 60, (1 + i * 5 % 9,), generator=generator).tolist() for i in range(count)]
    if table is TextTable:
        whole: Any = TextTable({"input_ids": Sequences.of(rows)}, torch.arange(count) % 3, pad=0)
    else:
        tokenizer = SimpleNamespace(pad_token_id=0)
        rows = [[*row, 7, 8] for row in rows]
        whole = InstructionTable(
            Sequences.of(rows), torch.tensor([len(r) - 2 for r in rows]), [["x"]] * count, tokenizer, 4
        )
    return tuple(Split(whole, part) for part in torch.arange(count).split([3, 10, 11]))


@contextmanager
def reading_texts(make: Any, table: type, config: SimpleNamespace) -> Iterator[tuple[SharedModel, list[Job]]]:
    """Return a small model in float64, and a job for each of three clients whose texts differ in length."""
    clients = texts(table)
    data = FederatedData(clients, clients[0], None, None, ("a", "b", "c"))
    torch.manual_seed(0)
    model = make().double()
    with adapted(config, model, head_names(model)) as shared:
        yield shared, [drawn_b(job) for job in jobs_of(shared, config, data)]


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("make", "table"), [(tiny_bert, TextTable), (tiny_llama, InstructionTable)])
def test_texts_of_unequal_length(make: Any, table: type, dropout: float, checkpointing: bool) -> None:
    config = make_config(
        clients={"count": 3, "ranks": [2, 4, 6]},
        adapter={"dropout": dropout, "target_modules": "all-linear"},
        # Not Adam: it takes full steps for gradients that consist of rounding errors only.
        train={"optimizer": "sgd", "client_steps": [2, 3, 1], "gradient_checkpointing": checkpointing},
    )
    with reading_texts(make, table, config) as (shared, jobs):
        train_and_compare(shared, jobs, config.train)


@pytest.mark.slow
@pytest.mark.parametrize(("make", "table"), [(tiny_bert, TextTable), (tiny_llama, InstructionTable)])
def test_compiled_texts_end_where_each_would_alone_and_are_soon_traced_no_more(
    make: Any, table: type, traced: list[Any]
) -> None:
    config = make_config(
        clients={"count": 3, "ranks": [2, 4, 6]},
        adapter={"dropout": 0.4, "target_modules": "all-linear"},
        train={"optimizer": "sgd", "local_steps": 7, "batch_size": 4},
    )
    with reading_texts(make, table, config) as (shared, jobs):
        compiled = CompiledLosses(pytest.fail)
        train_and_compare(shared, jobs, config.train, compiled=compiled)
        counts = []
        for number in range(2, 6):  # other batches, of other widths
            others = [job._replace(rng=ClientRandom(config.seed, number, job.client.id)) for job in jobs]
            train_together(shared, others, config.train, compiled=compiled)
            counts.append(len(traced))
    assert counts == [2, 2, 2, 2]  # one graph for the first width and one for all others, without graph breaks


def test_a_client_that_is_not_finite_touches_no_other() -> None:
    config = make_config(train=UNLIKE | {"max_grad_norm": 1.0}, adapter={"dropout": 0.2})
    data = double(make_data())
    with adapted(config, TinyClassifier().double(), HEAD) as shared:
        jobs = jobs_of(shared, config, data)
        A, B = jobs[2].start.factors["body.first"]
        poisoned = {**jobs[2].start.factors, "body.first": (A, B + float("inf"))}
        broken = [*jobs[:2], jobs[2]._replace(start=replace(jobs[2].start, factors=poisoned)), *jobs[3:]]
        fine, found = (train_together(shared, some, config.train) for some in (jobs, broken))
        assert not torch.isfinite(torch.tensor(found[2].loss))
        for place in (0, 1, 3):
            assert_same(found[place], fine[place], rtol=0, atol=0)


def test_what_no_loss_depends_on_does_not_decay() -> None:
    config = make_config(train={"weight_decay": 0.5}, adapter={"target_modules": ["first", "second", "idle"]})
    model = TinyClassifier()
    model.body["idle"] = nn.Linear(4, 3)
    with adapted(config, model.double(), HEAD) as shared:
        jobs = [drawn_b(job) for job in jobs_of(shared, config, double(make_data()))]
        for job, update in zip(jobs, train_and_compare(shared, jobs, config.train), strict=True):
            chosen = list(job.start.selected["body.idle"])
            assert torch.equal(update.factors["body.idle"][0], job.start.factors["body.idle"][0][chosen])


def test_a_head_of_other_layers() -> None:
    config, model = make_config(train=UNLIKE), TinyClassifier()
    model.head = nn.Sequential(nn.LayerNorm(5), nn.Linear(5, LABELS))
    with adapted(config, model.double(), HEAD) as shared:
        train_and_compare(shared, jobs_of(shared, config, double(make_data())), config.train)
        assert isinstance(shared.model.head[0], nn.LayerNorm)


def test_a_model_that_mixes_samples_is_refused() -> None:
    config, model = make_config(), TinyClassifier()
    model.norm = nn.BatchNorm1d(LABELS)
    with adapted(config, model, HEAD) as shared:
        jobs = jobs_of(shared, config, make_data())
        with pytest.raises(FedError, match="norm is BatchNorm1d: in training it mixes"):
            train_together(shared, jobs, config.train)


def test_a_head_of_another_dtype_than_the_factors_is_refused_before_the_first_round() -> None:
    changes: dict[str, Any] = {"adapter": {"dtype": "bfloat16"}, "execution": "cohort", "clients_per_pass": 2}
    model = TinyClassifier().bfloat16()
    model.head.float()
    message = (
        r"^the adapter is bfloat16 and the trained head float32: a cohort needs one dtype; adapter.dtype = 'float32', "
        r"train.head = 'freeze' or execution = 'sequential' would be right$"
    )
    with adapted(make_config(**changes), model, HEAD) as shared, pytest.raises(FedError, match=message):
        Federation(make_config(**changes), make_data(), shared, pytest.fail).beginning()
    for fine in (
        changes | {"execution": "sequential"},
        changes | {"adapter": {}},
        changes | {"train": {"head": "freeze"}},
    ):
        config = make_config(**fine)
        with adapted(config, model, HEAD) as shared:
            Federation(config, make_data(), shared, pytest.fail).beginning()


def test_the_model_comes_back_as_it_was() -> None:
    config, data = make_config(train={"max_grad_norm": 1.0}), make_data()
    model = TinyClassifier()
    with adapted(config, model, HEAD) as shared:
        state = {name: value.clone() for name, value in model.state_dict().items()}
        parameters: dict[str, Tensor] = dict(model.named_parameters())
        train_together(shared, jobs_of(shared, config, data), config.train)
        assert dict(model.named_parameters()).keys() == parameters.keys()
        assert all(value is parameters[name] for name, value in model.named_parameters())
        assert_equal(model.state_dict(), state)
        assert all(parameter.grad is None for parameter in model.parameters())
