"""Any input gives a valid configuration, or one line that says what is wrong, and at once."""

from __future__ import annotations

import copy
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fed import config as configuration
from fed.config import RunConfig
from fed.config.loader import PRESETS
from fed.data import federated_data
from fed.experiments import plan as plans
from fed.experiments.plan import Plan
from tests.support.hostile import outcome
from tests.support.text_data import PETS, write_rows

NUMBERS = [0, 1, -1, 2, 3, 16, 20, 256, 257, 10**4, 10**6, 10**9, 2**31, 2**32, 2**63 - 1, 2**63, -(2**64), 10**400]
FLOATS = [0.0, -0.0, 0.001, 0.5, 0.999, 1.0, 1e-8, 1e-300, 5e-324, 1e300, 1.7e308, -1e308]
FLOATS += [float("inf"), float("-inf"), float("nan")]
TEXTS = ["", " ", ".", "..", "/dev/zero", "/dev/null", "x" * 300, "x/" * 3000, "\0", "a\0b", "\x1b[31m", "a\nb"]
TEXTS += ["\u202e", "\ud800", "(a+)+b", "(a|a)*b", ".*" * 30, "a{1000000}", "(", "[", "all-linear", ".*proj", "{text}"]
TEXTS += ["{", "iid", "inf", "files", "glue", "hub", "digits", "instruction", "ShardPartitioner", "NoPartitioner"]
TEXTS += ["pathological", "natural"]
KEYS = [key for key, _ in configuration.flat(RunConfig().model_dump())] + [
    "data.path",
    "data.test_path",
    "model.path",
    "data.subset",
    "data.text_pair",
]
KEYS += ["data.partition_by", "data.test_split", "data.revision", "data.partition_options.alpha", "clients.ranks.4"]
TABLES = [
    "model",
    "data",
    "clients",
    "adapter",
    "train",
    "server",
    "privacy",
    "attack",
    "hetlora",
    "measure",
    "compare",
]

scalars = (
    st.sampled_from(NUMBERS)
    | st.sampled_from(FLOATS)
    | st.sampled_from(TEXTS)
    | st.booleans()
    | st.text(max_size=8)
    | st.integers(-5, 300)
    | st.floats(0, 1)
)
keys = st.sampled_from(KEYS) | st.sampled_from(TABLES) | st.sampled_from(TEXTS) | st.text(min_size=1, max_size=8)
names = st.sampled_from(TEXTS) | st.sampled_from(["4", "8", "04", "300", "alpha", "x"]) | st.text(max_size=4)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
changes = st.lists(st.tuples(keys, values), min_size=1, max_size=4)
presets = [tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(PRESETS.glob("*.toml"))]
beginnings = st.sampled_from([{}, *presets])


