"""The tuner's search: which candidates are tried, which are kept for the next stage, and which wins."""

import torch

from bench.tune.search import INHERITED, Timed, best_of_each_design, design_of, narrowed, search, survivors
from bench.tune.trials import Trial
from plora_kernels.tuning.blocks import (
    DESIGNS,
    KERNEL_DESIGNS,
    SIDE_FIRST,
    FoldBlocks,
    Hardware,
    MatmulBlocks,
    ShapeClass,
)
from plora_kernels.tuning.candidates import candidates

H200 = Hardware(90, 132)
GATE = ShapeClass("forward", "bfloat16", 8192, 4096, 4096, 16)


def matmul(design: str, block_m: int = 128, block_r: int = 16) -> MatmulBlocks:
    return MatmulBlocks(design, block_m, 128, 64, block_r, 8, 8, 3)


def timed(design: str, time_ms: float, block_m: int = 128, rounds: int = 4) -> Timed:
    return Timed(matmul(design, block_m), time_ms, rounds)


def test_the_fastest_quarter_and_the_best_of_every_design_go_on() -> None:
    found = {str(number): timed("tile", 1.0 + number) for number in range(20)}
    found |= {"late": timed("persistent", 90.0), "later": timed("persistent", 95.0)}
    assert survivors(found) == ["0", "1", "2", "3", "4", "late"]


def test_four_at_least_go_on() -> None:
    assert len(survivors({str(number): timed("tile", number) for number in range(6)})) == 4
    assert survivors({"only": timed("tile", 1.0)}) == ["only"]


def test_a_longer_measurement_counts_before_a_shorter() -> None:
    found = best_of_each_design([timed("tile", 1.0, 64), timed("tile", 1.2, 128, rounds=40), timed("persistent", 0.9)])
    assert found["tile"].time_ms == 1.2
    assert list(found) == ["tile", "persistent"]


def test_a_new_class_tries_the_designs_in_turns_the_default_first() -> None:
    known = candidates(GATE, H200)
    tried = narrowed(GATE, known, {}, most=1 + len(DESIGNS) + len(KERNEL_DESIGNS))
    assert tried[0] == known[0]
    designs = [blocks.design for blocks in tried[1:] if isinstance(blocks, MatmulBlocks)]
    assert set(designs[: len(DESIGNS)]) == set(DESIGNS)
    assert set(designs[len(DESIGNS) :]) == set(KERNEL_DESIGNS)  # torch's matmul has no blocks to vary
    ours = [blocks for blocks in tried[1:] if isinstance(blocks, MatmulBlocks) and blocks.design in KERNEL_DESIGNS]
    assert all((blocks.block_m, blocks.block_n, blocks.block_k) == (128, 256, 64) for blocks in ours[: len(DESIGNS)])


def test_a_class_near_one_searched_tries_what_was_best_there_at_its_own_modules() -> None:
    known = candidates(GATE, H200)
    searched = {GATE: [Timed(blocks, float(place), 4) for place, blocks in enumerate(known)]}
    near = ShapeClass("forward", "bfloat16", 8192, 2048, 2048, 64)
    tried = narrowed(near, candidates(near, H200), searched, most=100)
    assert tried[0] == candidates(near, H200)[0]
    ways = {"tile": 1, "algebra": 1, "algebra_first": 1}  # else two widths of modules
    assert 8 < len(tried) <= 1 + sum(ways.get(design, 2) * INHERITED for design in DESIGNS)
    assert {blocks.block_r for blocks in tried if design_of(blocks) == "tile_two_launch"} == {32, 64}
    persistent = {"persistent", "two_launch", "one_launch", "drawn"}
    assert {blocks.block_r for blocks in tried if design_of(blocks) in persistent} == {16, 32}
    assert {blocks.block_r for blocks in tried if design_of(blocks) == "tile"} == {64}
    backward = ShapeClass("input_gradient", "bfloat16", 8192, 4096, 4096, 16)
    inherited = narrowed(backward, candidates(backward, H200), searched, most=100)
    assert len(inherited) <= 1 + sum((2 if design in SIDE_FIRST else 1) * INHERITED for design in DESIGNS)
    assert any(blocks.gradient_beside for blocks in inherited if isinstance(blocks, MatmulBlocks))


def test_few_rows_other_dtypes_and_other_ops_are_not_alike() -> None:
    searched = {GATE: [timed("tile", 1.0)]}
    for other in (
        ShapeClass("forward", "bfloat16", 16, 4096, 4096, 16),
        ShapeClass("forward", "float16", 8192, 4096, 4096, 16),
        ShapeClass("fold", "bfloat16", 8192, 4096, 4096, 16),
    ):
        known = candidates(other, H200)
        assert len(narrowed(other, known, searched, most=10**6)) == len(known)


def test_the_search_times_all_and_the_best_longest(monkeypatch: object) -> None:
    calls: list[object] = []
    trial = Trial(ShapeClass("fold", "float32", 8, 8, 8, 1), lambda: calls.append(1), dict, lambda dtype: {})
    known = [FoldBlocks(16, 64, 16, warps, 2) for warps in (1, 2, 4, 8, 16, 32)]
    found = search(trial, known, torch.device("cpu"))
    assert {one.blocks for one in found} == set(known)
    assert [one.rounds for one in found] == [40] * 4 + [4] * 2
    assert [one.time_ms for one in found[:4]] == sorted(one.time_ms for one in found[:4])
    assert len(calls) == 6 * (1 + 4) + 4 * (1 + 12) + 4 * (1 + 40)
