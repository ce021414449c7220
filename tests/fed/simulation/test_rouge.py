"""ROUGE-1, ROUGE-L and exact match on answers small enough to count."""

from __future__ import annotations

import re
import unicodedata

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


def nfd(text: str) -> str:
    return unicodedata.normalize("NFD", text)


DIFFERENT = {
    "Hindi vowel signs": ("का", "की"),
    "Hindi vowel signs inside": ("सात", "सीता"),
    "Bengali vowel signs": ("বল", "বিল"),
    "Tamil vowel signs": ("மலை", "மாலை"),
    "Arabic vowels": ("كُتُب", "كَتَبَ"),
    "Thai tones": ("ใกล", "ใกล้"),
    "Hebrew points": ("שָׁר", "שִׁר"),
    "an accent": ("resume", "resumé"),
    "an accent of its own": ("resume", nfd("resumé")),
    "two accents": (nfd("resumè"), "resumé"),
    "a joiner in Persian": ("نامهای", "نامه\u200cای"),
    "a power": ("2", "²"),
    "full width": ("12", "\uff11\uff12"),
    "one Chinese character": ("中国", "中文"),
}


@pytest.mark.parametrize(("answer", "right"), DIFFERENT.values(), ids=DIFFERENT)
def test_words_that_differ_in_a_mark_differ(answer: str, right: str) -> None:
    assert rouge_1(answer, right) == rouge_l(answer, right) == 0.0
    assert not is_exact(answer, right)


SAME = {
    "Latin composed": ("café", nfd("café")),
    "Hangul composed": ("한국", nfd("한국")),
    "Kana composed": ("が", nfd("が")),
    "Vietnamese composed": ("tiếng", nfd("tiếng")),
    "Devanagari composed": ("क़लम", "\u0958लम"),
    "marks in another order": ("a\u0323\u0301", "a\u0301\u0323"),
    "Kelvin": ("273 K", "273 \u212a"),
    "sharp s": ("Straße", "STRASSE"),
    "final sigma": ("οδός", "ΟΔΌΣ"),
    "Turkish capital": ("istanbul", "İstanbul"),
    "Turkish capital decomposed": ("istanbul", nfd("İSTANBUL")),
    "iota below": ("ᾳ", "ᾼ"),
    "a ligature": ("ﬁn", "FIN"),
    "a soft hyphen": ("coop", "co\u00adop"),
    "a direction mark": ("שלום", "\u200fשלום\u200e"),
    "a byte order mark": ("yes", "\ufeffyes"),
    "a joiner at the end": ("کتاب", "کتاب\u200c"),
    "a form of a character": ("葛", "葛\U000e0100"),
}


@pytest.mark.parametrize(("answer", "right"), SAME.values(), ids=SAME)
def test_words_that_differ_in_encoding_or_case_are_the_same(answer: str, right: str) -> None:
    assert answer != right
    assert rouge_1(answer, right) == rouge_l(answer, right) == 1.0
    assert is_exact(answer, right)


def test_a_mark_belongs_to_its_word_and_is_none_alone() -> None:
    assert rouge_l("हिन्दी में", "हिन्दी") == pytest.approx(2 / 3)  # two words against one
    assert rouge_l("نامه\u200cای خوب", "خوب") == pytest.approx(2 / 3)
    assert rouge_1("yes \u2764\ufe0f", "yes") == rouge_1("step 1\ufe0f\u20e3", "Step 1") == 1.0
    assert rouge_1("\u0301 \u2764\ufe0f", "\u0301") == 0.0
    assert rouge_l("ភាសា\u200bខ្មែរ", "ភាសា ខ្មែរ") == 1.0  # Khmer writes this space between words


def test_emoji_are_exact_or_not() -> None:
    england, scotland = (f"\U0001f3f4\U000e0067\U000e0062{tag}\U000e007f" for tag in ("\U000e0065", "\U000e0073"))
    assert is_exact("\u2764", "\u2764\ufe0f")
    assert not is_exact(england, scotland)
    assert not is_exact("\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469")


@given(st.text("aA bB.'-_é1 2½“”’—©\n\t$%`^"))
def test_words_of_english_are_runs_of_letters_and_digits(text: str) -> None:
    words = re.findall(r"[^\W_]+", text.lower())
    assert rouge_1(text, " ".join(words)) == (1.0 if words else 0.0)
    assert len(words) < 2 or rouge_l(text, "x".join(words)) == 0.0