def changed(table: dict[str, Any], changes: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a table with values at dotted keys replaced, whether or not that makes sense."""
    found = copy.deepcopy(table)
    found.pop("compare", None)
    for key, value in changes:
        *parents, last = key.split(".")
        inner = found
        for name in parents:
            if not isinstance(inner.get(name), dict):
                inner[name] = {}
            inner = inner[name]
        inner[last] = value
    return found


def as_toml(value: Any) -> str:
    try:
        return tomli_w.dumps({"value": value}).removeprefix("value = ").strip()
    except (ValueError, TypeError):  # surrogates, and integers that Python does not write
        return ascii(value)


def try_all(examples: int, strategy: st.SearchStrategy[Any], check: Callable[[Any], object]) -> None:
    """Call `check` with so many inputs of a strategy."""
    tried = 0

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(strategy)
    def each(drawn: Any) -> None:
        nonlocal tried
        tried += 1
        check(drawn)

    each()
    assert tried >= examples


def of_each_size(few: int, many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("examples", [few, pytest.param(many, marks=pytest.mark.slow)])


@of_each_size(120, 6000)
def test_tables(examples: int) -> None:
    valid = 0

    def check(drawn: tuple[dict[str, Any], list[tuple[str, Any]]]) -> None:
        nonlocal valid
        found, _ = outcome(lambda: configuration.parse(changed(*drawn), where="here"))
        valid += isinstance(found, RunConfig)

    try_all(examples, st.tuples(beginnings, changes), check)
    assert 0 < valid < examples


@of_each_size(80, 6000)
def test_texts_of_files(examples: int, tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    texts = [file.read_bytes() for file in sorted(PRESETS.glob("*.toml"))]
    insertions = st.sampled_from([b"[", b"]", b"=", b'"', b"'''", b"\n", b"#", b".", b"\xff", b"\0", b"\r", b"[[a]]\n"])
    edits = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 30), insertions | st.binary(max_size=4)), max_size=3)
    lines = st.lists(st.tuples(keys, values), max_size=3)

    def check(drawn: tuple[bytes, list[tuple[float, int, bytes]], list[tuple[str, Any]]]) -> None:
        text, edits, lines = drawn
        text = "".join(f"{key} = {as_toml(value)}\n" for key, value in lines).encode("utf-8", "replace") + text
        for place, cut, inserted in edits:
            at = int(place * len(text))
            text = text[:at] + inserted + text[at + cut :]
        path.write_bytes(text)
        outcome(lambda: configuration.load(path))

    try_all(examples, st.tuples(st.sampled_from([b"", *texts]), edits, lines), check)


@of_each_size(80, 5000)
def test_settings(examples: int) -> None:
    texts = values.map(as_toml) | st.sampled_from(TEXTS) | st.text(max_size=12) | st.just("[" * 5000)
    overrides = st.lists(st.tuples(keys, st.sampled_from(["=", "=", "=", " = ", ""]), texts).map("".join), max_size=4)
    try_all(examples, overrides, lambda drawn: outcome(lambda: configuration.load("digits", drawn)))


@of_each_size(60, 3000)
def test_comparisons(examples: int, tmp_path: Path) -> None:
    named = ["fed-plora", "fedit", "flora", "fedit@2", "fedit@17", "fedit@", "fedit@٣"]
    numbered = ["", "0", "0-2", "0,1", "0-1000000000", "9" * 5000, "1-0", "0-4294967296", "٣"]
    methods = st.lists(st.sampled_from(named) | st.text(max_size=5), max_size=3)
    seeds = st.sampled_from(numbered) | st.text(max_size=5)
    varied = st.tuples(keys, st.lists(values.map(as_toml), max_size=3).map(",".join)).map("=".join)
    reference = st.sampled_from(["", "fed-plora", "x" * 5000]) | st.text(max_size=5)
    settings_ = st.lists(st.tuples(keys, values.map(as_toml)).map("=".join), max_size=1)

    def check(drawn: tuple[list[str], str, str, str, list[str]]) -> None:
        methods, seeds, varied, reference, given = drawn

        def make() -> Plan:
            numbers = plans.parse_seeds(seeds) if seeds else ()
            return plans.plan(plans.request("digits", given, methods, numbers, varied, reference))

        plan, _ = outcome(make)
        if plan is not None:
            plans.write(plan.request, tmp_path)
            again = plans.plan(plans.read(tmp_path))
            assert [cell.path for cell in again.cells] == [cell.path for cell in plan.cells]

    try_all(examples, st.tuples(methods, seeds, st.just("") | varied, reference, settings_), check)


@of_each_size(30, 600)
def test_valid_configurations_give_data_or_one_line(examples: int, bert: Path, tmp_path: Path) -> None:
    rows = [{"text": text, "label": label, "who": label} for text in PETS for label in ("dog", "cat")]
    text = {"model": {"path": str(bert)}, "data": {"path": str(write_rows(tmp_path / "a.jsonl", rows))}}
    small = {"clients": {"count": 3, "per_round": 1}}
    fractions = st.floats(0, 1) | st.sampled_from([0.001, 5e-324, 0.25, 0.999, 1 - 2**-53])
    counts = st.integers(0, 40) | st.sampled_from([10**6, 10**9])
    chosen = st.fixed_dictionaries(
        {},
        optional={
            "data.test_fraction": fractions,
            "data.validation_fraction": fractions,
            "data.pretrain_fraction": fractions,
            "data.train_rows": counts,
            "data.test_rows": counts,
            "data.rows_per_client": counts,
            "data.labels_per_client": counts,
            "data.partition": st.sampled_from(["iid", "dirichlet", "pathological", "natural", "ShardPartitioner"]),
            "data.partition_options": st.dictionaries(st.sampled_from(["shard_size", "shuffle", "seed"]), scalars),
            "data.partition_by": st.sampled_from(["who", "text", "nobody"]),
            "data.label": st.sampled_from(["label", "text", "nothing"]),
            "data.max_length": st.sampled_from([2, 16, 128, 129, 32_768]),
            "data.text_pair": st.sampled_from(["text", "nothing"]),
            "data.cache": st.sampled_from([False, str(tmp_path / "tokens"), "/dev/null/tokens"]),
            "clients.count": st.integers(1, 900),
            "clients.dirichlet_alpha": st.sampled_from([1e-6, 0.01, 1e9, "iid"]),
            "seed": st.integers(0, 3),
        },
    )

    def check(drawn: tuple[dict[str, Any], dict[str, Any]]) -> None:
        table, chosen = drawn
        merged = changed({**small, **copy.deepcopy(table)}, list(chosen.items()))
        config, _ = outcome(lambda: configuration.parse(merged, where="here"))
        if config is not None:
            data, _ = outcome(lambda: federated_data.load(config))
            if data is not None:
                assert len(data.clients) == config.clients.count
                assert all(len(split) for split in (*data.clients, data.test))

    try_all(examples, st.tuples(st.sampled_from([{}, text]), chosen), check)
