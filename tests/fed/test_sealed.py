"""JSON files that hold their own digest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fed.errors import FedError
from fed.files import digest
from fed.sealed import read_sealed, write_sealed

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60)
@given(st.dictionaries(st.text(max_size=4), VALUES, max_size=4))
def test_what_is_sealed_is_read_back(facts: dict[str, Any]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        write_sealed(path, facts)
        assert read_sealed(path) == facts


def test_numbers_may_be_keys(tmp_path: Path) -> None:
    """As numbers 2 comes before 10, as text it comes after: a checkpoint's clients have numbers."""
    write_sealed(tmp_path / "facts.json", {"kept": {10: "b", 2: "a"}, "round": 3})
    assert read_sealed(tmp_path / "facts.json") == {"kept": {"2": "a", "10": "b"}, "round": 3}


@pytest.mark.parametrize("kept", [{"b": 1, "a": 2}, {2: {"x": 1, "a": [1, {10: 0, 9: 1}]}, 10: {}, 100: None}])
def test_what_earlier_versions_sealed_is_read(kept: dict[Any, Any], tmp_path: Path) -> None:
    facts = {"round": 3, "kept": kept}
    sealed = {"digest": digest(json.dumps(facts, sort_keys=True).encode()), "facts": facts}
    path = tmp_path / "facts.json"
    path.write_text(json.dumps(sealed) + "\n")
    assert read_sealed(path) == json.loads(json.dumps(facts))


@pytest.mark.parametrize(
    ("before", "after"), [("12", "13"), ('"round"', '"rounD"'), ("true", "false"), ('"digest": "', '"digest": "0')]
)
def test_a_change_is_noticed(before: str, after: str, tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_sealed(path, {"round": 12, "kept": {"1": True}})
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(FedError, match=r"is damaged: it does not fit its digest"):
        read_sealed(path)
