"""`fold_` and `fold`: stochastic rounding, out of place, operators, bad input. (Accuracy: test_numerics.py.)"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels import reference
from plora_kernels.counter_rng import element_bits, round_stochastically
from tests.support.equality import assert_equal
from tests.support.notes import note_calls
from tests.support.numerics import DEVICE

HALVES = (torch.float16, torch.bfloat16)
KERNEL_HALVES = HALVES if DEVICE == "cuda" else (torch.float16,)  # the interpreter has no bfloat16 products


def factors(n: int = 29, k: int = 50, rank: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Return weight (N, K), lora_A (R, K), lora_B (N, R) of order one."""
    return tuple(torch.randn(*shape).to(DEVICE, dtype) for shape in ((n, k), (rank, k), (n, rank)))


def exact_factors(n: int, k: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return factors whose sums are exact in fp32 in any order, and seldom in half precision."""

    def draw(*shape: int) -> Tensor:
        return (torch.randint(-31, 32, shape) / 64).to(DEVICE, dtype)

    return draw(n, k), draw(rank, k), draw(n, rank)


def neighbours(exact: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the largest value of `dtype` ≤ exact and the smallest ≥ exact, by stepping from the nearest."""
    near = exact.to(dtype)
    # nextafter knows no fp16; a step of one in the bits is the next value away from zero.
    bits = near.view(torch.int16)
    away, toward = ((bits + step).view(dtype) for step in (1, -1))
    larger = torch.where(near > 0, away, toward)
    smaller = torch.where(near > 0, toward, away)
    low = torch.where(near.double() > exact.double(), smaller, near)
    high = torch.where(near.double() < exact.double(), larger, near)
    return low, high


# ------------------------------------------------------------------------------------------- stochastic rounding


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only(dtype: torch.dtype) -> None:
    draws = 4096
    # Normal values, subnormals of float16, below its smallest subnormal, exact ones.
    values = torch.tensor([1.0003, -1.0003, 3.1416, -100.7, 2.0**-15 * 1.01, -3.3e-7, 2.0**-25 * 1.3, 1.5, -0.25, 0.0])
    rounded = round_stochastically(values.expand(draws, -1).contiguous(), _bits(draws, len(values)), dtype)
    low, high = neighbours(values, dtype)
    assert bool(((rounded == low) | (rounded == high)).all())
    spread = (high.double() - low.double()).clamp_min(1e-300)
    mean = rounded.double().mean(0)
    chance = (values.double() - low.double()) / spread
    # Five standard deviations of a mean of Bernoulli draws.
    allowed = 5 * spread * (chance * (1 - chance) / draws).sqrt() + 2.0**-24 * spread
    assert bool(((mean - values.double()).abs() <= allowed).all()), (mean, values)
    exact = low == high
    assert torch.equal(rounded[:, exact], values.to(dtype)[exact].expand(draws, -1))


def _bits(rows: int, columns: int) -> Tensor:
    return element_bits(11, 0, rows, columns, torch.device("cpu"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_stochastic_folds_are_unbiased_where_nearest_ones_stand_still(dtype: torch.dtype) -> None:
    weight, lora_A, lora_B = torch.ones(64, 64), torch.full((1, 64), 2.0**-7), torch.full((64, 1), 2.0**-7)
    weight, lora_A, lora_B = (t.to(DEVICE, dtype) for t in (weight, lora_A, lora_B))
    nearest, stochastic = weight.clone(), weight.clone()
    for seed in range(64):  # 64 steps of 2⁻¹⁴, each less than half the spacing at 1
        pk.fold_(nearest, lora_A, lora_B, [])
        pk.fold_(stochastic, lora_A, lora_B, [], rounding="stochastic", seed=seed)
    assert torch.equal(nearest, weight)
    moved = (stochastic.double() - 1).mean().item()
    # A step goes up by the spacing e with probability 2⁻¹⁴/e: variance below 64 · 2⁻¹⁴ · e an element.
    deviation = (2.0**-8 * torch.finfo(dtype).eps / 64**2) ** 0.5
    assert abs(moved - 2.0**-8) < 5 * deviation


@pytest.mark.parametrize("dtype", KERNEL_HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1), (29, 50, 5), (130, 70, 33), (64, 128, 16)], ids=str)
def test_kernels_round_bit_for_bit_as_torch_does(
    shape: tuple[int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, lora_A, lora_B = exact_factors(*shape, dtype)
    # Subnormals, signed zeros and what overflows go through branches of their own.
    special = torch.tensor([2.0**-15, -(2.0**-20), 2.0**-24, 0.0, -0.0, 65504.0, -65504.0]).to(weight)
    weight.view(-1)[:7] = special[: weight.numel()]
    results = {}
    for name in ("torch", "triton"):
        monkeypatch.setenv("PLORA_BACKEND", name)
        results[name] = [
            pk.fold(weight, lora_A, lora_B, [0], scale=scale, rounding="stochastic", seed=2**40 + 5)
            for scale in (1.0, -(2.0**-9), 2.0**-18)
        ]
        results[name] += [pk.fold(weight, lora_A, lora_B, [], scale=0.25, rounding="stochastic", seed=1)]
    assert_equal(*([folded.view(torch.int16) for folded in found] for found in results.values()))


def test_stochastic_folds_are_reproducible_and_their_own_for_every_seed(each_backend: str) -> None:
    weight, lora_A, lora_B = factors(dtype=torch.float16)
    first, again, other = (pk.fold(weight, lora_A, lora_B, [1], rounding="stochastic", seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    low, high = neighbours(reference.fold(*(t.double() for t in (weight, lora_A, lora_B)), _mask(5, 1)), torch.float16)
    near = (first == low) | (first == high)
    assert near.double().mean().item() > 0.99  # fp32's own rounding may cross a boundary


def _mask(rank: int, *selected: int) -> Tensor:
    mask = torch.zeros(rank, dtype=torch.bool, device=DEVICE)
    mask[list(selected)] = True
    return mask


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")  # by the interpreter
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_what_is_not_finite_becomes_what_nearest_makes_of_it(dtype: torch.dtype, each_backend: str) -> None:
    largest = torch.finfo(dtype).max
    line = [largest, -largest, float("inf"), -float("inf"), float("nan"), largest, 1.0, 2.0]
    step = [largest / 64, -largest / 64, 1.0, 1.0, 1.0, largest * 2.0**-16, float("nan"), float("inf")]
    weight, lora_A = torch.tensor([line] * 3).to(DEVICE, dtype), torch.tensor([step]).to(DEVICE, dtype)
    lora_B = torch.ones(3, 1, dtype=dtype, device=DEVICE)
    nearest = pk.fold(weight, lora_A, lora_B, [])
    for seed in range(20):
        stochastic = pk.fold(weight, lora_A, lora_B, [], rounding="stochastic", seed=seed)
        assert torch.equal(stochastic.nan_to_num(7.0), nearest.nan_to_num(7.0))
        assert torch.equal(stochastic.isnan(), nearest.isnan())
        assert torch.equal(stochastic.isinf(), nearest.isinf())
    assert nearest[0].isnan().tolist() == [False] * 4 + [True, False, True, False]


# ------------------------------------------------------------------------------------------------- out of place


@pytest.mark.usefixtures("nan_filled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_out_of_place_gives_the_bits_of_in_place_and_leaves_the_weight(dtype: torch.dtype, each_backend: str) -> None:
    weight, lora_A, lora_B = factors(130, 70, 33, dtype)
    before = weight.clone()
    for selected in (range(4, 20), [], range(33), None):
        folded = pk.fold(weight, lora_A, lora_B, selected, scale=0.5, sign=-1)
        assert folded.data_ptr() != weight.data_ptr()
        assert torch.equal(weight, before)
        assert torch.equal(folded, pk.fold_(weight.clone(), lora_A, lora_B, selected, scale=0.5, sign=-1))
        out = torch.full_like(weight, float("nan"))
        assert pk.fold(weight, lora_A, lora_B, selected, scale=0.5, sign=-1, out=out) is out
        assert torch.equal(out, folded)
    assert pk.fold(weight, lora_A, lora_B, [3], out=weight) is weight
    assert torch.equal(weight, pk.fold(before, lora_A, lora_B, [3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_strided_weights_and_outputs(dtype: torch.dtype, each_backend: str) -> None:
    weight, lora_A, lora_B = factors(dtype=dtype)
    expected = pk.fold(weight, lora_A, lora_B, [2])
    transposed, sliced = weight.t().contiguous().t(), torch.full((29, 111), float("nan"), device=DEVICE, dtype=dtype)
    out = sliced[:, 3:103:2]
    pk.fold(transposed, lora_A.t().contiguous().t(), lora_B.repeat(1, 2)[:, :5], [2], out=out)
    torch.testing.assert_close(out, expected)
    assert int(sliced.isnan().sum()) == 29 * 61


def test_a_weight_larger_than_a_chunk_is_rounded_as_one_piece() -> None:
    weight, lora_A, lora_B = exact_factors(300, 1100, 3, torch.bfloat16)
    folded = pk.fold(weight, lora_A, lora_B, [], rounding="stochastic", seed=4)
    total = weight.float() + lora_B.float() @ lora_A.float()
    bits = element_bits(4, 0, 300, 1100, weight.device)
    assert torch.equal(folded, round_stochastically(total, bits, torch.bfloat16))
    assert torch.equal(pk.fold(weight, lora_A, lora_B, []), total.bfloat16())
    wide = pk.fold(*(t.double() for t in (weight, lora_A, lora_B)), [])
    assert torch.equal(wide, total.double())


def test_large_strides_take_wide_offsets(kernels: None) -> None:
    # A row stride so large that offsets inside a tile need 64 bits; there is one row only.
    storage = torch.randn(64, dtype=torch.float16, device=DEVICE)
    weight = storage.as_strided((1, 64), (2**30, 1))
    lora_A, lora_B = torch.randn(2, 64).to(weight), torch.randn(1, 2).to(weight)
    expected = pk.fold(weight.contiguous(), lora_A, lora_B, [])
    assert torch.equal(pk.fold(weight, lora_A, lora_B, [], out=torch.empty_like(expected)), expected)


# ------------------------------------------------------------------------------------- operators, autograd, compile


def test_opcheck(each_backend: str) -> None:
    index = torch.tensor([3, 1, *[-1] * 14], dtype=torch.int32, device=DEVICE)
    for seed, dtype in ((None, torch.float32), (None, torch.float16), (3, torch.float16)):
        weight, lora_A, lora_B = factors(dtype=dtype)
        torch.library.opcheck(torch.ops.plora.fold_.default, (weight, lora_A, lora_B, index, 0.5, seed))
        out = torch.zeros_like(weight)
        torch.library.opcheck(torch.ops.plora.fold.default, (weight, lora_A, lora_B, index, 0.5, seed, out))


def test_compile_traces_both_forms() -> None:
    weight, lora_A, lora_B = factors()

    def run(weight: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        folded = pk.fold(weight, lora_A, lora_B, mask, scale=0.5)
        return folded, pk.fold_(folded.clone(), lora_A, lora_B, mask, scale=0.5, sign=-1)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    for selected in ((0, 3), (1,)):
        mask = _mask(5, *selected)
        torch.testing.assert_close(compiled(weight, mask), run(weight, mask))


def test_folding_counts_as_a_change_of_what_is_written() -> None:
    weight, lora_A, lora_B = factors()
    out = torch.empty_like(weight)
    versions = weight._version, out._version
    pk.fold(weight, lora_A, lora_B, [], out=out)
    assert weight._version == versions[0]
    assert out._version > versions[1]
    pk.fold_(weight, lora_A, lora_B, [])
    assert weight._version > versions[0]
    with torch.inference_mode():
        inside = pk.fold_(weight.clone(), lora_A, lora_B, [])
    assert torch.equal(inside, pk.fold(weight, lora_A, lora_B, []))


def test_a_parameter_folds_out_of_place_into_a_plain_tensor() -> None:
    weight, lora_A, lora_B = (torch.nn.Parameter(t) for t in factors())
    folded = pk.fold(weight, lora_A, lora_B, [1])
    assert type(folded) is Tensor
    assert not folded.requires_grad


# -------------------------------------------------------------------------------------------------------- bad input


def test_wrong_arguments_are_named() -> None:
    weight, lora_A, lora_B = factors(dtype=torch.float16)
    for fold in (pk.fold, pk.fold_):
        with pytest.raises(pk.ConfigError, match="rounding is 'up'; it may be 'nearest' or 'stochastic'"):
            fold(weight, lora_A, lora_B, [], rounding="up")
        for seed in (None, -1, 2**63, 0.5, True, "1"):
            with pytest.raises(pk.ConfigError, match=f"seed is {seed!r}; rounding='stochastic' needs an integer"):
                fold(weight, lora_A, lora_B, [], rounding="stochastic", seed=seed)
        with pytest.raises(pk.ConfigError, match="seed is 3, but rounding is 'nearest'"):
            fold(weight, lora_A, lora_B, [], seed=3)
        with pytest.raises(pk.DTypeError, match=r"rounding is 'stochastic' and weight torch\.float32"):
            fold(weight.float(), lora_A.float(), lora_B.float(), [], rounding="stochastic", seed=3)
        for sign in (0, 2):
            with pytest.raises(pk.ConfigError, match=f"sign is {sign}; 1 folds and -1 takes out again"):
                fold(weight, lora_A, lora_B, [], sign=sign)
    with pytest.raises(pk.ShapeError, match=r"out is \(50, 29\); weight needs \(29, 50\)"):
        pk.fold(weight, lora_A, lora_B, [], out=weight.t())
    with pytest.raises(pk.DTypeError, match=r"out is torch\.float32, weight is torch\.float16"):
        pk.fold(weight, lora_A, lora_B, [], out=weight.float())
    with pytest.raises(pk.DeviceError, match="out is on meta, weight on"):
        pk.fold(weight, lora_A, lora_B, [], out=weight.to("meta"))
    with pytest.raises(pk.StateError, match="out requires a gradient"):
        pk.fold(weight, lora_A, lora_B, [], out=weight.clone().requires_grad_())


def test_empty_weights_are_left_alone(each_backend: str) -> None:
    for n, k in ((0, 7), (7, 0)):
        weight = torch.empty(n, k, device=DEVICE)
        factors = torch.empty(2, k, device=DEVICE), torch.empty(n, 2, device=DEVICE)
        assert pk.fold(weight, *factors, []).shape == (n, k)


# ------------------------------------------------------------------------------------------------ many in one call


def many(dtype: torch.dtype, *, out: bool) -> list[pk.Fold]:
    """Return folds of all shapes and selections: odd and aligned ones, none and all folded, strided, a device mask."""
    folds = []
    for n, k, rank, selected in (
        (29, 50, 5, [1, 3]),
        (64, 128, 16, []),
        (130, 70, 33, [0]),
        (1, 1, 1, []),
        (16, 16, 3, range(3)),
        (5, 7, 4, None),
        (64, 128, 16, torch.rand(16, device=DEVICE) > 0.5),
        (70, 256, 20, [2]),
    ):
        weight, lora_A, lora_B = factors(n, k, rank, dtype)
        result = torch.full_like(weight, float("nan")) if out else None
        folds.append(pk.Fold(weight, lora_A, lora_B, selected, 0.5 + len(folds), out=result))
    weight, lora_A, lora_B = factors(31, 17, 4, dtype)
    result = torch.full_like(weight, float("nan")) if out else None
    folds.append(pk.Fold(weight.t().contiguous().t(), lora_A, lora_B, [3], sign=-1, out=result))
    return folds


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        *((torch.float32, False), (torch.float16, True)),
        *(pytest.param(*other, marks=pytest.mark.slow) for other in ((torch.float32, True), (torch.float16, False))),
    ],
    ids=str,
)
def test_many_folds_are_the_single_ones(dtype: torch.dtype, out: bool, each_backend: str) -> None:
    folds = many(dtype, out=out)

    def rounding(seed: int) -> dict[str, object]:
        return {"rounding": "stochastic", "seed": seed} if dtype is torch.float16 else {}

    expected = []
    for position, one in enumerate(folds):
        form = {"scale": one.scale, "sign": one.sign} | rounding(5 + position)
        expected.append(pk.fold(one.weight, one.lora_A, one.lora_B, one.selected, **form))
    before = [one.weight.clone() for one in folds]
    results = pk.fold_many_(folds, **rounding(5))
    for one, result, weight, ours in zip(folds, results, before, expected, strict=True):
        assert result is (one.out if out else one.weight)
        assert torch.equal(result, ours)
        assert not out or torch.equal(one.weight, weight)
    assert pk.fold_many_([]) == []


@pytest.mark.usefixtures("kernels")
def test_many_folds_of_one_kind_are_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from plora_kernels.kernels import fold_many

    launches = note_calls(monkeypatch, fold_many, "_launch", lambda group, *rest: len(group))
    folds = [pk.Fold(*factors(32, 64, 16), [position % 16]) for position in range(40)]
    versions = [one.weight._version for one in folds]
    expected = [pk.fold(one.weight, one.lora_A, one.lora_B, one.selected) for one in folds]
    assert_equal(pk.fold_many_(folds), expected)
    assert launches == [40]
    assert all(one.weight._version > version for one, version in zip(folds, versions, strict=True))
    monkeypatch.setattr(fold_many, "MOST_LAYERS", 16)
    pk.fold_many_(folds)
    assert launches == [40, 16, 16, 8]


def test_folds_that_share_memory_are_done_in_order(each_backend: str) -> None:
    weight, lora_A, lora_B = factors()
    expected = pk.fold(pk.fold(weight, lora_A, lora_B, [0]), lora_A, lora_B, [1])
    pk.fold_many_([pk.Fold(weight, lora_A, lora_B, [0]), pk.Fold(weight, lora_A, lora_B, [1])])
    assert torch.equal(weight, expected)


def test_compile_traces_many_folds() -> None:
    tensors = [factors() for _ in range(2)]

    def run(mask: Tensor) -> list[Tensor]:
        chosen = zip(tensors, (mask, [2]), strict=True)
        return pk.fold_many_([pk.Fold(weight.clone(), *rest, selected) for (weight, *rest), selected in chosen])

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(_mask(5, 0)), run(_mask(5, 0)))


def test_nothing_is_written_when_one_of_many_is_wrong(each_backend: str) -> None:
    folds = [pk.Fold(*factors(), [1]), pk.Fold(*factors(), [5])]
    before = folds[0].weight.clone()
    with pytest.raises(pk.SelectionError, match="selected holds module 5"):
        pk.fold_many_(folds)
    folds[1] = pk.Fold(*factors(), [1], out=torch.empty(2, 2))
    with pytest.raises(pk.ShapeError, match=r"out is \(2, 2\); weight needs \(29, 50\)"):
        pk.fold_many_(folds)
    assert torch.equal(folds[0].weight, before)
