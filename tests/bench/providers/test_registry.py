"""The providers of every operator: each runs what its name says, and a wrong one is found."""

from unittest import mock

import pytest
import torch

import plora_kernels as pk
from bench.cases import FOLDS, MIXED_OPS, OPS, Case, Op, Projection, make_problem, several
from bench.checks.correctness import WrongResultError, check, references
from bench.harness.timing import Plan
from bench.measure import measure_on_device
from bench.providers.registry import every_provider, is_ours, make_provider, provider_names
from plora_kernels.nn import shared_input
from plora_kernels.ops import projections

CPU = torch.device("cpu")
WITHOUT_COMPILER = "peft-compiled"


def tiny(op: Op, dtype: str | None = None) -> Case:
    """Return a small case, by default in float32 or, for mixed precision, in bfloat16."""
    dtype = dtype or ("bfloat16" if op in MIXED_OPS else "float32")
    about_several = op in ("projections", "projections_forward", "fold_many")
    projection = several("tiny", "q, k, v", 50, 29, 7, 11) if about_several else Projection("tiny", "query", 50, 29)
    return Case(op, projection, 0 if op in FOLDS else 37, 5, dtype)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_provider_but_the_compiled_is_right(op: Op, dtype: str) -> None:
    wanted = [name for name in every_provider(op) if name != WITHOUT_COMPILER]
    records = measure_on_device(tiny(op, dtype), CPU, Plan(0.0, 2), wanted, {})
    mixed = {"peft", "peft-autocast", "fused-mixed"} if op in MIXED_OPS else {"peft-autocast"}
    absent = mixed if dtype == "float32" else set()
    for record in records:
        assert record["status"] == ("not available" if record["provider"] in absent else "timed"), record
    assert [record["provider"] for record in records] == wanted


@pytest.mark.parametrize("op", OPS)
def test_the_suites_have_a_base_peft_and_this_library(op: Op) -> None:
    names = provider_names(op)
    assert names[:2] == ("base", "peft")
    if op in MIXED_OPS:
        assert names == ("base", "peft", "peft-autocast", "peft-compiled", "fused", "fused-mixed")
        return
    assert names[-1] == "fused"
    assert not {"inplace", "peft-autocast"} & set(names)
    assert [name for name in ("base", "peft", "inplace", "fused", "fused-apart") if is_ours(name)] == [
        "fused",
        "fused-apart",
    ]


@pytest.mark.parametrize("op", MIXED_OPS)
def test_mixed_precision_differs_in_the_factors_alone(op: Op) -> None:
    """PEFT's providers and *fused-mixed* have gradients of A and B in float32, *fused* in the weight's dtype."""
    case = tiny(op, "bfloat16")
    problem = make_problem(case, CPU)
    for name in every_provider(op):
        if name in ("base", WITHOUT_COMPILER):
            continue
        results = make_provider(name, case, problem).results()
        dtypes = {key: value.dtype for key, value in results.items()}
        factors = torch.bfloat16 if name == "fused" else torch.float32
        gradients = {} if op == "mixed_forward" else {"dx": torch.bfloat16, "dA": factors, "dB": factors}
        assert dtypes == {"y": torch.bfloat16, **gradients}, name


@pytest.mark.parametrize("op", ["projections", "projections_forward"])
def test_projections_are_computed_together_by_fused_alone(op: Op) -> None:
    case = tiny(op)
    problem = make_problem(case, CPU)
    for name, launches in (("fused", 1), ("fused-apart", 0)):
        provider = make_provider(name, case, problem)
        with mock.patch.object(shared_input, "forward", wraps=projections.forward) as joint:
            for _ in range(3):
                joint.reset_mock()
                provider.step.reset()
                provider.step.run()
                assert joint.call_count == launches, name


def test_a_projection_s_gradient_given_to_another_is_found() -> None:
    case = tiny("projections")
    problem = make_problem(case, CPU)
    provider = make_provider("fused-apart", case, problem)
    results = dict(provider.results())
    exact, plain = references(case, problem, provider.expected)
    assert list(exact) == ["y 0", "y 1", "y 2", "dx", "dA 0", "dA 1", "dA 2", "dB 0", "dB 1", "dB 2"]
    check("fused-apart", results, exact, plain)
    results["dA 0"], results["dA 1"] = results["dA 1"], results["dA 0"]
    with pytest.raises(WrongResultError, match="fused-apart: dA 0 is off by"):
        check("fused-apart", results, exact, plain)


def test_a_buffer_that_is_not_written_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pk, "fold", lambda weight, *given, out, **named: out)
    records = {r["provider"]: r for r in measure_on_device(tiny("fold_out"), CPU, Plan(0.0, 2), ["fused"], {})}
    assert records["fused"]["status"] == "wrong"
    assert "weight is off by nan" in str(records["fused"]["cause"])
    assert records["base"]["status"] == "timed"


def test_one_of_many_weights_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    fold_many_ = pk.fold_many_
    monkeypatch.setattr(pk, "fold_many_", lambda folds: fold_many_(folds[:-1]))
    records = {r["provider"]: r for r in measure_on_device(tiny("fold_many"), CPU, Plan(0.0, 2), ["fused"], {})}
    assert "weight 2 is off by" in str(records["fused"]["cause"])


def test_folds_start_from_the_original_every_time() -> None:
    for op in FOLDS:
        case = tiny(op)
        problem = make_problem(case, CPU)
        before = problem.weight.clone()
        for name in every_provider(op):
            provider = make_provider(name, case, problem)
            for _ in range(3):
                provider.step.reset()
                provider.step.run()
            check(name, provider.results(), *references(case, problem, provider.expected))
            assert torch.equal(problem.weight, before), name
