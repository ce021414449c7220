"""The dropout masks that results are checked against: PEFT's, this library's, and one derived from a gradient."""

import pytest
import torch

from bench.cases import DROPOUT_P, Case, Problem, Projection, make_problem
from bench.checks.correctness import WITH_ADAPTER, WrongResultError, check, plain_results, references
from bench.providers.dropout_masks import kept_by_call, kept_by_layer, kept_by_torch, seeded
from bench.providers.registry import make_provider
from tests.bench.checks.test_correctness import BY_HAND

CPU = torch.device("cpu")
CASE = Case("dropout", Projection("tiny", "query", 50, 29), 37, 5, "float32")


@pytest.fixture
def problem() -> Problem:
    return make_problem(CASE, CPU)


def test_the_generator_goes_on_where_it_was() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(CPU):
        inside = torch.rand(2)
    assert torch.equal(torch.rand(2), expected)
    with seeded(CPU):
        assert torch.equal(torch.rand(2), inside)


def test_a_mask_drops_its_share_and_the_two_are_not_the_same(problem: Problem) -> None:
    first, second = kept_by_torch(problem, torch.float32), kept_by_layer(problem)
    for kept in (first, second):
        assert kept.shape == problem.x.shape
        assert kept.double().mean().item() == pytest.approx(1 - DROPOUT_P, abs=0.04)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", ["peft", "fused"])
def test_a_gradient_shows_the_mask_a_layer_is_known_to_draw(name: str, problem: Problem) -> None:
    provider = make_provider(name, CASE, problem)
    known = provider.expected.kept
    lora_A, lora_B = torch.nn.Parameter(problem.A.clone()), torch.nn.Parameter(problem.B.clone())

    def call(x: torch.Tensor) -> torch.Tensor:
        dropped = x * torch.where(known, 1 / (1 - DROPOUT_P), 0.0)
        return x @ problem.weight.T + problem.scale * dropped @ lora_A.T @ lora_B.T

    assert torch.equal(kept_by_call(call, problem, lora_A, lora_B), known)
    assert torch.equal(lora_A, problem.A)
    assert torch.equal(lora_B, problem.B)


def test_a_layer_that_drops_nothing_is_refused(problem: Problem) -> None:
    lora_A, lora_B = torch.nn.Parameter(problem.A.clone()), torch.nn.Parameter(problem.B.clone())
    with pytest.raises(WrongResultError, match=r"dropout drops 0\.0000 of x; it must be 0\.1"):
        kept_by_call(lambda x: x @ problem.weight.T + 2 * x @ lora_A.T @ lora_B.T, problem, lora_A, lora_B)


@pytest.mark.parametrize("name", ["peft", "fused"])
def test_another_mask_is_a_wrong_result(name: str, problem: Problem) -> None:
    provider = make_provider(name, CASE, problem)
    results = provider.results()
    check(name, results, *references(CASE, problem, provider.expected))
    other = {"peft": kept_by_layer(problem), "fused": kept_by_torch(problem, torch.float32)}[name]
    exact, plain = (
        plain_results(CASE, problem, dtype, adapted=True, kept=other) for dtype in (torch.float64, torch.float32)
    )
    with pytest.raises(WrongResultError, match=f"{name}: y is off by"):
        check(name, results, exact, plain)
    with pytest.raises(WrongResultError, match=f"{name}: y is off by"):
        check(name, results, *references(CASE, problem, WITH_ADAPTER))


def test_results_under_a_mask_by_hand() -> None:
    case = Case("dropout", Projection("tiny", "by-hand", 2, 2), 1, 1, "float32")
    results = plain_results(case, BY_HAND, torch.float64, adapted=True, kept=torch.tensor([[False, True]]))
    # D(x) = [0, 2/0.9]; y = [7, 8] + 2·(2/0.9)·[1, -1]; dY B = 0 leaves dx to the weight; dB = s dYᵀ (D(x) Aᵀ).
    assert results["y"].tolist() == [pytest.approx([7 + 4 / 0.9, 8 - 4 / 0.9])]
    assert results["dx"].tolist() == [[3.0, 6.0]]
    assert results["dB"].flatten().tolist() == pytest.approx([4 / 0.9] * 2)


def test_compiled_dropout_is_checked_by_its_own_mask(monkeypatch: pytest.MonkeyPatch, problem: Problem) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, *, fullgraph: module)
    provider = make_provider("peft-compiled", CASE, problem)
    kept = provider.expected.kept
    assert torch.equal(kept, kept_by_torch(problem, torch.float32))  # uncompiled, it draws the same mask as PEFT
    check("peft-compiled", provider.results(), *references(CASE, problem, provider.expected))


@pytest.mark.slow
def test_really_compiled_dropout_is_right() -> None:
    case = Case("dropout", Projection("tiny", "query", 48, 32), 40, 4, "float32")
    problem = make_problem(case, CPU)
    provider = make_provider("peft-compiled", case, problem)
    check("peft-compiled", provider.results(), *references(case, problem, provider.expected))
