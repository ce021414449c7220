"""Which updates are usable: every method's own are, and what is malformed is left out alone, by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed import methods
from fed.data.tables import DenseTable, Split
from fed.models.shared_model import adapted
from fed.seeding import ClientRandom
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.simulation.update_checks import Asked, asked_of, find_fault, growth, state_fault
from fed.training.local import Job
from fed.types import Adapter, Client, ClientStart, ClientUpdate, Options, ServerState, TailPenalty
from tests.support.equality import assert_equal
from tests.support.tiny_federation import (
    HEAD,
    TinyClassifier,
    make_config,
    make_data,
    make_server,
    make_update,
    update_of,
)

NAN, INF = float("nan"), float("inf")


def round_of(name: str, rounds: int = 1) -> tuple[ServerState, list[ClientStart], list[ClientUpdate]]:
    """Return a server that has aggregated some rounds, and the starts and updates of its next one."""
    method, server = methods.find(name), make_server(rank=6, fresh=True)
    server = replace(server, options=Options(hetlora_prune=name == "hetlora", hetlora_decay=0.5))
    for number in range(rounds + 1):
        starts, updates = [], []
        for client_id, rank in enumerate([6] * 4 if method.equal_ranks else [1, 3, 6, 4]):
            client = Client(client_id, rank, n_samples=4)
            start = method.start(server, client, ClientRandom(0, number + 1, client_id))
            update = make_update(start, client, seed=client_id + 10 * number, weight=1.0 + client_id)
            starts.append(start)
            updates.append(method.finish(server, start, update))
        if number == rounds:
            return server, starts, updates
        server = method.aggregate(server, updates)
    raise AssertionError


ROUNDS = {name: round_of(name) for name in methods.METHODS}


def one_tensor(change: Callable[[Tensor], object]) -> Callable[[ClientUpdate, int], ClientUpdate]:
    """Return a mutation that changes one factor, or a tensor of the head."""

    def mutate(update: ClientUpdate, place: int) -> ClientUpdate:
        factors, names = dict(update.factors), [*update.factors, "head"]
        matrix = names[place % len(names)]
        if matrix == "head":
            return replace(update, head={name: change(value) for name, value in update.head.items()})
        A, B = factors[matrix]
        factors[matrix] = (change(A), B) if place % 2 else (A, change(B))
        return replace(update, factors=factors)

    return mutate


def holding(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[-1] = value
        return spoilt

    return change


def one_field(**changes: Any) -> Callable[[ClientUpdate, int], ClientUpdate]:
    return lambda update, place: replace(update, **changes)


def selecting(
    change: Callable[[tuple[int, ...]], object],
) -> Callable[[ClientUpdate, int], ClientUpdate]:
    def mutate(update: ClientUpdate, place: int) -> ClientUpdate:
        matrix = list(update.selected)[place % len(update.selected)]
        return replace(update, selected={**update.selected, matrix: change(update.selected[matrix])})

    return mutate


def without_its_last_module(update: ClientUpdate, place: int) -> ClientUpdate:
    """Drop a module from factors and selection alike: consistent, but not what the client was to train."""
    return replace(
        update,
        factors={matrix: (A[:-1], B[:, :-1]) for matrix, (A, B) in update.factors.items()},
        selected={matrix: chosen[:-1] for matrix, chosen in update.selected.items()},
    )


def renamed(update: ClientUpdate, place: int) -> ClientUpdate:
    return replace(update, factors={f"{matrix}.x": pair for matrix, pair in update.factors.items()})


def one_memory(update: ClientUpdate, place: int) -> ClientUpdate:
    """Let a matrix's factors lie in the memory of the head."""
    memory = torch.zeros(10_000)
    head = {name: memory[: value.numel()].view(value.shape) for name, value in update.head.items()}
    matrix, (A, B) = list(update.factors.items())[place % len(update.factors)]
    shared = {matrix: (memory[: A.numel()].view(A.shape), memory[: B.numel()].view(B.shape))}
    return replace(update, head=head, factors={**update.factors, matrix: shared[matrix]})


