"""Training steps of many clients: all providers agree, a wrong one is not timed, and what a record holds."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.checks.correctness import WrongResultError
from bench.harness.records import SIMULATION, case_key
from bench.harness.timing import Plan
from bench.simulation import measure as measuring
from bench.simulation.cases import (
    BERT_BASE,
    BERT_TINY,
    COHORTS,
    DIGITS_VIT,
    LLAMA_1B,
    MODELS,
    SMOLLM2,
    ModelShape,
    SimulationCase,
    simulation_cases,
)
from bench.simulation.measure import ReferenceGradients, measure
from bench.simulation.models import HEADS, adapted_names, build_model, sharing_weights
from bench.simulation.problem import Problem, Trainer, Values, make_problem
from bench.simulation.providers import COMPILED, PROVIDERS, TRAINERS, BareBase, providers_of
from bench.simulation.resident import ResidentLoop, peft_loop
from fed.models.base_model import embedded_vit
from tests.support.notes import note_calls

CPU = torch.device("cpu")
QUICK = Plan(seconds_per_provider=0.0, min_rounds=2, warmup_rounds=1)
TINY = {
    "vit": ModelShape("tiny", "vit", 2, 12, 20, 2, 2, 0, 3),
    "bert": ModelShape("tiny", "bert", 2, 12, 20, 2, 2, 31, 3),
    "llama": ModelShape("tiny", "llama", 2, 16, 20, 4, 2, 31, 3),
    "llama-lm": ModelShape("tiny", "llama-lm", 2, 16, 20, 4, 2, 31, 0),
}
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) if name == COMPILED else name for name in TRAINERS if name != "peft-loop"
]


def tiny(family: str = "vit", cohort: int = 3) -> SimulationCase:
    return SimulationCase(TINY[family], 2, {"vit": 17, "llama-lm": 8}.get(family, 5), cohort, "float32")


@functools.cache
def exact(family: str) -> Problem:
    """A tiny problem in float64."""
    return make_problem(tiny(family), CPU).in_dtype(torch.float64)


@contextmanager
def attention_for(provider: str) -> Iterator[None]:
    """Compile attention as products and a softmax; providers that are not compiled keep the fused one.

    torch 2.11 compiles the CPU's fused attention as if it saved float32 for its backward, in float64 too. torch's cache
    on disk does not tell the two forms apart.
    """
    if provider != COMPILED:
        yield
        return
    with sdpa_kernel(SDPBackend.MATH), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


def largest_difference(found: list[Values], expected: list[Values]) -> float:
    """Return max |found − expected| over all values of all clients, whose names are the same."""
    differences = []
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        differences += [(one[name] - value).abs().max().item() for name, value in other.items()]
    return max(differences)


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("provider", OTHERS)
def test_every_provider_has_the_gradients_of_the_peft_loop(provider: str, family: str) -> None:
    problem = exact(family)
    expected = peft_loop(problem).gradients()
    assert min(value.abs().max() for client in expected for value in client.values()) > 1e-9, "a gradient is zero"
    # Llama's norms compute in float32 even in a float64 model, and compiled code sums in another order; transformers'
    # loss of tokens, which vmap calls, is in float32 too.
    in_float32 = (COMPILED, "llama"), (COMPILED, "llama-lm"), ("vmap", "llama-lm")
    bound = 1e-6 if (provider, family) in in_float32 else 1e-13
    with attention_for(provider):
        found = TRAINERS[provider](problem).gradients()
    assert largest_difference(found, expected) < bound


@pytest.mark.parametrize("provider", OTHERS)
def test_every_provider_takes_the_same_steps(provider: str) -> None:
    problem = exact("bert")
    start = [dict(client) for client in problem.starts]
    with attention_for(provider):
        trainers = [make(problem) for make in (peft_loop, TRAINERS[provider])]
        for trainer in trainers:
            assert largest_difference(trainer.values(), start) == 0.0
            for _ in range(4):
                trainer.step()
    expected, found = (trainer.values() for trainer in trainers)
    # AdamW divides by |gradient| + 1e-8, so an error of 1e-16 in a gradient moves a parameter by at most 1e-4 · 1e-8.
    assert largest_difference(found, expected) < 4e-12
    assert largest_difference(expected, start) > 1e-4


def test_clients_have_values_gradients_and_batches_of_their_own() -> None:
    first, second, _ = peft_loop(exact("vit")).gradients()
    assert all((first[name] - second[name]).abs().max() > 1e-9 for name in first)


@pytest.mark.parametrize("provider", ["peft-loop", *OTHERS])
def test_looking_at_gradients_moves_nothing(provider: str) -> None:
    problem = make_problem(tiny(), CPU)
    trainer = TRAINERS[provider](problem)
    twice = [trainer.gradients() for _ in range(2)]
    assert largest_difference(*twice) == 0.0
    assert largest_difference(trainer.values(), [dict(start) for start in problem.starts]) == 0.0


def test_the_base_does_what_clients_without_modules_do() -> None:
    """With B = 0 and one head for all, the base's head gradient is the sum of the clients'."""
    problem = exact("bert")
    head = {
        f"{problem.head}.{name}": value for name, value in problem.model.get_submodule(problem.head).named_parameters()
    }
    bare = tuple({name: head.get(name, torch.zeros_like(value)) for name, value in s.items()} for s in problem.starts)
    gradients = peft_loop(Problem(problem.model, problem.matrices, problem.head, bare, problem.batches)).gradients()
    base = BareBase(problem)
    base.step()
    for parameter, name in zip(base.head, head, strict=True):
        torch.testing.assert_close(parameter.grad, sum(client[name] for client in gradients), rtol=0, atol=1e-13)
    assert base.entered.grad is not None
    assert base.entered.shape == (6, 5, 12)
    assert all(parameter.grad is None for parameter in problem.model.parameters())


def test_a_copy_shares_the_weights_and_not_the_head() -> None:
    model = build_model(TINY["bert"], CPU, torch.float32)
    copied = dict(sharing_weights(model, ["classifier"]).named_parameters())
    shared = {name for name, parameter in model.named_parameters() if copied[name] is parameter}
    assert set(copied) - shared == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize("family", TINY)
def test_every_linear_layer_but_the_head_is_adapted(family: str) -> None:
    model = build_model(TINY[family], CPU, torch.float32)
    names = adapted_names(model, HEADS[family])
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert set(linears) - set(names) == {HEADS[family] or "lm_head"}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_small_vit_is_the_simulators() -> None:
    class Config:
        seed = 0

    ours = build_model(DIGITS_VIT, CPU, torch.float32).config.to_dict()  # type: ignore[operator]
    theirs = embedded_vit(Config(), tuple("0123456789")).config.to_dict()  # type: ignore[arg-type]
    named = {"id2label", "label2id"}
    assert {name: value for name, value in ours.items() if name not in named and value != theirs[name]} == {}
    assert len(ours["id2label"]) == len(theirs["id2label"])


def test_a_language_model_in_half_precision_has_factors_in_fp32() -> None:
    case = replace(tiny("llama-lm", cohort=2), dtype="bfloat16")
    problem = make_problem(case, CPU)
    assert problem.model.dtype == torch.bfloat16
    assert {value.dtype for start in problem.starts for value in start.values()} == {torch.float32}
    for make in (peft_loop, TRAINERS["sequential"], TRAINERS["cohort"]):
        assert {value.dtype for client in make(problem).gradients() for value in client.values()} == {torch.float32}
    found = measure(case, CPU, QUICK, ["sequential", "cohort"])
    for one in found.values():
        assert one.record["status"] == "timed", one.record
        assert one.record["tokens_per_second"] == pytest.approx(2 * 2 * 8 / one.record["seconds"])  # type: ignore[operator]
        assert one.record["peak_bytes"] > 0  # type: ignore[operator]


def test_the_prompt_of_a_language_model_does_not_count() -> None:
    (batch, _) = make_problem(tiny("llama-lm", cohort=2), CPU).batches
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 8)
    assert (batch["labels"][:, :6] == -100).all()
    assert torch.equal(batch["labels"][:, 6:], batch["input_ids"][:, 6:])


@pytest.mark.parametrize("provider", ["sequential", "cohort"])  # transformers reads the mask, which vmap forbids
def test_texts_of_unequal_length_are_padded_or_not_and_have_the_same_gradients(provider: str) -> None:
    problem = make_problem(replace(tiny("llama-lm"), length=12, unequal=True), CPU).in_dtype(torch.float64)
    widths = {batch["input_ids"].shape[1] for batch in problem.batches}
    lengths = [length for batch in problem.batches for length in batch["attention_mask"].sum(1).tolist()]
    assert len(widths) > 1
    assert min(lengths) >= 3
    assert {name: value.shape for name, value in problem.joined().items()} == dict.fromkeys(
        problem.batches[0], (6, max(widths))
    )
    found = TRAINERS[provider](problem).gradients()
    assert largest_difference(found, peft_loop(problem).gradients()) < 1e-13
    record = measure(replace(tiny("llama-lm"), length=12, unequal=True), CPU, QUICK, ["base"])["base"].record
    assert record["tokens_per_second"] == pytest.approx(sum(lengths) / record["seconds"])  # type: ignore[operator]
    assert record["unequal"] is True


def test_every_record_has_its_figures() -> None:
    case = tiny(cohort=2)
    found = measure(case, CPU, QUICK)
    assert list(found) == [name for name in PROVIDERS if name != COMPILED]
    for provider, one in found.items():
        record: dict[str, Any] = one.record
        assert (record["provider"], record["status"], record["rounds"]) == (provider, "timed", len(one.seconds))
        assert (record["op"], record["model"], record["cohort"]) == (SIMULATION, "tiny", 2)
        assert (record["batch"], record["length"], record["dtype"], record["r"]) == (2, 17, "float32", 16)
        assert record["threads"] == torch.get_num_threads()
        assert record["clients_steps_per_second"] == pytest.approx(2 / record["seconds"])
        for other, key in (("base", "ratio_to_base"), ("peft-loop", "ratio_to_peft_loop")):
            assert record[key] == pytest.approx(record["seconds"] / found[other].record["seconds"])  # type: ignore[operator]
        assert record["peak_bytes"] is None
        assert case_key(record) == case_key(case.facts())


def test_compiled_steps_are_measured_where_compiling_is_worth_the_time() -> None:
    def sizes(model: ModelShape, device_type: str) -> dict[bool, set[int]]:
        cases = [case for case in simulation_cases(device_type) if case.model == model]
        return {
            wanted: {case.cohort for case in cases if (COMPILED in providers_of(case)) is wanted}
            for wanted in (True, False)
        }

    assert sizes(DIGITS_VIT, "cpu") == {True: set(COHORTS), False: set()}
    assert sizes(BERT_BASE, "cpu") == {True: {1, 2, 4, 10}, False: set()}
    for model, device_type in ((BERT_TINY, "cpu"), (DIGITS_VIT, "cuda"), (BERT_BASE, "cuda")):
        assert sizes(model, device_type) == {True: {1, 10}, False: set(COHORTS) - {1, 10}}
    assert providers_of(SimulationCase(DIGITS_VIT, 16, 17, 10, "float32")) == PROVIDERS
    texts = [case for case in simulation_cases("cpu") if case.model == SMOLLM2]
    assert {case.unequal: COMPILED in providers_of(case) for case in texts} == {False: True, True: False}


def test_where_the_check_took_long_it_was_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = note_calls(monkeypatch, measuring, "interleave", lambda *given: given[3])
    monkeypatch.setattr(measuring, "LONG_SECONDS", 0.0)
    found = measure(tiny(), CPU, Plan(seconds_per_provider=9.0, min_rounds=3, warmup_rounds=1), ["base"])
    assert [(plan.min_rounds, plan.max_rounds, plan.warmup_rounds) for plan in plans] == [(3, 3, 0)]
    assert len(found["base"].seconds) == 3


def test_memory_is_read_at_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "WEIGHED_COHORT", 2)
    found = measure(tiny(cohort=2), CPU, QUICK, ["base"])
    assert list(found) == ["base", "peft-loop"]
    assert all(one.record["peak_bytes"] > 0 for one in found.values())  # type: ignore[operator]


def wrong_by(factor: float) -> Callable[[Problem], Trainer]:
    """Return a provider whose last client's gradients are off by a factor."""

    class Wrong(ResidentLoop):
        def gradients(self) -> list[Values]:
            *right, last = super().gradients()
            return [*right, {name: value * factor for name, value in last.items()}]

    def make(problem: Problem) -> Trainer:
        loop = peft_loop(problem)
        return Wrong(loop.model, loop.slots, problem, loop.loss)

    return make


