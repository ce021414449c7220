"""Replayed calls give the results of calls that are not, on other tensors of the same form."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest
import torch

import plora_kernels as pk
from plora_kernels.functional import grouped_product
from plora_kernels.kernels import (
    adapted_matmul,
    factor_gradient,
    grouped_matmul,
    projections_backward,
    projections_forward,
    replay,
    side_product,
    tile_matmul,
)
from plora_kernels.tuning import lookup
from tests.plora_kernels.kernels.test_designs import blocks_of
from tests.plora_kernels.ops.test_projections import check as check_projections
from tests.plora_kernels.ops.test_projections import make_problems
from tests.support.equality import assert_equal
from tests.support.groups import draw_grouped
from tests.support.notes import note_calls
from tests.support.numerics import DEVICE, Problem, check, in_form, make_problem, run
from tests.support.tiers import slow

pytestmark = pytest.mark.usefixtures("kernels", "nan_filled")


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that receives the op of every launch whose blocks are looked up; a replay looks up none."""
    found: list[str] = []
    for module in (adapted_matmul, factor_gradient, grouped_matmul, projections_forward, side_product):
        note_calls(monkeypatch, module, "find_blocks", lambda kind, shape, *rest, **named: shape.op, found)
    return found


def problem(
    seed: int, rows: int = 37, form: str | None = None, p: float = 0.0, dtype: torch.dtype = torch.float32
) -> Problem:
    options = in_form(form, 5, 3) | {"bias": seed % 2 == 0, "dropout_p": p, "seed": seed}
    return make_problem(rows, 50, 29, 5, dtype, **options)


def assert_worked_out(problem: Problem, worked_out: list[str]) -> None:
    """Check a problem, and that its form was not recorded before."""
    worked_out.clear()
    check(problem)
    assert "forward" in worked_out


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("form", [None, "folded", "frozen"])
def test_other_tensors_of_the_same_form_are_replayed(form: str | None, p: float, worked_out: list[str]) -> None:
    assert_worked_out(problem(0, form=form, p=p), worked_out)
    worked_out.clear()
    for seed in (2, 4):
        check(problem(seed, form=form, p=p))
    assert worked_out == []


def test_a_replay_gives_the_same_bits(worked_out: list[str]) -> None:
    first, second = run(problem(0)), run(problem(0))
    assert worked_out.count("forward") == 1
    assert_equal(first, second)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def test_what_differs_in_form_is_worked_out(worked_out: list[str]) -> None:
    other = replace(problem(0), scale=0.25)
    strided = replace(problem(0), weight=problem(0).weight.t().contiguous().t())
    halves = problem(0, dtype=torch.float16)
    for different in (problem(0), problem(1), problem(0, rows=38), halves, other, strided):
        assert_worked_out(different, worked_out)


def test_an_address_that_is_not_aligned_is_another_form(worked_out: list[str]) -> None:
    aligned = problem(0)
    check(aligned)
    room = torch.zeros(aligned.weight.numel() + 1, device=DEVICE)
    aligned.weight = room[1:].view_as(aligned.weight).copy_(aligned.weight)
    assert_worked_out(aligned, worked_out)


def test_new_tables_and_forced_blocks_are_looked_at(worked_out: list[str]) -> None:
    check(problem(0))
    lookup.forget_tables()
    assert_worked_out(problem(0), worked_out)
    for design in ("tile_two_launch", "persistent", "one_launch"):
        with lookup.override_blocks(blocks_of(design, 16)):
            assert_worked_out(problem(0), worked_out)
    with lookup.record_blocks() as taken:
        check(problem(0))
    assert "forward" in taken


@pytest.mark.parametrize(
    "design", ["tile", "tile_two_launch", "algebra", *slow("persistent", "two_launch", "one_launch")]
)
def test_every_design_may_be_replayed(design: str, monkeypatch: pytest.MonkeyPatch, worked_out: list[str]) -> None:
    blocks = blocks_of(design, 16)
    real = lookup._chosen
    monkeypatch.setattr(lookup, "_chosen", lambda shape, *rest: blocks.get(shape.op) or real(shape, *rest))
    for seed in (0, 2, 4):
        aligned = make_problem(70, 48, 80, 5, torch.float32, seed=seed)
        check(aligned)
        if seed == 0:
            worked_out.clear()
    # "algebra" uses torch's own product, which is not recorded.
    assert worked_out.count("forward") == (2 if design == "algebra" else 0)


