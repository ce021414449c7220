"""The network of the tests itself: its processes end, and nodes and runs are told apart."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.flower_control import until
from tests.support.flower_network import ROOT, FlowerNetwork
from tests.support.marked_processes import MarkedProcesses
from tests.support.processes import alive

# Starts a process that starts another in a session of its own; prints both and waits.
FAMILY = """
import subprocess, sys, time
code = "import time; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def first_line(path: Path) -> str:
    assert until(lambda: path.read_text().endswith("\n"), 30)
    return path.read_text().splitlines()[0]


def test_a_grandchild_in_a_session_of_its_own_ends_too(tmp_path: Path) -> None:
    with MarkedProcesses() as processes:
        command = [sys.executable, "-c", FAMILY]
        process = processes.start("family", command, tmp_path / "log.txt", tmp_path, dict(os.environ))
        grandchild = int(first_line(tmp_path / "log.txt"))
        assert processes.family(process.pid) == [grandchild]
        assert sorted(processes.pids()) == sorted([process.pid, grandchild])
    assert not alive(process.pid)
    assert not alive(grandchild)


def test_processes_of_another_test_are_left_alone(tmp_path: Path) -> None:
    with MarkedProcesses() as mine, MarkedProcesses() as others:
        command = [sys.executable, "-c", "import time; time.sleep(600)"]
        started = others.start("other", command, tmp_path / "log.txt", tmp_path, dict(os.environ))
        assert until(lambda: others.pids() == [started.pid], 30)
        assert mine.pids() == []
        mine.end_all()
        assert alive(started.pid)


@pytest.mark.slow
def test_a_process_ends_with_the_test_process(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from tests.support.marked_processes import MarkedProcesses\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "command = [sys.executable, '-c', 'import time; time.sleep(600)']\n"
        "child = MarkedProcesses().start('child', command, folder / 'log.txt', folder, dict(os.environ))\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as tester:
        assert tester.stdout is not None
        child = int(tester.stdout.readline())
        assert alive(child)
        tester.send_signal(signal.SIGKILL)
    assert until(lambda: not alive(child), 30)


@pytest.mark.slow
def test_a_network_leaves_no_process_when_its_test_fails(tmp_path: Path) -> None:
    pids: list[int] = []

    def fail_in_the_middle() -> None:
        with FlowerNetwork(tmp_path, [{}]) as network:
            pids.extend([network.link.pid, network.nodes[0].running.pid])
            assert all(alive(pid) for pid in pids)
            raise RuntimeError("the test fails")

    with pytest.raises(RuntimeError, match="the test fails"):
        fail_in_the_middle()
    assert not any(alive(pid) for pid in pids)


@pytest.mark.slow
def test_a_node_that_ends_is_an_error_with_its_log(tmp_path: Path) -> None:
    with FlowerNetwork(tmp_path) as network:
        node = network.add_node(trust=["--insecure", "--no-such-option"])
        with pytest.raises(AssertionError, match=r"(?s)ended: \['node-0'\].*unrecognized arguments: --no-such-option"):
            network.wait_online([node])
