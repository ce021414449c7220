"""Whole models' training steps: all providers agree, a wrong one is not timed, and what a record holds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

import plora_kernels as pk
from bench.harness.records import MODEL, case_key
from bench.harness.timing import Plan
from bench.models import measure as measuring
from bench.models.cases import ModelCase, device_models, model_cases, shortened
from bench.models.measure import measure
from bench.models.problem import Problem, Values, adapted_names, make_problem
from bench.models.providers import COMPILED, EAGER, PROVIDERS, RUNNERS, Adapted, make_runner, providers_of
from bench.simulation.cases import BERT_BASE, ModelShape
from bench.simulation.models import build_model, layers_of, sharing_weights
from tests.support.tiers import slow

CPU = torch.device("cpu")
QUICK = Plan(seconds_per_provider=0.0, min_rounds=2, warmup_rounds=1)
TINY = {
    "bert": ModelShape("tiny", "bert", 2, 12, 20, 2, 2, 31, 3),
    "llama-lm": ModelShape("tiny", "llama-lm", 2, 16, 20, 4, 2, 31, 0),
    "gpt2": ModelShape("tiny", "gpt2", 2, 12, 20, 2, 2, 31, 0),
}
OTHERS = ("fuse-peft", "inject")
# What `inject` refuses.
REFUSED = ("inject", "gpt2")


def tiny(family: str = "bert", dtype: str = "float32", *, compiled: bool = False) -> ModelCase:
    return ModelCase(TINY[family], 2, 7, dtype, compiled)


@functools.cache
def exact(family: str) -> Problem:
    """A tiny problem in float64."""
    return make_problem(tiny(family), CPU).in_float64()


@pytest.fixture
def compiled_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace torch.compile by the identity, which saves the time of compiling; return what was compiled."""
    seen: list[object] = []

    def same(model: Callable[..., object], *, fullgraph: bool) -> Callable[..., object]:
        assert fullgraph
        seen.append(model)
        return model

    monkeypatch.setattr(torch, "compile", same)
    return seen


def largest_difference(found: Values, expected: Values) -> float:
    """Return max |found − expected| over all values, whose names are the same."""
    assert found.keys() == expected.keys()
    return max((found[name] - value).abs().max().item() for name, value in expected.items())


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name in OTHERS for family in TINY if (name, family) != REFUSED]
)
def test_every_provider_has_the_loss_and_the_gradients_of_peft(
    name: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")  # else PEFT would compute these small calls of its fused model too
    problem = exact(family)
    expected = make_runner("peft", problem).results()
    assert set(expected) == {"loss", *problem.factors}
    assert min(value.abs().max() for value in expected.values()) > 1e-9, "a gradient is zero"
    assert largest_difference(make_runner(name, problem).results(), expected) < 1e-13


@pytest.mark.parametrize("family", TINY)
def test_peft_s_gradients_are_those_of_weights_with_the_update_in_them(family: str) -> None:
    """dL/dA = s·Bᵀ dL/dW and dL/dB = s·dL/dW Aᵀ of a plain model whose weights are W + s·B A."""
    problem = exact(family)
    found = make_runner("peft", problem).results()
    model = sharing_weights(problem.model, problem.matrices)
    for matrix in problem.matrices:
        weight = model.get_submodule(matrix).get_parameter("weight").requires_grad_()
        A, B = (problem.factors[f"{matrix}.{factor}"] for factor in ("lora_A", "lora_B"))
        with torch.no_grad():
            weight += _oriented(problem, 2.0 * B @ A)
    loss = RUNNERS["base"](replace(problem, model=model), compiled=False).loss(model, problem.batch)
    loss.backward()
    expected = {"loss": loss.detach()}
    for matrix in problem.matrices:
        gradient = model.get_submodule(matrix).get_parameter("weight").grad
        assert gradient is not None
        gradient = _oriented(problem, gradient)
        A, B = (problem.factors[f"{matrix}.{factor}"] for factor in ("lora_A", "lora_B"))
        expected |= {f"{matrix}.lora_A": 2.0 * B.T @ gradient, f"{matrix}.lora_B": 2.0 * gradient @ A.T}
    # Llama's norms compute in float32 even in a float64 model.
    assert largest_difference(found, expected) < (1e-6 if family == "llama-lm" else 1e-13)


def _oriented(problem: Problem, weight: Tensor) -> Tensor:
    return weight.T if problem.has_transposed_weights else weight


@pytest.mark.parametrize("family", TINY)
def test_the_base_is_the_model_itself_down_to_its_embeddings(family: str) -> None:
    problem = exact(family)
    model: Any = sharing_weights(problem.model, ())
    kept: list[Tensor] = []

    def keep(module: object, given: object, words: Tensor) -> Tensor:
        kept.append(words.detach().requires_grad_())
        return kept[-1]

    model.get_input_embeddings().register_forward_hook(keep)
    runner = RUNNERS["base"](problem, compiled=False)
    loss = runner.loss(model, problem.batch)
    loss.backward()
    assert kept[0].grad is not None
    assert kept[0].grad.shape == (2, 7, TINY[family].width)
    assert largest_difference(runner.results(), {"loss": loss.detach(), "embeddings": kept[0].grad}) < 1e-13
    assert not any(parameter.requires_grad for parameter in problem.model.parameters())


@pytest.mark.parametrize("name", OTHERS)
def test_every_provider_takes_the_same_steps(name: str) -> None:
    problem = exact("llama-lm" if name == "inject" else "gpt2")
    peft, other = (make_runner(each, problem) for each in ("peft", name))
    assert isinstance(peft, Adapted)
    assert isinstance(other, Adapted)
    for runner in (peft, other):
        assert largest_difference(dict(runner.factors), problem.factors) == 0.0
        for _ in range(4):
            runner.step()
    found, expected = dict(other.factors), dict(peft.factors)
    # AdamW divides by |gradient| + 1e-8, so an error of 1e-16 in a gradient moves a parameter by at most 1e-4 · 1e-8.
    assert largest_difference(found, expected) < 4e-12
    assert largest_difference(expected, problem.factors) > 1e-4


@pytest.mark.parametrize("name", ["peft", *OTHERS])
def test_looking_at_results_moves_nothing(name: str) -> None:
    problem = make_problem(tiny("bert"), CPU)
    runner = make_runner(name, problem)
    assert isinstance(runner, Adapted)
    once, again = (runner.results() for _ in range(2))
    assert largest_difference(once, again) == 0.0
    assert largest_difference(dict(runner.factors), problem.factors) == 0.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", TINY)
def test_no_call_of_a_fused_model_is_left_to_peft(family: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")  # no call is too small
    reports = []
    fuse = pk.fuse_peft
    monkeypatch.setattr(pk, "fuse_peft", lambda model: reports.append((model, fuse(model))) or reports[-1][1])
    problem = make_problem(tiny(family, dtype), CPU)
    runner = make_runner("fuse-peft", problem)
    runner.results()
    ((_, report),) = reports
    assert len(report.layers) == len(problem.matrices)
    assert all(layer.calls == {"fused": 1} for layer in report.layers)


@pytest.mark.parametrize("family", TINY)
def test_the_linears_of_the_layers_are_adapted_and_no_others(family: str) -> None:
    model = build_model(TINY[family], CPU, torch.float32)
    names = adapted_names(model)
    in_layer = {"bert": 6, "llama-lm": 7, "gpt2": 4}[family]
    assert len(names) == in_layer * len(layers_of(model))
    linears = [name for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))]
    others = {"bert": {"bert.pooler.dense", "classifier"}}.get(family, {"lm_head"})
    assert set(linears) - set(names) == others


