"""The counted bytes: PEFT's and in-place algebra's as its operators move them, the kernels' as `least_bytes` says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from peft.tuners import lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, Projection, least_bytes
from bench.report import traffic
from bench.report.traffic import Shape, Way
from bench.report.traffic_pictures import main, pictures

ROOT = Path(__file__).resolve().parents[3]
SHAPES = [Shape(37, 50, 29, 5), Shape(8192, 4096, 4096, 16), Shape(512, 96, 224, 64)]
VIEWS = {"t", "transpose", "view", "detach", "alias", "_unsafe_view", "expand"}


class Bytes(TorchDispatchMode):
    """Add up the bytes of every tensor that an operator reads and writes; operators on views alone move nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ not in VIEWS:
            self.total += sum(tensor.nbytes for tensor in (*args, result) if isinstance(tensor, Tensor))
        return result


def moved(call: Callable[[], object]) -> int:
    with Bytes() as counted:
        call()
    return counted.total


def named(ways: list[Way], title: str) -> int:
    (way,) = [way for way in ways if way.title == title]
    return way.bytes


def peft_layer(shape: Shape, factors: torch.dtype) -> lora.Linear:
    with torch.device("meta"):
        linear = nn.Linear(shape.k, shape.n, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        layer = lora.Linear(linear, "default", config=LoraConfig(r=shape.r, init_lora_weights=False), r=shape.r)
    for module in (layer.lora_A, layer.lora_B):
        module.to(factors)
    return layer


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("title", "factors"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_peft_s_bytes_are_those_of_its_layer_s_operators(title: str, factors: torch.dtype, shape: Shape) -> None:
    layer = peft_layer(shape, factors)
    x = torch.empty(shape.m, shape.k, dtype=torch.bfloat16, device="meta", requires_grad=True)
    outputs: list[Tensor] = []
    assert moved(lambda: outputs.append(layer(x))) == named(traffic.forward(shape), f"PEFT, {title} factors")
    dy = torch.empty_like(outputs[0])
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    backward = moved(lambda: torch.autograd.grad(outputs[0], wanted, dy))
    assert backward == named(traffic.backward(shape), f"PEFT, {title} factors")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_of_peft_s_merge_are_those_of_its_operators(shape: Shape) -> None:
    assert moved(peft_layer(shape, torch.bfloat16).merge) == named(traffic.fold(shape), "PEFT's merge, bf16")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_in_place_algebra_s_bytes_are_those_of_torch_s_operators(shape: Shape) -> None:
    m, k, n, r = shape
    x, W, A, B, dY = (
        torch.empty(size, dtype=torch.bfloat16, device="meta") for size in ((m, k), (n, k), (r, k), (n, r), (m, n))
    )

    def forward() -> None:
        y, S = torch.mm(x, W.t()), torch.mm(x, A.t())
        y.addmm_(S, B.t())

    def backward() -> None:
        dS, dX = torch.mm(dY, B), torch.mm(dY, W)
        torch.mm(dY.t(), dS)  # dB, of dS's size as S is
        torch.mm(dS.t(), x)
        dX.addmm_(dS, A)

    for call, ways in ((forward, traffic.forward(shape)), (backward, traffic.backward(shape))):
        # addmm_ reads and writes what it returns, and is counted with both.
        assert moved(call) == named(ways, "in place, by torch")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_move_the_least_and_what_is_said_beyond_it(shape: Shape) -> None:
    m, k, n, r = shape
    cases = {
        op: Case(op, Projection("any", "query", k, n), m, r, "bfloat16")
        for op in ("forward", "forward_backward", "fold")
    }  # type: ignore[arg-type]
    side = 2 * m * r
    ways = traffic.forward(shape)
    least = least_bytes(cases["forward"], adapted=True)
    assert ways[0].bytes == least_bytes(cases["forward"], adapted=False)
    assert named(ways, "tile") == least + side
    assert named(ways, "two_launch") == least + 2 * m * k + 2 * side
    both = least_bytes(cases["forward_backward"], adapted=True)
    back = traffic.backward(shape)
    parts = sum(
        size for way in back for launch in way.launches for name, size in launch.writes.items() if "parts" in name
    )
    # Beyond least_bytes: x once more in the forward, dY once more for dS and dB; S and dS; partial sums, twice each.
    beyond = 2 * m * k + 2 * m * n + 6 * side + 2 * parts
    assert named(ways, "two_launch") + named(back, "two_launch") == both + beyond
    assert named(traffic.fold(shape), "fold_") == least_bytes(cases["fold"], adapted=True)


def test_clients_in_one_pass_read_the_weight_once() -> None:
    shape = Shape(37, 50, 29, 5)
    ways = {way.title: way.bytes for way in traffic.clients(shape, 10)}
    weight = 2 * shape.k * shape.n
    assert ways["two_launch, in turn"] - ways["in one pass"] == 9 * weight
    assert ways["PEFT, bf16, in turn"] == 10 * named(traffic.forward(shape), "PEFT, bf16 factors")


def test_the_committed_pictures_are_those_of_the_counts_and_are_in_the_page(tmp_path: Path) -> None:
    assert main([str(tmp_path)]) == 0
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    for name in pictures():
        assert (tmp_path / name).read_bytes() == (ROOT / "docs" / name).read_bytes(), (
            "python -m bench.report.traffic_pictures docs"
        )
        assert f"]({name})" in page


def test_the_page_s_figures_of_bytes_are_the_pictures() -> None:
    """Every "NNN MB" in the section on traffic is the total of a bar."""
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    section = page.split("## What they read and write")[1].split("\n## ")[0]
    drawn = set(re.findall(r"([\d,]+) MB \(", "".join(pictures().values())))
    said = set(re.findall(r"([\d,]+) MB", section))
    assert said
    assert said <= drawn


def test_the_command_wants_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "FOLDER" in capsys.readouterr().err