MUTATIONS: dict[str, Callable[[ClientUpdate, int], ClientUpdate]] = {
    **{
        f"a tensor {title}": one_tensor(change)
        for title, change in {
            "with NaN": holding(NAN),
            "with infinity": holding(-INF),
            "of more rows": lambda tensor: torch.cat([tensor, tensor]),
            "without rows": lambda tensor: tensor[:0],
            "of one number": lambda tensor: tensor[:1, :1],
            "that broadcasts": lambda tensor: torch.ones(()),
            "with an axis more": lambda tensor: tensor[None],
            "turned": lambda tensor: torch.cat([tensor.mT, tensor.mT]),
            "in fp64": Tensor.double,
            "in fp16": Tensor.half,
            "of integers": Tensor.long,
            "of bools": Tensor.bool,
            "of complex numbers": lambda tensor: tensor.to(torch.complex64),
            "that is sparse": Tensor.to_sparse,
            "on another device": lambda tensor: tensor.to("meta"),
            "that is a list": Tensor.tolist,
            "that requires gradients": lambda tensor: tensor.clone().requires_grad_(),
            "that is missing": lambda tensor: None,
        }.items()
    },
    **{f"a loss of {loss}": one_field(loss=loss) for loss in (NAN, INF, -INF, "0.5", None, torch.ones(()))},
    **{f"{steps} steps": one_field(steps=steps) for steps in (0, -1, 1.0, True, None)},
    **{f"a weight of {w}": one_field(weight=w) for w in (0.0, -1.0, NAN, INF, -INF, 1e300, 1e-300, True, "1", None)},
    **{f"sending {sent!r}": one_field(sent=sent) for sent in ("", "BA", "AA", "C", "ABC", "other", None)},
    "factors that are no mapping": one_field(factors=[]),
    "no factors": one_field(factors={}),
    "other factors": renamed,
    "factors of one matrix more": lambda update, place: replace(
        update, factors={**update.factors, "more": update.factors["left"]}
    ),
    "three factors": lambda update, place: replace(
        update, factors={**update.factors, "left": (*update.factors["left"], torch.ones(1))}
    ),
    "no head": lambda update, place: replace(update, head={}),
    "a head with more": lambda update, place: replace(update, head={**update.head, "head.bias": torch.ones(3)}),
    "no selection": one_field(selected={}),
    "selecting none": selecting(lambda chosen: ()),
    "selecting more": selecting(lambda chosen: (*chosen, 7)),
    "selecting one twice": selecting(lambda chosen: (*chosen, chosen[-1])),
    "selecting out of range": selecting(lambda chosen: (*chosen[:-1], 99)),
    "selecting below zero": selecting(lambda chosen: (-1, *chosen[1:])),
    "selecting by bools": selecting(lambda chosen: (True,) * len(chosen)),
    "selecting by floats": selecting(lambda chosen: tuple(map(float, chosen))),
    "selecting by a tensor": selecting(torch.tensor),
    "without its last module": without_its_last_module,
    "keeping no tensor": one_field(memory={"rank": 3}),
    "keeping NaN": one_field(memory={"kept": torch.tensor([0.0, NAN])}),
    "keeping a sparse tensor": one_field(memory={"kept": torch.ones(2, 2).to_sparse()}),
    "keeping no mapping": one_field(memory=[torch.ones(2)]),
    "keeping by number": one_field(memory={3: torch.ones(2)}),
    "tensors in one memory": one_memory,
}


@dataclass(frozen=True)
class Case:
    """A method, one of its clients, and a mutation of what it sends, at one of several places."""

    name: str
    client: int
    mutation: str
    place: int


CASES = st.builds(
    Case,
    st.sampled_from(list(methods.METHODS)),
    st.integers(0, 3),
    st.sampled_from(list(MUTATIONS)),
    st.integers(0, 5),
)


