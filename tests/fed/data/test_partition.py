"""Partitions of rows among clients: every kind, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed.config import RunConfig, parse
from fed.data.partition import Classes, deal, describe_leftover, draw_rows, partition_dirichlet, split_stratified
from fed.errors import FedError

LABELS = np.arange(400) % 8


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def config(seed: int = 0, count: int = 10, alpha: float | str = 0.5, **data: Any) -> RunConfig:
    clients = {"count": count, "per_round": 1, "dirichlet_alpha": alpha}
    return parse(
        {"seed": seed, "model": {"path": "m"}, "data": {"path": "d", **data}, "clients": clients}, where="here"
    )


def kinds(part: np.ndarray, labels: np.ndarray = LABELS) -> int:
    return len(np.unique(labels[part]))


def test_a_stratified_split_takes_the_fraction_of_every_label() -> None:
    labels = np.array([0] * 8 + [1] * 4 + [2])
    taken, left = split_stratified(labels, 0.25, rng())
    assert np.bincount(labels[taken], minlength=3).tolist() == [2, 1, 0]
    assert sorted([*taken, *left]) == list(range(13))


@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=90),
    clients=st.integers(1, 10),
    alpha=st.sampled_from([0.05, 0.5, 100.0, "iid"]),
    seed=st.integers(0, 1000),
)
def test_a_partition_deals_every_row_once_and_two_to_each(
    labels: list[int], clients: int, alpha: float, seed: int
) -> None:
    parts = partition_dirichlet(np.array(labels), clients, alpha, rng(seed))
    assert sorted(np.concatenate(parts)) == list(range(len(labels)))
    assert len(parts) == clients
    assert min(map(len, parts)) >= 2
    again = partition_dirichlet(np.array(labels), clients, alpha, rng(seed))
    assert all((one == other).all() for one, other in zip(parts, again, strict=True))


def skew(parts: list, labels: np.ndarray) -> float:
    """Return the mean share of a client's most frequent label."""
    return float(np.mean([np.bincount(labels[part]).max() / len(part) for part in parts]))


def test_a_small_alpha_skews_labels_and_iid_does_not() -> None:
    labels = np.arange(2000) % 10
    shares = [skew(partition_dirichlet(labels, 20, alpha, rng()), labels) for alpha in (0.1, 1.0, 100.0, "iid")]
    assert shares[0] > 0.5 > shares[1] > 0.2 > max(shares[2:])
    assert {len(part) for part in partition_dirichlet(labels, 20, "iid", rng())} == {100}


def test_too_few_rows_for_the_clients_are_refused() -> None:
    with pytest.raises(
        FedError, match=r"clients.count is 6: 11 training rows allow at most 5 clients of 2 rows; with data.r"
    ):
        partition_dirichlet(np.zeros(11, dtype=np.int64), 6, 0.5, rng())


def test_clients_may_share_rows() -> None:
    """629 rows, 1000 clients: a client's rows differ from each other and do not depend on the number of clients."""
    labels = np.arange(629) % 10
    parts = deal(config(count=1000, alpha=0.1, rows_per_client=16), labels)
    assert {len(np.unique(part)) for part in parts} == {16}
    assert len(np.unique(np.concatenate(parts))) == 629
    fewer = deal(config(count=3, alpha=0.1, rows_per_client=16), labels)
    assert all((one == other).all() for one, other in zip(fewer, parts, strict=False))
    even = deal(config(count=1000, alpha="iid", rows_per_client=16), labels)
    assert skew(parts, labels) > 0.6 > 0.3 > skew(even, labels)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    alpha=st.sampled_from([1e-3, 0.5, "iid"]),
    seed=st.integers(0, 1000),
    data=st.data(),
)
def test_a_label_without_rows_left_gives_way_to_others(sizes: list[int], alpha: float, seed: int, data: Any) -> None:
    by_label = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    wanted = data.draw(st.integers(1, sum(sizes)))
    drawn = draw_rows(by_label, wanted, alpha, rng(seed))
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert len(drawn) == wanted
    if wanted == sum(sizes):
        assert drawn.tolist() == list(range(wanted))


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(FedError, match=r"data.rows_per_client is 16: there are 11 training rows to draw from; it sh"):
        deal(config(rows_per_client=16), np.zeros(11, dtype=np.int64))
    with pytest.raises(
        FedError, match=r"data.rows_per_client is 4: it goes with data.partition = 'dirichlet' or 'iid'"
    ):
        config(rows_per_client=4, partition="natural")


