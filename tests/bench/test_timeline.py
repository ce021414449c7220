"""When kernels run: spans put together by hand, and operators profiled on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import timeline
from bench.checks.correctness import WrongResultError
from bench.harness.records import ResultsError, load_records
from bench.timeline import Span, main, median_call, picture, profiled


def test_spans_are_medians_from_the_first_start_and_know_what_runs_beside_them() -> None:
    """The product runs 0 to 10, the sums 4 to 8 and 6 to 12, what adds them from 12 on: 6 of 10 µs, 4 of 4, 4 of 6."""
    calls = [
        [Span("product", first + 0, 10), Span("dA", first + 4, 4), Span("dB", first + 6, 6), Span("add", first + 12, 1)]
        for first in (100.0, 200.0)
    ]
    calls.append([Span("product", 300, 90), Span("dA", 310, 80), Span("dB", 300, 70), Span("add", 399, 60)])
    assert median_call(calls) == [
        Span("product", 0, 10, 0.6),
        Span("dA", 4, 4, 1.0),
        Span("dB", 6, 6, pytest.approx(4 / 6)),
        Span("add", 12, 1, 0.0),
    ]


def test_calls_that_launch_different_kernels_are_refused() -> None:
    for calls in ([[Span("a", 0, 1)], [Span("b", 0, 1)]], [[Span("a", 0, 1)], []], [], [[]]):
        with pytest.raises(ResultsError, match="should launch the same kernels"):
            median_call(calls)


def test_a_picture_shows_where_each_kernel_runs() -> None:
    lines = picture([Span("product", 0, 30, 0.25), Span("dA", 30, 10)]).splitlines()
    assert lines[1] == "      0.0     30.0     25%  " + "#" * 30 + " " * 10 + "  product"
    assert lines[2] == "     30.0     10.0      0%  " + " " * 30 + "#" * 10 + "  dA"


def test_operators_are_profiled_in_order() -> None:
    x = torch.ones(64, 64)
    spans = profiled(lambda: (x @ x).sum(), torch.device("cpu"))
    assert [span.kernel for span in spans] == ["aten::matmul", "aten::sum"]
    assert spans[0].duration_us > 0
    assert spans[1].start_us >= spans[0].end_us


def test_the_command_goes_on_where_it_was_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--device", "cpu", "--calls", "2", "--providers"]
    assert main([*arguments, "inplace"]) == 0
    assert main([*arguments, "peft", "--budget-seconds", "0"]) == 0
    assert "1 records, 0 wrong, 1 left" in capsys.readouterr().out
    monkeypatch.setattr(timeline, "timeline", lambda *given: [Span("again", 0, 1)])
    assert main([*arguments, "inplace", "peft"]) == 0
    _, (first, second) = load_records(tmp_path / "timeline" / "cpu.json")
    assert (first["op"], first["form"], first["m"], first["provider"]) == (
        "timeline",
        "forward_backward",
        32,
        "inplace",
    )
    assert first["time_ms"] == max(one["start_us"] + one["duration_us"] for one in first["kernels"]) / 1e3
    assert [one["kernel"] for one in second["kernels"]] == ["again"]
    assert "forward_backward 32 64 48 4 float32, peft:" in capsys.readouterr().out


def test_a_wrong_result_is_not_profiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(*given: object) -> None:
        raise WrongResultError("inplace: y is off")

    monkeypatch.setattr("bench.measure.check", wrong)
    assert main(["--out", str(tmp_path), "--device", "cpu", "--providers", "inplace"]) == 1
    assert "WRONG forward_backward 32 64 48 4 float32, inplace: inplace: y is off" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path), "--device", "cuda"]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