def test_over_half_precision_factors_are_in_fp32() -> None:
    case = tiny("llama-lm", "bfloat16")
    problem = make_problem(case, CPU)
    assert next(problem.model.parameters()).dtype == torch.bfloat16
    for name in EAGER[1:]:
        runner = make_runner(name, problem)
        assert isinstance(runner, Adapted)
        assert {factor.dtype for factor in runner.factors.values()} == {torch.float32}
        assert {value.dtype for value in runner.results().values()} == {torch.float32}
    assert {one.record["status"] for one in measure(case, CPU, QUICK).values()} == {"timed"}


@pytest.mark.usefixtures("compiled_by_hand")
@pytest.mark.parametrize("family", [*list(TINY)[:1], *slow(*list(TINY)[1:])])
def test_every_record_has_its_figures(family: str) -> None:
    case = tiny(family, compiled=True)
    found = measure(case, CPU, QUICK)
    assert tuple(found) == PROVIDERS
    for provider, one in found.items():
        record: dict[str, Any] = one.record
        assert (record["op"], record["provider"], record["model"]) == (MODEL, provider, "tiny")
        assert (record["batch"], record["length"], record["dtype"], record["r"]) == (2, 7, "float32", 16)
        assert case_key(record) == case_key(case.facts())
        if provider.removesuffix(COMPILED) == "inject" and family == "gpt2":
            assert record["status"] == "not available"
            assert "Conv1D" in record["cause"]
            assert one.seconds == []
            continue
        assert (record["status"], record["rounds"]) == ("timed", len(one.seconds)), record
        assert record["tokens_per_second"] == pytest.approx(2 * 7 / record["seconds"])
        for other, key in (("base", "ratio_to_base"), ("peft", "ratio_to_peft")):
            assert record[key] == pytest.approx(record["seconds"] / found[other].record["seconds"])  # type: ignore[operator]
        peft_peak = found["peft"].record["peak_bytes"]
        assert record["peak_ratio_to_peft"] == pytest.approx(record["peak_bytes"] / peft_peak)
        assert record["threads"] == torch.get_num_threads()
        assert ("compile_seconds" in record) is provider.endswith(COMPILED)
    assert found["base"].record["peak_bytes"] < found["peft"].record["peak_bytes"]  # type: ignore[operator]


