"""The grouped operator under torch.compile, with every form of arguments, and the independence of groups."""

from __future__ import annotations

import functools
import itertools
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from tests.support.equality import assert_equal
from tests.support.layer_inputs import GROUPS
from tests.support.layer_inputs import layer_inputs as inputs


def test_compile_traces_and_new_groups_do_not_recompile() -> None:
    x, weight, lora_A, lora_B, bias = inputs(groups=GROUPS)
    counter = CompileCounterWithBackend("aot_eager")

    def call(selected: Tensor, groups: Tensor, scale: Tensor, seeds: Tensor, numbers: Tensor) -> Tensor:
        form = {"bias": bias, "unselected": "frozen", "scale": scale}
        form |= {"dropout_p": 0.2, "dropout_seed": seeds, "dropout_rows": numbers}
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, groups=groups, **form)

    compiled = torch.compile(call, backend=counter, fullgraph=True)
    for turn in range(12):
        chosen = torch.rand(3, 4) > 0.5
        offsets, numbers = torch.tensor([0, turn, turn + 1, 15]), torch.randperm(15)
        arguments = (chosen, offsets, torch.rand(3), torch.randint(99, (3,)), numbers)
        y = compiled(*arguments)
        torch.testing.assert_close(y, call(*arguments))
        y.sum().backward()
    assert counter.frame_count == 1
    with pytest.raises(pk.ShapeError, match="groups falls from 9 to 8 at group 1"):
        compiled(chosen, torch.tensor([0, 9, 8, 15]), torch.rand(3), torch.randint(99, (3,)), numbers)


@pytest.mark.usefixtures("without_group_weights")
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # read by torch for fake tensors
def test_a_compiler_traces_the_backward() -> None:
    found = []
    for compiled in (False, True):
        torch.manual_seed(0)
        x, weight, lora_A, lora_B, _ = inputs(groups=GROUPS)
        y = pk.plora_linear(x, weight, lora_A, lora_B, groups=GROUPS)
        whole = functools.partial(torch.compile, backend="eager", fullgraph=True)
        with compiled_autograd._enable(whole) if compiled else nullcontext():
            y.square().sum().backward()
        found.append((x.grad, lora_A.grad, lora_B.grad))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------------------ forms of input


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_way_to_name_selections_and_groups_gives_the_same(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs(groups=GROUPS)
    mask = torch.tensor([[True, False, True, False], [True] * 4, [False, False, False, True]])
    ways = (mask, [[0, 2], None, [3]], [torch.tensor([2, 0]), mask[1], (3,)])
    groups = (GROUPS, torch.tensor(GROUPS), torch.tensor(GROUPS, dtype=torch.int32), tuple(GROUPS))
    scales = (2.0, [2.0, 2.0, 2.0], torch.full((3,), 2.0), 2)
    results = [
        pk.plora_linear(x, weight, lora_A, lora_B, way, unselected=form, groups=offsets, scale=scale)
        for way, offsets, scale in itertools.zip_longest(ways, groups, scales, fillvalue=mask)
    ]
    assert_equal(results[1:], [results[0]] * (len(results) - 1))


def test_no_rows_at_all(each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs(groups=GROUPS)
    x = torch.randn(2, 0, 7, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, [[0], [1], []], bias=bias, groups=[0, 0, 0, 0])
    assert y.shape == (2, 0, 6)
    y.sum().backward()
    assert not lora_A.grad.any()
    assert not lora_B.grad.any()


@pytest.mark.parametrize("form", ["folded", "frozen"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # by the interpreter
def test_a_group_that_is_not_finite_touches_no_other(form: str, each_backend: str) -> None:
    selected = [[1, 2], [], [0, 1]]
    results = []
    for broken in (False, True):
        torch.manual_seed(0)
        x, weight, lora_A, lora_B, _ = inputs(groups=GROUPS)
        if broken:
            with torch.no_grad():
                lora_A[0], lora_B[0], x.view(15, 7)[:6] = float("nan"), float("inf"), float("inf")
        y = pk.plora_linear(x, weight, lora_A, lora_B, selected, unselected=form, groups=GROUPS)
        y.sum().backward()
        results.append([y.view(15, 6)[6:], x.grad.view(15, 7)[6:], lora_A.grad[1:], lora_B.grad[1:]])
    assert_equal(*results)
