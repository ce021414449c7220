"""A whole measurement on shapes small enough for a test."""

from collections.abc import Callable

import pytest
import torch

import plora_kernels as pk
from bench.cases import OPS, Op
from bench.checks.correctness import WrongResultError
from bench.harness.timing import Plan
from bench.measure import Measurement, measure
from bench.providers.registry import provider_names
from tests.bench.providers.test_registry import tiny

PLAN = Plan(seconds_per_provider=0.0, min_rounds=3)
CPU = torch.device("cpu")


@pytest.fixture
def compiled_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace torch.compile by the identity, which saves the time of compiling."""

    def same(module: Callable[..., object], *, fullgraph: bool) -> Callable[..., object]:
        assert fullgraph
        return module

    monkeypatch.setattr(torch, "compile", same)


@pytest.mark.usefixtures("compiled_by_hand")
@pytest.mark.parametrize("op", OPS)
def test_every_provider_is_checked_and_timed(op: Op) -> None:
    measurement = measure(tiny(op), CPU, PLAN)
    assert tuple(measurement.seconds) == provider_names(op)
    assert not measurement.not_available
    for provider in measurement.seconds:
        entry = measurement.entry(provider)
        assert entry["rounds"] == 3
        assert entry["time_ms"] > 0
        assert entry["op"] == op
        assert entry.get("widths", []) == list(tiny(op).projection.widths)
    assert measurement.entry("base")["ratio_to_base"] == 1
    assert measurement.entry("peft")["ratio_to_peft"] == 1


@pytest.mark.usefixtures("compiled_by_hand")
def test_peak_bytes_hold_the_output_and_the_gradients() -> None:
    output_bytes, gradient_bytes = 37 * 29 * 4, 37 * 50 * 4
    forward = measure(tiny("forward"), CPU, PLAN).peak_bytes
    assert forward["base"] == output_bytes
    assert forward["peft"] >= 3 * output_bytes  # y, the adapter's output and its scaled copy
    backward = measure(tiny("forward_backward"), CPU, PLAN).peak_bytes
    assert backward["base"] == output_bytes + gradient_bytes
    assert backward["fused"] > backward["base"]


@pytest.mark.usefixtures("compiled_by_hand")
def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pk.FusedPLoRALinear.forward
    monkeypatch.setattr(pk.FusedPLoRALinear, "forward", lambda self, x: forward(self, x) * 1.001)
    monkeypatch.setattr("bench.measure.interleave", lambda *given: pytest.fail("a wrong result was timed"))
    with pytest.raises(WrongResultError, match="fused: y"):
        measure(tiny("forward"), CPU, PLAN)


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(module: object, *, fullgraph: bool) -> Callable[..., object]:
        def call(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("\nNo working C++ compiler found\nmore lines")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    measurement = measure(tiny("forward"), CPU, PLAN)
    assert measurement.not_available == {"peft-compiled": "No working C++ compiler found"}
    assert measurement.missing("peft-compiled")["cause"] == "No working C++ compiler found"
    assert set(measurement.seconds) == {"base", "peft", "fused"}


def test_an_entry_by_hand() -> None:
    seconds = {"base": [0.002, 0.004, 0.003], "peft": [0.010, 0.006, 0.020], "fused": [0.004, 0.005, 0.0045]}
    measurement = Measurement(tiny("forward"), "cpu", seconds, dict.fromkeys(seconds, 7))
    entry = measurement.entry("fused")
    assert entry["time_ms"] == pytest.approx(4.5)
    assert entry["iqr_ms"] == pytest.approx(0.5)
    assert entry["ratio_to_base"] == pytest.approx(1.5)
    assert entry["ratio_to_peft"] == pytest.approx(0.45)
    assert (entry["m"], entry["k"], entry["n"], entry["r"]) == (37, 50, 29, 5)
    assert entry["peak_bytes"] == 7


@pytest.mark.slow
def test_peft_really_compiles() -> None:
    measurement = measure(tiny("forward_backward"), CPU, PLAN)
    assert "peft-compiled" in measurement.seconds or "compiler" in measurement.not_available["peft-compiled"]