@pytest.mark.parametrize(("share", "unselected"), [(None, "folded"), (0.5, "folded"), (0.5, "frozen")])
@pytest.mark.parametrize("p", [*slow(0.0), 0.4])
def test_groups_are_replayed_with_other_bounds(
    share: float | None, unselected: str, p: float, worked_out: list[str]
) -> None:
    form = {"share": share, "unselected": unselected, "dropout_p": p}
    for number, sizes in enumerate(((9, 0, 12), (3, 17, 1), (7, 7, 7))):
        check(draw_grouped(sizes, 20, 24, 5, torch.float32, seed=number, **form))
        if number == 0:
            assert "forward" in worked_out
            worked_out.clear()
    assert worked_out == []


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_groups_with_weights_of_their_own_are_replayed(p: float, turned: bool, worked_out: list[str]) -> None:
    form = {"dropout_p": p, "own_weights": True, "turned": turned}
    for number, sizes in enumerate(((9, 0, 12), (3, 17, 1), (7, 7, 7))):
        check(draw_grouped(sizes, 20, 24, 5, torch.float32, seed=number, **form))
        if number == 0:
            assert "forward" in worked_out
            worked_out.clear()
    assert worked_out == []


def test_products_of_groups_without_modules_are_replayed(worked_out: list[str]) -> None:
    for number, sizes in enumerate(((9, 0, 12), (3, 17, 1))):
        problem = draw_grouped(sizes, 20, 24, 1, torch.float32, seed=number, own_weights=True)
        x, bias = problem.x.requires_grad_(), problem.bias.requires_grad_()
        y = grouped_product(x, problem.weight, torch.tensor(problem.bounds, device=DEVICE), bias)
        y.backward(problem.dy)
        for group, (start, end) in enumerate(itertools.pairwise(problem.bounds)):
            own, dy = problem.weight[group], problem.dy[start:end]
            torch.testing.assert_close(y[start:end], torch.nn.functional.linear(x[start:end], own, bias[group]))
            torch.testing.assert_close(x.grad[start:end], dy @ own)
            torch.testing.assert_close(bias.grad[group], dy.sum(0))
        if number == 0:
            assert "forward" in worked_out
            worked_out.clear()
    assert worked_out == []


def test_projections_of_one_input_are_replayed(worked_out: list[str]) -> None:
    for seed in (0, 10):
        shape = (7, 20, (24, 16), (3, 2), (True, False), (False, True))
        check_projections(make_problems(shape, torch.float32, DEVICE, seed), f"seed {seed}")
        if seed == 0:
            assert "projections_forward" in worked_out
            assert "projections_input_gradient" in worked_out
            worked_out.clear()
    assert worked_out == []


