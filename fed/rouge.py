"""ROUGE-1, ROUGE-L and exact match of a generated answer with one that is right."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def rouge_1(answer: str, right: str) -> float:
    """Return ROUGE-1's F measure, 0 … 1: as `rouge_l`, with the number of words in common in whatever order."""
    words, wanted = _words(answer), _words(right)
    return _f_measure((Counter(words) & Counter(wanted)).total(), words, wanted)


def rouge_l(answer: str, right: str) -> float:
    """Return ROUGE-L's F measure, 0 … 1: 2PR / (P + R), P and R being lcs / words of the answer, and of the right one.

    lcs is the length of the longest common subsequence of words: runs of letters and digits in lower case, not
    stemmed. Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004.
    """
    words, wanted = _words(answer), _words(right)
    return _f_measure(longest_common_subsequence(words, wanted), words, wanted)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many elements of `first` are found in `second` in the same order, at most."""
    row = [0] * (len(second) + 1)  # row[j]: of what of `first` was seen, and second[:j]
    for element in first:
        diagonal = 0
        for column, other in enumerate(second, start=1):
            diagonal, row[column] = (
                row[column],
                diagonal + 1 if element == other else max(row[column], row[column - 1]),
            )
    return row[-1]


def is_exact(answer: str, right: str) -> bool:
    """Say whether two answers are the same, case, punctuation and white space apart."""
    return _plain(answer) == _plain(right)


def _f_measure(common: int, words: Sequence[str], wanted: Sequence[str]) -> float:
    return 2 * common / (len(words) + len(wanted)) if common else 0.0


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _plain(text: str) -> str:
    """Lower case, white space as single blanks, without punctuation, unless there is nothing else."""
    lower = " ".join(text.lower().split())
    bare = "".join(letter for letter in lower if not unicodedata.category(letter).startswith("P"))
    return " ".join(bare.split()) or lower
