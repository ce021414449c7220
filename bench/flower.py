"""Clients a second over Flower, on one SuperNode and on two, each with a core of its own.

`python -m bench.flower --out docs/results/flower` writes `nodes.json`, of which `python -m bench.report` makes a table.
The SuperLink and the SuperNodes run on 127.0.0.1, SuperNode i on core i alone. A round's time is that between two rows
of the run, so it holds all that a round does: messages, training, aggregation, and the checkpoint. The first round, in
which the machines load the model's code, does not count.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.harness.machine import commit_of, environment, timestamp, usable_cores
from bench.harness.records import ResultsError, write_text
from bench.report.node_tables import NODES

SETTINGS = (
    *("engine.mode=simulation", "clients.ranks=[4, 8, 16, 16]", "data.partition=iid", "data.test_rows=20", "threads=1"),
    *("model.pretrain_steps=5", "measure.noise=false", "measure.similarity=false", "measure.memory=false"),
    "measure.clients=false",
)
BIN = Path(sys.executable).parent
LOOK_SECONDS = 0.05


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure rounds on one SuperNode and on several, and write the results."""
    parser = argparse.ArgumentParser(prog="python -m bench.flower", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 2], help="how many SuperNodes, in turn")
    parser.add_argument("--clients", type=int, default=40, help="in a round")
    parser.add_argument("--steps", type=int, default=240, help="of each client")
    parser.add_argument("--rounds", type=int, default=2, help="that count")
    parser.add_argument("--seconds", type=float, default=900.0, help="after which a run has failed")
    options = parser.parse_args(arguments)
    if max(options.nodes) > usable_cores():
        parser.error(f"{max(options.nodes)} SuperNodes need as many cores; there are {usable_cores()}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the processes end as well
    measured = [_measure(count, options) for count in options.nodes]
    first = measured[0]["clients_per_second"]
    for one in measured:
        one["ratio"] = round(one["clients_per_second"] / first, 3)
        print(f"{one['nodes']} SuperNodes: {one['clients_per_second']:.3f} clients/s, {one['ratio']:.2f} of the first")
    facts = {
        "kind": NODES,
        "timestamp": timestamp(),
        "commit": commit_of(Path.cwd()),
        "environment": environment(torch.device("cpu"), threads=1),
        "settings": list(SETTINGS),
        "clients": options.clients,
        "steps": options.steps,
        "measured": measured,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "nodes.json", json.dumps(facts, indent=1) + "\n")


def _measure(count: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the seconds of rounds on so many SuperNodes, and the clients a second by their median."""
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        port = _free_port()
        address = f"127.0.0.1:{port}"
        link = ["flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port)]
        _start(stack, folder / "superlink", [*link, "--disable-runtime-dependency-installation"])
        _await(lambda: _listens(port), 60, "the SuperLink does not listen")
        for number in range(count):
            node = ["flower-supernode", "--insecure", "--superlink", address, "--port", str(_free_port())]
            _start(stack, folder / f"node-{number}", [*node, "--node-config", "threads=1"], core=number)
        sizes = [f"clients.count={options.clients}", f"clients.per_round={options.clients}"]
        sizes += [f"train.local_steps={options.steps}", f"rounds={options.rounds + 1}", f"engine.nodes={count}"]
        run = [sys.executable, "-m", "fed", "run", "digits", *SETTINGS, *sizes, "--no-centralised"]
        command = [*run, "--out", str(folder / "run"), "--flower", f"http://{address}"]
        process = _start(stack, folder / "command", command)
        moments: list[float] = []
        until = time.monotonic() + options.seconds
        rows = folder / "run" / "rounds.jsonl"
        while len(moments) < options.rounds + 2:
            if time.monotonic() > until or process.poll() not in (None, 0):
                raise ResultsError(f"the run came to {len(moments)} rows:\n{(folder / 'command' / 'log').read_text()}")
            lines = rows.read_text().count("\n") if rows.exists() else 0
            moments += [time.monotonic()] * (lines - len(moments))
            time.sleep(LOOK_SECONDS)
        played = [json.loads(line) for line in rows.read_text().splitlines()]
    if left := [row["round"] for row in played if row.get("late") or row["skipped"]]:
        raise ResultsError(f"clients gave no usable update in round {left[0]}")
    counted = played[2:]
    seconds = [round(after - before, 3) for before, after in pairwise(moments[1:])]
    return {
        "nodes": count,
        "round_seconds": seconds,
        "train_seconds": round(median(row["train_seconds"] for row in counted), 3),
        "bytes": median(row["upload_bytes"] + row["download_bytes"] for row in counted),
        "clients_per_second": round(options.clients / median(seconds), 4),
    }


def _start(stack: ExitStack, home: Path, command: Sequence[str], core: int | None = None) -> "subprocess.Popen[bytes]":
    """Start a process in a folder of its own, perhaps on one core, to be killed at the end with what it started."""
    home.mkdir()
    variables = {
        "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "FLWR_HOME": str(home / "flwr"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "*",
        "PYTHONUNBUFFERED": "1",
    }
    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            command if Path(command[0]).is_absolute() else [str(BIN / command[0]), *command[1:]],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=None
            if core is None
            else lambda: os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[core]]),
        )
    stack.callback(_end, process)
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _await(condition: Any, seconds: float, fault: str) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise ResultsError(fault)
        time.sleep(LOOK_SECONDS)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