def check_left_out(case: Case) -> None:
    """A mutated update is found, in one line, and the others are aggregated as if it were not there."""
    server, starts, updates = ROUNDS[case.name]
    mutated = list(updates)
    mutated[case.client] = MUTATIONS[case.mutation](updates[case.client], case.place)
    faults = [find_fault(server, start, update) for start, update in zip(starts, mutated, strict=True)]
    assert [number for number, fault in enumerate(faults) if fault is not None] == [case.client]
    assert "\n" not in faults[case.client]
    assert len(faults[case.client]) < 250
    rest = [update for update, fault in zip(mutated, faults, strict=True) if fault is None]
    expected = [update for number, update in enumerate(updates) if number != case.client]
    found, wanted = (methods.find(case.name).aggregate(server, some) for some in (rest, expected))
    for field in ("head", "base_delta", "visits"):
        assert_equal(getattr(found, field), getattr(wanted, field))
    assert_equal(found.adapter.factors, wanted.adapter.factors)


@settings(max_examples=100, deadline=None)
@given(CASES)
def test_a_malformed_update_is_left_out_alone(case: Case) -> None:
    check_left_out(case)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(CASES)
def test_many_malformed_updates_are_left_out_alone(case: Case) -> None:
    check_left_out(case)


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
@pytest.mark.parametrize("name", methods.METHODS)
def test_what_a_method_sends_is_usable(name: str, execution: str) -> None:
    """In three rounds of training, with every head; HETLoRA prunes, and the second round of RoLoRA trains A."""
    equal = methods.find(name).equal_ranks
    for head in ("train", "freeze", "personal"):
        config = make_config(
            method=name,
            execution=execution,
            clients_per_pass=4,
            clients={"per_round": 4, "ranks": [6] if equal else [1, 2, 3, 6]},
            train={"head": head},
            hetlora={"prune": True, "decay": 0.5, "penalty": 50.0},
            measure={"noise": False},
        )
        with adapted(config, TinyClassifier(), HEAD if head != "freeze" else ()) as shared:
            federation = Federation(config, make_data(), shared, pytest.fail)
            played = list(federation.play(federation.beginning()))
        assert [following.row["skipped"] for following in played] == [[]] * 4
        if name == "hetlora":
            assert len(played[-1].updates[3].selected["body.first"]) < 6


def test_a_pruned_update_may_have_lost_its_last_modules_in_every_matrix_and_no_others() -> None:
    server = make_server(rank=3)
    start = methods.find("hetlora").start(server, Client(0, 3, 1), ClientRandom(0, 1, 0))
    update = make_update(start, Client(0, 3, 1), seed=0)
    pruned = without_its_last_module(update, 0)
    assert find_fault(server, start, pruned) == "its selection of left is (0, 1); (0, 1, 2) would be right"
    start = replace(start, penalty=TailPenalty(first=2, weight=1.0))
    assert find_fault(server, start, pruned) is None
    assert find_fault(server, start, update) is None
    mixed = replace(
        update,
        factors={"left": pruned.factors["left"], "right": update.factors["right"]},
        selected={"left": (0, 1), "right": (0, 1, 2)},
    )
    assert find_fault(server, start, mixed) == "it dropped modules of some matrices; of all or of none would be right"