@pytest.mark.parametrize("ranks", [(3, 2), (3, 0)])
def test_projections_apart_are_replayed_but_for_torch_s_products(
    ranks: tuple[int, int], worked_out: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (projections_forward, projections_backward):
        monkeypatch.setattr(module, "are_joined", lambda *_: False)
    products = note_calls(monkeypatch, projections_backward, "_input_gradient_by_torch", lambda *_: "dx")
    for seed in (0, 10):
        worked_out.clear()
        shape = (7, 20, (24, 16), ranks, (True, False), (False, False))
        check_projections(make_problems(shape, torch.float32, DEVICE, seed), f"seed {seed}")
        # A projection without modules is torch's own product.
        expected = 2 if ranks[1] else 1
        assert worked_out.count("forward") == (0 if seed and ranks[1] else expected)
    assert products == ["dx", "dx"]


def test_one_tensor_in_two_places_is_not_recorded(worked_out: list[str]) -> None:
    x = torch.randn(16, 16, device=DEVICE)
    A, B = torch.randn(4, 16, device=DEVICE), torch.randn(16, 4, device=DEVICE)
    for _ in range(2):
        y = pk.plora_linear(x, x, A, B)
        torch.testing.assert_close(y, x @ x.t() + x @ A.t() @ B.t())
    assert worked_out.count("forward") == 2
    weight = torch.randn(16, 16, device=DEVICE)
    for _ in range(2):
        pk.plora_linear(x, weight, A, B)
    y = pk.plora_linear(x, x, A, B)  # recorded with two tensors, called with one in both places
    torch.testing.assert_close(y, x @ x.t() + x @ A.t() @ B.t())


def test_an_output_that_is_a_view_is_not_recorded() -> None:
    calls: list[str] = []

    @replay.replayed
    def made(x: torch.Tensor, form: str) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        calls.append(form)
        y = replay.zeros((4, 6), x.dtype, x.device)
        return None, [y if form == "whole" else y.view(-1)]

    for form, shape, worked_out in (("whole", (4, 6), 1), ("view", (24,), 2)):
        results = [made(torch.ones(3, device=DEVICE), form) for _ in range(2)]
        assert [(nothing, [y.shape for y in ys]) for nothing, ys in results] == [(None, [shape])] * 2
        assert calls.count(form) == worked_out
        assert not any(y.any() for _, ys in results for y in ys)


def test_tensors_on_another_device_are_another_form() -> None:
    here, there = torch.zeros(3), torch.zeros(3, device="meta")
    forms: list[list[object]] = [[], []]
    for form, tensor in zip(forms, (here, there), strict=True):
        replay._look_at([tensor], form, [])
    assert forms[0] != forms[1]
    assert replay._Recording([here, torch.ones(3)]).usable
    assert not replay._Recording([here, there]).usable


def test_what_cannot_be_replayed_is_not_recorded_again(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = note_calls(monkeypatch, replay._Recording, "__init__", lambda self, given: given)
    x, A, B = (torch.randn(s, device=DEVICE) for s in ((16, 16), (4, 16), (16, 4)))
    for _ in range(3):
        pk.plora_linear(x, x, A, B)
    assert len(recorded) == 1


def test_a_kernel_that_is_still_compiled_is_not_recorded() -> None:
    recording = replay._Recording([torch.zeros(3)])
    recording.launched(object(), (1,), ())
    assert not recording.usable


def test_a_call_that_fails_leaves_no_recording_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise RuntimeError("no")

    with monkeypatch.context() as patch:
        patch.setattr(adapted_matmul, "tile_matmul", fail)
        with pytest.raises(RuntimeError, match="no"):
            run(problem(0))
    assert replay._local.recording is None
    check(problem(0))


def test_another_thread_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    real, found = tile_matmul.tile_matmul, []

    def beside(*tensors: torch.Tensor, **options: object) -> None:
        thread = threading.Thread(target=lambda: found.append(replay.empty((3,), torch.float32, torch.device(DEVICE))))
        thread.start()
        thread.join()
        assert not any(tensor is found[-1] for tensor in replay._local.recording.tensors)
        real(*tensors, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(adapted_matmul, "tile_matmul", beside)
    check(problem(0))
    assert len(found) == 2


def test_forms_do_not_pile_up(monkeypatch: pytest.MonkeyPatch, worked_out: list[str]) -> None:
    monkeypatch.setattr(replay, "MOST_FORMS", 2)
    for rows in (1, 2, 3, 1):
        pk.plora_linear(*(torch.randn(s, device=DEVICE) for s in ((rows, 16), (16, 16), (4, 16), (16, 4))))
    assert worked_out.count("forward") == 4


def test_buffers_are_let_go_after_their_last_use(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[replay._Replay] = []
    real = replay._Recording.replay
    monkeypatch.setattr(lookup, "multiprocessors_of", lambda device: 8)
    monkeypatch.setattr(replay._Recording, "replay", lambda self, outputs: made.append(real(self, outputs)) or made[-1])
    check(make_problem(300, 48, 80, 1, torch.float32))
    _, backward = made
    own = [step.slot for step in backward.steps if isinstance(step, replay._Allocation)]
    dropped = [slot for step in backward.steps if isinstance(step, replay._Launch) for slot in step.last]
    assert len(dropped) >= 3  # dS and the partial sums of dA and dB
    assert sorted([*dropped, *backward.outputs]) == own