def test_a_wrong_provider_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "vmap", wrong_by(1.001))
    found = measure(tiny(), CPU, QUICK)["vmap"]
    assert (found.record["status"], found.seconds) == ("wrong", [])
    assert "the gradients of client 2 are off by 0.001 in relative Frobenius norm" in str(found.record["cause"])
    monkeypatch.setitem(TRAINERS, "vmap", wrong_by(1.0))
    assert measure(tiny(), CPU, QUICK)["vmap"].record["status"] == "timed"


def test_a_provider_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Problem) -> Trainer:
        raise RuntimeError("no batching rule\nand more")

    monkeypatch.setitem(TRAINERS, "vmap", refuse)
    found = measure(tiny(), CPU, QUICK)
    assert found["vmap"].record["status"] == "not available"
    assert found["vmap"].record["cause"] == "RuntimeError: no batching rule"
    assert found["sequential"].record["status"] == "timed"
    monkeypatch.setitem(TRAINERS, "peft-loop", refuse)
    with pytest.raises(RuntimeError, match="no batching rule"):  # the base model's time is the divisor
        measure(tiny(), CPU, QUICK)


def test_the_bounds_of_reference_gradients_by_hand() -> None:
    exact_values = [{"a": torch.tensor([3.0, 4.0], dtype=torch.float64)}]
    plain = [{"a": torch.tensor([3.0, 4.0005])}]
    reference = ReferenceGradients(exact_values, plain)
    assert reference.bounds == pytest.approx({"Frobenius": 2e-4, "max": 2.5e-4}, rel=1e-3)
    reference.check("near", [{"a": torch.tensor([3.0, 4.0009])}])
    with pytest.raises(WrongResultError, match=r"far: the gradients of client 0 are off by 0\.00022 in rel"):
        reference.check("far", [{"a": torch.tensor([3.0, 4.0011])}])
    for other in ([{"b": torch.ones(2)}], [{"a": torch.ones(3)}], [{"a": torch.tensor([3.0, float("nan")])}]):
        with pytest.raises(WrongResultError):
            reference.check("other", other)
    with pytest.raises(WrongResultError, match="gradients of 2 clients, not of 1"):
        reference.check("more", exact_values * 2)
    assert ReferenceGradients(exact_values, [{"a": torch.tensor([3.0, 4.0])}]).bounds["max"] == 4 * 2.0**-23


def test_the_cases_are_those_of_the_plan() -> None:
    for device in ("cpu", "cuda"):
        listed = simulation_cases(device)
        assert len({case.name for case in listed}) == len({case_key(case.facts()) for case in listed}) == len(listed)
        small = {case.cohort for case in listed if case.model == DIGITS_VIT}
        assert small == set(COHORTS)
    gpu = simulation_cases("cuda")
    assert {case.model for case in gpu} == set(MODELS.values()) - {SMOLLM2}
    assert [case.name for case in simulation_cases("cpu") if case.is_language_model] == [
        "smollm2-135m-4x128-c4-float32",
        "smollm2-135m-4x128-c4-bfloat16",
        "smollm2-135m-4x128-c4-float32-unequal",
        "smollm2-135m-4x128-c4-bfloat16-unequal",
    ]
    assert [(case.model, case.batch, case.length, case.cohort) for case in gpu[:2]] == [
        (BERT_BASE, 16, 128, 10),
        (LLAMA_1B, 16, 128, 10),
    ]
    assert LLAMA_1B not in {case.model for case in simulation_cases("cpu")}
    assert max(case.tokens for case in simulation_cases("cpu") if case.model == BERT_BASE) <= 2048
