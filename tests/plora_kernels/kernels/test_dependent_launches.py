"""Dependent launches, which begin before the launch ahead has ended: which waits for which, and their memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from plora_kernels.kernels import (
    adapted_matmul,
    factor_gradient,
    linear,
    output_gradient,
    persistent_matmul,
    replay,
    side_product,
)
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import (
    Blocks,
    GradientBlocks,
    MatmulBlocks,
    OutputGradientBlocks,
    SideBlocks,
    beside_product,
    staged_bytes,
)

M, K, N, R = 600, 64, 96, 16
# Modules that launch kernels, and modules that allocate memory.
LAUNCHING = (persistent_matmul, side_product, output_gradient, factor_gradient)
TAKING = (adapted_matmul, linear, factor_gradient, output_gradient, side_product)


class Trace(list[tuple[str, dict[str, object]]]):
    """Launches and allocations, in order."""

    def kernels(self) -> list[str]:
        return [name for name, _ in self if name != "memory"]

    def constants(self, kernel: str) -> dict[str, object]:
        """Return the named arguments of a kernel's last launch."""
        return [named for name, named in self if name == kernel][-1]


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    """Pretend that the device has dependent launches; record each launch, and run it without their instructions."""
    found = Trace()

    def record_blocks(kernel: object, grid: tuple[int, ...], *arguments: object, **named: object) -> None:
        found.append((kernel.fn.__name__, named))
        plain = dict.fromkeys({"DEPENDENT", "LAUNCHES_DEPENDENTS"} & named.keys(), False)
        replay.launch(kernel, grid, *arguments, **{k: v for k, v in named.items() if k != "launch_pdl"} | plain)

    def taking(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def taken(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
            found.append(("memory", {"shape": tuple(shape)}))
            return make(shape, dtype, device)

        return taken

    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: 8)  # gradients are summed in parts
    for module in LAUNCHING:
        monkeypatch.setattr(module, "launch", record_blocks)
        monkeypatch.setattr(module, "launches_dependents", lambda device: True, raising=False)
    for module in TAKING:
        for name in ("empty", "zeros"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, taking(getattr(replay, name)))
    return found


def forced(design: str, **ways: bool) -> dict[str, Blocks]:
    matmul = MatmulBlocks(design, 128, 32, 16, 16, 2, 4, 2, **ways)
    return {
        "forward": matmul,
        "input_gradient": matmul,
        "side_product": SideBlocks(16, 16, 16, 4, 2),
        "output_gradient": OutputGradientBlocks(16, 32, 16, 6, 4, 2),
    }


def tensors(dtype: torch.dtype = torch.float16) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(size).to(dtype) for size in ((M, K), (N, K), (R, K), (N, R), (M, N)))


def run_forward(index: torch.Tensor | None = None) -> None:
    x, weight, A, B, _ = tensors()
    linear.forward(x, weight, A, B, None, index, 1.0, False, True, 0.0, None)


def run_backward(
    index: torch.Tensor | None = None, frozen: bool = False, need_B: bool = True, dropout_p: float = 0.0
) -> None:
    x, weight, A, B, dy = tensors()
    places = R if index is None or frozen else index.shape[0]
    s = torch.randn(M, places).half()
    seed = torch.tensor([5]) if dropout_p else None
    linear.backward(dy, x, weight, A, B, s, index, 1.0, frozen, True, True, need_B, dropout_p, seed)


def test_a_dependent_launch_waits_and_the_one_ahead_lets_it_begin(trace: Trace) -> None:
    with lookup.override_blocks(forced("two_launch", dependent=True)):
        run_forward()
    assert trace.kernels() == ["side_product_kernel", "persistent_matmul_kernel"]
    ahead, own = trace.constants("side_product_kernel"), trace.constants("persistent_matmul_kernel")
    assert ahead["LAUNCHES_DEPENDENTS"]
    assert "launch_pdl" not in ahead  # it waits for all launches before it
    assert own["launch_pdl"]
    assert own["DEPENDENT"]
    assert not own["LAUNCHES_DEPENDENTS"]  # the launch after it may be another library's


def test_nothing_depends_unless_the_blocks_say_so(trace: Trace) -> None:
    with lookup.override_blocks(forced("two_launch")):
        run_forward()
        run_backward()
    for _, named in trace:
        assert "launch_pdl" not in named
        assert not named.get("DEPENDENT")
        assert not named.get("LAUNCHES_DEPENDENTS")


def test_without_a_module_there_is_no_launch_to_depend_on(trace: Trace) -> None:
    nothing = torch.empty(0, dtype=torch.int32)
    with lookup.override_blocks(forced("two_launch", dependent=True, gradient_beside=True)):
        run_forward(nothing)
        run_backward(nothing)
    assert trace.kernels() == ["persistent_matmul_kernel"] * 2
    assert all("launch_pdl" not in named and not named.get("DEPENDENT") for _, named in trace)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("form", ["all", "folded", "frozen"])
