"""A run whose machine loses power at any point goes on from a checkpoint that is whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.children import Tell, in_child
from tests.support.interrupted_runs import CASES, Case, Tally, fresh, go_on, prepared
from tests.support.power_loss import Loss, Recorder, distinct, lay_out

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def losses_of(case: Case, directory: Path) -> list[Loss]:
    """Play the run in a child and return what a power loss at each of its changes would leave of the disk."""

    def work(tell: Tell) -> list[Loss]:
        recorder = Recorder(directory.parent)

        def on_round(row: dict) -> None:
            recorder.told = row["round"]

        recorder.begin()
        case.play(directory, bool(case.begun), on_round)
        recorder.note("the end")
        return recorder.losses

    return in_child(work).value


def check(case: Case, folder: Path, stride: int, tally: Tally) -> None:
    begun, directory, wanted = prepared(case, folder)
    losses = losses_of(case, fresh(directory, begun))
    for what, told, image in distinct(losses)[stride // 2 :: stride]:
        shutil.rmtree(directory.parent)
        lay_out(image, directory.parent)
        with tally.fault(what) as came_out:
            came_out(go_on(case, directory, wanted, told))
    tally.check()


@pytest.mark.parametrize("name", ["fed-plora-personal"])
def test_a_run_goes_on_after_a_power_loss(name: str, tmp_path: Path, tally: Tally) -> None:
    check(CASES[name], tmp_path, 15, tally)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fed-plora-personal", "fedsa-lora-every-2", "flora", "flora-longer"])
def test_a_run_goes_on_after_a_power_loss_at_any_point(name: str, tmp_path: Path, tally: Tally) -> None:
    check(CASES[name], tmp_path, 1, tally)
