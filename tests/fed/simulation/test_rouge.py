"""ROUGE-1, ROUGE-L and exact match on answers small enough to count."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fed.simulation.evaluation import is_exact, longest_common_subsequence, rouge_1, rouge_l


@pytest.mark.parametrize(
    ("first", "second", "length"),
    [("", "", 0), ("a", "", 0), ("abc", "abc", 3), ("abcde", "ace", 3), ("abc", "cba", 1), ("xaxbxc", "aabbcc", 3)],
)
def test_common_subsequences_counted_by_hand(first: str, second: str, length: int) -> None:
    assert longest_common_subsequence(first, second) == longest_common_subsequence(second, first) == length


def by_definition(first: str, second: str) -> int:
    """Return the length of the longest common subsequence, by recursion on its definition."""
    if not first or not second:
        return 0
    if first[-1] == second[-1]:
        return by_definition(first[:-1], second[:-1]) + 1
    return max(by_definition(first[:-1], second), by_definition(first, second[:-1]))


@given(st.text("abc", max_size=7), st.text("abc", max_size=7))
def test_common_subsequences_agree_with_the_definition(first: str, second: str) -> None:
    assert longest_common_subsequence(first, second) == by_definition(first, second)


# What the package rouge-score 0.1.2 gives without its stemmer, to five places.
PUBLISHED = [
    ("police killed the gunman", "police kill the gunman", 0.75, 0.75),
    ("the gunman kill police", "police killed the gunman", 0.75, 0.5),
    ("the gunman police killed", "police killed the gunman", 1.0, 0.5),
    ("The cat sat on the mat.", "the cat was on the mat", 0.83333, 0.83333),
    ("yes yes", "Yes, it is", 0.4, 0.4),
    ("", "yes", 0.0, 0.0),
    ("a-b c_d 3.5", "a b c d 3 5", 1.0, 1.0),
]


@pytest.mark.parametrize(("answer", "right", "words", "sequence"), PUBLISHED)
def test_rouge_is_what_the_published_package_gives(answer: str, right: str, words: float, sequence: float) -> None:
    assert rouge_1(answer, right) == pytest.approx(words, abs=1e-5)
    assert rouge_l(answer, right) == pytest.approx(sequence, abs=1e-5)


def test_words_of_any_script_count() -> None:
    assert rouge_l("Шинзо Абе", "шинзо абе") == 1.0
    assert rouge_l("größer", "großer") == 0.0


@pytest.mark.parametrize(
    ("answer", "right", "same"),
    [
        ("Yes.", "yes", True),
        ("  New\n York ", "new york", True),
        ("its", "it's", True),
        ("no", "yes", False),
        ("1", "1.", True),
        ("!", "?", False),
        ("+", "-", False),
        ("", "a", False),
    ],
)
def test_exact_is_up_to_case_punctuation_and_white_space(answer: str, right: str, same: bool) -> None:
    assert is_exact(answer, right) is same