def test_da_begins_beside_dx_with_memory_of_its_own(form: str, dropout_p: float, trace: Trace) -> None:
    index = None if form == "all" else torch.tensor([0, 3, 5, -1], dtype=torch.int32)
    with lookup.override_blocks(forced("two_launch", dependent=True, gradient_beside=True)):
        run_backward(index, form == "frozen", dropout_p=dropout_p)
    names = [name for name, _ in trace]
    place = names.index("persistent_matmul_kernel")
    # No memory of dX's launch may be freed and reused before dA's launch, and no other launch may come between.
    assert names[place + 1] == "partial_gradient_kernel"
    assert trace[place][1]["LAUNCHES_DEPENDENTS"]
    assert trace[place + 1][1]["launch_pdl"]
    assert trace[place + 1][1]["DEPENDENT"]
    assert "launch_pdl" not in trace.constants("reduce_gradient_kernel")  # the sum of the parts waits for both launches


@pytest.mark.parametrize("design", ["drawn", "one_launch", "persistent"])
def test_where_dx_makes_ds_da_waits_for_it(design: str, trace: Trace) -> None:
    with lookup.override_blocks(forced(design, dependent=True, gradient_beside=True)):
        run_backward()
    assert all("launch_pdl" not in named for _, named in trace)


@pytest.mark.parametrize("dependent", [False, True])
def test_without_db_the_side_product_goes_first_and_da_runs_beside_dx(dependent: bool, trace: Trace) -> None:
    with lookup.override_blocks(forced("two_launch", dependent=dependent, gradient_beside=True)):
        run_backward(need_B=False)
    assert trace.kernels()[:3] == ["side_product_kernel", "persistent_matmul_kernel", "partial_gradient_kernel"]
    assert trace.constants("side_product_kernel")["LAUNCHES_DEPENDENTS"] == dependent
    assert trace.constants("partial_gradient_kernel")["launch_pdl"]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_ds_beside_dx_leaves_db_to_a_launch_of_its_own(dropout_p: float, trace: Trace) -> None:
    with lookup.override_blocks(forced("two_launch", dependent=True, gradient_beside=True)):
        run_backward(dropout_p=dropout_p)
    sums = ["partial_gradient_kernel"] * 2 + ["reduce_gradient_kernel"] * 2
    assert trace.kernels() == ["side_product_kernel", "persistent_matmul_kernel", *sums]
    # No memory may be taken between launches that run at once: it could be what the first of them still uses.
    names = [name for name, _ in trace]
    first = names.index("persistent_matmul_kernel")
    assert names[first : first + 3] == ["persistent_matmul_kernel", *sums[:2]]
    ahead = trace.constants("side_product_kernel")
    assert ahead["LAUNCHES_DEPENDENTS"]
    assert ahead["shares_multiprocessors"]
    # 64 rows, and 48 KiB at most: what a program of 128×256 tiles leaves of a multiprocessor.
    assert (ahead["BLOCK_M"], ahead["BLOCK_K"]) == (64, 64)
    assert 2 * 64 * (64 + ahead["BLOCK_R"]) * ahead["num_stages"] <= 48 * 1024  # type: ignore[operator]
    for_A, for_B = (named for name, named in trace if name == "partial_gradient_kernel")
    for one in (for_A, for_B):
        assert one["launch_pdl"]
        assert one["shares_multiprocessors"]
        assert (one["BLOCK_M"], one["BLOCK_D"]) == (64, 64)
    assert for_A["LAUNCHES_DEPENDENTS"]
    assert not for_B["LAUNCHES_DEPENDENTS"]  # the sums of both need all their parts


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("block_r", [16, 32, 64])
def test_what_runs_beside_a_product_fits_beside_it(block_r: int, dtype: str) -> None:
    for blocks in (SideBlocks(32, 128, block_r, 4, 5), GradientBlocks(128, 256, block_r, 2, 8, 4)):
        beside = beside_product(blocks, dtype)
        assert type(beside) is type(blocks)
        assert (beside.block_r, beside.num_warps) == (block_r, 4)
        # sm_90 has 228 KiB a multiprocessor, of which every program takes one for itself. Triton 3.6 and 3.9 give the
        # product's program, with tiles of 128×256×64 in three stages, 180,248 bytes.
        assert staged_bytes(beside, dtype) + 180_248 + 2 * 1024 <= 228 * 1024
        if dtype == "bfloat16" and block_r == 16:
            assert beside.num_stages == 4  # what is in flight hides the memory's latency


def test_a_driver_of_another_name_leaves_the_preference_unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def missing(name: str) -> None:
        asked.append(name)
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(replay.ctypes, "CDLL", missing)
    replay.prefer_shared_memory.__wrapped__(1)
    assert asked == ["libcuda.so.1"]
