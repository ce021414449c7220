"""`plora_linear` and `fold_` as torch operators: schemas, autograd, compile, autocast, forms of input, bad input."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import plora_kernels as pk
from plora_kernels import reference
from plora_kernels.selection import index_buffer

INDEX = index_buffer((1, 3), torch.device("cpu"))


def inputs(dtype: torch.dtype = torch.float32, requires_grad: bool = True) -> tuple[Tensor, ...]:
    """Return x (3, 5, 7), weight (6, 7), lora_A (4, 7), lora_B (6, 4), bias (6,)."""
    x, weight, lora_A, lora_B, bias = (torch.randn(s, dtype=dtype) for s in ((3, 5, 7), (6, 7), (4, 7), (6, 4), (6,)))
    for tensor in (x, lora_A, lora_B, bias):
        tensor.requires_grad_(requires_grad)
    return x, weight, lora_A, lora_B, bias


# --------------------------------------------------------------------------------------------- torch's own checks


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("index", [None, INDEX], ids=["all", "indexed"])
@pytest.mark.parametrize("dropout", [(0.0, None), (0.3, torch.tensor([5]))], ids=["plain", "dropout"])
def test_opcheck_of_the_forward_and_backward(
    frozen: bool, index: Tensor | None, dropout: tuple[float, Tensor | None], each_backend: str
) -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    arguments = (x, weight, lora_A, lora_B, bias, index, 0.5, frozen, True, *dropout)
    torch.library.opcheck(torch.ops.plora.linear.default, arguments)
    _, s = torch.ops.plora.linear(*arguments)
    dy = torch.randn(3, 5, 6)
    for needs in ((True, True, True, True), (True, False, True, False), (False, True, False, False)):
        backward = (dy, *(t.detach() for t in (x, weight, lora_A, lora_B, s)), index, 0.5, frozen, *needs, *dropout)
        torch.library.opcheck(torch.ops.plora.linear_backward.default, backward)


def test_opcheck_of_the_fold(each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    torch.library.opcheck(torch.ops.plora.fold_.default, (weight, lora_A, lora_B, INDEX, 0.5, None))


@pytest.mark.parametrize("selected", [None, [], [0, 2]], ids=str)
def test_gradcheck_in_float64(selected: list[int] | None) -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64)

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias, scale=0.7)

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B, bias))


def test_gradcheck_of_the_frozen_form_in_its_selected_modules() -> None:
    x, weight, lora_A, lora_B, bias = inputs(torch.float64)
    rows = torch.tensor([0, 2])

    def run(x: Tensor, part_A: Tensor, part_B: Tensor, bias: Tensor) -> Tensor:
        full_A = lora_A.detach().index_copy(0, rows, part_A)
        full_B = lora_B.detach().index_copy(1, rows, part_B)
        return pk.plora_linear(x, weight, full_A, full_B, [0, 2], bias=bias, scale=0.7, unselected="frozen")

    parts = (t.detach().clone().requires_grad_() for t in (lora_A[rows], lora_B[:, rows]))
    assert torch.autograd.gradcheck(run, (x, *parts, bias))


# ------------------------------------------------------------------------------------------------ forms of input


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_every_way_to_name_a_selection_gives_the_same(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    mask = torch.tensor([True, False, False, True])
    ways = (mask, [0, 3], (3, 0), torch.tensor([3, 0]), torch.tensor([0, 3], dtype=torch.int32).numpy())
    ways = (*ways, list(ways[-1]))
    results = [pk.plora_linear(x, weight, lora_A, lora_B, way, unselected=form) for way in ways]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_selecting_all_is_lora_and_selecting_none_is_the_base(each_backend: str) -> None:
    x, weight, lora_A, lora_B, bias = inputs()
    base = torch.nn.functional.linear(x, weight, bias)
    lora = base + 0.5 * x @ lora_A.T @ lora_B.T
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, bias=bias, scale=0.5), lora)
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, range(4), bias=bias, scale=0.5), lora)
    torch.testing.assert_close(pk.plora_linear(x, weight, lora_A, lora_B, [], bias=bias, scale=0.5), base)


@pytest.mark.parametrize("shape", [(7,), (0, 7), (2, 0, 3, 7), (2, 3, 4, 7)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...], each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs()
    x = torch.randn(shape, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, [1, 2], bias=bias)
    assert y.shape == (*shape[:-1], 6)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    mask = torch.tensor([False, True, True, False])
    torch.testing.assert_close(y, reference.forward(x, weight, lora_A, lora_B, mask, bias=bias))
    assert lora_A.grad is not None
    if x.numel() == 0:
        assert not lora_A.grad.any()


def test_tensors_need_not_be_contiguous(each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    x = torch.randn(7, 5, 3).permute(2, 1, 0)
    strided = [torch.randn(t.shape[1], t.shape[0]).T.copy_(t) for t in (weight, lora_A, lora_B)]
    assert not any(t.is_contiguous() for t in (x, *strided))
    leaves = [strided[1].requires_grad_(), strided[2].requires_grad_()]
    bias = torch.randn(6, 2)[:, 0]
    y = pk.plora_linear(x, strided[0], *leaves, bias=bias)
    torch.testing.assert_close(y, reference.forward(x, weight, lora_A, lora_B, bias=bias))
    y.sum().backward()  # an expanded dy: strides of zero
    dy = torch.ones(15, 6)
    _, d_A, d_B, _ = reference.gradients(dy, x.reshape(15, 7), weight, lora_A, lora_B)
    torch.testing.assert_close(leaves[0].grad, d_A)
    torch.testing.assert_close(leaves[1].grad, d_B)


@pytest.mark.usefixtures("kernels")
def test_strides_beyond_what_32_bits_hold() -> None:
    # The last row starts at element 3·2³⁰ > 2³¹: offsets inside the tile need 64 bits. The storage is never touched
    # but for the rows themselves, so the pages between them are never there.
    rows, stride = 4, 2**30
    storage = torch.empty(stride * (rows - 1) + 7, dtype=torch.float16)
    x = storage.as_strided((rows, 7), (stride, 1))
    x.copy_(torch.randn(rows, 7))
    weight, lora_A, lora_B = (torch.randn(s).half() for s in ((6, 7), (4, 7), (6, 4)))
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    assert torch.equal(y, pk.plora_linear(x.contiguous(), weight, lora_A, lora_B))


@pytest.mark.usefixtures("kernels")
def test_steps_along_a_stride_beyond_what_32_bits_hold() -> None:
    # Column-major x: the second block of K starts 32 strides of 2²⁷ elements away, past 2³¹.
    stride, k = 2**27, 40
    storage = torch.empty(stride * (k - 1) + 3, dtype=torch.float16)
    x = storage.as_strided((3, k), (1, stride))
    x.copy_(torch.randn(3, k))
    weight, lora_A, lora_B = (torch.randn(s).half() for s in ((6, k), (4, k), (6, 4)))
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    assert torch.equal(y, pk.plora_linear(x.contiguous(), weight, lora_A, lora_B))


def test_a_large_side_product_does_not_overflow_half_precision(each_backend: str) -> None:
    # x Aᵀ is 6400; times the scale it would pass 65504, while its product with B does not.
    x, weight = torch.ones(2, 64, dtype=torch.float16), torch.zeros(3, 64, dtype=torch.float16)
    lora_A = torch.full((2, 64), 100.0, dtype=torch.float16, requires_grad=True)
    lora_B = torch.full((3, 2), 2.0**-12, dtype=torch.float16, requires_grad=True)
    y = pk.plora_linear(x, weight, lora_A, lora_B, scale=16.0)
    torch.testing.assert_close(y, torch.full_like(y, 2 * 6400 * 16 / 2**12))
    y.backward(torch.full_like(y, 2.0**-10))
    assert lora_B.grad is not None
    torch.testing.assert_close(lora_B.grad, torch.full_like(lora_B.grad, 2 * 6400 * 16 / 2**10))


def test_the_output_may_be_written_in_place(each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = inputs()
    for shape in ((5, 7), (3, 5, 7)):
        x = torch.randn(shape)
        expected = torch.relu(pk.plora_linear(x, weight, lora_A, lora_B, bias=bias) + 1.0)
        y = pk.plora_linear(x, weight, lora_A, lora_B, bias=bias)
        y += 1.0
        y = torch.nn.functional.relu(y, inplace=True)
        assert torch.equal(y, expected)
        y.sum().backward()


@pytest.mark.parametrize("form", ["folded", "frozen"])
def test_unselected_modules_get_no_gradient_and_folded_ones_are_not_read(form: str, each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    if form == "folded":
        with torch.no_grad():
            lora_A[[0, 3]] = float("nan")
            lora_B[:, [0, 3]] = float("inf")
    pk.plora_linear(x, weight, lora_A, lora_B, [1, 2], unselected=form).sum().backward()
    assert lora_A.grad is not None
    assert lora_B.grad is not None
    assert not lora_A.grad[[0, 3]].any()
    assert not lora_B.grad[:, [0, 3]].any()
    for gradient in (x.grad, lora_A.grad, lora_B.grad):
        assert gradient is not None
        assert gradient.isfinite().all()
    assert lora_A.grad[[1, 2]].any()
    assert lora_B.grad[:, [1, 2]].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's numpy says it
@pytest.mark.parametrize("selected", [None, [1], [0, 3]], ids=str)
def test_non_finite_inputs_propagate_as_in_linear(selected: list[int] | None, each_backend: str) -> None:
    _, weight, lora_A, lora_B, bias = (t.detach().abs() for t in inputs())  # one sign: infinities do not cancel
    x = torch.rand(3, 5, 7)
    x[0, 0, 0], x[1, 1, 1] = float("nan"), float("inf")
    x.requires_grad_()
    y = pk.plora_linear(x, weight, lora_A, lora_B, selected, bias=bias)
    plain = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(y.isnan(), plain.isnan())
    assert torch.equal(y.isposinf(), plain.isposinf())
    assert y[1, 1].isposinf().all()
    dy = torch.rand(3, 5, 6)
    dy[2, 0, 0] = float("inf")
    y.backward(dy)
    assert x.grad is not None
    assert torch.equal(x.grad.isposinf(), (dy @ weight).isposinf())
    assert not x.grad.isnan().any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_only_the_gradients_asked_for(needs: tuple[bool, bool, bool], each_backend: str) -> None:
    x, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    mask = torch.tensor([False, True, True, False])
    expected = reference.gradients(torch.ones(3, 5, 6), x, weight, lora_A, lora_B, mask)
    for form in ("folded", "frozen"):
        leaves = [t.clone().requires_grad_(need) for t, need in zip((x, lora_A, lora_B), needs, strict=True)]
        pk.plora_linear(leaves[0], weight, leaves[1], leaves[2], mask, unselected=form).sum().backward()
        for leaf, need, gradient in zip(leaves[1:], needs[1:], expected[1:3], strict=True):
            if need:
                torch.testing.assert_close(leaf.grad, gradient)
            else:
                assert leaf.grad is None


@pytest.mark.usefixtures("kernels")
def test_gradients_of_the_kernels_are_deterministic() -> None:
    results = []
    for _ in range(2):
        x, weight, lora_A, lora_B = (
            torch.randn(s, generator=torch.Generator().manual_seed(i))
            for i, s in enumerate(((1100, 20), (9, 20), (5, 20), (9, 5)))
        )
        lora_A.requires_grad_()
        lora_B.requires_grad_()
        pk.plora_linear(x, weight, lora_A, lora_B).square().sum().backward()
        results.append((lora_A.grad, lora_B.grad))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


# ----------------------------------------------------------------------------------- compile, autocast, transforms


def test_compile_traces_whole_models_and_selections_do_not_recompile() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 9))
    handle = pk.inject(model, pk.PLoRAConfig(rank=24, target_modules=["0", "2"]))
    for layer in handle.layers.values():
        torch.nn.init.normal_(layer.lora_B)
    source = random.Random(0)
    for form in ("folded", "frozen"):
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        for _ in range(50):
            handle.select(source.sample(range(24), 10), form)
            x = torch.randn(4, 20)
            y = compiled(x)
            torch.testing.assert_close(y, model(x))
            y.sum().backward()
        assert counter.frame_count == 1, form


def test_compile_checks_indices_on_the_device() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    compiled = torch.compile(
        lambda selected: pk.plora_linear(x, weight, lora_A, lora_B, selected), backend="aot_eager", fullgraph=True
    )
    for wrong in ([-1, 0], [0, 4], [2, 2]):
        with pytest.raises(RuntimeError, match="selected must hold distinct modules from 0 to 3"):
            compiled(torch.tensor(wrong))


def test_compile_with_a_selection_as_argument_does_not_recompile() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    counter = CompileCounterWithBackend("aot_eager")

    def run(selected: Tensor) -> Tensor:
        return pk.plora_linear(x, weight, lora_A, lora_B, selected)

    compiled = torch.compile(run, backend=counter, fullgraph=True)
    for _ in range(12):
        mask = torch.rand(4) > 0.5
        torch.testing.assert_close(compiled(mask), run(mask))
    assert counter.frame_count == 1
    for _ in range(12):
        indices = torch.randperm(4)[:2]
        torch.testing.assert_close(compiled(indices), run(indices))
    assert counter.frame_count == 2


@pytest.mark.slow
def test_inductor_computes_the_same() -> None:
    x, weight, lora_A, lora_B, bias = inputs()

    def run(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return pk.plora_linear(x.relu(), weight, lora_A, lora_B, bias=bias).tanh()

    expected, compiled = run(x, lora_A, lora_B), torch.compile(run, fullgraph=True)(x, lora_A, lora_B)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(
        torch.autograd.grad(compiled.sum(), (x, lora_A, lora_B)),
        torch.autograd.grad(expected.sum(), (x, lora_A, lora_B)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("active", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_behaves_as_for_linear(dtype: torch.dtype, active: torch.dtype) -> None:
    x, weight, lora_A, lora_B, bias = (t.to(dtype).detach() for t in inputs())
    lora_A.requires_grad_()
    with torch.autocast("cpu", dtype=active):
        y = pk.plora_linear(x, weight, lora_A, lora_B, bias=bias)
        assert y.dtype == torch.nn.functional.linear(x, weight, bias).dtype
    y.sum().backward()
    assert lora_A.grad is not None
    assert lora_A.grad.dtype == dtype
    with torch.autocast("cpu", dtype=active, enabled=False):
        assert pk.plora_linear(x, weight, lora_A, lora_B).dtype == dtype


def test_autocast_takes_mixed_dtypes() -> None:
    x, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = pk.plora_linear(x.bfloat16(), weight, lora_A, lora_B)
    assert y.dtype is torch.bfloat16


def test_double_backward_and_transforms_say_so() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    (gradient,) = torch.autograd.grad(pk.plora_linear(x, weight, lora_A, lora_B).sum(), lora_A, create_graph=True)
    with pytest.raises(pk.UnsupportedError, match="no double backward"):
        gradient.sum().backward()

    def run(row: Tensor) -> Tensor:
        return pk.plora_linear(row, weight, lora_A, lora_B).sum()

    transforms = (torch.vmap(run), torch.func.grad(run), lambda x: torch.func.jvp(run, (x,), (x,)))
    for transform in transforms:
        with pytest.raises(pk.UnsupportedError, match=r"does not run under torch\.func transforms"):
            transform(x.detach())


# --------------------------------------------------------------------------------------------------- fold, backend


def test_fold_adds_the_unselected_and_takes_them_out_again(each_backend: str) -> None:
    _, weight, lora_A, lora_B, _ = inputs(requires_grad=False)
    mask = torch.tensor([True, False, True, False])
    folded = weight.clone()
    assert pk.fold_(folded, lora_A, lora_B, mask, scale=0.5) is folded
    torch.testing.assert_close(folded, reference.fold(weight, lora_A, lora_B, mask, scale=0.5))
    pk.fold_(folded, lora_A, lora_B, [0, 2], scale=0.5, sign=-1)
    torch.testing.assert_close(folded, weight)
    assert torch.equal(pk.fold_(weight.clone(), lora_A, lora_B, None), weight)
    assert torch.equal(pk.fold_(weight.clone(), lora_A, lora_B, range(4)), weight)


def test_fold_counts_as_a_change_for_autograd() -> None:
    x, weight, lora_A, lora_B, _ = inputs()
    before = weight._version
    y = pk.plora_linear(x, weight, lora_A, lora_B)
    pk.fold_(weight, lora_A, lora_B, [])
    assert weight._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_fold_refuses_a_weight_that_trains() -> None:
    _, weight, lora_A, lora_B, _ = inputs()
    weight.requires_grad_()
    with pytest.raises(pk.StateError, match="weight requires a gradient"):
        pk.fold_(weight, lora_A, lora_B, [])
    with torch.no_grad():
        pk.fold_(weight, lora_A, lora_B, [])


def test_backend_says_and_the_environment_forces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PLORA_BACKEND", raising=False)
    assert pk.backend("cpu") == "torch"
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    assert pk.backend("cuda") == "torch"
    monkeypatch.setenv("PLORA_BACKEND", "numpy")
    with pytest.raises(pk.ConfigError, match="PLORA_BACKEND is 'numpy'; it may be 'triton' or 'torch'"):
        pk.backend()
    monkeypatch.setenv("PLORA_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(pk.ConfigError, match="the tensors are on cpu"):
        pk.backend("cpu")


# ------------------------------------------------------------------------------------------------------ bad input

GOOD = {"x": (2, 7), "weight": (6, 7), "lora_A": (4, 7), "lora_B": (6, 4)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"lora_A": (4, 8)}, pk.ShapeError, r"lora_A is \(4, 8\); weight \(N=6, K=7\) needs \(R, 7\)"),
        ({"lora_B": (6, 5)}, pk.ShapeError, r"lora_B is \(6, 5\); .*need \(6, 4\)"),
        ({"x": (2, 6)}, pk.ShapeError, r"x is \(2, 6\); weight \(N=6, K=7\) needs \(…, 7\)"),
        ({"weight": (6,)}, pk.ShapeError, r"weight is \(6,\); a matrix \(N, K\) is needed"),
        ({"lora_A": (0, 7), "lora_B": (6, 0)}, pk.RankError, "rank is 0; an integer from 1 to 256"),
        ({"lora_A": (257, 7), "lora_B": (6, 257)}, pk.RankError, "rank is 257; an integer from 1 to 256"),
    ],
)
def test_wrong_shapes_are_named(change: dict, error: type[Exception], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in (GOOD | change).items()}
    with pytest.raises(error, match=message):
        pk.plora_linear(**tensors)


@pytest.mark.parametrize(
    ("selected", "error", "message"),
    [
        ([4], pk.SelectionError, "selected holds module 4; rank 4 has modules 0 to 3"),
        ([-1], pk.SelectionError, "selected holds module -1"),
        ([1, 2, 1], pk.SelectionError, "selected names module 1 more than once"),
        ([True, False, True, True], pk.SelectionError, "selected holds the bool True"),
        (3, pk.SelectionError, "selected is 3; a list of module indices"),
        ([0.5], pk.SelectionError, "selected holds 0.5; module indices are integers"),
        (torch.ones(3, dtype=torch.bool), pk.ShapeError, r"the selection mask is \(3,\); rank 4 needs \(4,\)"),
        (torch.tensor(2), pk.SelectionError, "a list of module indices"),
    ],
    ids=str,
)
def test_wrong_selections_are_named(selected: object, error: type[Exception], message: str) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(error, match=message):
        pk.plora_linear(**tensors, selected=selected)  # type: ignore[arg-type]


def test_other_wrong_arguments_are_named() -> None:
    tensors = {name: torch.zeros(shape) for name, shape in GOOD.items()}
    with pytest.raises(pk.DTypeError, match=r"weight is torch.float64, x is torch.float32"):
        pk.plora_linear(**tensors | {"weight": torch.zeros(6, 7, dtype=torch.float64)})
    with pytest.raises(pk.DTypeError, match=r"x is torch.int64; float16, bfloat16, float32 or float64"):
        pk.plora_linear(**{name: tensor.long() for name, tensor in tensors.items()})
    with pytest.raises(pk.DeviceError, match="lora_A is on meta, x on cpu"):
        pk.plora_linear(**tensors | {"lora_A": torch.zeros(4, 7, device="meta")})
    with pytest.raises(pk.ShapeError, match=r"bias is \(5,\).*needs \(6,\)"):
        pk.plora_linear(**tensors, bias=torch.zeros(5))
    with pytest.raises(pk.ConfigError, match="unselected is 'dropped'; it may be 'folded' or 'frozen'"):
        pk.plora_linear(**tensors, unselected="dropped")
    with pytest.raises(pk.StateError, match="the base is frozen"):
        pk.plora_linear(**tensors | {"weight": torch.zeros(6, 7, requires_grad=True)})
    with pytest.raises(pk.ConfigError, match="sign is 0; 1 folds and -1 takes out again"):
        pk.fold_(tensors["weight"], tensors["lora_A"], tensors["lora_B"], [], sign=0)
    for scale in (torch.tensor(1.0), float("nan"), "1"):
        with pytest.raises(pk.ConfigError, match="a finite number is needed"):
            pk.plora_linear(**tensors, scale=scale)  # type: ignore[arg-type]
    for p in (-0.1, 1.0, "0.1"):
        with pytest.raises(pk.ConfigError, match="dropout_p is"):
            pk.plora_linear(**tensors, dropout_p=p, dropout_seed=1)  # type: ignore[arg-type]
    for seed in (None, 1.0, 2**63, torch.zeros(2, dtype=torch.int64), torch.zeros(1)):
        with pytest.raises(pk.ConfigError, match="dropout_seed"):
            pk.plora_linear(**tensors, dropout_p=0.1, dropout_seed=seed)  # type: ignore[arg-type]
    with pytest.raises(pk.DeviceError, match="dropout_seed is on meta, x on cpu"):
        pk.plora_linear(**tensors, dropout_p=0.1, dropout_seed=torch.zeros(1, dtype=torch.int64, device="meta"))
