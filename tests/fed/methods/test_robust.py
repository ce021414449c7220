"""Median, trimmed mean and Krum: by hand, against NumPy and loops, and what a minority can do to them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fed import methods
from fed.config import RunConfig, parse
from fed.errors import FedError
from fed.methods.average import next_state
from fed.methods.robust import combine, krum, median, most_hostile, trimmed_mean
from fed.seeding import ClientRandom
from fed.simulation.simulate import simulate
from fed.types import Adapter, Client, Options, ServerState
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

RULES = ("median", "trimmed-mean", "krum")
BY_MODULE = [name for name, method in methods.METHODS.items() if method.by_module]


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


@pytest.mark.parametrize("count", range(1, 9))
def test_the_median_is_numpys(count: int) -> None:
    values = torch.randn(count, 7, dtype=torch.float64)
    np.testing.assert_allclose(median(values, ones(count)).numpy(), np.median(values.numpy(), axis=0), rtol=1e-15)


@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(1, 4)), min_size=1, max_size=6))
def test_a_weighted_median_is_that_of_repeated_values(pairs: list[tuple[int, int]]) -> None:
    values, weights = column(*(value for value, _ in pairs)), torch.tensor([float(weight) for _, weight in pairs])
    repeated = list(itertools.chain.from_iterable([value] * weight for value, weight in pairs))
    assert median(values, weights).item() == np.median(repeated)
    assert median(values, 1e6 * weights).item() == np.median(repeated)


def trimmed_by_loops(values: list[float], weights: list[float], trim: float) -> float:
    """Return the trimmed mean of one column; cut is decided in whole hundredths, without rounding."""
    pairs, total = sorted(zip(values, weights, strict=True)), sum(weights)
    kept, reached = [], 0.0
    for value, weight in pairs:
        behind = total - reached - weight
        if 100 * reached >= round(100 * trim) * total and 100 * behind >= round(100 * trim) * total:
            kept.append((value, weight))
        reached += weight
    if not kept:
        return median(column(*values), torch.tensor(weights)).item()
    return sum(value * weight for value, weight in kept) / sum(weight for _, weight in kept)


@given(
    st.lists(st.tuples(st.integers(-50, 50), st.integers(1, 5)), min_size=1, max_size=12),
    st.sampled_from([0.01, 0.07, 0.1, 0.2, 0.25, 0.3, 0.45]),
)
def test_a_trimmed_mean_is_that_of_loops(pairs: list[tuple[int, int]], trim: float) -> None:
    values, weights = [float(value) for value, _ in pairs], [float(weight) for _, weight in pairs]
    for own in (weights, [1.0] * len(weights)):
        found = trimmed_mean(column(*values), torch.tensor(own), trim).item()
        assert found == pytest.approx(trimmed_by_loops(values, own, trim), abs=1e-12)


@pytest.mark.parametrize("count", range(1, 21))
@pytest.mark.parametrize("trim", [0.07, 0.1, 0.2, 0.3])
def test_so_many_are_cut_from_each_end(count: int, trim: float) -> None:
    """⌈trim · n⌉, also where trim · n comes out above a whole number, as 0.07 · 100 does; else the median."""
    cut = math.ceil(round(trim * count, 9))
    values = np.sort(np.random.default_rng(count).normal(size=count))
    expected = values[cut : count - cut].mean() if count > 2 * cut else np.median(values)
    assert trimmed_mean(column(*values), ones(count), trim).item() == pytest.approx(expected, abs=1e-12)


def test_columns_are_cut_apart_by_weight() -> None:
    """Weights 3, 1, 1, of which 1 is cut from each end: of the first column 1 is left, of the second the 5 alone."""
    values = torch.tensor([[0.0, 5.0], [1.0, 0.0], [2.0, 9.0]])
    found = trimmed_mean(values, torch.tensor([3.0, 1.0, 1.0]), 0.2)
    assert found.tolist() == [1.0, 5.0]


def krum_by_loops(rows: np.ndarray, hostile: int) -> int:
    count, sums = len(rows), []
    for one in range(count):
        away = sorted(float(((rows[one] - rows[other]) ** 2).sum()) for other in range(count) if other != one)
        sums.append(sum(away[: count - hostile - 2]))
    return sums.index(min(sums))


@pytest.mark.parametrize(("count", "share"), [(5, 0.2), (7, 0.2), (9, 0.3), (10, 0.3), (11, 0.1)])
def test_krum_is_that_of_loops(count: int, share: float) -> None:
    rows = torch.randn(count, 4, dtype=torch.float64)
    hostile = math.ceil(round(share * count, 9))
    assert most_hostile(count, share) == hostile
    assert count >= 2 * hostile + 3
    assert torch.equal(krum(rows, share), rows[krum_by_loops(rows.numpy(), hostile)])


@pytest.mark.parametrize(("count", "share"), [(1, 0.2), (2, 0.2), (4, 0.2), (6, 0.2), (8, 0.3)])
def test_krum_of_too_few_is_the_median(count: int, share: float) -> None:
    rows = torch.randn(count, 3, dtype=torch.float64)
    assert torch.equal(krum(rows, share), median(rows, ones(count)))


@pytest.mark.parametrize("rule", RULES)
def test_one_client_s_vector_is_taken_as_it_is(rule: str) -> None:
    row = torch.randn(1, 5)
    assert torch.equal(combine(row, ones(1), Options(aggregation=rule)), row[0].double())


def test_another_rule_is_an_error() -> None:
    with pytest.raises(ValueError, match="'mean' is no rule"):
        combine(torch.ones(1, 1), ones(1), Options())


NUMBERS = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@settings(max_examples=50, deadline=None)
@given(st.lists(NUMBERS, min_size=3, max_size=9), st.lists(st.floats(-1e30, 1e30), max_size=4), st.randoms())
def test_a_minority_moves_no_rule_out_of_the_range_of_the_others(
    honest: list[float], hostile: list[float], random: object
) -> None:
    """As many hostile values as the rule is told of, of any size, in any place."""
    most = {"median": (len(honest) - 1), "trimmed-mean": len(honest) // 3, "krum": (len(honest) - 3) // 2}
    for rule, count in most.items():
        bad = hostile[: max(0, count)]
        mixed = honest + bad
        random.shuffle(mixed)
        share = min(0.49, max(0.01, len(bad) / len(mixed)))
        options = Options(aggregation=rule, trim=share, byzantine_share=share)
        found = combine(column(*mixed), ones(len(mixed)), options).item()
        assert min(honest) - 1e-9 <= found <= max(honest) + 1e-9, (rule, mixed)


# ------------------------------------------------------------------------------------------------------------ methods


def server_of(rule: str, A: list[list[float]], B: list[list[float]], **head: Tensor) -> ServerState:
    adapter = Adapter({"m": (torch.tensor(A), torch.tensor(B))}, 1.0)
    return ServerState(adapter, head, options=Options(aggregation=rule, byzantine_share=0.2))


@pytest.mark.parametrize("rule", RULES)
def test_every_module_is_combined_over_those_who_trained_it(rule: str) -> None:
    """Three modules: the first from five clients, the second from one, the third from nobody."""
    server = server_of(rule, [[9.0], [8.0], [7.0]], [[6.0, 5.0, 4.0]], h=torch.zeros(1))
    firsts = [1.0, 2.0, 2.5, 3.5, 1e6]
    updates = [
        update_of(number, [[a]], [[-a]], 1.0, head={"h": torch.tensor([10 * a])}) for number, a in enumerate(firsts)
    ]
    both = torch.tensor([[2.5], [55.0]]), torch.tensor([[-2.5, 66.0]])
    updates[2] = replace(updates[2], factors={"m": both}, selected={"m": (0, 1)})
    following = next_state(server, updates)
    A, B = following.adapter.factors["m"]
    first = {"median": 2.5, "trimmed-mean": (2 + 2.5 + 3.5) / 3, "krum": 2.0}[rule]
    assert A.flatten().tolist() == pytest.approx([first, 55.0, 7.0])
    assert B.flatten().tolist() == pytest.approx([-first, 66.0, 4.0])
    assert following.head["h"].tolist() == pytest.approx([10 * first])
    assert following.visits["m"].tolist() == [5, 1, 0]
    assert (following.round, server.adapter.factors["m"][0].flatten().tolist()) == (1, [9.0, 8.0, 7.0])


def test_medians_are_weighted_as_the_run_says() -> None:
    server = server_of("median", [[0.0]], [[0.0]])
    updates = [
        update_of(number, [[value]], [[value]], weight)
        for number, (value, weight) in enumerate([(1.0, 1), (2.0, 1), (9.0, 5)])
    ]
    assert next_state(server, updates).adapter.factors["m"][0].item() == 9.0


def test_krum_takes_a_whole_pair_and_a_whole_head() -> None:
    """Each coordinate of client 0 lies nearest to the others', but only client 3's pair as a whole is nobody's copy."""
    rows = torch.randn(5, 4)
    server = server_of("krum", [[0.0, 0.0]], [[0.0], [0.0]], h=torch.zeros(2), k=torch.zeros(1))
    updates = [
        update_of(
            number, [row[:2].tolist()], [[row[2].item()], [row[3].item()]], 1.0, head={"h": row[1:3], "k": row[3:]}
        )
        for number, row in enumerate(rows)
    ]
    following = next_state(server, updates)
    A, B = following.adapter.factors["m"]
    assert torch.equal(torch.cat([A[0], B[:, 0]]), rows[krum_by_loops(rows.double().numpy(), 1)])
    head = rows[krum_by_loops(rows[:, 1:].double().numpy(), 1)]
    assert torch.equal(torch.cat([following.head["h"], following.head["k"]]), head[1:])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", BY_MODULE)
