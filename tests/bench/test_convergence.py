"""Fifty steps with PEFT and with the fused layers: one loss curve."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.convergence import Curves, Training, losses, main, make_model, peft_factors, train_all, with_fused, with_peft


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def curves() -> Curves:
    return train_all(Training())


def test_fifty_steps_give_peft_s_loss_curve_within_rounding(curves: Curves) -> None:
    assert len(curves.fused_fp32) == 50
    assert curves.equal(), (curves.errors(), curves.bounds())
    # The curve is one of learning: a model that stood still would agree as well.
    assert sum(curves.fused_fp64[-5:]) / 5 < 0.2 * curves.fused_fp64[0]


def test_a_scale_off_by_a_thousandth_is_not_within_rounding(curves: Curves) -> None:
    training = Training()
    base = make_model(training.seed)
    factors = peft_factors(with_peft(copy.deepcopy(base), training))
    off = losses(with_fused(base, replace(training, alpha=training.alpha * 1.001), factors), training)
    assert not replace(curves, fused_fp32=off).equal()


def test_bounds_by_hand() -> None:
    curves = Curves(peft_fp32=[1.0, 2.5], fused_fp32=[1.0, 1.2], peft_fp64=[1.0, 2.0], fused_fp64=[1.0, 2.0])
    assert curves.errors() == {"peft_fp32": 0.5, "fused_fp32": pytest.approx(0.8), "fused_fp64": 0.0}
    assert curves.bounds()["fused_fp32"] == 1.0
    assert curves.equal()


def test_the_command_writes_both_curves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "out"), "--steps", "3"]) == 0
    saved = json.loads((tmp_path / "out" / "convergence.json").read_text(encoding="utf-8"))
    assert len(saved["losses"]["peft_fp32"]) == 3
    assert (tmp_path / "out" / "convergence.png").read_bytes().startswith(b"\x89PNG")
    assert "bound" in capsys.readouterr().out
