"""`group_gradients`: gradients of groups' modules equal autograd's and are written to the given memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.fallback import grouped_products

K, N, RANK = 12, 9, 4
SIZES = ((3,), (2, 2, 2), (3, 1, 0, 1), (1, 2, 2))
LENGTH = 6


class Layer:
    """A frozen linear with groups' factors, and NaN-filled memory for their gradients."""

    def __init__(self, sizes: tuple[int, ...], seed: int, scale: object = 0.7, trained: str = "AB") -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.weight, self.bias = draw(N, K), draw(N)
        # Column-major, as a trainer may keep A.
        self.A, self.B = draw(len(sizes), K, RANK).mT, draw(len(sizes), N, RANK)
        self.memory = [
            torch.full_like(factor, torch.nan) if side in trained else None
            for side, factor in zip("AB", (self.A, self.B), strict=True)
        ]
        for side, factor in zip("AB", (self.A, self.B), strict=True):
            factor.requires_grad_(side in trained)
        self.rows = pk.RowGroups(sizes)
        self.groups = pk.GroupModules.of(self.rows, self.A, self.B, scale=scale, gradients=tuple(self.memory))
        self.plain = pk.GroupModules.of(self.rows, self.A, self.B, scale=scale)

    def gradients(self, loss: Tensor) -> list[Tensor | None]:
        """Return autograd's own gradients of a loss made by `plain`."""
        return list(torch.autograd.grad(loss, [t for t in (self.A, self.B) if t.requires_grad]))