def test_every_method_by_module_takes_the_rule(name: str, rule: str) -> None:
    """One client of seven sends a millionfold: the state stays near that of six, and what is held fixed is kept."""
    method, base = methods.find(name), make_server(rank=6)
    server = replace(base, options=Options(aggregation=rule, trim=0.2, byzantine_share=0.2))
    updates = []
    for number in range(7):
        client = Client(number, 6, n_samples=4)
        begun = method.start(server, client, ClientRandom(0, 1, number))
        updates.append(method.finish(server, begun, make_update(begun, client, seed=number)))
    bad = replace(
        updates[3],
        factors={matrix: (1e6 * A, 1e6 * B) for matrix, (A, B) in updates[3].factors.items()},
        head={key: 1e6 * value for key, value in updates[3].head.items()},
    )
    spoilt, mean = [*updates[:3], bad, *updates[4:]], method.aggregate(base, [*updates[:3], bad, *updates[4:]])
    for following, limit in ((method.aggregate(server, spoilt), 10.0), (mean, math.inf)):
        far = max(own.abs().max().item() for pair in following.adapter.factors.values() for own in pair)
        assert far < limit
    assert max(own.abs().max().item() for pair in mean.adapter.factors.values() for own in pair) > 1e4
    assert method.aggregate(server, spoilt).head["head.weight"].abs().max() < 10
    if name in ("ffa-lora", "rolora"):
        for matrix, (A, _) in method.aggregate(server, spoilt).adapter.factors.items():
            assert torch.equal(A, server.adapter.factors[matrix][0])
    for order in ([6, 5, 4, 3, 2, 1, 0], [3, 0, 6, 1, 5, 2, 4]):
        again = method.aggregate(server, [spoilt[place] for place in order])
        assert_equal(again.adapter.factors, method.aggregate(server, spoilt).adapter.factors)