def test_ten_thousand_clients_each_get_rows() -> None:
    parts = deal(config(count=10_000, alpha=0.1), np.arange(25_000) % 10)
    assert min(map(len, parts)) == 2
    assert sum(map(len, parts)) == 25_000


SETTINGS: dict[str, dict[str, Any]] = {
    "iid": {"partition": "iid"},
    "dirichlet": {"partition": "dirichlet"},
    "pathological": {"partition": "pathological"},
    "natural": {"partition": "natural", "count": 4},
    "shards": {"partition": "ShardPartitioner", "partition_options": {"num_shards_per_partition": 2}},
    "of the library": {
        "partition": "DirichletPartitioner",
        "partition_options": {"alpha": 5.0, "min_partition_size": 1},
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_every_way_deals_each_row_once_and_goes_by_the_seed_alone(settings: dict[str, Any]) -> None:
    parts = deal(config(**settings), LABELS)
    assert len(parts) == settings.get("count", 10)
    assert sorted(np.concatenate(parts)) == list(range(400))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert min(map(len, parts)) > 0
    again, other = deal(config(**settings), LABELS), deal(config(seed=1, **settings), LABELS)
    assert all((one == two).all() for one, two in zip(parts, again, strict=True))
    assert any(one.tolist() != two.tolist() for one, two in zip(parts, other, strict=True))


def test_a_pathological_client_has_a_few_labels() -> None:
    for labels in (1, 3):
        parts = deal(config(count=16, partition="pathological", labels_per_client=labels), LABELS)
        assert {kinds(part) for part in parts} == {labels}


def test_a_natural_client_has_whole_values_of_its_own() -> None:
    parts = deal(config(count=8, partition="natural"), LABELS)
    assert [kinds(part) for part in parts] == [1] * 8
    assert {len(part) for part in parts} == {50}
    # With fewer clients than values each gets several, and their numbers differ by one at most.
    assert sorted(kinds(part) for part in deal(config(count=3, partition="natural"), LABELS)) == [2, 3, 3]


def test_the_library_skews_labels_as_the_own_dirichlet_does() -> None:
    labels = np.arange(4000) % 10
    options = {"alpha": 0.5, "min_partition_size": 1}
    own = [skew(deal(config(seed, count=20), labels), labels) for seed in range(4)]
    library = [
        skew(deal(config(seed, count=20, partition="DirichletPartitioner", partition_options=options), labels), labels)
        for seed in range(4)
    ]
    assert np.mean(own) == pytest.approx(np.mean(library), abs=4 * np.std(own + library) / 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "natural", "label": "kind"}, r"clients.count is 10: 'kind' has 8 values, and a natural client"),
        ({"partition": "pathological", "labels_per_client": 9}, r"data.partition is 'pathological': .*=9 is greater"),
        ({"partition": "ShardsPartitioner"}, r"data.partition is 'ShardsPartitioner': flwr_datasets has .*ShardPart"),
        (
            {"partition": "ShardPartitioner", "partition_options": {"shards": 2}},
            r"unexpected keyword argument 'shards'",
        ),
        (
            {"partition": "SizePartitioner", "partition_options": {"partition_sizes": [100, 300]}},
            r"clients.count is 10: SizePartitioner makes 2 parts",
        ),
    ],
)
def test_what_cannot_be_dealt_out_is_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(FedError, match=message) as caught:
        deal(config(**settings), LABELS)
    assert "\n" not in str(caught.value)


def test_a_client_without_rows_is_refused() -> None:
    options = {"alpha": 0.01, "min_partition_size": 0}
    with pytest.raises(FedError, match=r"data.partition is 'DirichletPartitioner': client \d+ gets no row of 400"):
        deal(config(count=50, partition="DirichletPartitioner", partition_options=options), LABELS)


def test_an_unknown_partition_is_refused_with_those_there_are() -> None:
    with pytest.raises(FedError, match=r"data.partition is 'dirichle': it should be 'dirichlet', 'iid', 'path"):
        config(partition="dirichle")


