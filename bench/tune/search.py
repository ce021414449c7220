"""The search for the fastest blocks: all candidates are timed briefly, and the best of them longer."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from bench.harness.processes import note
from bench.harness.timing import Plan, Step, cache_flush, host_seconds, interleave, lead_seconds, timer_for
from bench.tune.trials import Trial
from plora_kernels.tuning.blocks import Blocks, MatmulBlocks, ShapeClass

# Rounds of each stage. This share of the candidates reaches the next stage, at least so many, and each design's best.
STAGES = (4, 12, 40)
SHARE, AT_LEAST = 0.25, 4
# How many of the best candidates of each design a class takes from a similar class that was searched before.
INHERITED = 5


@dataclass(frozen=True)
class Timed:
    """A candidate's median of the last stage it reached."""

    blocks: Blocks
    time_ms: float
    rounds: int

    @property
    def design(self) -> str:
        return design_of(self.blocks)


def design_of(blocks: Blocks) -> str:
    """Return a matmul's design, and for other launches the name of their blocks."""
    return blocks.design if isinstance(blocks, MatmulBlocks) else type(blocks).__name__


def search(trial: Trial, candidates: Sequence[Blocks], device: torch.device) -> list[Timed]:
    """Time the candidates by successive halving; return all of them, the fastest of the longest stage first.

    Notes each candidate's index before its first call at full size, and None once they run in turn.
    """
    steps = {str(number): Step(trial.with_blocks(blocks)) for number, blocks in enumerate(candidates)}
    timer, host = timer_for(device), []
    if device.type == "cuda":
        for name, step in steps.items():
            note(int(name))
            host.append(host_seconds(step, calls=3))
    note(None)
    flush = cache_flush(device, cold=False, lead_s=lead_seconds(host))
    found: dict[str, Timed] = {}
    for rounds in STAGES:
        plan = Plan(seconds_per_provider=0.0, min_rounds=rounds, max_rounds=rounds, warmup_rounds=1)
        for name, seconds in interleave(steps, timer, flush, plan).items():
            found[name] = Timed(candidates[int(name)], statistics.median(seconds) * 1e3, rounds)
        going_on = survivors({name: found[name] for name in steps})
        steps = {name: steps[name] for name in going_on}
    return sorted(found.values(), key=lambda timed: (-timed.rounds, timed.time_ms))


def survivors(timed: Mapping[str, Timed]) -> list[str]:
    """Return the names that reach the next stage: the fastest quarter, at least four, and each design's fastest."""
    order = sorted(timed, key=lambda name: timed[name].time_ms)
    best = dict.fromkeys(order[: max(AT_LEAST, int(SHARE * len(order)))])
    for name in order:
        if not any(timed[chosen].design == timed[name].design for chosen in best):
            best[name] = None
    return list(best)


def best_of_each_design(timed: Iterable[Timed]) -> dict[str, Timed]:
    """Return each design's fastest, the fastest design first; later stages count before earlier ones."""
    found: dict[str, Timed] = {}
    for one in sorted(timed, key=lambda one: (-one.rounds, one.time_ms)):
        found.setdefault(one.design, one)
    return found


def narrowed(
    shape: ShapeClass, known: Sequence[Blocks], searched: Mapping[ShapeClass, Sequence[Timed]], most: int
) -> tuple[Blocks, ...]:
    """Return the candidates to try, the default first: `most` of all, or the best ones of a similar class.

    A class is similar if it has the same op, or is the forward of this dX, has the same dtype, and between a quarter of
    and four times as many rows; the nearest one counts. Candidates that differ from its best only in `block_r` and
    `gradient_beside` are all tried: the best of those depends on the class.
    """
    like = [other for other in searched if _alike(shape, other)]
    if not like:
        return _in_turns(known)[:most]
    nearest = min(like, key=lambda other: (other.op != shape.op, _distance(shape, other)))
    own: dict[Blocks, list[Blocks]] = {}
    for blocks in known:
        own.setdefault(_regardless(blocks), []).append(blocks)
    chosen, counts = {known[0]: None}, Counter[str]()
    for timed in sorted(searched[nearest], key=lambda timed: (-timed.rounds, timed.time_ms)):
        same = own.pop(_regardless(timed.blocks), ())
        if same and counts[timed.design] < INHERITED:
            counts[timed.design] += 1
            chosen |= dict.fromkeys(same)
    return tuple(chosen)


def _regardless(blocks: Blocks) -> Blocks:
    """Return blocks with `block_r` and `gradient_beside` left out: their best values differ from class to class."""
    same = replace(blocks, block_r=0)
    return replace(same, gradient_beside=False) if isinstance(same, MatmulBlocks) else same


def _alike(shape: ShapeClass, other: ShapeClass) -> bool:
    family = (shape.op, shape.op.replace("input_gradient", "forward"))
    rows = max(shape.m, other.m) <= 4 * min(shape.m, other.m)
    return other.op in family and other.dtype == shape.dtype and rows


def _distance(shape: ShapeClass, other: ShapeClass) -> float:
    sizes = ((shape.r, other.r), (shape.d_in, other.d_in), (shape.d_out, other.d_out), (shape.m, other.m))
    return sum(abs(math.log2(one / two)) for one, two in sizes)


def _in_turns(known: Sequence[Blocks]) -> tuple[Blocks, ...]:
    """Return the default, then the designs' candidates in turns, the most promising first, as time may run out."""
    by_design: dict[str, list[Blocks]] = {}
    for blocks in sorted(known[1:], key=_unlikely):
        by_design.setdefault(design_of(blocks), []).append(blocks)
    longest = max((len(own) for own in by_design.values()), default=0)
    turns = [own[turn] for turn in range(longest) for own in by_design.values() if turn < len(own)]
    return tuple(dict.fromkeys([known[0], *turns]))


def _unlikely(blocks: Blocks) -> tuple[float, ...]:
    """Return what sorts a matmul's large tiles first, of equal ones those of common depth; others keep their order."""
    if not isinstance(blocks, MatmulBlocks):
        return ()
    depth = abs(math.log2(blocks.block_k / 64)) if blocks.block_k else 0.0
    return -blocks.block_m * blocks.block_n, depth, abs(blocks.num_stages - 3)
