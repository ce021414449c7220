"""How the clients of a round are divided into cohorts, and runs with cohorts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fed.data.federated_data import FederatedData
from fed.data.tables import Sequences, Split, TextTable
from fed.errors import FedError
from fed.models.head import head_names
from fed.models.shared_model import SharedModel, adapted
from fed.simulation.rounds import Federation
from fed.simulation.simulate import simulate
from fed.training import cohort, cohort_scheduler
from fed.training.cohort import train_together
from fed.training.cohort_scheduler import CohortScheduler
from fed.training.compiled_loss import CompiledLosses
from fed.training.local import Job
from fed.training.memory import MIB, base_bytes
from plora_kernels.fallback import grouped_products
from tests.support import tiny_federation
from tests.support.command_line import rows_of
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

SIX = {"clients": {"count": 6, "per_round": 6, "ranks": [1, 2, 3, 6]}}
DATA = make_data(sizes=(9, 2, 14, 5, 9, 9))


@pytest.fixture
def shared() -> Iterator[SharedModel]:
    with adapted(make_config(**SIX), TinyClassifier(), HEAD) as workplace:
        yield workplace


def jobs_of(shared: SharedModel, config: SimpleNamespace) -> list[Job]:
    return tiny_federation.jobs_of(shared, config, DATA)


def divided(shared: SharedModel, **changes: Any) -> list[list[int]]:
    config = make_config(**SIX, execution="cohort", **changes)
    return list(CohortScheduler(shared, config, pytest.fail).divide(jobs_of(shared, config)))


def test_a_cohort_holds_as_many_as_asked_for_and_clients_of_as_many_steps(shared: SharedModel) -> None:
    assert divided(shared, clients_per_pass=4) == [[0, 1, 2, 3], [4, 5]]
    unequal = {"client_steps": [1, 3, 2]}
    assert divided(shared, clients_per_pass=2, train=unequal) == [[1, 4], [2, 5], [0, 3]]


def test_a_cohort_fits_its_memory(shared: SharedModel) -> None:
    config = make_config(**SIX, execution="cohort", clients_per_pass=6, cohort_memory_mib=1.0)
    divider, jobs = CohortScheduler(shared, config, pytest.fail), jobs_of(shared, config)
    needs, fixed = divider._needs(jobs), base_bytes(shared)
    assert [len(cohort) for cohort in divider.divide(jobs)] == [6]
    # Weights (7·11 + 11 + 11·5 + 5·3 + 3) fp32; a client's factors 6·(7 + 11 + 11 + 5) and its head 18, their
    # gradients and AdamW's two moments, six step counts, and the activations of its batch.
    assert fixed == 4 * (77 + 11 + 55 + 18)
    activations = divider._activations(jobs[0], jobs[0].split)
    assert needs[0] == 4 * 4 * (6 * 34 + 18) + 4 * 6 + activations
    room = (fixed + needs[0] + needs[1] + 1) / MIB
    for places in divided(shared, clients_per_pass=6, cohort_memory_mib=room):
        assert fixed + sum(needs[place] for place in places) <= room * MIB
    assert max(map(len, divided(shared, clients_per_pass=6, cohort_memory_mib=room))) == 2


def test_compiled_clients_take_alike(shared: SharedModel) -> None:
    config = make_config(**SIX, execution="cohort", clients_per_pass=6, cohort_memory_mib=1.0)
    plain = CohortScheduler(shared, config, pytest.fail)._needs(jobs_of(shared, config))
    config.cohort_compile = True
    needs = CohortScheduler(shared, config, pytest.fail)._needs(jobs_of(shared, config))
    assert needs == [plain[3]] * 6  # a client with all modules and a full batch
    assert plain[1] < plain[3]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_texts_are_counted_as_long_as_the_longest(attention: str) -> None:
    """Eager attention keeps the square of a row's length."""
    rows = [[1] * (2 if client < 9 else 36) for client in range(18)]  # the second client's are longer
    table = TextTable({"input_ids": Sequences.of(rows)}, torch.arange(18) % 3, pad=0)
    clients = tuple(Split(table, part) for part in torch.arange(18).split(9))
    config = make_config(
        clients={"count": 2, "ranks": [2]},
        adapter={"target_modules": "all-linear"},
        execution="cohort",
        clients_per_pass=2,
        cohort_memory_mib=1000.0,
    )
    model = tiny_bert()
    model.set_attn_implementation(attention)
    with adapted(config, model, head_names(model)) as shared:
        data = FederatedData(clients, clients[0], None, None, ("a", "b", "c"))
        jobs = tiny_federation.jobs_of(shared, config, data)
        needs = CohortScheduler(shared, config, pytest.fail)._needs(jobs)
        assert needs[0] == needs[1]
        whole = Split.joined([job.split for job in jobs])
        (long,) = train_together(shared, jobs[1:], config.train, measure=True)
        counted = CohortScheduler(shared, config, pytest.fail)._activations(jobs[0], whole)
        assert counted == long.footprint.activation_bytes
        (short,) = train_together(shared, jobs[:1], config.train, measure=True)
        taken = sum(
            update.footprint.activation_bytes for update in train_together(shared, jobs, config.train, measure=True)
        )
        assert 2 * short.footprint.activation_bytes < 0.5 * taken <= sum(needs)