def test_a_trained_factor_is_not_the_servers_own_and_a_fixed_one_may_be() -> None:
    server = make_server(rank=2)
    start = methods.find("ffa-lora").start(server, Client(0, 2, 1), ClientRandom(0, 1, 0))
    update = make_update(start, Client(0, 2, 1), seed=0)
    A, B = server.adapter.factors["left"]
    fixed = replace(update, factors={**update.factors, "left": (A, update.factors["left"][1])})
    assert find_fault(server, start, fixed) is None
    moved = replace(update, factors={**update.factors, "left": (A, B)})
    said = "its left lora_B shares memory with what the client received; a copy would be right"
    assert find_fault(server, start, moved) == said
    head = replace(update, head=server.head)
    assert find_fault(server, start, head) == said.replace("left lora_B", "head.weight")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": NAN}, "its training loss is nan"),
        ({"loss": INF}, "its training loss is inf"),
        ({"weight": 0.0}, "its weight is 0.0; a number from 1e-09 to 1e+15 would be right"),
        ({"steps": 0}, "its number of steps is 0; an integer of at least 1 would be right"),
        ({"sent": "A"}, "it says that it sends 'A'; 'AB' would be right"),
        ({"factors": {}}, "its modules lacks m"),
        ({"factors": {"m": (torch.ones(1, 2), torch.tensor([[INF]]))}}, "its m lora_B holds NaN or infinity"),
        ({"factors": {"m": (torch.ones(1, 3), torch.ones(1, 1))}}, "its m lora_A is (1, 3); (1, 2) would be right"),
        ({"selected": {"m": (1,)}}, "its selection of m is (1); (0) would be right"),
        ({"head": {"head.bias": torch.tensor([0.0, NAN])}}, "its head.bias holds NaN or infinity"),
        ({"head": {"head.bias": torch.ones(())}}, "its head.bias is (); (2,) would be right"),
        ({"head": {}}, "its head lacks head.bias"),
        ({"memory": {"kept": torch.tensor([NAN])}}, "its kept that it keeps holds NaN or infinity"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], said: str) -> None:
    server = ServerState(Adapter({"m": (torch.ones(1, 2), torch.ones(1, 1))}, 1.0), {"head.bias": torch.ones(2)})
    start = ClientStart(server.adapter.factors, {"m": (0,)}, 1.0, "folded")
    update = update_of(0, [[1.0, 2.0]], [[3.0]], 1.0, head={"head.bias": torch.ones(2)})
    assert find_fault(server, start, update) is None
    assert find_fault(server, start, replace(update, **change)) == said


NARROW = Asked(steps=3, weight=5.0, least_tokens=30, most_tokens=60)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 4}, "it says that it took 4 steps; 3 would be right"),
        ({"weight": 1.0}, "its weight is 1; 5 would be right"),
        ({"weight": 5.0 + 1e-9}, "its weight is 5; 5 would be right"),
        ({"tokens": 29}, "it says that it trained on 29 tokens; 30 to 60 would be right"),
        ({"tokens": 61}, "it says that it trained on 61 tokens; 30 to 60 would be right"),
        ({"tokens": 45.0}, "it says that it trained on 45.0 tokens; 30 to 60 would be right"),
        ({"tokens": True}, "it says that it trained on True tokens; 30 to 60 would be right"),
        ({"positions": 44}, "it says that it computed 44 tokens, padding included; at least 45 would be right"),
        ({"positions": 10**400}, f"it says that it computed {str(10**400)[:80]} tokens, padding included; at least"),
        ({"selected": {"m": (0,)}}, "its selection of m is (0); (1) would be right"),
    ],
)
def test_counts_that_cannot_be_are_named(change: dict[str, Any], said: str) -> None:
    A, B = torch.ones(2, 2), torch.ones(1, 2)
    start = ClientStart({"m": (A, B)}, {"m": (1,)}, 1.0, "folded")
    honest = update_of(0, [[1.0, 2.0]], [[3.0]], 5.0, selected={"m": (1,)}, steps=3, tokens=45, positions=50)
    server = ServerState(Adapter({"m": (A, B)}, 1.0))
    assert find_fault(server, start, honest, NARROW) is None
    assert find_fault(server, start, replace(honest, tokens=7, steps=2), None) is None
    assert find_fault(server, start, replace(honest, **change), NARROW).startswith(said)


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
def test_what_a_job_asks_for(weighting: str) -> None:
    """Texts of 3, 5 and 4 tokens, two of them a step, in six steps."""
    from fed.data.tables import Sequences, TextTable

    tokens = Sequences.of([[1] * 9, [1] * 3, [1] * 5, [1] * 4])
    split = Split(TextTable({"input_ids": tokens}, torch.zeros(4, dtype=torch.int64), 0), torch.tensor([1, 2, 3]))
    job = Job(Client(0, 1, 3), ClientStart({}, {}, 1.0, "folded"), {}, split, 6, 0.1, ClientRandom(0, 1, 0))
    weight = 3.0 if weighting == "samples" else 1.0
    train = make_config(train={"batch_size": 2, "weighting": weighting}).train
    assert asked_of(job, train) == Asked(6, weight, 36, 60)
    assert asked_of(job, make_config(train={"batch_size": 8, "weighting": weighting}).train).most_tokens == 90


