"""The commands of docs/flower.md work as they are written there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.command_line import Outcome
from tests.support.flower_app import write_app
from tests.support.flower_control import Control, until
from tests.support.flower_network import BIN, ROOT, WAIT_SECONDS, free_port
from tests.support.marked_processes import MarkedProcess, MarkedProcesses

PAGE = ROOT / "docs" / "flower.md"
BASH = shutil.which("bash") or ""

pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("bash", "openssl", "ssh-keygen"))), reason="needs bash, openssl and ssh-keygen"
)


class Reader:
    """Somebody who types the page's commands in a folder, whose server is this machine."""

    def __init__(self, folder: Path, processes: MarkedProcesses) -> None:
        self.folder, self.port, self._processes = folder, free_port(), processes
        places = {"fl.example.org": "localhost", "0.0.0.0": "127.0.0.1", "/home/me": str(folder)}
        ports = {old: str(self.port if old == "8000" else free_port()) for old in ("8000", "9094", "9095")}
        self._here = places | ports
        # A home of its own, and none of the variables that the page has to name itself.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("FLWR_")}
        self._environment = kept | {
            "HOME": str(folder),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "NO_PROXY": "*",
            "no_proxy": "*",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self._setting, *_ = self.blocks("sh", "export FLWR_TELEMETRY_ENABLED")

    def blocks(self, language: str, begin: str) -> list[str]:
        """Return the page's blocks of a language that begin so, with this machine's names and ports."""
        found = re.findall(rf"^```{language}\n({re.escape(begin)}.*?)^```", PAGE.read_text(), re.DOTALL | re.M)
        assert found, f"no block of {language} begins with {begin!r}"
        return [
            re.sub("|".join(map(re.escape, self._here)), lambda word: self._here[word[0]], block) for block in found
        ]

    def type(self, begin: str, *changed: tuple[str, str]) -> Outcome:
        """Run the block that begins so, after replacing words of it; it must succeed."""
        (block,) = self.blocks("sh", begin)
        for old, new in changed:
            block = block.replace(old, new)
        return self.run(block)

    def run(self, commands: str, *, told: bool = True) -> Outcome:
        """Run commands to their end, which must be a success; `told`: after what the page sets on every machine."""
        done = subprocess.run(
            [BASH, "-euc", f"{self._setting if told else ''}{commands}"],
            cwd=self.folder,
            env=self._processes.environment(self._environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        outcome = Outcome(done.returncode, done.stdout, done.stderr)
        assert outcome.status == 0, outcome
        return outcome

    def start(self, command: str) -> MarkedProcess:
        """Start a command in the background."""
        log = self.folder / f"log-{len(self._processes.started)}.txt"
        line = f"{self._setting}exec {command}"
        return self._processes.start(command.split()[0], [BASH, "-euc", line], log, self.folder, self._environment)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with MarkedProcesses() as processes:
        yield Reader(tmp_path, processes)


def wait_for(control: Control, process: MarkedProcess) -> None:
    until(lambda: process.status is not None or control.answers(), 60)
    assert control.answers(), process.tail()


@pytest.mark.slow
def test_the_way_to_several_machines(reader: Reader) -> None:
    reader.type("openssl req -x509")
    (superlink,) = reader.blocks("sh", "flower-superlink --host")
    control = Control(f"127.0.0.1:{reader.port}", reader.folder / "ca.crt")
    wait_for(control, reader.start(superlink))

    reader.type("ssh-keygen")
    (connection,) = reader.blocks("toml", "[superlink]")
    (reader.folder / ".flwr").mkdir(exist_ok=True)
    (reader.folder / ".flwr" / "config.toml").write_text(connection)
    registered = reader.type("flwr supernode register")
    ((number, status),) = control.nodes().items()
    assert status == "registered"
    assert f"SuperNode {number} registered successfully" in registered.out
    assert str(number) in registered.out

    (supernode,) = reader.blocks("sh", "flower-supernode --superlink")
    node = reader.start(supernode)
    assert until(lambda: control.nodes()[number] == "online", 60), node.tail()

    replies = reader.folder / "replies.json"
    write_app(reader.folder / "app", settings={"replies": str(replies), "nodes": 1})
    run = reader.type("flwr run app ours --stream")
    assert re.search(r"\bcompleted\b", run.out), run.out
    (reply,) = json.loads(replies.read_text())["replies"]
    assert (reply["city"], reply["rank"]) == ("Lund", 4)

    reader.type("flwr supernode unregister", ("NUMBER", str(number)))
    assert node.wait(WAIT_SECONDS) == 0, node.tail()
    assert control.nodes()[number] == "unregistered"


def test_the_way_on_one_machine(reader: Reader) -> None:
    (block,) = reader.blocks("sh", "flower-superlink --insecure")
    superlink, *supernodes = block.splitlines()
    control = Control(f"127.0.0.1:{reader.port}", None)
    wait_for(control, reader.start(superlink))
    nodes = [reader.start(line) for line in supernodes]
    assert until(lambda: list(control.nodes().values()) == ["online"] * 2, 60), [node.tail() for node in nodes]


# Prints the hosts that Flower's commands look up as they start; none is found.
HOSTS = """
import json, socket, threading
hosts = set()
def refuse(host, *rest, **more):
    hosts.add(str(host))
    raise OSError("no network")
socket.getaddrinfo = refuse
from flwr.supercore import telemetry, update_check
telemetry.event(telemetry.EventType.PING).exception()
update_check.warn_if_flwr_update_available(process_name="flwr")
for thread in threading.enumerate():
    if thread is not threading.main_thread():
        thread.join(30)
print(json.dumps(sorted(hosts)))
"""


@pytest.mark.parametrize(("told", "hosts"), [(True, []), (False, ["api.flower.ai", "telemetry.flower.ai"])])
def test_what_the_page_sets_keeps_flower_from_looking_up_other_hosts(
    reader: Reader, told: bool, hosts: list[str]
) -> None:
    (reader.folder / "hosts.py").write_text(HOSTS)
    assert json.loads(reader.run("python hosts.py", told=told).out) == hosts
