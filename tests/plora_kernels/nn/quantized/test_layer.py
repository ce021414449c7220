"""Layers over a quantised weight, on a stand-in for a library's: as over the dequantised weight, bit for bit."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import plora_kernels as pk
from plora_kernels.counter_rng import keep_mask
from plora_kernels.nn.quantized import product
from plora_kernels.nn.quantized.bitsandbytes import EightBit
from tests.support.quantized import Linear8bitLt, dequantized, stand_in

ROWS = 40  # more than are few


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def pair(dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[pk.FusedPLoRALinear, pk.FusedPLoRALinear]:
    """Return a layer over a quantised weight and one over the dequantised weight, with the same adapter."""
    base = Linear8bitLt(24, 20)
    base.bias = nn.Parameter(base.bias.data.to(dtype))
    dense = nn.Linear(24, 20, dtype=dtype)
    # As the layer dequantises: the scales' products with the integers are rounded once.
    dense.weight = nn.Parameter(EightBit().dequantize(base, dtype))
    dense.bias = nn.Parameter(base.bias.data.clone())
    config = pk.PLoRAConfig(rank=6, alpha=12.0, target_modules=["0"], dropout=dropout)
    layers = [pk.inject(nn.Sequential(linear), config).layers["0"] for linear in (base, dense)]
    factors = torch.randn(6, 24) / 5, torch.randn(20, 6) / 3
    for layer in layers:
        layer.set_factors(*factors)
        layer.dropout_seed = 11
    return layers[0], layers[1]


def results(layer: nn.Module, x: Tensor, *leaves: Tensor, call: Callable | None = None) -> list[Tensor]:
    """Return y and the gradients of a sum of its squares by x and the leaves."""
    x = x.clone().requires_grad_()
    y = layer(x) if call is None else call(x)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *leaves])]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dropout", "selected", "rows"), [(0.0, None, ROWS), (0.4, [1, 4], ROWS), (0.4, [], 3), (0.0, [1, 4], 3)], ids=str
)
def test_it_computes_as_over_the_dequantised_weight(
    dtype: torch.dtype, dropout: float, selected: list[int] | None, rows: int, each_backend: str
) -> None:
    quantized, dense = pair(dtype, dropout)
    assert quantized.lora_A.dtype is torch.float32
    x = torch.randn(rows, 24).to(dtype)
    found = []
    for layer in (quantized, dense):
        if selected is not None:
            layer.select(selected, unselected="frozen")
        leaves = [layer.lora_A, layer.lora_B] if selected != [] else []
        found.append(results(layer, x, *leaves))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype is theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 3, 24), (2, 0, 24)])
def test_x_of_any_shape(shape: tuple[int, ...]) -> None:
    quantized, dense = pair()
    x = torch.randn(shape)
    for ours, theirs in zip(*(results(layer, x, layer.lora_A) for layer in (quantized, dense)), strict=True):
        assert torch.equal(ours, theirs)


def test_few_rows_take_the_library_s_product_and_one_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, dense = pair()
    calls = []

    def of_library(self: EightBit, module: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
        calls.append(x.shape)
        return nn.functional.linear(x, dequantized(module), bias)

    monkeypatch.setattr(EightBit, "product", of_library)
    dequantisations = mock.Mock(side_effect=product._dequantized)
    monkeypatch.setattr(product, "_dequantized", dequantisations)
    for rows in (1, product.FEW_ROWS, product.FEW_ROWS + 1):
        x = torch.randn(1, rows, 24)
        found = [results(layer, x, layer.lora_A, layer.lora_B) for layer in (quantized, dense)]
        torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    assert calls == [(1, 1, 24), (1, product.FEW_ROWS, 24)]
    assert dequantisations.call_count == 3 + 1  # in every backward, and in the forward of many rows
    with torch.no_grad():
        torch.testing.assert_close(quantized(x[0, :2]), dense(x[0, :2]), rtol=1e-5, atol=1e-5)
    assert len(calls) == 3


def test_no_dense_weight_is_kept_for_the_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, _ = pair()
    made: list[object] = []

    def noted(call: product.Call, dtype: torch.dtype) -> Tensor:
        weight = call.kind.dequantize(call.module, dtype)
        made.append(torch.utils.weak.TensorWeakRef(weight))
        return weight

    monkeypatch.setattr(product, "_dequantized", noted)
    y = quantized(torch.randn(ROWS, 24, requires_grad=True))
    assert [reference() for reference in made] == [None]
    y.sum().backward()
    assert [reference() for reference in made] == [None, None]
    quantized(torch.randn(ROWS, 24)).sum().backward()
    assert len(made) == 3  # x needs no gradient, so the backward needs no weight


def test_groups_have_their_own_modules_in_one_pass() -> None:
    quantized, dense = pair()
    sizes, rows = [2, 1, 3], pk.RowGroups([2, 1, 3])
    lora_A, lora_B = torch.randn(3, 4, 24) / 5, torch.randn(3, 20, 4) / 3
    x = torch.randn(6, 7, 24)
    found = []
    for layer in (quantized, dense):
        handle = pk.Injected(nn.Sequential(layer), pk.PLoRAConfig(), {"0": layer}, _linears={"0": nn.Linear(1, 1)})
        leaves = [factor.clone().requires_grad_() for factor in (lora_A, lora_B)]
        form = {"scale": [0.5, 1.0, 2.0], "dropout_p": 0.3, "dropout_seeds": [1, 2, 3]}
        groups = pk.GroupModules.of(rows, *leaves, [[0, 1], None, [3]], **form)
        with handle.grouped({"0": groups}):
            found.append(results(layer, x, *leaves))
        memory = [torch.empty_like(factor) for factor in leaves]
        groups = pk.GroupModules.of(rows, *leaves, gradients=(memory[0], memory[1]))
        with handle.grouped({"0": groups}):
            assert pk.group_gradients(layer(x).square().sum(), {"0": groups}) == ((), [])
        found[-1] += memory
    assert sum(sizes) == x.shape[0]
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)
    with (
        pytest.raises(pk.ShapeError, match=r"weight \(N=20, K=24\)"),
        handle.grouped({"0": pk.GroupModules.of(rows, lora_A[:, :, :5], lora_B)}),
    ):
        pass


def test_folding_is_refused_and_names_the_frozen_form() -> None:
    model = nn.Sequential(Linear8bitLt(24, 20))
    handle = pk.inject(model, pk.PLoRAConfig(rank=4, target_modules=["0"]))
    layer = handle.layers["0"]
    for select in (layer.select, handle.select):
        with pytest.raises(pk.StateError, match=r"quantised .*select with unselected='frozen'"):
            select([1])
    assert layer.selected is None
    with pytest.raises(pk.StateError, match=r"cannot be merged into it: keep the adapter beside it"):
        layer.merge()
    with pytest.raises(pk.ConfigError, match=r"unselected is 'melted'"):
        layer.select([1], unselected="melted")
    with pytest.raises(pk.DTypeError, match=r"float64"):
        pk.inject(nn.Sequential(Linear8bitLt(24, 20)), pk.PLoRAConfig(target_modules=["0"], adapter_dtype="float64"))


def test_factors_train_through_selections_and_come_back() -> None:
    model = nn.Sequential(Linear8bitLt(24, 20), nn.ReLU(), nn.Linear(20, 2))
    base, values = model[0], model[0].weight.clone()
    handle = pk.inject(model, pk.PLoRAConfig(rank=5, target_modules="all-linear"))
    assert set(handle.layers) == {"0", "2"}
    assert type(handle.layers["0"]) is not type(handle.layers["2"])
    handle.select([0, 3], unselected="frozen")
    before = handle.factors()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert [tuple(parameter.shape) for parameter in trained] == [(2, 24), (20, 2), (2, 20), (2, 2)]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.5)
    for _ in range(2):
        model(torch.randn(ROWS, 24)).square().sum().backward()
        optimizer.step()
    handle.unfold()
    for name, (A, B) in handle.factors().items():
        assert A.dtype is B.dtype is torch.float32
        changed = (before[name][0] != A).any(1)
        assert changed.tolist() == [j in (0, 3) for j in range(5)], name
        assert (before[name][1] != B).any(0).tolist() == changed.tolist()
    assert handle.restore() is model
    assert model[0] is base
    assert torch.equal(base.weight, values)
    assert [parameter.requires_grad for parameter in model.parameters()] == [False, True, True, True]


def test_state_dicts_copies_and_pickles() -> None:
    quantized, _ = pair()
    quantized.select([0, 2], unselected="frozen")
    x = torch.randn(ROWS, 24)
    y = quantized(x)
    for copied in (copy.deepcopy(quantized), pickle.loads(pickle.dumps(quantized))):
        assert torch.equal(copied(x), y)
        assert copied.base_layer is not quantized.base_layer
        copied.unfold()
        assert copied.lora_A.shape == (6, 24)
    state = quantized.state_dict(prefix="layer.")
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes == {
        "layer.lora_A": (6, 24), "layer.lora_B": (20, 6), "layer.weight": (20, 24), "layer.bias": (20,),
    }  # fmt: skip
    holder = nn.ModuleDict({"layer": quantized})
    state["layer.lora_A"] = state["layer.lora_A"] + 1
    holder.load_state_dict(state)
    assert torch.equal(quantized.factors()[0], state["layer.lora_A"])
    assert quantized.selected == (0, 2)
    only = {key: value for key, value in state.items() if "lora" in key}
    assert set(holder.load_state_dict(only, strict=False).missing_keys) == {
        f"layer.base_layer.{name}" for name in ("weight", "bias")
    }
    for wrong in ({"layer.weight": state["layer.weight"] + 1}, {"layer.bias": state["layer.bias"].double()}):
        with pytest.raises(RuntimeError, match=r"is not what the quantised layer holds") as refused:
            holder.load_state_dict(state | wrong)
        assert "Missing" not in str(refused.value)
    weight = quantized.weight
    with pytest.raises(RuntimeError, match=r"assign=True would replace the quantised weight") as refused:
        holder.load_state_dict(state, assign=True)
    assert "Missing" not in str(refused.value)
    assert quantized.weight is weight
    assert torch.equal(quantized.weight, state["layer.weight"])


def test_casting_a_model_keeps_the_quantised_weight() -> None:
    quantized, _ = pair()
    weight = quantized.weight.clone()
    quantized.select([1], unselected="frozen")
    quantized.to(torch.float16)
    assert torch.equal(quantized.weight, weight)
    assert quantized(torch.randn(2, 24, dtype=torch.float16)).dtype is torch.float16
    quantized.unfold()
    assert quantized.lora_A.dtype is torch.float16  # what the caller cast stays cast


def test_the_dtype_of_y_is_x_s_and_autocast_chooses_that_of_the_products() -> None:
    quantized, dense = pair(torch.bfloat16)
    x = torch.randn(ROWS, 24)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(x)
    assert y.dtype is torch.float32
    assert torch.equal(y, dense(x.bfloat16()).float())
    y = quantized(x)  # without autocast in x's dtype
    exact = x.double() @ dequantized(quantized.base_layer).double().T + quantized.bias.double()
    exact += quantized.scale * x.double() @ quantized.lora_A.double().T @ quantized.lora_B.double().T
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("selected", [None, [1, 4]], ids=str)
@pytest.mark.parametrize("rows", [3, ROWS])
def test_where_the_base_computes_in_a_narrower_dtype_the_branch_keeps_x_s(
    dropout: float, selected: list[int] | None, rows: int, monkeypatch: pytest.MonkeyPatch, each_backend: str
) -> None:
    half = torch.bfloat16 if each_backend == "torch" else torch.float16
    monkeypatch.setattr(EightBit, "dtypes", lambda self, module, x, autocast: (half, x.dtype))
    layer, _ = pair(dropout=dropout)
    A, B = (factor.requires_grad_() for factor in layer.factors())
    if selected is not None:
        layer.select(selected, unselected="frozen")
    x, dy = torch.randn(rows, 24, requires_grad=True), torch.randn(rows, 20)
    y = layer(x)
    found = [y, *torch.autograd.grad(y, [x, layer.lora_A, layer.lora_B], dy)]
    weight, bias = EightBit().dequantize(layer.base_layer, half), layer.bias.detach().to(half)
    base = nn.functional.linear(x.to(half), weight, bias).float()
    mask = torch.tensor([selected is None or j in selected for j in range(6)])
    kept = keep_mask(torch.tensor([11]), rows, 24, dropout) / (1 - dropout) if dropout else torch.ones(rows, 24)
    s = torch.where(mask, (x * kept) @ A.T, x @ A.T)
    expected = base + layer.scale * s @ B.T
    d_x, d_A, d_B = torch.autograd.grad(expected, [x, A, B], dy)
    for ours, theirs in zip(found, (expected, d_x, d_A[mask], d_B[:, mask]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_double_backward_is_refused_also_where_the_base_is_narrower(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(EightBit, "dtypes", lambda self, module, x, autocast: (dtype, x.dtype))
    layer, _ = pair()
    for trained in (True, False):
        layer.lora_A.requires_grad_(trained)
        layer.lora_B.requires_grad_(trained)
        x = torch.randn(ROWS, 24, requires_grad=True)
        (d_x,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        with pytest.raises(pk.UnsupportedError, match="no double backward"):
            (d_x.square().sum() + x.sum()).backward()


def test_checkpointing_and_accumulation() -> None:
    quantized, dense = pair(dropout=0.2)
    x = torch.randn(ROWS, 24)
    found = []
    for layer in (quantized, dense):
        total = [torch.zeros(6, 24), torch.zeros(20, 6)]
        for reentrant in (False, True):

            def call(t: Tensor, layer: nn.Module = layer, reentrant: bool = reentrant) -> Tensor:
                return checkpoint(layer, t, use_reentrant=reentrant)

            layer.zero_grad()
            call(x.clone().requires_grad_()).square().sum().backward()
            total = [own + factor.grad for own, factor in zip(total, (layer.lora_A, layer.lora_B), strict=True)]
        found.append(total)
    assert all(map(torch.equal, *found))


def test_a_compiler_traces_it() -> None:
    quantized, dense = pair()
    quantized.select([0, 2], unselected="frozen")
    dense.select([0, 2], unselected="frozen")
    compiled = torch.compile(quantized, backend="aot_eager", fullgraph=True)
    x = torch.randn(ROWS, 24)
    found = [results(layer, x, layer.lora_A, layer.lora_B, call=call) for layer, call in (
        (quantized, compiled), (dense, dense),
    )]  # fmt: skip
    torch.testing.assert_close(*found)


def test_what_the_layer_cannot_do_is_refused() -> None:
    quantized, _ = pair()
    with pytest.raises(pk.ShapeError, match=r"x is \(3, 7\); weight \(N=20, K=24\) needs \(…, 24\)"):
        quantized(torch.randn(3, 7))
    with pytest.raises(pk.DTypeError, match=r"lora_A is torch.float32, x is torch.float64"):
        quantized(torch.randn(3, 24, dtype=torch.float64))
    x = torch.randn(ROWS, 24, requires_grad=True)
    (gradient,) = torch.autograd.grad(quantized(x).square().sum(), x, create_graph=True)
    with pytest.raises(pk.UnsupportedError, match=r"no double backward"):
        gradient.sum().backward()
    with pytest.raises(pk.UnsupportedError, match=r"torch.func transforms"):
        torch.func.grad(lambda t: quantized(t).sum())(x)


def test_a_bias_that_requires_a_gradient_gets_one() -> None:
    quantized, _ = pair()
    quantized.bias.requires_grad_()
    x = torch.randn(ROWS, 24)
    (gradient,) = torch.autograd.grad(quantized(x).sum(), [quantized.bias])
    assert torch.equal(gradient, torch.full((20,), float(ROWS)))


def test_quantised_siblings_run_alone() -> None:
    model = nn.ModuleDict({name: Linear8bitLt(8, 8) for name in ("q_proj", "k_proj")} | {"v_proj": nn.Linear(8, 8)})
    config = pk.PLoRAConfig(rank=2, target_modules=["q_proj", "k_proj", "v_proj"], fuse_projections=True)
    assert pk.inject(model, config).projections == ()


class NotYet(Linear8bitLt):
    """A subclass is another layer than the library's own."""


def test_what_is_quantised_otherwise_is_refused_by_name() -> None:
    unquantised = Linear8bitLt(8, 8)
    unquantised.state.SCB = None
    hooked = Linear8bitLt(8, 8)
    hooked.register_forward_hook(lambda *_: None)
    for linear, message in (
        (unquantised, "a Linear8bitLt that is not quantised yet"),
        (NotYet(8, 8), r"a NotYet that holds torch\.int8; quantised weights are supported of"),
        (hooked, "with hooks, which would be lost"),
    ):
        for targets in ("all-linear", ["1"]):
            model = nn.Sequential(nn.Linear(8, 8), linear)
            with pytest.raises(pk.TargetError, match=f"'1' is {message}|'1' is an nn.Linear {message}"):
                pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=targets))
            assert model[1] is linear
    with pytest.raises(pk.TargetError, match=r"from_linear got a Linear8bitLt that holds torch.int8"):
        pk.FusedPLoRALinear.from_linear(Linear8bitLt(8, 8))
