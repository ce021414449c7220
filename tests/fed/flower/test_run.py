"""Runs of the command line over real Flower processes, against runs in one process; and what it says of bad input."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fed.cli import main
from tests.fed.flower.test_training import OWN, assert_same_run, config_of, play
from tests.support.command_line import assert_refused, outcome_of, rows_of
from tests.support.flower_keys import make_certificates, make_key
from tests.support.flower_kills import SETTINGS, KilledRun, drawn_kinds
from tests.support.flower_network import ROOT, FlowerNetwork, free_port
from tests.support.processes import Process

TINY = [
    *("rounds=2", "clients.count=3", "clients.per_round=3", "clients.ranks=[1, 2, 4]", "adapter.rank=4", "threads=1"),
    *("model.dtype=float64", "model.pretrain_steps=2", "data.train_rows=60", "data.test_rows=20"),
    *("train.local_steps=2", "engine.wait=120"),
]
EQUAL = [*TINY, "clients.ranks=[4]"]
QUICK: dict[str, Any] = {"idle_seconds": 0.2}


def deployed(folder: Path) -> list[dict[str, Any]]:
    return [{"partition-id": number, "state": str(folder / f"state-{number}")} for number in range(3)]


def play_both(folder: Path, network: FlowerNetwork, settings: Sequence[str], *engine: str) -> tuple[Path, Path]:
    """Play a run over a network and in this process, both at once, and return the directories."""
    scheme = "" if network.certificates else "http://"
    over = [*engine, "--flower", f"{scheme}{network.address}", "--no-centralised", "--out", str(folder / "there")]
    with Process(folder / "over", "run", "digits", *settings, *over) as there:
        play(config_of(*settings), folder / "here")
        outcome = there.wait(600)
    assert outcome.status == 0, f"{outcome}\n{network.tails()}"
    assert not outcome.err
    return folder / "there", folder / "here"


@pytest.mark.slow
def test_a_run_over_three_supernodes_is_as_one_in_a_process(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path / "network", deployed(tmp_path), **QUICK) as network:
        found, expected = play_both(tmp_path, network, TINY, "engine.mode=deployment")
    assert_same_run(found, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine.name=flower"], "engine.address is empty: the SuperLink's HOST:PORT would be right"),
        (["--flower", "fl.example.org"], "engine.address is 'fl.example.org': HOST:PORT or http://HOST:PORT would be"),
        (["--flower", "ftp://fl.example.org:80"], "HOST:PORT or http://HOST:PORT would be right"),
        (["--flower", "fl.example.org:123456"], "HOST:PORT or http://HOST:PORT would be right"),
        (
            ["engine.root_certificates=no/such.pem", "--flower", "localhost:1"],
            "engine.root_certificates is 'no/such.pem'",
        ),
    ],
)
def test_bad_input_is_named(
    arguments: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = outcome_of(lambda: main(["run", "digits", *arguments, "--out", str(tmp_path / "out")]), capsys)
    assert_refused(outcome, re.escape(message))
    assert not (tmp_path / "out").exists()


def test_without_flower_the_command_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "flwr", None)
    outcome = outcome_of(lambda: main(["run", "digits", "--flower", "localhost:1", "--out", str(tmp_path)]), capsys)
    assert_refused(outcome, r"needs Flower: pip install 'plora-kernels\[flower\]'")


def test_a_superlink_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    outcome = outcome_of(lambda: main(["run", "digits", "--flower", address, "--out", str(tmp_path / "out")]), capsys)
    assert_refused(
        outcome, f"the SuperLink at {address} did not take the run: Connection to the SuperLink is unavailable"
    )


@pytest.mark.slow
@pytest.mark.parametrize("trusts", ["another authority", "the system's authorities", "none, without TLS"])
def test_a_superlink_with_a_certificate_that_is_not_trusted_is_named(
    tmp_path: Path, trusts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = [f"engine.root_certificates={make_certificates(tmp_path).authority}"] if "another" in trusts else []
    with FlowerNetwork(tmp_path / "network", tls=True) as network:
        address = f"http://{network.address}" if "without" in trusts else network.address
        arguments = ["run", "digits", *other, "--flower", address, "--out", str(tmp_path / "out")]
        outcome = outcome_of(lambda: main(arguments), capsys)
    assert_refused(outcome, f"the SuperLink at {address} did not take the run: ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("simulation", [*TINY, "method=flora", "execution=cohort", "clients_per_pass=2"]),
        ("simulation", [*TINY, "clients.count=12", "clients.per_round=12"]),
        ("deployment", [*EQUAL, "method=fedsa-lora"]),
        ("deployment", [*TINY, "method=hetlora", "hetlora.prune=true", "train.head=personal"]),
    ],
    ids=["simulation of flora in cohorts", "simulation of many", "deployment of fedsa-lora", "deployment of hetlora"],
)
def test_methods_over_supernodes(tmp_path: Path, mode: str, settings: Sequence[str]) -> None:
    with FlowerNetwork(tmp_path / "network", deployed(tmp_path), **QUICK) as network:
        found, expected = play_both(tmp_path, network, settings, f"engine.mode={mode}")
    # Each machine has cohorts of its own, and a client's part of what a cohort holds depends on the others in it.
    without = OWN if mode == "deployment" else {"activation_bytes"} if "execution=cohort" in settings else None
    assert_same_run(found, expected, without)


@pytest.mark.slow
def test_a_run_with_certificates_and_keys(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path / "network", authentication=True, **QUICK) as network:
        assert network.certificates is not None
        nodes = []
        for number, config in enumerate(deployed(tmp_path)):
            key = make_key(tmp_path, f"key-{number}")
            network.register(key)
            nodes.append(network.add_node(config, key=key))
        network.wait_online(nodes)
        trust = f"engine.root_certificates={network.certificates.authority}"
        found, expected = play_both(tmp_path, network, TINY, "engine.mode=deployment", trust)
    assert_same_run(found, expected)


@pytest.mark.slow
def test_flwr_run_plays_the_app_of_the_package(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path / "network", [{}], **QUICK) as network:
        settings = [setting.replace(" ", "") for setting in TINY]
        asked = {"config": "digits", "set": " ".join(settings), "out": str(tmp_path / "there"), "centralised": False}
        end = network.submit(ROOT / "fed" / "flower", asked)
        assert end.result == "completed", f"{end.details}\n{end.log}"
        refused = network.submit(ROOT / "fed" / "flower", {**asked, "out": ""})
    assert refused.result == "failed"
    assert "out is empty: the path of a directory for the run would be right" in refused.log
    play(config_of(*TINY), tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here")


@pytest.mark.slow
def test_ctrl_c_stops_the_run_at_the_superlink_and_resume_goes_on(tmp_path: Path) -> None:
    out, settings = tmp_path / "there", [*TINY, "rounds=4"]
    with FlowerNetwork(tmp_path / "network", deployed(tmp_path), **QUICK) as network:
        flower = ("engine.mode=deployment", "--flower", f"http://{network.address}", "--no-centralised")
        with Process(tmp_path / "command", "run", "digits", *settings, "--out", str(out), *flower) as command:
            begun = command.until(lambda: (out / "rounds.jsonl").exists() and len(rows_of(out)) > 1, 400)
            assert begun, f"{command.wait(1)}\n{network.tails()}"
            command.send(signal.SIGINT)
            outcome = command.wait(60)
        assert outcome.status == 130
        assert outcome.err == f"interrupted: the rounds so far are in {out}; python -m fed resume {out} continues\n"
        runs = json.loads(network.flwr("list", "network", "--format", "json").out)["runs"]
        assert [run["status"] for run in runs] == ["finished:stopped"]
        with Process(tmp_path / "command", "resume", str(out), "--no-centralised") as command:
            outcome = command.wait()
        assert outcome.status == 0, f"{outcome}\n{network.tails()}"
    play(config_of(*settings), tmp_path / "here")
    assert_same_run(out, tmp_path / "here")


@pytest.mark.slow
@pytest.mark.parametrize("mode", SETTINGS)
def test_a_run_whose_processes_are_killed_ends_as_if_none_had_been(tmp_path: Path, mode: str) -> None:
    # Few, because Flower takes a minute to notice that a SuperNode is gone; flower_kills plays more of them.
    run = KilledRun(tmp_path, mode, SETTINGS[mode], rounds=5)
    run.play(drawn_kinds(mode, 3, seed=1))
    assert_same_run(run.out, run.play_whole(), OWN if mode == "deployment" else None)
