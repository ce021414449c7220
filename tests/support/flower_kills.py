"""Runs over a real Flower network whose processes are killed again and again.

`python -m tests.support.flower_kills deployment --kills 20 --out FILE` kills so many processes, at moments drawn by
`--seed`, and compares what the run ends with to a run in one process that nobody killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.support.command_line import Outcome
from tests.support.flower_control import until
from tests.support.flower_network import FlowerNetwork
from tests.support.processes import Process

# What is killed: the SuperLink with the ServerApp that it started; a SuperNode with all that it started; the process
# that trains; the process that Flower starts for one message.
KINDS = ("SuperLink", "SuperNode", "trainer", "ClientApp")
PARTS = {"trainer": "fed.flower.trainer", "ClientApp": "flwr-clientapp"}
SMALL = [
    *("clients.count=3", "clients.per_round=3", "adapter.rank=4", "model.dtype=float64", "model.pretrain_steps=2"),
    *("data.train_rows=60", "data.test_rows=20", "threads=1", "train.local_steps=20"),
    *("engine.wait=600", "engine.resends=9"),  # a client's machines may be killed again and again in a round
]
# No round takes longer, a killed SuperNode's minute as a connected one included.
ROUND_SECONDS = 400.0


class KilledRun:
    """A run whose processes are killed; `told` holds what the commands said that ended early."""

    def __init__(self, folder: Path, mode: str, settings: list[str], rounds: int, seed: int = 0) -> None:
        self.out, self._folder, self._random = folder / "killed", folder, random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self.told: list[Outcome] = []
        self._settings = [*SMALL, *settings, f"rounds={rounds}"]
        self._mode, self._rounds = mode, rounds
        configs: list[dict[str, Any]] = [{"state": str(folder / f"state-{number}")} for number in range(3)]
        if mode == "deployment":
            configs = [{**config, "partition-id": number} for number, config in enumerate(configs)]
        else:
            configs = configs[:2]
        self.network = FlowerNetwork(folder / "network", configs, database=True, poll_seconds=0.2, idle_seconds=0.3)

    def play(self, kinds: list[str], at_once: int = 1) -> None:
        """Play the run to its end while processes of these kinds are killed, `at_once` of them after each new round."""
        with self.network:
            address = f"http://{self.network.address}"
            command = self._command("run", "digits", *self._settings, f"engine.mode={self._mode}", "--flower", address)
            try:
                for number, kind in enumerate(kinds):
                    if number % at_once == 0:
                        self._await_rounds(command, self.played + 1)
                    time.sleep(self._random.uniform(0, 5))
                    command = self._killed(kind, command)
                self.told.append(command.wait((self._rounds + 1) * ROUND_SECONDS))
            finally:
                command.__exit__()
        assert self.told[-1].status == 0, f"{self.told[-1]}\n{self.network.tails()}"

    def play_whole(self) -> Path:
        """Play the run in one process, which nobody kills, and return its directory."""
        out = self._folder / "whole"
        arguments = ["run", "digits", *self._settings, "--out", str(out), "--no-centralised"]
        with Process(self._folder / "alone", *arguments) as alone:
            outcome = alone.wait(1200)
        assert outcome.status == 0, outcome
        return out

    @property
    def played(self) -> int:
        """The number of rounds that have a row."""
        rows = self.out / "rounds.jsonl"
        return max(0, len(rows.read_text().splitlines()) - 1) if rows.exists() else 0

    def _command(self, *arguments: str) -> Process:
        if arguments[0] == "run":
            arguments = (*arguments, "--out", str(self.out))
        return Process(self._folder / "commands", *arguments, "--no-centralised")

    def _await_rounds(self, command: Process, number: int) -> None:
        reached = command.until(lambda: self.played >= number, ROUND_SECONDS)
        said = "" if command.running else command.wait(1)
        assert reached, f"round {number} was not played: {said}\n{self.network.tails()}"

    def _killed(self, kind: str, command: Process) -> Process:
        """Kill something of a kind, and start again what does not start by itself; return the command to follow."""
        network, began, played = self.network, time.monotonic(), self.played
        if kind == "SuperLink":
            network.kill(network.link)
            self.told.append(command.wait(120))
            network.start_superlink()
            command = self._command("resume", str(self.out), "--flower", f"http://{network.address}")
        elif kind == "SuperNode":
            node = self._random.choice(network.nodes)
            network.kill(node.running)
            network.start_node(node)
        else:
            self._kill_one(PARTS[kind])
        self.kills.append({"kind": kind, "after_round": played, "seconds": round(time.monotonic() - began, 1)})
        print(self.kills[-1], flush=True)
        return command

    def _kill_one(self, part: str) -> None:
        """Kill one process whose command holds `part`, as soon as there is one."""
        killed: list[int] = []

        def kill() -> bool:
            found = [pid for pid, command in self.network.running_processes().items() if part in " ".join(command)]
            with suppress(ProcessLookupError):
                if found:
                    os.kill(pid := self._random.choice(found), signal.SIGKILL)
                    killed.append(pid)
            return bool(killed)

        assert until(kill, ROUND_SECONDS), f"there is no {part} to kill\n{self.network.tails()}"


def drawn_kinds(mode: str, count: int, seed: int) -> list[str]:
    """Return what to kill in turn: each kind as often as the others, in an order drawn by the seed."""
    kinds = [KINDS[number % len(KINDS)] for number in range(count)]
    random.Random(f"{mode} {seed}").shuffle(kinds)
    return kinds


SETTINGS = {
    "deployment": ["method=fedsa-lora", "clients.ranks=[4]"],
    "simulation": ["method=fed-plora", "clients.ranks=[1, 2, 4]"],
}


if __name__ == "__main__":
    from tests.fed.flower.test_training import OWN, assert_same_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mode", choices=sorted(SETTINGS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--at-once", type=int, default=1, help="how many after each new round")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rounds = options.kills // options.at_once + 3
        run = KilledRun(Path(name), options.mode, SETTINGS[options.mode], rounds, options.seed)
        run.play(drawn_kinds(options.mode, options.kills, options.seed), options.at_once)
        whole = run.play_whole()
        assert_same_run(run.out, whole, OWN if options.mode == "deployment" else None)
        counts = dict(Counter(kill["kind"] for kill in run.kills))
        facts = {"mode": options.mode, "rounds": rounds, "same_as_never_killed": True, "killed": counts}
        options.out.write_text(json.dumps({**facts, "kills": run.kills}, indent=1) + "\n")
        print(facts)