def test_a_compiled_provider_compiles_the_model_that_it_calls(compiled_by_hand: list[object]) -> None:
    problem = make_problem(tiny("bert"), CPU)
    for name in EAGER:
        runner: Any = make_runner(f"{name}{COMPILED}", problem)
        assert runner.call is compiled_by_hand[-1]
        assert largest_difference(runner.results(), make_runner(name, problem).results()) == 0.0
    assert len(compiled_by_hand) == len(EAGER)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(model: object, *, fullgraph: bool) -> object:
        raise RuntimeError("No working C++ compiler found\nmore lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    found = measure(tiny(compiled=True), CPU, QUICK)
    assert {name for name, one in found.items() if one.record["status"] == "timed"} == set(EAGER)
    assert found["peft-compiled"].record["cause"] == "RuntimeError: No working C++ compiler found"


def wrong_by(factor: float) -> Callable[..., Adapted]:
    """Return a provider whose last gradient is off by a factor."""

    class Wrong(Adapted):
        def results(self) -> Values:
            found = super().results()
            last = list(found)[-1]
            return {**found, last: found[last] * factor}

    def make(problem: Problem, *, compiled: bool) -> Adapted:
        real = RUNNERS["peft"](problem, compiled=compiled)
        assert isinstance(real, Adapted)
        return Wrong(real.call, real.factors, problem, compiled=False)

    return make


def test_a_wrong_provider_is_recorded_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNNERS, "inject", wrong_by(1.001))
    found = measure(tiny(), CPU, QUICK)["inject"]
    assert (found.record["status"], found.seconds) == ("wrong", [])
    assert "inject: the gradient bert.encoder.layer.1.output.dense.lora_B is off by" in str(found.record["cause"])
    monkeypatch.setitem(RUNNERS, "inject", wrong_by(1.0))
    assert measure(tiny(), CPU, QUICK)["inject"].record["status"] == "timed"


def test_a_loss_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Off(Adapted):
        def results(self) -> Values:
            found = super().results()
            return {**found, "loss": found["loss"] + 1e-4}

    def make(problem: Problem, *, compiled: bool) -> Adapted:
        real = RUNNERS["peft"](problem, compiled=compiled)
        assert isinstance(real, Adapted)
        return Off(real.call, real.factors, problem, compiled=False)

    monkeypatch.setitem(RUNNERS, "inject", make)
    assert "inject: loss is off by 0.0001" in str(measure(tiny(), CPU, QUICK)["inject"].record["cause"])


def test_without_peft_there_is_nothing_to_compare_with(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(problem: Problem, *, compiled: bool) -> Adapted:
        raise RuntimeError("out of memory")

    monkeypatch.setitem(RUNNERS, "peft", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        measure(tiny(), CPU, QUICK)


def test_wanted_providers_run_beside_those_they_are_divided_by(monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[object] = []
    monkeypatch.setattr(measuring, "note", noted.append)
    assert list(measure(tiny(), CPU, QUICK, ["inject"])) == ["base", "peft", "inject"]
    assert noted[:3] == ["base", "peft", None]  # `inject` is noted by what guards it
    assert isinstance(noted[-1], list)


def test_the_cases_are_those_of_the_plan() -> None:
    for device in ("cpu", "cuda"):
        listed = model_cases(device)
        assert len({case.name for case in listed}) == len({case_key(case.facts()) for case in listed}) == len(listed)
        assert {case.model.family for case in listed} == {"bert", "llama-lm", "gpt2"}
        assert all(providers_of(case) == PROVIDERS for case in listed)
    on_cpu = {(case.batch, case.length, case.dtype) for case in model_cases("cpu")}
    assert on_cpu == {(*batch, dtype) for batch in ((4, 128), (1, 32)) for dtype in ("float32", "bfloat16")}
    assert {case.model.name for case in model_cases("cpu")} == {
        "smollm2-135m-6-layers",
        "bert-base-4-layers",
        "gpt2-4-layers",
    }
    assert [(case.name, case.model.layers) for case in model_cases("cuda")] == [
        ("llama-1b-lm-4x512-bfloat16", 16),
        ("bert-base-4x512-bfloat16", 12),
        ("gpt2-4x512-bfloat16", 12),
    ]
    assert all(providers_of(case) == EAGER for case in device_models("cpu"))
    assert {case.model.family for case in device_models("cpu")} == {"bert", "gpt2"}
    assert shortened(BERT_BASE, 4) == replace(BERT_BASE, name="bert-base-4-layers", layers=4)


@pytest.mark.slow
@pytest.mark.parametrize("family", TINY)
def test_every_provider_really_compiles(family: str) -> None:
    found = measure(tiny(family, compiled=True), CPU, QUICK)
    for name, one in found.items():
        if name.removesuffix(COMPILED) == "inject" and family == "gpt2":
            continue
        assert one.record["status"] == "timed" or "compiler" in str(one.record["cause"]), one.record
