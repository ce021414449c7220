"""Tests that need a CUDA device: bfloat16 in every design, CUDA graphs, no host synchronisation, several streams."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import plora_kernels as pk
from plora_kernels.kernels import factor_gradient, persistent_matmul, replay
from plora_kernels.tile_tables import tables_of
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import DESIGNS, MatmulBlocks, ShapeClass
from plora_kernels.tuning.candidates import candidates
from tests.support.equality import assert_equal
from tests.support.groups import draw_grouped
from tests.support.mixed_precision import assert_rounded_once, check_mixed, widened
from tests.support.numerics import check, in_form, make_problem, run

pytestmark = pytest.mark.gpu


@pytest.fixture
def waiting_is_an_error() -> Iterator[None]:
    """Raise where the host waits for the device."""
    with warnings.catch_warnings():  # torch warns once in a process that it does not find every such place
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def layer_and_input(dtype: torch.dtype = torch.bfloat16, dropout: float = 0.0) -> tuple[pk.FusedPLoRALinear, Tensor]:
    layer = pk.FusedPLoRALinear(256, 384, rank=16, dropout=dropout, device="cuda", dtype=dtype)
    torch.nn.init.normal_(layer.lora_B)
    return layer, torch.randn(512, 256, device="cuda", dtype=dtype, requires_grad=True)


def first_of(design: str, shape: ShapeClass) -> MatmulBlocks | None:
    """Return the first candidate of a design on this device, or None."""
    hardware = lookup.hardware_of(torch.device("cuda", torch.cuda.current_device()))
    same = (b for b in candidates(shape, hardware) if isinstance(b, MatmulBlocks) and b.design == design)
    return next(same, None)


def forced(design: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> AbstractContextManager[None]:
    """Return a context in which layers of this size (rows, K, N, R) run a design; skip the test if it is none here."""
    rows, k, n, rank = size
    name = str(dtype).removeprefix("torch.")
    forward = first_of(design, ShapeClass("forward", name, rows, k, n, rank))
    backward = first_of(design, ShapeClass("input_gradient", name, rows, n, k, rank))
    if forward is None or backward is None:
        pytest.skip(f"{design} is no candidate here")
    return lookup.override_blocks({"forward": forward, "input_gradient": backward})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "size", [(512, 256, 384, 16), (1000, 512, 256, 64), (37, 48, 80, 5), (300, 256, 512, 100)], ids=str
)
@pytest.mark.parametrize("design", DESIGNS)
def test_designs_are_within_the_bound(design: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, k, n, rank = size
    with forced(design, size, dtype):
        for form in ("folded", "frozen"):
            check(make_problem(rows, k, n, rank, dtype, **in_form(form, rank, rank)))
        check(make_problem(rows, k, n, rank, dtype, dropout_p=0.3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(512, 256, 384, 16), (1000, 512, 256, 64), (37, 48, 80, 5)], ids=str)
@pytest.mark.parametrize("design", DESIGNS)
def test_designs_take_fp32_factors(design: str, size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    rows, k, n, rank = size
    with forced(design, size, dtype):
        for form in (None, "folded", "frozen"):
            problem = widened(make_problem(rows, k, n, rank, dtype, **in_form(form, rank, rank)))
            check_mixed(problem)
            _, _, dA, dB, _ = run(problem)
            for gradient in (dA, dB):
                assert not gradient.any() or not torch.equal(gradient.to(dtype).float(), gradient)
        check_mixed(widened(make_problem(rows, k, n, rank, dtype, dropout_p=0.3)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [5, 64])
def test_groups_take_fp32_factors(rank: int, dtype: torch.dtype) -> None:
    for share, unselected in ((None, "folded"), (0.5, "frozen")):
        for p in (0.0, 0.3):
            options = {"share": share, "unselected": unselected, "dropout_p": p}
            check_mixed(widened(draw_grouped((300, 0, 37, 512), 256, 384, rank, dtype, **options)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [(384, 256, 16), (512, 1024, 64), (29, 50, 5)], ids=str)
def test_folds_of_fp32_factors_are_rounded_once(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    n, k, rank = size
    weight = torch.randn(n, k, device="cuda").to(dtype)
    lora_A, lora_B = torch.randn(rank, k, device="cuda"), torch.randn(n, rank, device="cuda")
    folded = pk.fold(weight, lora_A, lora_B, [0], scale=0.3)
    assert_rounded_once(folded, weight, lora_A[1:], lora_B[:, 1:], 0.3)
    jobs = [pk.Fold(weight.clone(), lora_A, lora_B, [0], 0.3), pk.Fold(weight.clone(), lora_A, lora_B, [0], 0.3)]
    assert_equal(pk.fold_many_(jobs), [folded, folded])


@contextmanager
def taking(op: str, blocks: MatmulBlocks) -> Iterator[None]:
    """Make every launch of an op use these blocks inside the context, and name them in an error raised there."""
    try:
        with lookup.override_blocks({op: blocks}):
            yield
    except Exception as error:
        error.add_note(f"{op} with {blocks}")
        raise


def overlapping(op: str, rows: int, d_in: int, d_out: int, rank: int) -> list[MatmulBlocks]:
    """Return the first candidate of this device for each way in which tiles or launches overlap."""
    hardware = lookup.hardware_of(torch.device("cuda", torch.cuda.current_device()))
    found: dict[tuple[object, ...], MatmulBlocks] = {}
    for blocks in candidates(ShapeClass(op, "bfloat16", rows, d_in, d_out, rank), hardware):
        if isinstance(blocks, MatmulBlocks):
            ways = (blocks.resident, blocks.dependent, blocks.gradient_beside)
            if ways != (1, False, False):
                found.setdefault((blocks.design, *ways), blocks)
    return list(found.values())


def test_every_way_to_overlap_is_within_the_bound() -> None:
    rows, k, n = 1000, 512, 384
    if not overlapping("forward", rows, k, n, 16):
        pytest.skip("nothing overlaps here")
    for rank in (16, 40):
        for op, sizes in (("forward", (k, n)), ("input_gradient", (n, k))):
            for blocks in overlapping(op, rows, *sizes, rank):
                with taking(op, blocks):
                    for form in (None, "frozen"):
                        problem = make_problem(rows, k, n, rank, torch.bfloat16, **in_form(form, rank, rank))
                        check(problem)
                        check_mixed(widened(problem))


def launch_apart(kernel: object, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
    """Launch a kernel after the one before has ended, whatever its blocks ask for."""
    replay.launch(kernel, grid, *arguments, **{name: one for name, one in named.items() if name != "launch_pdl"})


# With five modules the rows of dS are not aligned and are loaded in another way than with sixteen.
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("rank", [5, 16])
def test_launches_side_by_side_give_the_same_bits_every_time(
    rank: int, dropout_p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, k, n = 4096, 1024, 1152
    ways = [
        blocks
        for blocks in overlapping("input_gradient", rows, n, k, rank)
        if blocks.gradient_beside or blocks.dependent
    ]
    if not ways:
        pytest.skip("no launch begins beside another here")
    problem = make_problem(rows, k, n, rank, torch.bfloat16, dropout_p=dropout_p)
    for blocks in ways:
        with taking("input_gradient", blocks), taking("forward", replace(blocks, gradient_beside=False)):
            for _ in range(30):
                problem.dy.copy_(torch.randn_like(problem.dy))
                with monkeypatch.context() as patch:
                    for module in (persistent_matmul, factor_gradient):
                        patch.setattr(module, "launch", launch_apart)
                    expected = run(problem)
                assert_equal(run(problem), expected)


@pytest.mark.parametrize("design", ["one_launch", "drawn"])
def test_side_tiles_within_a_launch_on_many_streams_at_once(design: str) -> None:
    # No launch that shares the device may wait for one of its own programs that cannot start.
    shape = ShapeClass("forward", "bfloat16", 4096, 1024, 1024, 16)
    blocks = first_of(design, shape)
    if blocks is None:
        pytest.skip(f"{design} is no candidate here")
    problem = make_problem(4096, 1024, 1024, 16, torch.bfloat16)
    with lookup.override_blocks({"forward": blocks}), torch.no_grad():
        arguments = (problem.x, problem.weight, problem.lora_A, problem.lora_B)
        expected = pk.plora_linear(*arguments)
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in range(8)]
        results = []
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(pk.plora_linear(*arguments))
        torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in results)


@pytest.mark.parametrize("unselected", [None, "folded", "frozen"])
@pytest.mark.usefixtures("waiting_is_an_error")
def test_the_host_waits_for_nothing(unselected: str | None) -> None:
    layer, x = layer_and_input(dropout=0.1)
    if unselected is not None:
        layer.select([1, 5, 7], unselected)
    layer(x).square().sum().backward()
    layer.unfold()


@pytest.mark.parametrize("design", DESIGNS)
def test_a_graph_replays_the_step(design: str) -> None:
    layer, x = layer_and_input()
    shapes = {"forward": (512, 256, 384), "input_gradient": (512, 384, 256)}
    forced = {op: first_of(design, ShapeClass(op, "bfloat16", *sizes, 16)) for op, sizes in shapes.items()}
    if None in forced.values():
        pytest.skip(f"{design} is no candidate here")
    leaves = (x, layer.lora_A, layer.lora_B)
    with lookup.override_blocks(forced):
        expected = torch.autograd.grad(layer(x).float().square().sum(), leaves)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                torch.autograd.grad(layer(x).float().square().sum(), leaves)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = torch.autograd.grad(layer(x).float().square().sum(), leaves)
        for _ in range(3):
            for gradient in captured:
                gradient.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert_equal(captured, expected)


def test_a_graph_takes_the_table_of_tiles_made_before_it_or_its_own() -> None:
    sizes = (400, 0, 250)
    x, weight = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((650, 256), (384, 256)))
    A, B = (torch.randn(3, *size, device="cuda", dtype=torch.bfloat16) for size in ((16, 256), (384, 16)))
    for warmed in (True, False):
        rows, expected = pk.RowGroups(sizes), pk.GroupModules.of(pk.RowGroups(sizes), A, B).linear(x, weight, None)
        rows.offsets(x)  # a copy from the host, which a graph cannot hold
        modules = pk.GroupModules.of(rows, A, B)
        if warmed:
            modules.linear(x, weight, None)
        kept = len(tables_of(rows.offsets(x)) or {})
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = modules.linear(x, weight, None)
        assert len(tables_of(rows.offsets(x)) or {}) == kept  # no memory that only a replay fills
        for _ in range(2):
            y.fill_(float("nan"))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, expected)
        assert torch.equal(modules.linear(x, weight, None), expected)


def test_every_replay_drops_anew() -> None:
    layer, x = layer_and_input(dropout=0.5)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        results = []
        for _ in range(3):
            graph.replay()
            results.append(y.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [(4500, 2048, 2048, 16), (37, 50, 29, 5), (600, 256, 512, 64)], ids=str)
def test_a_call_of_a_known_form_is_right_on_any_stream(size: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    lookup.forget_tables()
    for seed in range(2):
        check(make_problem(*size, dtype, seed=seed))
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        check(make_problem(*size, dtype, seed=2))
    problem = make_problem(*size, dtype)
    replayed = run(problem)
    lookup.forget_tables()
    assert_equal(replayed, run(problem))


def test_gradients_are_the_same_bits_every_time() -> None:
    problem = make_problem(5000, 512, 768, 16, torch.bfloat16)
    assert_equal(run(problem), run(problem))


def test_dropout_is_the_same_on_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(300, 200, 100, 8, torch.float32, dropout_p=0.3, seed=5)
    kernels = run(problem)
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    torch.testing.assert_close(kernels, run(problem), rtol=1e-3, atol=1e-3)