def test_what_fits_not_even_one_client_is_refused(shared: SharedModel) -> None:
    with pytest.raises(FedError, match=r"cohort_memory_mib is 0.001: the base takes .* and client 0 alone"):
        divided(shared, clients_per_pass=2, cohort_memory_mib=0.001)


def test_the_fastest_size_is_measured_once_and_said(shared: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seconds per cohort, each measured twice. A client's share is least at 5; the search must pass 2.
    took = {1: [9.0, 1.0], 2: [3.0, 2.4], 5: [2.0, 2.5], 6: [9.0, 9.0]}
    monkeypatch.setattr(CohortScheduler, "_seconds", lambda self, jobs: took[len(jobs)].pop())
    config, said = make_config(**SIX, execution="cohort"), []
    divider = CohortScheduler(shared, config, said.append)
    for _ in range(2):
        assert [len(cohort) for cohort in divider.divide(jobs_of(shared, config))] == [5, 1]
    assert divider.size == 5
    assert said == [
        "cohorts of 5 clients measure fastest here (ms a client's step: 1: 500.00, 2: 600.00, 5: 200.00, 6: 750.00)"
    ]


def test_measuring_changes_nothing(shared: SharedModel) -> None:
    config = make_config(**SIX, execution="cohort")
    jobs = jobs_of(shared, config)
    measured = CohortScheduler(shared, config, lambda line: None)
    first = measured.train(jobs)
    given = CohortScheduler(shared, config, pytest.fail, measured.size).train(jobs)
    assert_equal([one.factors for one in first], [one.factors for one in given])


NO_ROOM = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")


def with_room_for(most: int, monkeypatch: pytest.MonkeyPatch, error: Exception = NO_ROOM) -> list[int]:
    """Let cohorts of more than `most` clients fail; return the list to which the sizes that are tried will be added."""
    tried: list[int] = []

    def train(shared: SharedModel, jobs: list[Job], *settings: Any) -> Any:
        tried.append(len(jobs))
        if len(jobs) > most:
            raise error
        return train_together(shared, jobs, *settings)

    monkeypatch.setattr(cohort_scheduler, "train_together", train)
    return tried


@pytest.mark.parametrize("error", [NO_ROOM, MemoryError(), torch.OutOfMemoryError("CUDA out of memory")])
def test_sizes_that_do_not_fit_are_not_chosen(
    shared: SharedModel, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    tried, said = with_room_for(2, monkeypatch, error), []
    monkeypatch.setattr(cohort_scheduler, "ENOUGH", 1e9)  # no size is too slow
    config = make_config(**SIX, execution="cohort")
    size = CohortScheduler(shared, config, said.append).measure(jobs_of(shared, config))
    assert tried == [1, 1, 1, 2, 2, 5]
    assert size in (1, 2)
    assert re.fullmatch(r"cohorts of \d clients measure fastest here \(ms a client's step: 1: \S+, 2: \S+\)", said[0])


def test_other_errors_of_a_trial_are_raised(shared: SharedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room_for(2, monkeypatch, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    config = make_config(**SIX, execution="cohort")
    monkeypatch.setattr(cohort_scheduler, "ENOUGH", 1e9)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        CohortScheduler(shared, config, pytest.fail).measure(jobs_of(shared, config))


@pytest.mark.parametrize(
    ("most", "size", "said"),
    [
        (2, 3, r"round 1: 3 clients in one cohort run out of memory; a clients_per_pass below 3, or a cohort_memory"),
        (0, 3, r"round 1: 3 clients in one cohort run out of memory"),
        (0, 1, r"round 1: client \d runs out of memory even alone, .*a smaller train.batch_size"),
        (0, 0, r"round 1: client \d runs out of memory even alone, .*a smaller train.batch_size"),
    ],
)
def test_a_cohort_that_runs_out_of_memory_says_what_to_set(
    shared: SharedModel, monkeypatch: pytest.MonkeyPatch, most: int, size: int, said: str
) -> None:
    with_room_for(most, monkeypatch)
    config = make_config(**SIX, execution="cohort", clients_per_pass=size)
    with pytest.raises(FedError, match=said):
        CohortScheduler(shared, config, pytest.fail).train(jobs_of(shared, config))


@pytest.mark.parametrize("selection", ["random", "gradient"])
def test_a_size_measured_before_the_first_round_is_the_runs_own(selection: str) -> None:
    """The run then equals one with this size in its configuration, bit for bit; the model is as it was."""
    config, said = make_config(**SIX, execution="cohort", adapter={"selection": selection, "dropout": 0.3}), []
    with adapted(config, TinyClassifier(dropout=0.2), HEAD) as shared:
        federation = Federation(config, DATA, shared, said.append)
        state = federation.beginning()
        before, random = [value.clone() for value in shared.model.state_dict().values()], torch.get_rng_state()
        size = federation.measure_cohort_size(state)
        assert_equal(list(shared.model.state_dict().values()), before)
        assert torch.equal(torch.get_rng_state(), random)
        assert federation.measure_cohort_size(state) == size
        measured = list(federation.play(state))
    assert [re.match(r"cohorts of (\d) clients", line)[1] for line in said] == [str(size)]
    config.clients_per_pass = size
    with adapted(config, TinyClassifier(dropout=0.2), HEAD) as shared:
        federation = Federation(config, DATA, shared, pytest.fail)
        assert federation.measure_cohort_size(federation.beginning()) == size
        given = list(federation.play(federation.beginning()))
    for one, other in zip(measured, given, strict=True):
        assert_equal(one.state.server.adapter.factors, other.state.server.adapter.factors)
        assert one.row["loss"] == other.row["loss"]
        assert one.row["clients_per_pass"] == other.row["clients_per_pass"]


def run(directory: Path, resume: bool = False, **changes: Any) -> tuple[list[dict], list[str]]:
    config, said = make_config(**SIX, execution="cohort", **changes), []
    return simulate(config, DATA, TinyClassifier(), HEAD, directory, None, said.append, resume=resume), said


def test_a_run_goes_on_with_the_size_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, said = run(tmp_path, rounds=1)
    assert re.fullmatch(r"cohorts of \d clients measure fastest here \(.*\)", said[0])
    size = rows[1]["clients_per_pass"]
    monkeypatch.setattr(cohort_scheduler, "SIZES", ())  # measuring anew would fail
    rows, said = run(tmp_path, resume=True, rounds=3)
    assert [row["clients_per_pass"] for row in rows] == [None, size, size, size]
    assert said == []
    assert [row["clients_per_pass"] for row in rows_of(tmp_path)] == [None, size, size, size]


@pytest.mark.slow
# torch ignores this warning itself where a graph breaks, as it does at this model's namespace.
@pytest.mark.parametrize("by", ["weights", "factors", "operator"])
def test_compiled_steps_are_the_same(by: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # without torch's cache
    monkeypatch.setattr(grouped_products, "group_weights_are_cheaper", lambda *operands: by == "weights")
    monkeypatch.setattr(CompiledLosses, "_compare", lambda *arguments: None)  # it would mend what is wrong
    plan = cohort.Plan  # batches are not padded, so that unequal groups are compiled too
    monkeypatch.setattr(cohort, "Plan", lambda job, batch_size, full: plan(job, batch_size, full=False))
    torch.compiler.reset()
    changes = {**SIX, "adapter": {"dropout": 0.3 if by == "operator" else 0.0}, "measure": {"memory": False}}
    with adapted(make_config(**changes), TinyClassifier(), HEAD) as shared:
        found = []
        for compiled in (False, True):
            config = make_config(**changes, execution="cohort", clients_per_pass=3, cohort_compile=compiled)
            found.append(CohortScheduler(shared, config, pytest.fail).train(jobs_of(shared, config)))
    assert [len(one.factors["body.first"][0]) for one in found[0]] == [1, 2, 3, 6, 1, 2]
    for one, other in zip(*found, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        torch.testing.assert_close(dict(one.factors), dict(other.factors), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dict(one.head), dict(other.head), rtol=1e-4, atol=1e-5)


def test_cohorts_of_one_size_are_compiled_once(shared: SharedModel, traced: list[object]) -> None:
    places = 0, 1, 5, 2, 3, 4  # ranks 1, 2, 2 and batches of 4, 2, 4; then 3, 6, 1 and 4, 4, 4
    config = make_config(**SIX, execution="cohort", clients_per_pass=3, cohort_compile=True, measure={"memory": False})
    cohorts, jobs = CohortScheduler(shared, config, pytest.fail), jobs_of(shared, config)
    found = cohorts.train([jobs[place] for place in places[:3]])
    begun = len(traced)
    assert begun > 0
    found += cohorts.train([jobs[place] for place in places[3:]])
    assert len(traced) == begun
    plain = make_config(**SIX, execution="cohort", clients_per_pass=3, measure={"memory": False})
    jobs = jobs_of(shared, plain)
    expected = CohortScheduler(shared, plain, pytest.fail).train([jobs[place] for place in places])
    for one, other in zip(found, expected, strict=True):
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        torch.testing.assert_close(dict(one.factors), dict(other.factors), rtol=1e-4, atol=1e-5)


def test_a_client_that_cannot_be_used_is_left_out_alone(tmp_path: Path) -> None:
    data = make_data(sizes=(9, 2, 14, 5, 9, 9))
    data.test.table.inputs["inputs"][data.clients[2].rows] = float("nan")
    config, said = make_config(**SIX, execution="cohort", clients_per_pass=6, rounds=1), []
    rows = simulate(config, data, TinyClassifier(), HEAD, tmp_path, None, said.append)
    assert rows[1]["skipped"] == [2]
    assert said == ["round 1: client 2 is left out: its training loss is nan"]