@pytest.mark.parametrize("execution", ["sequential", "cohort"])
@pytest.mark.parametrize("rule", RULES)
def test_a_run_by_a_rule_goes_on_after_an_interruption(rule: str, execution: str, tmp_path: Path) -> None:
    settings = {"execution": execution, "clients_per_pass": 4, "server": {"aggregation": rule}}
    whole = simulate(make_config(**settings), make_data(), TinyClassifier(), HEAD, tmp_path / "whole")
    simulate(make_config(rounds=2, **settings), make_data(), TinyClassifier(), HEAD, tmp_path / "cut")
    simulate(make_config(**settings), make_data(), TinyClassifier(), HEAD, tmp_path / "cut", resume=True)
    one, other = ((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == other
    assert whole[-1]["loss"] < whole[0]["loss"]
    mean = simulate(make_config(rounds=3), make_data(), TinyClassifier(), HEAD, tmp_path / "mean")
    assert mean[-1]["loss"] != whole[-1]["loss"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": "flora", "server": {"aggregation": "median"}}, "FLoRA does not average module by module.*'fedit'"),
        (
            {"method": "fedex-lora", "clients": {"ranks": [16]}, "server": {"aggregation": "krum"}},
            "FedEx-LoRA does not",
        ),
        ({"server": {"aggregation": "krum"}, "train": {"weighting": "samples"}}, "Krum picks the update of one client"),
        ({"server": {"aggregation": "mode"}}, "server.aggregation is 'mode': it should be 'mean', 'median'"),
        ({"server": {"trim": 0.5}}, "server.trim is 0.5: it should be less than 0.5"),
        ({"server": {"byzantine_share": 0.0}}, "server.byzantine_share is 0.0: it should be greater than 0"),
    ],
)
def test_a_rule_that_would_be_wrong_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(FedError, match=said):
        parse(changes, where="here")


def test_a_weighted_median_is_a_run() -> None:
    for rule in ("median", "trimmed-mean"):
        assert isinstance(parse({"server": {"aggregation": rule}, "train": {"weighting": "samples"}}, "x"), RunConfig)
