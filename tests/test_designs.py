"""Every design of the forward and the backward against float64, forced upon shapes that it must leave or mask."""

from __future__ import annotations

import pytest
import torch

from plora_kernels import configs
from plora_kernels.blocks import DESIGNS, Blocks, MatmulBlocks, OutputGradientBlocks, SideBlocks
from plora_kernels.kernels import adapted_matmul
from tests.support.numerics import Problem, make_problem, random_mask
from tests.test_numerics import DEVICE, check

# The blocks of TMA are at least 16 bytes wide; sizes are small, so that edges fall inside tiles.
DTYPES = [torch.float16, torch.float32]
WALKING = ("persistent", "two_launch", "one_launch")


def blocks_of(design: str, block_r: int) -> dict[str, Blocks]:
    matmul = MatmulBlocks(design, 32, 32, 16, block_r, 2, 4, 2)
    return {
        "forward": matmul,
        "input_gradient": matmul,
        "side_product": SideBlocks(16, 16, block_r, 4, 2),
        "output_gradient": OutputGradientBlocks(16, 32, block_r, 3, 4, 2),
    }


def run_design(design: str, problem: Problem, block_r: int = 16) -> None:
    with configs.forcing(blocks_of(design, block_r)):
        check(problem)


@pytest.fixture(autouse=True)
def on_kernels(kernels: None, nan_filled: None) -> None:
    """Run on the kernels, every output filled with NaN first."""


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the design of every launch that walks over tiles."""
    designs: list[str] = []
    real = adapted_matmul.persistent_matmul

    def counted(*tensors: torch.Tensor, blocks: MatmulBlocks, **options: object) -> None:
        designs.append(blocks.design)
        real(*tensors, blocks=blocks, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapted_matmul, "persistent_matmul", counted)
    return designs


@pytest.mark.parametrize("form", [None, "folded", "frozen"])
@pytest.mark.parametrize(
    ("rows", "k", "n", "rank"), [(1, 16, 16, 1), (37, 48, 80, 5), (70, 104, 40, 17), (64, 64, 64, 33)]
)
@pytest.mark.parametrize("design", DESIGNS)
def test_designs_are_within_the_bound(
    design: str, rows: int, k: int, n: int, rank: int, form: str | None, walks: list[str]
) -> None:
    dtype = DTYPES[(rank + (form is None)) % 2]
    mask = None if form is None else random_mask(rank, rank).to(DEVICE)
    problem = make_problem(
        rows, k, n, rank, dtype, mask=mask, unselected=form or "folded", bias=rank != 5, seed=rank, device=DEVICE
    )
    run_design(design, problem)
    assert walks == [design] * (2 if design in WALKING else 0)


@pytest.mark.parametrize("design", DESIGNS)
def test_dropout_in_every_design(design: str) -> None:
    for form in ("folded", "frozen"):
        mask = random_mask(5, 3).to(DEVICE)
        run_design(
            design,
            make_problem(
                37, 48, 80, 5, torch.float32, mask=mask, unselected=form, dropout_p=0.4, seed=5, device=DEVICE
            ),
        )


@pytest.mark.parametrize("design", WALKING)
def test_what_descriptors_cannot_fetch_takes_pointer_loads(design: str, walks: list[str]) -> None:
    run_design(design, make_problem(7, 50, 29, 5, torch.float16, device=DEVICE))
    assert walks == []


def test_side_tiles_come_first_at_every_launch(walks: list[str]) -> None:
    # The last program of a launch readies the workspace for the next: three in a row, of different sizes.
    for rows in (70, 16, 100):
        run_design("one_launch", make_problem(rows, 48, 80, 20, torch.float32, seed=rows, device=DEVICE))
    assert walks == ["one_launch"] * 6


@pytest.mark.parametrize("programs", [1, 3])
def test_any_number_of_programs_covers_all_tiles(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "multiprocessors_of", lambda device: programs)
    for design in WALKING:
        run_design(design, make_problem(70, 48, 104, 5, torch.float32, device=DEVICE))


def test_partial_gradients_are_the_same_bits_every_time() -> None:
    problem = make_problem(130, 48, 80, 5, torch.float16, device=DEVICE)
    with configs.forcing(blocks_of("two_launch", 16)):
        from tests.test_numerics import run

        first, second = run(problem), run(problem)
    for a, b in zip(first, second, strict=True):
        assert a is None or torch.equal(a, b)
