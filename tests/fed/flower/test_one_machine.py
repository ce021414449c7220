"""Settings of runs on many machines, given to what plays on one: refused, not passed over."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed import commands
from fed.errors import FedError
from fed.experiments import plan as plans
from tests.fed.flower.test_training import SMALL, config_of, play


def test_a_run_on_this_machine_alone_names_no_others(tmp_path: Path) -> None:
    config = config_of(*SMALL, "engine.name=flower", "engine.address=127.0.0.1:9")
    with pytest.raises(FedError, match=r"engine.name is 'flower', and this plays runs on one machine"):
        commands.run(config, tmp_path / "out", overwrite=False, centralised=False)
    assert not (tmp_path / "out").exists()


def test_a_comparison_is_played_on_this_machine(tmp_path: Path) -> None:
    asked = plans.request("digits", [*SMALL, "engine.name=flower"], ["fed-plora", "flora"], (0,), "", "")
    with pytest.raises(FedError, match=r"engine.name is 'flower', and this plays runs on one machine"):
        commands.compare(plans.plan(asked), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_a_deployment_does_not_begin_without_its_machines(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"engine.mode is 'deployment', and the run would be played on this machine"):
        play(config_of(*SMALL, "engine.mode=deployment"), tmp_path / "out")
    assert not (tmp_path / "out" / "rounds.jsonl").exists()
