"""A long run over a real Flower network, and how the memory and the open files of its processes go.

`python -m tests.support.flower_soak --rounds 1000 --out docs/results/flower` plays rounds of one tiny client on one
SuperNode, which is started by `QUICK_NODE`, so that an idle one asks for work after a tenth of a second in place of
three. It writes `soak.json` every few seconds, and at the end `soak.png`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.flower_network import FlowerNetwork
from tests.support.processes import Process

SETTINGS = [
    *("method=fedsa-lora", "engine.mode=deployment", "clients.count=1", "clients.per_round=1", "clients.ranks=[4]"),
    *("adapter.rank=4", "train.local_steps=1", "model.pretrain_steps=1", "data.train_rows=40", "data.test_rows=20"),
    *("measure.noise=false", "measure.similarity=false", "measure.memory=false", "measure.clients=false", "threads=1"),
]
# A process by what its command contains; one for each message, `flwr-clientapp`, does not live long enough to grow.
ROLES = {
    "SuperLink": "flower-superlink",
    "ServerApp": "flwr-serverapp",
    "SuperNode": "start_client_internal",
    "trainer": "fed.flower.trainer",
}


def sample(network: FlowerNetwork) -> dict[str, dict[str, float]]:
    """Return the resident memory in MB (10^6 bytes) and the number of open files of each role's process."""
    found: dict[str, dict[str, float]] = {}
    for pid, command in network.running_processes().items():
        for role, part in ROLES.items():
            if any(part in argument for argument in command) and "flower-superexec" not in command[0]:
                with suppress(OSError):  # it has ended
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                    rss = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
                    files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
                    if rss > found.get(role, {"rss_mb": 0.0})["rss_mb"]:
                        found[role] = {"rss_mb": round(rss, 3), "files": files}
    return found


def slopes(samples: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the growth per 1,000 rounds over the second half of the rounds, by a line of least squares."""
    last = samples[-1]["round"] if samples else 0
    late = [one for one in samples if one["round"] >= last / 2]
    found: dict[str, dict[str, float]] = {}
    for role in ROLES:
        there = [one for one in late if role in one]
        rounds = np.array([one["round"] for one in there], float)
        if len(set(rounds)) > 1:
            found[role] = {
                f"{name}_per_1000_rounds": round(
                    float(np.polyfit(rounds, [one[role][name] for one in there], 1)[0]) * 1000, 3
                )
                for name in ("rss_mb", "files")
            }
    return found


def soak(rounds: int, out: Path, folder: Path, every: float) -> None:
    """Play the rounds, and write the samples to `out`."""
    out.mkdir(parents=True, exist_ok=True)
    samples: list[dict[str, Any]] = []
    with FlowerNetwork(
        folder / "network", [{"partition-id": 0, "state": str(folder / "state")}], poll_seconds=0.2, idle_seconds=0.1
    ) as network:
        arguments = ["run", "digits", *SETTINGS, f"rounds={rounds}", "--out", str(folder / "run"), "--no-centralised"]
        began = time.monotonic()
        with Process(folder / "command", *arguments, "--flower", f"http://{network.address}") as command:
            while command.running:
                time.sleep(every)
                rows = folder / "run" / "rounds.jsonl"
                played = max(0, len(rows.read_text().splitlines()) - 1) if rows.exists() else 0
                samples.append({"seconds": round(time.monotonic() - began, 1), "round": played, **sample(network)})
                facts = {"settings": SETTINGS, "rounds": rounds, "slopes": slopes(samples), "samples": samples}
                (out / "soak.json").write_text(json.dumps(facts, indent=1) + "\n")
            outcome = command.wait(60)
        if outcome.status:
            sys.exit(f"{outcome.out[-3000:]}{outcome.err}{network.tails()}")
    draw(samples, out / "soak.png")


def draw(samples: list[dict[str, Any]], path: Path) -> None:
    """Draw memory and open files over the rounds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    memory, files = figure.subplots(1, 2)
    for role in ROLES:
        there = [one for one in samples if role in one]
        rounds = [one["round"] for one in there]
        memory.plot(rounds, [one[role]["rss_mb"] for one in there], label=role)
        files.plot(rounds, [one[role]["files"] for one in there], label=role)
    for axes, title in ((memory, "resident memory, MB"), (files, "open files")):
        axes.set_title(title)
        axes.set_xlabel("round")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    memory.legend(loc="center right")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="where the run and the network live; by default a temporary folder")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two samples")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        soak(options.rounds, options.out.absolute(), (options.folder or Path(name)).absolute(), options.every)
