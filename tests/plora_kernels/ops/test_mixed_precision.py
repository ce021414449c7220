"""fp32 factors beside x and W of half precision: dtypes, values, what is refused, torch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.checks import may_adapt
from plora_kernels.fallback import grouped_linear as grouped_fallback
from plora_kernels.fallback import linear as fallback
from plora_kernels.ops.projections import JointGradient, Projection, attach, forward
from plora_kernels.selection import index_buffer
from tests.support.equality import assert_equal
from tests.support.layer_inputs import GROUPS
from tests.support.layer_inputs import layer_inputs as inputs
from tests.support.pairwise import pairwise

HALF = [torch.bfloat16, torch.float16]
FORMS: dict[str, dict[str, Any]] = {
    "all": {},
    "folded": {"selected": [0, 3]},
    "frozen": {"selected": [0, 3], "unselected": "frozen"},
    "none": {"selected": []},
    "none frozen": {"selected": [], "unselected": "frozen"},
    "dropout": {"selected": [1, 2], "unselected": "frozen", "dropout_p": 0.3, "dropout_seed": 5},
}


@pytest.fixture(autouse=True)
def on_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")


def mixed_inputs(dtype: torch.dtype, groups: list[int] | None = None) -> list[Tensor]:
    """Return the tensors of a small layer as leaves: factors of fp32, all others of `dtype`."""
    tensors = [tensor.detach() for tensor in inputs(groups=groups)]
    return [tensor if place in (2, 3) else tensor.to(dtype) for place, tensor in enumerate(tensors)]


def results(tensors: list[Tensor], form: dict[str, Any]) -> list[Tensor]:
    """Return y, and the gradients of x, lora_A, lora_B and bias for a loss that differs in every element of y."""
    x, weight, lora_A, lora_B, bias = tensors
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B, bias)]
    y = pk.plora_linear(leaves[0], weight, *leaves[1:3], bias=leaves[3], scale=0.5, **form)
    dy = torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def for_groups(form: dict[str, Any]) -> dict[str, Any]:
    """Return a form for three groups, each with the selection and the seed of one."""
    several = {name: [form[name]] * 3 for name in ("selected", "dropout_seed") if name in form}
    return form | several | {"groups": GROUPS}


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("at_once", [1 << 19, 1], ids=["at once", "in parts"])
@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "grouped"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_factors_are_rounded_as_they_enter_and_their_gradients_not_at_all(
    dtype: torch.dtype, form: str, groups: list[int] | None, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (fallback, grouped_fallback):
        monkeypatch.setattr(module, "CAST_ELEMENTS", at_once)
    tensors, options = mixed_inputs(dtype, groups), for_groups(FORMS[form]) if groups else FORMS[form]
    rounded = [tensor.to(dtype) for tensor in tensors]
    y, dx, dA, dB, dbias = results(tensors, options)
    expected = results(rounded, options)
    assert [t.dtype for t in (y, dx, dA, dB, dbias)] == [dtype, dtype, torch.float32, torch.float32, dtype]
    assert_equal((y, dx, dbias), (expected[0], expected[1], expected[4]))
    for own, theirs in ((dA, expected[2]), (dB, expected[3])):
        # The same sums, once rounded: half a unit in the last place apart, and a whole one where it lies on the edge.
        torch.testing.assert_close(own, theirs.float(), rtol=torch.finfo(dtype).eps, atol=1e-6)
        assert not own.any() or not torch.equal(own.to(dtype).float(), own)


def test_the_gradients_by_hand() -> None:
    # One module. bfloat16 keeps eight bits: B = 1 + 2⁻⁹ enters as 1, and 257 = dA is not one of its numbers.
    x = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)
    weight = torch.zeros(1, 1, dtype=torch.bfloat16)
    lora_A, lora_B = torch.ones(1, 1, requires_grad=True), torch.full((1, 1), 1 + 2.0**-9, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    assert y.flatten().tolist() == [256.0, 1.0]
    dA, dB = torch.autograd.grad(y, (lora_A, lora_B), torch.ones_like(y))
    assert (dA.item(), dB.item()) == (257.0, 257.0)
    with torch.no_grad():
        folded = pk.fold(
            torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1), torch.full((1, 1), 2.0**-8 + 2**-16), []
        )
    assert folded.item() == 1 + 2.0**-7  # 1 + 2⁻⁸ is a tie, which goes to 1: with B rounded first it would be that


@pytest.mark.parametrize("fold", ["in place", "out of place", "many"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_fold_of_fp32_factors_is_rounded_once(dtype: torch.dtype, fold: str) -> None:
    weight = torch.randn(29, 50, dtype=torch.float64).to(dtype)
    lora_A, lora_B = torch.randn(5, 50), torch.randn(29, 5)
    rest = [0, 2, 3]
    exact = weight.double() - 0.3 * lora_B[:, rest].double() @ lora_A[rest].double()
    given = weight.clone()
    if fold == "in place":
        result = pk.fold_(given, lora_A, lora_B, [1, 4], scale=0.3, sign=-1)
    elif fold == "out of place":
        result = pk.fold(given, lora_A, lora_B, [1, 4], scale=0.3, sign=-1)
    else:
        # Folds of factors of both kinds in one call.
        jobs = [pk.Fold(given, lora_A, lora_B, [1, 4], 0.3, -1)]
        jobs.append(pk.Fold(weight.clone(), lora_A.to(dtype), lora_B.to(dtype), [1, 4], 0.3, -1))
        result, of_half = pk.fold_many_(jobs)
        alone = pk.fold(weight, lora_A.to(dtype), lora_B.to(dtype), [1, 4], scale=0.3, sign=-1)
        assert torch.equal(of_half, alone)
    assert result.dtype is dtype
    # No further than half a spacing, and what fp32 sums are off.
    spacing = torch.finfo(dtype).eps * 2 ** exact.abs().clamp_min(2.0**-14).log2().floor()
    assert ((result.double() - exact).abs() <= spacing / 2 * 1.001 + 1e-6).all()


REFUSED = {
    "float64 factors": (torch.bfloat16, torch.float64, torch.float64, "lora_A is torch.float64, x is torch.bfloat16"),
    "half over fp32": (torch.float32, torch.float16, torch.float16, "lora_A is torch.float16, x is torch.float32"),
    "fp32 over float64": (torch.float64, torch.float32, torch.float32, "lora_A is torch.float32, x is torch.float64"),
    "the other half": (torch.float16, torch.bfloat16, torch.bfloat16, "lora_A is torch.bfloat16, x is torch.float16"),
    "A and B differ": (
        torch.bfloat16, torch.float32, torch.bfloat16, "lora_A is torch.float32, lora_B is torch.bfloat16"
    ),
    "B alone": (torch.bfloat16, torch.bfloat16, torch.float64, "lora_B is torch.float64, x is torch.bfloat16"),
}  # fmt: skip


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "grouped"])
@pytest.mark.parametrize("mixture", REFUSED)
def test_no_other_mixture_is_taken(mixture: str, groups: list[int] | None) -> None:
    dtype, of_A, of_B, message = REFUSED[mixture]
    x, weight, lora_A, lora_B, bias = (tensor.detach() for tensor in inputs(dtype, groups=groups))
    lora_A, lora_B = lora_A.to(of_A), lora_B.to(of_B)
    with pytest.raises(pk.DTypeError, match=message):
        pk.plora_linear(x, weight, lora_A, lora_B, bias=bias, groups=groups)
    if groups is None:
        with pytest.raises(pk.DTypeError, match=message.replace("x is", "weight is")):
            pk.fold_(weight, lora_A, lora_B, [])


def test_a_bias_of_another_dtype_is_refused() -> None:
    x, weight, lora_A, lora_B, bias = mixed_inputs(torch.bfloat16)
    with pytest.raises(pk.DTypeError, match=r"bias is torch\.float32, x is torch\.bfloat16"):
        pk.plora_linear(x, weight, lora_A, lora_B, bias=bias.float())


def test_which_factors_may_stand_beside_which_weights() -> None:
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int8)
    taken = {(factors, dtype) for factors in kinds for dtype in kinds if may_adapt(factors, dtype)}
    beside_half = {(torch.float32, dtype) for dtype in HALF}
    assert taken == {(kind, kind) for kind in kinds} | beside_half


# ------------------------------------------------------------------------------------------------ torch's own tools


INDEX = index_buffer((1, 3), torch.device("cpu"))
INDICES = torch.stack([INDEX, torch.full_like(INDEX, -1), INDEX])


@pytest.mark.parametrize(
    ("name", "frozen", "indexed", "dropout", "needs"),
    pairwise(
        ["linear", "grouped_linear"], [False, True], [False, True], [0.0, 0.3],
        [(True, True, True, True), (False, True, False, False), (True, False, True, False)],
    ),
    ids=str,
)  # fmt: skip
def test_opcheck(name: str, frozen: bool, indexed: bool, dropout: float, needs: tuple[bool, ...]) -> None:
    grouped = name == "grouped_linear"
    operands = mixed_inputs(torch.bfloat16, GROUPS if grouped else None)
    for place in (0, 2, 3, 4):
        operands[place].requires_grad_()
    index = (INDICES if grouped else INDEX) if indexed else None
    groups = (torch.tensor(GROUPS), torch.tensor([1.0, 2.0, 0.5])) if grouped else ()
    seeds = (torch.tensor([5, 6, 7][: 3 if grouped else 1]) if dropout else None, *((None,) if grouped else ()))
    form, drops = (index, *groups, 0.5, frozen), (dropout, *seeds)
    forward, backward = (getattr(torch.ops.plora, own) for own in (name, f"{name}_backward"))
    torch.library.opcheck(forward.default, (*operands, *form, True, *drops))
    _, s = forward(*operands, *form, True, *drops)
    dy = torch.randn(3, 5, 6).bfloat16()
    tensors = (dy, *(tensor.detach() for tensor in (*operands[:4], s)))
    torch.library.opcheck(backward.default, (*tensors, *form, *needs, *drops))


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "grouped"])
def test_a_compiler_traces_mixed_precision(groups: list[int] | None) -> None:
    x, weight, lora_A, lora_B, bias = mixed_inputs(torch.bfloat16, groups)
    lora_A.requires_grad_()
    lora_B.requires_grad_()

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return pk.plora_linear(x.relu(), weight, lora_A, lora_B, bias=bias, scale=0.5, groups=groups).float().sum()

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    results = [torch.autograd.grad(one(x, lora_A, lora_B), (lora_A, lora_B)) for one in (run, compiled)]
    assert [gradient.dtype for gradient in results[1]] == [torch.float32] * 2
    assert_equal(*results)


# -------------------------------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "grouped"])
def test_autocast_leaves_fp32_factors_beside_half_precision(groups: list[int] | None) -> None:
    tensors, form = mixed_inputs(torch.bfloat16, groups), {"groups": groups}
    expected = results(tensors, form)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(results(tensors, form), expected)
        # As in a model whose norms give fp32: x is cast, as for nn.Linear.
        y, dx, dA, dB, _ = results([tensors[0].float(), *tensors[1:]], form)
    assert_equal((y, dA, dB), (expected[0], *expected[2:4]))
    assert dx.dtype is torch.float32


@pytest.mark.parametrize("groups", [None, GROUPS], ids=["linear", "grouped"])
def test_autocast_of_an_fp32_model_casts_everything(groups: list[int] | None) -> None:
    tensors, form = [tensor.detach() for tensor in inputs(groups=groups)], {"groups": groups}
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(tensors, form)
    expected = results([tensor.bfloat16() for tensor in tensors], form)
    assert_equal(cast[0], expected[0])
    assert_equal(cast[1:], [gradient.float() for gradient in expected[1:]])


@pytest.mark.usefixtures("without_group_weights")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("of_layer", ["linear", "grouped", "projections"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_a_backward_inside_autocast_is_the_one_outside(dtype: torch.dtype, of_layer: str, dropout: float) -> None:
    groups = GROUPS if of_layer == "grouped" else None
    x, weight, lora_A, lora_B, bias = mixed_inputs(dtype, groups)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, lora_A, lora_B)]
    if of_layer == "projections":
        both = [Projection(weight, *leaves[1:], bias, scale, None) for scale in (0.5, 2.0)]
        joint = JointGradient(x.shape)
        y = sum(attach(leaves[0], o, c, joint) for o, c in zip(both, forward(x, both, True), strict=True))
    else:
        form = for_groups({"dropout_seed": 5}) if groups else {"dropout_seed": 5}
        y = pk.plora_linear(leaves[0], weight, *leaves[1:], bias=bias, scale=0.5, dropout_p=dropout, **form)
    outside = torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True)
    for other in HALF:
        with torch.autocast("cpu", other):
            assert_equal(torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True), outside)


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 25])
def test_gradients_summed_over_parts_of_the_rows_are_those_of_all(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "CAST_ELEMENTS", 8 * 50)  # eight rows at a time
    monkeypatch.setattr(fallback, "_multiplies_bfloat16", lambda: False)
    thin, wide = torch.randn(rows, 5).bfloat16(), torch.randn(rows, 50).bfloat16()
    expected = 0.5 * thin.double().t() @ wide.double()
    torch.testing.assert_close(fallback.factor_gradient(thin, wide, 0.5, torch.float32), expected.float())


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize(("rows", "rank"), [(0, 5), (1, 1), (7, 5), (512, 16), (4096, 3)])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_a_second_product_returns_what_rounding_to_bfloat16_took(
    rows: int, rank: int, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fallback, "_multiplies_bfloat16", lambda: True)
    torch.manual_seed(rows)
    thin, wide = torch.randn(rows, rank).bfloat16(), (torch.randn(rows, 50) * size).bfloat16()
    expected, terms = 0.5 * thin.double().t() @ wide.double(), thin.double().abs().t() @ wide.double().abs()
    found = fallback.factor_gradient(thin, wide, 0.5, torch.float32)
    # Half the last of 2·8 bits of the sum, and the rounding of an fp32 sum of so many terms.
    bound = 2**-17 * expected.abs() + rows**0.5 * torch.finfo(torch.float32).eps * terms
    assert ((found - expected).abs() <= bound).all()
