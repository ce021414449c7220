"""The cases measured on a device, and the tensors drawn for a case."""

from dataclasses import replace

import pytest
import torch

from bench.cases import (
    FOLDS,
    MAIN_OPS,
    MIXED_OPS,
    OPS,
    PROJECTIONS,
    RANK,
    Case,
    Projection,
    cases,
    least_bytes,
    make_problem,
    operations,
    several,
)
from bench.gpu_cases import device_cases
from bench.harness.records import case_key

WHERE = Projection("tiny", "query", 3, 5)  # K 3, N 5

TINY = Case("forward", Projection("tiny", "query", 29, 13), 37, 5, "float32")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_projection_meets_every_main_op_at_the_default_rank(device_type: str) -> None:
    found = {(case.op, case.projection) for case in cases(device_type) if case.r == RANK and case.op in MAIN_OPS}
    assert found == {(op, projection) for op in MAIN_OPS for projection in PROJECTIONS}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
@pytest.mark.parametrize("listed", [cases, device_cases])
def test_every_op_is_measured_and_several_projections_where_it_is_about_them(listed, device_type: str) -> None:
    found = listed(device_type)
    assert {case.op for case in found} == set(OPS)
    for case in found:
        about_several = case.op in ("projections", "projections_forward", "fold_many")
        assert (case.projection.count > 1) is about_several, case
        assert (case.m == 0) is (case.op in FOLDS), case
        assert case.projection.n == sum(case.projection.widths or (case.projection.n,))
        # A file of records distinguishes cases only by these fields.
    assert len({case_key(case.facts()) for case in found}) == len(found)


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_are_unique_within_an_op(device_type: str) -> None:
    keys = [(case.op, case.name) for case in cases(device_type)]
    assert len(set(keys)) == len(keys)


def test_rows_and_dtype_follow_the_device() -> None:
    plain = {device: [case for case in cases(device) if case.op not in FOLDS + MIXED_OPS] for device in ("cpu", "cuda")}
    assert {(case.m, case.dtype) for case in plain["cpu"]} == {(512, "float32")}
    assert {(case.m, case.dtype) for case in plain["cuda"]} == {(8192, "bfloat16")}


@pytest.mark.parametrize(("device_type", "rows"), [("cpu", 512), ("cuda", 8192)])
def test_mixed_precision_is_measured_at_every_projection_in_half(device_type: str, rows: int) -> None:
    found = [case for case in cases(device_type) if case.op in MIXED_OPS]
    assert {(case.m, case.r, case.dtype) for case in found} == {(rows, RANK, "bfloat16")}
    assert [(case.op, case.projection) for case in found] == [(op, one) for op in MIXED_OPS for one in PROJECTIONS]


def test_a_problem_has_the_case_s_shapes_and_a_nonzero_update() -> None:
    problem = make_problem(TINY, torch.device("cpu"))
    assert problem.x.shape == (37, 29)
    assert problem.weight.shape == (13, 29)
    assert problem.A.shape == (5, 29)
    assert problem.B.shape == (13, 5)
    assert problem.grad_y.shape == (37, 13)
    assert problem.B.abs().min() > 0


def test_several_projections_share_x_and_have_all_else_to_themselves() -> None:
    case = Case("projections", several("tiny", "q, k, v", 29, 13, 5, 7), 37, 3, "float32")
    problem = make_problem(case, torch.device("cpu"), sets=2)
    parts = problem.parts()
    assert [part.weight.shape for part in parts] == [(13, 29), (5, 29), (7, 29)]
    assert [part.A.shape for part in parts] == [(3, 29)] * 3
    assert [part.B.shape for part in parts] == [(13, 3), (5, 3), (7, 3)]
    assert [part.grad_y.shape for part in parts] == [(37, 13), (37, 5), (37, 7)]
    assert all(part.x is problem.x for part in parts)
    assert torch.equal(torch.cat([part.grad_y for part in parts], 1), problem.grad_y)
    assert torch.equal(torch.cat([part.weight for part in parts]), problem.weight)
    assert [part.parts()[0].B.shape for part in parts] == [(13, 3), (5, 3), (7, 3)]
    assert case.name == "tiny-q-k-v-29x25-m37-r3-float32"


def test_the_same_seed_draws_the_same_problem() -> None:
    one, other = (make_problem(TINY, torch.device("cpu"), seed=3) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, make_problem(TINY, torch.device("cpu"), seed=4).weight)


def test_the_dtype_rounds_the_same_draw() -> None:
    half = make_problem(replace(TINY, dtype="bfloat16"), torch.device("cpu"))
    full = make_problem(TINY, torch.device("cpu"))
    assert torch.equal(half.x, full.x.to(torch.bfloat16))


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
