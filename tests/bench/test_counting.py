"""Operations and bytes, against sums by hand."""

from bench.cases import Case, Projection, several
from bench.counting import least_bytes, operations

WHERE = Projection("tiny", "query", 3, 5)  # K 3, N 5


def test_forward_by_hand() -> None:
    case = Case("forward", WHERE, 2, 1, "bfloat16")
    assert operations(case, adapted=False) == 2 * 2 * 3 * 5
    assert operations(case, adapted=True) == 60 + 2 * 2 * 3 + 2 * 2 * 5
    assert least_bytes(case, adapted=False) == 2 * (6 + 15 + 10)
    assert least_bytes(case, adapted=True) == 2 * (31 + 8)


def test_forward_and_backward_by_hand() -> None:
    case = Case("forward_backward", WHERE, 2, 1, "float32")
    assert operations(case, adapted=False) == 2 * 60
    # S 12, S·Bᵀ 20, dS 20, dS·A 12, dA 12, dB 20
    assert operations(case, adapted=True) == 120 + 96
    # x W y, dY W dX; x for dA; A and B twice, dA and dB
    assert least_bytes(case, adapted=True) == 4 * (31 + 31 + 6 + 24)


def test_fold_by_hand() -> None:
    case = Case("fold", WHERE, 0, 2, "float16")
    assert operations(case, adapted=True) == 2 * 3 * 5 * 2
    assert least_bytes(case, adapted=False) == 2 * 30
    assert least_bytes(case, adapted=True) == 2 * (30 + 16)


def test_several_projections_by_hand() -> None:
    case = Case("projections_forward", several("tiny", "q, k", 3, 5, 1), 2, 1, "bfloat16")
    assert operations(case, adapted=False) == 2 * 2 * 3 * 6
    # S 12 of each, S·Bᵀ 20 and 4
    assert operations(case, adapted=True) == 72 + 24 + 24
    # x once, W 15 and 3, y 10 and 2; A 3 each, B 5 and 1
    assert least_bytes(case, adapted=False) == 2 * (6 + 18 + 12)
    assert least_bytes(case, adapted=True) == 2 * (36 + 12)


def test_dropout_and_other_folds_count_as_the_op_they_are_like() -> None:
    for op, like in (("dropout", "forward_backward"), ("fold_out", "fold")):
        case, other = (Case(name, WHERE, 0 if like == "fold" else 2, 2, "float32") for name in (op, like))
        for adapted in (False, True):
            assert operations(case, adapted=adapted) == operations(other, adapted=adapted)
            assert least_bytes(case, adapted=adapted) == least_bytes(other, adapted=adapted)