def test_without_the_library_only_its_own_partitions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flwr_datasets.partitioner", None)
    assert len(deal(config(), LABELS)) == 10
    with pytest.raises(FedError, match=r"needs the library flwr-datasets: install plora-kernels\[data\]"):
        deal(config(partition="pathological"), LABELS)


NAMES = tuple(f"kind {number}" for number in range(8))


def leftover(
    settings: dict[str, Any], labels: np.ndarray = LABELS, pool: np.ndarray | None = None, column: str = "label"
) -> str | None:
    """Deal out all rows, or those of `pool`, and return what is said of it."""
    asked, rows = config(**settings), np.arange(len(labels)) if pool is None else pool
    parts = [rows[part] for part in deal(asked, labels[rows])]
    return describe_leftover(asked, rows, parts, [Classes(column, labels, NAMES)])


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_nothing_is_said_if_every_row_has_a_client(settings: dict[str, Any]) -> None:
    assert leftover(settings) is None


LEAVING: dict[str, tuple[str, dict[str, Any]]] = {
    "pathological": ("partition 'pathological'", {"partition": "pathological", "count": 3}),
    "sizes": (
        "partition 'SizePartitioner'",
        {"partition": "SizePartitioner", "count": 2, "partition_options": {"partition_sizes": [3, 5]}},
    ),
    "shards": (
        "partition 'ShardPartitioner'",
        {
            "partition": "ShardPartitioner",
            "count": 3,
            "partition_options": {"num_shards_per_partition": 1, "shard_size": 50},
        },
    ),
    "shards of a size that leaves one row": (
        "partition 'ShardPartitioner'",
        {"partition": "ShardPartitioner", "count": 7, "partition_options": {"num_shards_per_partition": 1}},
    ),
    "sizes of the library's Dirichlet": (
        "partition 'InnerDirichletPartitioner'",
        {
            "partition": "InnerDirichletPartitioner",
            "count": 2,
            "partition_options": {"partition_sizes": [20, 20], "alpha": 0.1},
        },
    ),
    "drawn": ("data.rows_per_client is 4", {"rows_per_client": 4, "count": 2, "alpha": "iid"}),
}


@pytest.mark.parametrize(("way", "settings"), LEAVING.values(), ids=LEAVING)
def test_rows_and_labels_that_are_no_clients_are_said(way: str, settings: dict[str, Any]) -> None:
    dealt = np.concatenate(deal(config(**settings), LABELS))
    line = f"{way}: {400 - len(set(dealt))} of 400 training rows go to no client"
    if missing := [repr(name) for number, name in enumerate(NAMES) if number not in LABELS[dealt]]:
        line += f"; no client trains on label {', '.join(missing)}"
    assert len(set(dealt)) < 400
    assert leftover(settings) == line


def test_labels_of_held_out_rows_alone_are_said() -> None:
    pool = np.flatnonzero(LABELS != 3)
    assert leftover({}, pool=pool) == "partition 'dirichlet': no client trains on label 'kind 3'"
    unknown = np.where(LABELS == 3, -1, LABELS)  # the source's own test rows, of no value
    assert leftover({}, unknown, pool, "user") is None
    assert leftover({}, LABELS, pool, "user") == "partition 'dirichlet': no client trains on user 'kind 3'"


def test_rows_of_several_clients_are_said_unless_sharing_was_asked_for() -> None:
    parts = [np.arange(300), np.arange(200, 400)]
    said = describe_leftover(config(), np.arange(400), parts, [Classes("label", LABELS, NAMES)])
    assert said == "partition 'dirichlet': 100 of 400 training rows go to several clients"
    assert describe_leftover(config(rows_per_client=9), np.arange(400), parts, []) is None


def test_partitioners_of_columns_and_what_the_library_raises_are_refused() -> None:
    with pytest.raises(FedError, match=r"data.partition is 'VerticalEvenPartitioner': flwr_datasets has .*ShardPart"):
        deal(config(partition="VerticalEvenPartitioner"), LABELS)
    with pytest.raises(FedError, match=r"data.partition is 'ShardPartitioner': "):
        deal(config(partition="ShardPartitioner", partition_options={"num_shards_per_partition": []}), LABELS)