@pytest.mark.parametrize("name", ["ffa-lora", "rolora"])
def test_a_factor_that_was_to_be_held_fixed_is_the_start_s(name: str) -> None:
    server, starts, updates = ROUNDS[name]
    fixed = "AB".index({"A": "B", "B": "A"}[starts[0].trained])
    for matrix in updates[0].factors:
        pair = list(updates[0].factors[matrix])
        pair[fixed] = pair[fixed].clone()
        assert find_fault(server, starts[0], replace(updates[0], factors={**updates[0].factors, matrix: pair})) is None
        pair[fixed][0, 0] += 1e-6 * (1 + pair[fixed][0, 0].abs())
        fault = find_fault(server, starts[0], replace(updates[0], factors={**updates[0].factors, matrix: tuple(pair)}))
        assert fault.startswith(f"its {matrix} lora_{'AB'[fixed]} was to be held fixed")


@pytest.mark.parametrize("change", [{"steps": 4}, {"weight": 1e6}, {"tokens": 10**9}, {"positions": 0}])
def test_a_run_leaves_out_what_cannot_be(
    change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finish(server: ServerState, start: ClientStart, update: ClientUpdate) -> ClientUpdate:
        return replace(update, **change) if update.client.id == 1 else update

    monkeypatch.setitem(methods.METHODS, "mutated", methods.METHODS["fed-plora"]._replace(finish=finish))
    config = make_config(method="mutated", rounds=2, clients={"per_round": 4})
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
    assert [row["skipped"] for row in rows] == [[], [1], [1]]
    assert [len(row["faults"]) for row in rows] == [0, 1, 1]
    assert rows[-1]["faults"][0].endswith("would be right")


def test_a_client_that_sends_next_to_nothing_does_not_make_the_others_seem_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Client 1 shrinks all that it sends to a millionth, so that every other one grew a million times as much."""

    def finish(server: ServerState, start: ClientStart, update: ClientUpdate) -> ClientUpdate:
        if update.client.id != 1:
            return update
        small = {matrix: (1e-6 * A, 1e-6 * B) for matrix, (A, B) in update.factors.items()}
        return replace(update, factors=small, head={name: 1e-6 * value for name, value in update.head.items()})

    monkeypatch.setitem(methods.METHODS, "mutated", methods.METHODS["fed-plora"]._replace(finish=finish))
    config = make_config(method="mutated", rounds=2, clients={"per_round": 4})
    rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path)
    assert [row["skipped"] for row in rows] == [[]] * 3


def test_updates_without_any_tensor_are_usable_where_there_is_none() -> None:
    start = ClientStart({}, {}, 1.0, "folded")
    update = ClientUpdate(Client(0, 1, 1), {}, {}, {}, 1.0, 1, 0.0)
    assert find_fault(ServerState(Adapter({}, 1.0)), start, update) is None


def test_growth_by_hand() -> None:
    """Start: A = [3], B = [0], head [4], norm 5. End: A = [6], B = [8], head [0], norm 10."""
    start = ClientStart({"m": (torch.tensor([[3.0]]), torch.tensor([[0.0]]))}, {"m": (0,)}, 1.0, "folded")
    update = update_of(0, [[6.0]], [[8.0]], 1.0, head={"h": torch.tensor([0.0])})
    assert growth(start, {"h": torch.tensor([4.0])}, update) == 2.0
    nothing = ClientStart({"m": (torch.zeros(1, 1), torch.zeros(1, 1))}, {"m": (0,)}, 1.0, "folded")
    assert growth(nothing, {}, update) == math.inf


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"head": {"h": torch.tensor([NAN])}}, "the server's h would hold NaN or infinity"),
        ({"base_delta": {"m": torch.tensor([[INF]])}}, "what is folded into m would hold NaN or infinity"),
        ({"moments": {"second A m": torch.tensor([INF])}}, "the moment second A m would hold NaN or infinity"),
        ({"adapter": Adapter({"m": (torch.ones(1, 1), torch.tensor([[INF]]))}, 1.0)}, "the server's m lora_B would"),
    ],
)
def test_a_state_that_is_not_finite_is_found(change: dict[str, Any], said: str) -> None:
    server = ServerState(Adapter({"m": (torch.ones(1, 1), torch.ones(1, 1))}, 1.0))
    assert state_fault(server) is None
    assert state_fault(replace(server, **change)).startswith(said)


@pytest.mark.parametrize("mutation", ["a tensor of more rows", "2 steps", "factors that are no mapping"])
def test_a_run_goes_on_without_a_malformed_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mutation: str
) -> None:
    """Client 1's updates are mutated on their way; the run equals one in which they say that their loss is NaN."""
    states = []
    for number, mutate in enumerate((MUTATIONS["a loss of nan"], MUTATIONS.get(mutation, one_field(steps=NAN)))):

        def finish(server: ServerState, start: ClientStart, update: ClientUpdate, mutate: Any = mutate) -> ClientUpdate:
            return mutate(update, 0) if update.client.id == 1 else update

        monkeypatch.setitem(methods.METHODS, "mutated", methods.METHODS["fed-plora"]._replace(finish=finish))
        config, said = make_config(method="mutated", rounds=2, clients={"per_round": 4}), []
        rows = simulate(config, make_data(), TinyClassifier(), HEAD, tmp_path / str(number), None, said.append)
        assert [row["skipped"] for row in rows] == [[], [1], [1]]
        assert [row["steps"] for row in rows[1:]] == [[3] * 4] * 2
        assert [line.startswith("round ") and ": client 1 is left out: its " in line for line in said] == [True] * 2
        states.append((tmp_path / str(number) / "adapter" / "adapter_model.safetensors").read_bytes())
    assert states[0] == states[1]


class Unbounded(TinyClassifier):
    """The same layers without anything between them that would bound what overflows."""

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.body["second"](self.body["first"](inputs))))


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
def test_float16_that_overflows_is_one_clients_fault_with_a_hint(execution: str) -> None:
    """One client's inputs are beyond float16: it is left out, and the others' round is as without it."""
    lines: list[str] = []
    config = make_config(
        rounds=1, execution=execution, clients_per_pass=4, clients={"per_round": 4}, train={"head": "freeze"}
    )
    data = make_data()
    inputs = data.test.table.inputs["inputs"].clone()
    inputs[data.clients[1].rows] = 3e4  # the first layer's outputs are beyond 65504
    table = DenseTable({"inputs": inputs.half()}, data.test.table.labels)
    data = replace(
        data, clients=tuple(Split(table, own.rows) for own in data.clients), test=Split(table, data.test.rows)
    )
    model = Unbounded().half()
    model.body["first"].weight.data.fill_(1.0)
    with adapted(config, model, HEAD) as shared:
        assert next(iter(shared.handle.layers.values())).lora_A.dtype is torch.float32
        federation = Federation(config, data, shared, lines.append)
        *_, last = federation.play(federation.beginning())
    assert last.row["skipped"] == [1]
    assert lines == [
        "round 1: client 1 is left out: its training loss is nan; float16 overflows beyond 65504, so model.dtype = "
        "'bfloat16' may be right"
    ]
