"""Tensors of a message in a few arrays: any records come back as they were, and any other layout is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.flower import bundles
from fed.flower.bundles import BUNDLE, LAYOUT, bundled, unbundled
from fed.flower.records import RecordError, arrays_of, facts_record, tensors_of

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
shapes = st.lists(st.integers(0, 4), max_size=3)
tensors = st.tuples(st.sampled_from(DTYPES), shapes, st.integers(0, 2**31)).map(lambda own: drawn(*own))


def drawn(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50
    return (values > 0) if dtype == torch.bool else values.abs().to(dtype)


def hand_made() -> RecordDict:
    """Return a message of two records: 2 × 3 and 3 numbers of one dtype, and one of another."""
    first = {"A": torch.arange(6.0).reshape(2, 3), "n": torch.tensor(7)}
    return RecordDict({"one": arrays_of(first), "facts": facts_record({}), "two": arrays_of({"A": -torch.ones(3)})})


def test_numbers_of_a_dtype_are_one_array_in_the_order_of_the_layout() -> None:
    content = bundled(hand_made())
    assert list(content) == ["facts", BUNDLE, LAYOUT]
    assert tensors_of(content[BUNDLE], "bundle")["float32"].tolist() == [0, 1, 2, 3, 4, 5, -1, -1, -1]
    assert tensors_of(content[BUNDLE], "bundle")["int64"].tolist() == [7]
    assert json.loads(str(content[LAYOUT]["json"])) == {
        "one": {"A": ["float32", [2, 3]], "n": ["int64", []]},
        "two": {"A": ["float32", [3]]},
    }


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["arrays-0", "arrays-1", "server"]), st.dictionaries(st.text(max_size=4), tensors)),
    st.sampled_from([1, 200, 2**20]),
)
def test_every_message_comes_back_as_it_was(parts: dict[str, dict[str, torch.Tensor]], large: int) -> None:
    content = RecordDict({"metrics-0": MetricRecord({"loss": 0.5})})
    for title, own in parts.items():
        content[title] = arrays_of(own)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bundles, "LARGE_BYTES", large)
        found = unbundled(bundled(content))
    assert set(found) == set(content)
    assert dict(found["metrics-0"]) == {"loss": 0.5}
    for title, own in parts.items():
        back = tensors_of(found[title], title)
        assert list(back) == list(own)  # in their order, too
        assert all(back[name].dtype == value.dtype and torch.equal(back[name], value) for name, value in own.items())


def test_a_large_tensor_is_an_array_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "LARGE_BYTES", 1000)
    whole = RecordDict({"base": arrays_of({"s": torch.ones(2), "l": torch.ones(500)})})
    content = bundled(whole)
    assert list(content["base"]) == ["l"]
    assert content["base"]["l"] is whole["base"]["l"]
    assert list(unbundled(content)["base"]) == ["s", "l"]


def test_a_message_without_tensors_is_left_alone() -> None:
    content = RecordDict({"facts": facts_record({"lacks": "the run"})})
    assert dict(bundled(content)) == dict(unbundled(content)) == dict(content)


def with_layout(layout: Any) -> RecordDict:
    content = bundled(hand_made())
    content[LAYOUT] = facts_record(layout)
    return content


F = "float32"
WRONG = {
    "more numbers than there are": ({"one": {"A": [F, [10]], "n": ["int64", []]}}, "its bundle ends before one/A"),
    "fewer": ({"one": {"A": [F, [8]], "n": ["int64", []]}}, "its bundle holds more float32 numbers than its layout"),
    "a dtype that is not there": ({"one": {"A": ["float64", [1]]}}, "its bundle ends before one/A"),
    "a negative size": ({"one": {"A": [F, [-1, -9]]}}, "its layout does not say what one/A is"),
    "a huge size": ({"one": {"A": [F, [2**60, 0]]}}, "its layout does not say what one/A is"),
    "a fraction": ({"one": {"A": [F, [9.0]]}}, "its layout does not say what one/A is"),
    "many dimensions": ({"one": {"A": [F, [1] * 17]}}, "its layout does not say what one/A is"),
    "no shape": ({"one": {"A": [F]}}, "its layout does not say what one/A is"),
    "an absent large tensor": ({"one": {"A": None}}, "its layout does not say what one/A is"),
    "a record of another kind": ({"facts": {"A": [F, [9]]}}, "its layout has facts, which is none of its arrays"),
    "no names": ({"one": [F, [9]]}, "its layout has one, which is none of its arrays"),
    "the bundle itself": ({}, "its bundle holds more float32 numbers than its layout says"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_layout_of_something_else_is_refused(wrong: str) -> None:
    layout, fault = WRONG[wrong]
    with pytest.raises(RecordError, match=fault):
        unbundled(with_layout(layout))


def test_a_bundle_that_is_none_is_refused() -> None:
    content = bundled(hand_made())
    for bundle, fault in (
        (ConfigRecord({}), "it has a layout and no arrays bundle"),
        (ArrayRecord({F: Array("float32", (9,), "torch", b"")}), "its bundle/float32 is no array of NumPy's bytes"),
        (arrays_of({F: torch.ones(9, dtype=torch.float64)}), "its bundle/float32 is not the numbers"),
        (arrays_of({F: torch.ones(3, 3)}), "its bundle/float32 is not the numbers"),
    ):
        content[BUNDLE] = bundle
        with pytest.raises(RecordError, match=fault):
            unbundled(content)
    del content[BUNDLE]
    with pytest.raises(RecordError, match="it has a layout and no arrays bundle"):
        unbundled(content)


def test_more_tensors_than_were_asked_for_are_refused_unread() -> None:
    content = bundled(hand_made())
    assert list(unbundled(content, 3)["one"]) == ["A", "n"]
    with pytest.raises(RecordError, match="its layout has 3 tensors; at most 2 were asked for"):
        unbundled(content, 2)


def test_a_tensor_that_the_layout_does_not_know_is_refused() -> None:
    content = bundled(hand_made())
    content["one"] = arrays_of({"B": torch.ones(2)})
    with pytest.raises(RecordError, match="its one has 'B', which its layout has not"):
        unbundled(content)
