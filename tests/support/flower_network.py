"""A real Flower network on 127.0.0.1: a SuperLink and SuperNodes, each a process with a home of its own."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.command_line import Outcome
from tests.support.flower_control import Control, RunEnd, until
from tests.support.flower_keys import Certificates, make_certificates, public_pem
from tests.support.marked_processes import MarkedProcess, MarkedProcesses

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
# Nothing leaves the machine, nothing is installed, and no proxy stands before 127.0.0.1.
OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "HF_HUB_OFFLINE": "1",
    "NO_PROXY": "*",
    "no_proxy": "*",
}
# A SuperNode without work sleeps for 3 seconds, a literal in Flower; this is one that sleeps for its first argument.
QUICK_NODE = """
import sys, time, types
from flwr.supernode import start_client_internal
from flwr.supernode.cli import flower_supernode
idle = float(sys.argv.pop(1))
clock = types.SimpleNamespace(**vars(time))
clock.sleep = lambda seconds: time.sleep(min(seconds, idle))
start_client_internal.time = clock
sys.exit(flower_supernode())
"""
# Ports below those that Linux hands out to outgoing connections.
PORTS = (20000, 32000)
WAIT_SECONDS = 60.0


def toml_pairs(values: Mapping[str, object]) -> str:
    """Return `name=value …` as `--node-config` and `--run-config` want it: values in TOML, text in quotes."""
    # The JSON of text, numbers and booleans is TOML as well.
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, drawn so that tests beside this one draw others."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(*PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class SuperNode:
    """What a SuperNode is started with, and its latest process.

    config: its node configuration. key: a private key's file. trust: the options that say which SuperLink it accepts.
    superlink: the HOST:PORT it connects to. port: where its own processes ask it for work.
    """

    name: str
    config: Mapping[str, object]
    key: Path | None
    trust: Sequence[str]
    superlink: str
    home: Path
    port: int = field(default_factory=free_port)
    process: MarkedProcess | None = None

    @property
    def running(self) -> MarkedProcess:
        """The latest process."""
        assert self.process is not None, f"{self.name} was never started"
        return self.process


class FlowerNetwork:
    """A SuperLink, started by entering the context, and SuperNodes; at the context's end all processes are killed.

    node_configs: a SuperNode is started for each, and waited for. tls: HTTPS, with the certificate of a new authority.
    authentication: only SuperNodes with registered keys are let in; it implies HTTPS. database: the SuperLink keeps its
    state in a file, which outlives it. poll_seconds: how often a SuperExec asks for work (Flower's default is 1).
    idle_seconds: how often a SuperNode does that has none (Flower's is 3, which None leaves).
    environment: more variables for all processes.
    """

    def __init__(
        self,
        folder: Path,
        node_configs: Sequence[Mapping[str, object]] = (),
        *,
        tls: bool = False,
        authentication: bool = False,
        database: bool = False,
        poll_seconds: float = 0.05,
        idle_seconds: float | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.port = folder, free_port()
        self.certificates: Certificates | None = make_certificates(folder / "tls") if tls or authentication else None
        self.nodes: list[SuperNode] = []
        self.superlink: MarkedProcess | None = None
        self._configs, self._authentication, self._database = node_configs, authentication, database
        self._node_command = [str(BIN / "flower-supernode")]
        if idle_seconds is not None:
            self._node_command = [sys.executable, "-c", QUICK_NODE, str(idle_seconds)]
        hidden = ("FORCE_COLOR", "TTY_COMPATIBLE")
        self._environment = {name: value for name, value in os.environ.items() if name not in hidden}
        self._environment |= OFFLINE | {
            "PATH": f"{BIN}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": str(ROOT),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": str(poll_seconds),
            **(environment or {}),
        }
        self._processes = MarkedProcesses()
        self.control = Control(self.address, self.certificates.authority if self.certificates else None)

    def __enter__(self) -> FlowerNetwork:
        try:
            self.start_superlink()
            nodes = [self.add_node(config) for config in self._configs]
            self.wait_online(nodes)
        except BaseException:
            self._processes.end_all()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.end_all()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start_superlink(self) -> None:
        """Start the SuperLink, the first one or another at the same port, and wait until it answers."""
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--disable-runtime-dependency-installation"]
        if self.certificates is None:
            options += ["--insecure"]
        else:
            made = self.certificates
            options += ["--ssl-ca-certfile", str(made.authority), "--ssl-certfile", str(made.certificate)]
            options += ["--ssl-keyfile", str(made.key)]
        options += ["--enable-supernode-auth"] if self._authentication else []
        options += ["--database", str(self.folder / "superlink.db")] if self._database else []
        self.superlink = self._start([str(BIN / "flower-superlink")], options, self.folder / "superlink")
        # A process that has ended will never answer.
        until(lambda: self.link.status is not None or self.control.answers(), WAIT_SECONDS)
        answers = self.link.status is None and self.control.answers()
        assert answers, f"the SuperLink does not answer\n{self.tails()}"

    @property
    def link(self) -> MarkedProcess:
        """The SuperLink's latest process."""
        assert self.superlink is not None, "the SuperLink was never started"
        return self.superlink

    def add_node(
        self,
        config: Mapping[str, object] | None = None,
        *,
        key: Path | None = None,
        trust: Sequence[str] | None = None,
        superlink: str | None = None,
    ) -> SuperNode:
        """Start another SuperNode and return it without waiting; by default it trusts this network's authority.

        key: the private key it proves itself by (`make_key`). trust: instead of `--root-certificates FILE`.
        superlink: HOST:PORT, if not the SuperLink's own.
        """
        if trust is None:
            trust = ["--root-certificates", str(self.certificates.authority)] if self.certificates else ["--insecure"]
        name = f"node-{len(self.nodes)}"
        node = SuperNode(name, config or {}, key, trust, superlink or self.address, self.folder / name)
        self.nodes.append(node)
        self.start_node(node)
        return node

    def start_node(self, node: SuperNode) -> None:
        """Start a SuperNode, or start it again, without waiting."""
        options = ["--superlink", node.superlink, "--port", str(node.port), *node.trust]
        options += ["--node-config", toml_pairs(node.config)] if node.config else []
        options += ["--auth-supernode-private-key", str(node.key)] if node.key else []
        node.process = self._start(self._node_command, options, node.home)

    def register(self, key: Path) -> int:
        """Register the public half of a node's key and return the node's id."""
        return self.control.register(public_pem(key))

    def wait_online(self, nodes: Sequence[SuperNode], seconds: float = WAIT_SECONDS) -> None:
        """Wait until SuperNodes are connected. Raises AssertionError with the logs' ends if one is not in time."""

        def connected() -> bool:
            online = [number for number, status in self.control.nodes().items() if status == "online"]
            return all(node.running.status is None and self.node_id(node) in online for node in nodes)

        def ended() -> list[str]:
            return [node.name for node in nodes if node.running.status is not None]

        until(lambda: connected() or bool(ended()), seconds)
        assert connected(), f"not connected within {seconds} s (ended: {ended()})\n{self.tails()}"

    def node_id(self, node: SuperNode) -> int | None:
        """Return the id that a SuperNode's latest process was given; None until then."""
        marker = "SuperNode ID: "
        lines = [line for line in node.running.text().splitlines() if marker in line]
        return int(lines[-1].partition(marker)[2]) if lines else None

    def submit(self, app: Path, config: Mapping[str, object] | None = None, seconds: float = 120) -> RunEnd:
        """Run a Flower app to its end and return how it ended. Raises AssertionError if it does not end in time."""
        return self.wait_for_run(self.start_run(app, config), seconds)

    def start_run(self, app: Path, config: Mapping[str, object] | None = None) -> int:
        """Start a run of a Flower app with `flwr run` and return its number."""
        options = ["--run-config", toml_pairs(config)] if config else []
        outcome = self.flwr("run", str(app), "network", "--format", "json", *options)
        assert outcome.status == 0, f"{outcome.out}{outcome.err}\n{self.tails()}"
        return int(json.loads(outcome.out)["run-id"])

    def wait_for_run(self, run_id: int, seconds: float = 120) -> RunEnd:
        """Wait until a run has ended. Raises AssertionError with the ends of the logs if it does not in time."""
        done = until(lambda: self.control.finished(run_id), seconds)
        assert done, f"run {run_id} did not end within {seconds} s\n{self.tails()}"
        return self.control.end(run_id)

    def flwr(self, *arguments: str, trust: str | None = None, seconds: float = WAIT_SECONDS) -> Outcome:
        """Call `flwr`, whose connection `network` is this SuperLink; `trust` is the connection's second line."""
        home = self.folder / "user"
        home.mkdir(exist_ok=True)
        if trust is None:
            trust = f"root-certificates = '{self.certificates.authority}'" if self.certificates else "insecure = true"
        (home / "config.toml").write_text(f"[superlink.network]\naddress = '{self.address}'\n{trust}\n")
        done = subprocess.run(
            [str(BIN / "flwr"), *arguments],
            cwd=self.folder,
            env=self._processes.environment(self._environment | {"FLWR_HOME": str(home)}),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    def stop(self, node: SuperNode) -> None:
        """Ask a SuperNode to end, as Ctrl-C does, and wait: the SuperLink then knows at once that it is offline."""
        node.running.send(signal.SIGTERM)
        node.running.wait(WAIT_SECONDS)

    def running_processes(self) -> dict[int, list[str]]:
        """Return the commands of all processes of the network by their numbers, also of those that others started."""
        found = {}
        for pid in self._processes.pids():
            with suppress(OSError):  # it has ended
                found[pid] = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")
        return found

    def kill(self, process: MarkedProcess) -> None:
        """Kill a SuperLink or SuperNode as a failing machine would: with all that it has started."""
        family = self._processes.family(process.pid)
        process.send(signal.SIGKILL)
        process.wait(WAIT_SECONDS)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def tails(self) -> str:
        """Return the ends of all processes' logs, without the lines about this class's own questions."""
        return "".join(
            process.tail(hidden=("/v1/control/list-", "ControlServicer.List")) for process in self._processes.started
        )

    def _start(self, command: Sequence[str], options: Sequence[str], home: Path) -> MarkedProcess:
        home.mkdir(exist_ok=True)
        environment = self._environment | {"FLWR_HOME": str(home / "flwr")}
        log = home / f"log-{len(list(home.glob('log-*.txt')))}.txt"
        return self._processes.start(home.name, [*command, *options], log, home, environment)
