"""The cases of a device and the tensors drawn for one."""

from dataclasses import replace

import pytest
import torch

from bench.cases import OPS, PROJECTIONS, RANK, Case, Projection, cases, make_problem

TINY = Case("forward", Projection("tiny", "query", 29, 13), 37, 5, "float32")


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_every_projection_meets_every_op_at_the_default_rank(device_type: str) -> None:
    found = {(case.op, case.projection) for case in cases(device_type) if case.r == RANK}
    assert found == {(op, projection) for op in OPS for projection in PROJECTIONS}


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_names_are_unique_within_an_op(device_type: str) -> None:
    keys = [(case.op, case.name) for case in cases(device_type)]
    assert len(set(keys)) == len(keys)


def test_rows_and_dtype_follow_the_device() -> None:
    assert {(case.m, case.dtype) for case in cases("cpu") if case.op != "fold"} == {(512, "float32")}
    assert {(case.m, case.dtype) for case in cases("cuda") if case.op != "fold"} == {(8192, "bfloat16")}


def test_a_problem_has_the_case_s_shapes_and_a_nonzero_update() -> None:
    problem = make_problem(TINY, torch.device("cpu"))
    assert problem.x.shape == (37, 29)
    assert problem.weight.shape == (13, 29)
    assert problem.A.shape == (5, 29)
    assert problem.B.shape == (13, 5)
    assert problem.grad_y.shape == (37, 13)
    assert problem.B.abs().min() > 0


def test_the_same_seed_draws_the_same_problem() -> None:
    one, other = (make_problem(TINY, torch.device("cpu"), seed=3) for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert not torch.equal(one.weight, make_problem(TINY, torch.device("cpu"), seed=4).weight)


def test_the_dtype_rounds_the_same_draw() -> None:
    half = make_problem(replace(TINY, dtype="bfloat16"), torch.device("cpu"))
    full = make_problem(TINY, torch.device("cpu"))
    assert torch.equal(half.x, full.x.to(torch.bfloat16))
