"""Classes: their order, and which heads of checkpoints have them."""

from __future__ import annotations

import pytest

from fed.data.labels import match_head, order_classes, quoted

TWELVE = tuple(f"LABEL_{number}" for number in range(12))
NLI = ("CONTRADICTION", "NEUTRAL", "ENTAILMENT")

KNOWN = {
    "as written": (("b", "a"), ("a", "b"), ("a", "b")),
    "in another case": (("entailment", "neutral", "contradiction"), NLI, ("contradiction", "neutral", "entailment")),
    "in the case of a language": (("GROẞ", "klein"), ("klein", "groß"), ("klein", "GROẞ")),
    "with other separators": (("entailment", "not_entailment"), ("Not-Entailment", "Entailment "), None),
    "in another normal form": (("cafe\u0301", "the"), ("the", "caf\u00e9"), None),
    "numbers": (tuple(map(str, range(12))), TWELVE, tuple(map(str, range(12)))),
    "numbers as the head names them": (("label_1", "Label_0"), ("LABEL_0", "LABEL_1"), ("Label_0", "label_1")),
    "a head with bare numbers": (("LABEL_0", "LABEL_1"), ("1", "0"), ("LABEL_1", "LABEL_0")),
    "zeros and signs": (("+01", "-1", "00"), ("-1", "0", "1"), ("-1", "00", "+01")),
    "a column read as decimals": (("1.0", "0.0"), ("LABEL_0", "LABEL_1"), ("0.0", "1.0")),
    "truth in JSON": (("True", "False"), ("LABEL_0", "LABEL_1"), ("False", "True")),
    "truth in another language": (("true", "false"), ("False", "True"), ("false", "true")),
    "two that differ in case alone": (("us", "US"), ("US", "us"), ("US", "us")),
    "truth, of a head that knows more": (("True", "False"), ("false", "true", "?"), ("False", "True", "?")),
    "some of the head's": (("entailment", "contradiction"), NLI, ("contradiction", "NEUTRAL", "entailment")),
}


@pytest.mark.parametrize(("names", "head", "order"), KNOWN.values(), ids=KNOWN)
def test_a_head_is_known_by_its_labels(
    names: tuple[str, ...], head: tuple[str, ...], order: tuple[str, ...] | None
) -> None:
    order = order or names[::-1]
    assert match_head(names, head) == match_head(names[::-1], head) == order
    assert match_head(order, head) == order  # the same head is still known by the names in its order
    assert order_classes(set(names), head, ()) == order


OTHERS = {
    "another task's": (("sports", "politics", "tech"), ("sadness", "joy", "anger")),
    "names of numbers": (("bad", "good"), ("LABEL_0", "LABEL_1")),
    "numbers from one on": (("1", "2"), ("LABEL_0", "LABEL_1")),
    "fewer numbers": (("0", "1"), TWELVE[:3]),
    "fewer numbers that are written alike": (("0", "1"), ("0", "1", "2")),
    "more numbers": (("0", "1", "2"), TWELVE[:2]),
    "signs": (("-1", "1"), ("LABEL_0", "LABEL_1")),
    "a label that the head lacks": (("joy", "fear"), ("joy", "anger", "sadness")),
    "a head with two of a name": (("a", "b"), ("a", "b", "b")),
    "labels that differ in case alone": (("us", "US"), ("us", "them")),
    "a head whose labels differ in case alone": (("Us", "them"), ("us", "US", "them")),
    "two ways to write a number": (("1", "01"), ("LABEL_0", "LABEL_1")),
    "numbers and truth": (("1", "true"), ("LABEL_0", "LABEL_1")),
    "a head that numbers a label twice": (("0", "1"), ("LABEL_0", "LABEL_1", "01")),
    "no head": (("0", "1"), ()),
    "a regression's": (("0", "1"), ("LABEL_0",)),
}


@pytest.mark.parametrize(("names", "head"), OTHERS.values(), ids=OTHERS)
def test_another_head_is_not_taken(names: tuple[str, ...], head: tuple[str, ...]) -> None:
    assert match_head(names, head) is None
    assert set(order_classes(set(names), head, ())) == set(names)


def test_a_source_that_numbers_its_labels_knows_which_is_label_k() -> None:
    glue = ("entailment", "not_entailment")
    assert match_head(glue, ("LABEL_0", "LABEL_1"), (0, 1)) == glue
    assert match_head(glue, ("LABEL_1", "LABEL_0"), (0, 1)) == glue[::-1]
    assert order_classes(set(glue), ("LABEL_1", "LABEL_0"), glue) == glue[::-1]
    # Names say more than numbers: a head with the names in another order is used in its order.
    assert order_classes(set(glue), ("NOT_ENTAILMENT", "ENTAILMENT"), glue) == glue[::-1]
    # Stars are numbered from 0 on by the source, whatever they are called.
    assert order_classes({"1", "2"}, ("LABEL_0", "LABEL_1"), ("1", "2")) == ("1", "2")
    # A label of the source that no row has is an output of the head all the same.
    assert order_classes({"c", "a"}, TWELVE[:3], ("a", "b", "c")) == ("a", "b", "c")
    assert order_classes({"c", "a"}, TWELVE[:2], ("a", "b", "c")) == ("a", "c")


@pytest.mark.parametrize(
    ("found", "order"),
    [
        ({"10", "9", "-1", "1"}, ("-1", "1", "9", "10")),
        ({"10", "9", "x"}, ("10", "9", "x")),
        ({"label_10", "label_9"}, ("label_9", "label_10")),
        ({"1", "01", "0"}, ("0", "01", "1")),
        ({"0.5", "10.0", "9.5"}, ("0.5", "9.5", "10.0")),
        ({"True", "False"}, ("False", "True")),
        ({"b", "B", "a"}, ("B", "a", "b")),
    ],
)
def test_without_a_head_labels_are_sorted_as_what_they_are(found: set[str], order: tuple[str, ...]) -> None:
    assert order_classes(found, (), ()) == order


def test_messages_name_the_first_labels() -> None:
    assert quoted(TWELVE) == "'LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3' and 8 more"
    assert quoted(["a"]) == "'a'"