@pytest.fixture(params=[False, True], ids=["factors", "weights"])
def by_weights(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute with a weight for each group, or with the factors, whichever is cheaper."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    monkeypatch.setattr(grouped_products, "group_weights_are_cheaper", lambda *_: request.param)


def inputs(samples: int, seed: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, LENGTH, K, generator=generator, dtype=torch.float64)


def compare(layer: Layer, run: Callable[[pk.GroupModules], Tensor]) -> None:
    """Compare the memory after `run` on the groups with autograd after `run` on plain ones."""
    found, idle = pk.group_gradients(run(layer.groups), {"layer": layer.groups})
    assert (found, idle) == ((), [])
    expected = layer.gradients(run(layer.plain))
    for own, other in zip((m for m in layer.memory if m is not None), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("by_weights")
@pytest.mark.parametrize("own_scales", [False, True])
@pytest.mark.parametrize("trained", ["AB", "A", "B"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_gradients_are_autograds(sizes: tuple[int, ...], trained: str, own_scales: bool) -> None:
    scale = [0.5 + g for g in range(len(sizes))] if own_scales else 0.7
    layer, x = Layer(sizes, 1, scale, trained), inputs(sum(sizes))
    compare(layer, lambda groups: groups.linear(x, layer.weight, layer.bias).square().sum())


@pytest.mark.usefixtures("by_weights")
def test_a_layer_may_run_more_than_once_and_on_other_rows() -> None:
    layer, x = Layer((2, 1), 2), inputs(3)

    def run(groups: pk.GroupModules) -> Tensor:
        twice = groups.linear(x, layer.weight, layer.bias).sum() * groups.linear(2 * x, layer.weight, None).sum()
        return twice + groups.linear(x[:, :2], layer.weight, None).square().sum()

    compare(layer, run)


@pytest.mark.usefixtures("by_weights")
def test_the_factors_may_enter_the_loss_by_themselves() -> None:
    layer, x = Layer((2, 1), 3), inputs(3)
    compare(layer, lambda groups: groups.linear(x, layer.weight, None).sum() + layer.A.square().sum() * layer.B.sum())


@pytest.mark.usefixtures("by_weights")
def test_what_an_optimiser_moves_is_seen() -> None:
    layer, x = Layer((2, 2), 4), inputs(4)

    def run(groups: pk.GroupModules) -> Tensor:
        return groups.linear(x, layer.weight, layer.bias).square().sum()

    compare(layer, run)
    with torch.no_grad():
        layer.A.mul_(1.5)
        layer.weight.add_(0.1)
    compare(layer, run)
    run(layer.groups)  # a forward without a backward
    with torch.no_grad():
        layer.B.sub_(0.2)
    compare(layer, run)
    with torch.no_grad():
        layer.weight.mul_(2.0)
        torch.testing.assert_close(run(layer.groups), run(layer.plain))


@pytest.mark.usefixtures("by_weights")
def test_a_layer_without_part_in_the_loss_has_zeros_and_is_named() -> None:
    used, idle, x = Layer((2, 1), 5), Layer((2, 1), 6), inputs(3)
    head, other = torch.ones(N, dtype=torch.float64, requires_grad=True), torch.ones(1, requires_grad=True)
    idle.groups.linear(x, idle.weight, None)
    loss = (used.groups.linear(x, used.weight, None) * head).sum()
    found, names = pk.group_gradients(loss, {"used": used.groups, "idle": idle.groups}, [head, other])
    assert names == ["idle"]
    assert all(not memory.any() for memory in idle.memory if memory is not None)
    torch.testing.assert_close(found[0], used.plain.linear(x, used.weight, None).sum((0, 1)))
    assert found[1] is None


@pytest.mark.usefixtures("without_group_weights")
def test_autograd_gets_the_memory_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What batched products write is not copied."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    layer, x = Layer((2, 2), 7), inputs(4)
    loss = layer.groups.linear(x, layer.weight, None).square().sum()
    for own, memory in zip(torch.autograd.grad(loss, [layer.A, layer.B]), layer.memory, strict=True):
        assert own.data_ptr() == memory.data_ptr()


def test_what_does_not_fit_is_named() -> None:
    layer = Layer((2, 1), 8)
    d_A, d_B = layer.memory

    def make(*gradients: Tensor | None) -> pk.GroupModules:
        return pk.GroupModules.of(layer.rows, layer.A, layer.B, gradients=gradients)  # type: ignore[arg-type]

    with pytest.raises(pk.ConfigError, match="lora_B requires a gradient, but there is no memory for it"):
        make(d_A, None)
    with pytest.raises(pk.ShapeError, match=r"the memory for dA is \(2, 9, 4\); lora_A is \(2, 4, 12\)"):
        make(d_B, d_B)
    with pytest.raises(pk.DTypeError, match=r"the memory for dB is torch\.float32; lora_B is torch\.float64"):
        make(d_A, d_B.float())  # type: ignore[union-attr]
    loss = layer.plain.linear(inputs(3), layer.weight, None).sum()
    with pytest.raises(pk.ConfigError, match="the groups of layer q have no memory for gradients"):
        pk.group_gradients(loss, {"q": layer.plain})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("trained", ["AB", "A", "B"])
@pytest.mark.parametrize("own_scales", [False, True])
@pytest.mark.parametrize("few", [0, 2**16], ids=["one by one", "batched"])
def test_fp32_factors_beside_half_precision_are_written_once(
    dtype: torch.dtype, trained: str, own_scales: bool, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The results are no further from exact ones than the operator's, and gradients go to the memory without a copy."""
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    monkeypatch.setattr(grouped_products, "FEW_SUMS", few)
    sizes = (3, 1, 0, 1)
    layer = Layer(sizes, 1, [0.5 + g for g in range(4)] if own_scales else 0.7, trained)
    leaves = [layer.A.detach().float(), layer.B.detach().float()]
    memory = [None if own is None else torch.full_like(own, torch.nan, dtype=torch.float32) for own in layer.memory]
    for leaf, own in zip(leaves, memory, strict=True):
        leaf.requires_grad_(own is not None)
    scale = layer.groups.scales if own_scales else 0.7
    groups = pk.GroupModules.of(layer.rows, *leaves, scale=scale, gradients=tuple(memory))
    x, dy = inputs(5).to(dtype), torch.randn(5, LENGTH, N).to(dtype)
    weight, bias = layer.weight.to(dtype), layer.bias.to(dtype)

    def differentiated(of: pk.GroupModules, x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x = x.clone().requires_grad_()
        y = of.linear(x, weight.to(dtype), bias.to(dtype))
        trained = [factor for factor in (of.lora_A, of.lora_B) if factor.requires_grad]
        return [y.detach(), *torch.autograd.grad(y, [x, *trained], dy.to(dtype))]

    found = differentiated(groups, x, dtype)
    own = [one for one in memory if one is not None]
    assert [one.data_ptr() for one in found[2:]] == [one.data_ptr() for one in own]
    assert all(one.dtype is torch.float32 for one in own)
    monkeypatch.setattr(grouped_products, "serves", lambda *_: False)
    operators = differentiated(pk.GroupModules.of(layer.rows, *leaves, scale=scale), x, dtype)
    wide = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves]
    exact = differentiated(pk.GroupModules.of(layer.rows, *wide, scale=scale), x.double(), torch.float64)
    for one, other, truth in zip(found, operators, exact, strict=True):
        assert one.dtype is other.dtype
        assert (one - truth).norm() <= 1.02 * (other - truth).norm()


@pytest.mark.usefixtures("without_group_weights")
def test_a_bias_of_another_dtype_is_refused_by_groups_as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    layer, x = Layer((2, 1), 8), inputs(3)
    layer.groups.linear(x, layer.weight, layer.bias)
    with pytest.raises(pk.DTypeError, match=r"bias is torch\.float32, x is torch\.float64"):
        layer.groups.linear(x, layer.weight, layer.bias.float())
