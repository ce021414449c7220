"""Handing a run to a SuperLink, as `flwr run` does, and following it to its end."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from fed.config import RunConfig
from fed.config.engine import EngineConfig
from fed.errors import INTERRUPTED, FedError, printable

APP = Path(__file__).parent  # its pyproject.toml is the Flower app
_CONNECTION = "superlink"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LEVEL = re.compile(r"^(INFO|WARNING|DEBUG|ERROR) *:\s{0,12}")
_BOXED = re.compile(r"^│ *(.*?) *│$", re.MULTILINE)  # how flwr shows an error
_STARTED = re.compile(r"Successfully started run (\d+)")


def run(config: RunConfig, out: Path, overwrite: bool, centralised: bool) -> int:
    """Have a run played by the SuperLink of `engine.address`; show what it says, and return the exit status.

    The ServerApp writes the run's directory, at the same path on the SuperLink's machine.
    """
    asked = {
        "settings": json.dumps(config.model_dump(mode="json", exclude_none=True)),
        "out": str(out.absolute()),
        "overwrite": overwrite,
        "centralised": centralised,
    }
    return _played(config.engine, asked, out)


def resume(engine: EngineConfig, out: Path, centralised: bool) -> int:
    """Have a run in a directory on the SuperLink's machine continued; return the exit status."""
    return _played(engine, {"out": str(out.absolute()), "centralised": centralised, "resume": True}, out)


def _played(engine: EngineConfig, asked: Mapping[str, Any], out: Path) -> int:
    if not engine.address:
        raise FedError("engine.address is empty: the SuperLink's HOST:PORT would be right")
    if engine.root_certificates is not None and not Path(engine.root_certificates).is_file():
        raise FedError(f"engine.root_certificates is {str(engine.root_certificates)!r}: there is no such file")
    with tempfile.TemporaryDirectory(prefix="plora-flower-") as name:
        home, settings, app = Path(name) / "home", Path(name) / "run.toml", Path(name) / "federation"
        for folder in (home, app):
            folder.mkdir()
        (home / "config.toml").write_text(tomli_w.dumps(_connections(engine)), encoding="utf-8")
        (app / "pyproject.toml").write_text((APP / "pyproject.toml").read_text(encoding="utf-8"), encoding="utf-8")
        settings.write_text(tomli_w.dumps(dict(asked)), encoding="utf-8")
        quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
        environment = {**quiet, **os.environ, "FLWR_HOME": str(home)}
        return _follow([str(app), _CONNECTION, "--stream", "--run-config", str(settings)], environment, engine, out)


def _connections(engine: EngineConfig) -> dict[str, Any]:
    """Return Flower's own configuration with the one connection of a run."""
    address = engine.address.removeprefix("https://")
    connection: dict[str, Any] = {"address": address.removeprefix("http://")}
    if address.startswith("http://"):
        connection["insecure"] = True
    elif engine.root_certificates is not None:
        connection["root-certificates"] = str(Path(engine.root_certificates).absolute())
    return {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}


def _flwr(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from flwr.cli.app import app; app()", *arguments]


def _follow(arguments: list[str], environment: dict[str, str], engine: EngineConfig, out: Path) -> int:
    """Start the run, print its lines until it ends, and return the exit status; Ctrl-C stops the run."""
    number, tail = None, ""
    process = subprocess.Popen(
        _flwr("run", *arguments),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            shown = printable(_LEVEL.sub("", _COLOUR.sub("", line.rstrip())))
            if number is None and (found := _STARTED.search(shown)):
                number = found[1]
            elif number is not None:
                print(shown, flush=True)
            tail = f"{tail}{shown}\n"[-2000:]
        process.wait()
    except KeyboardInterrupt:
        process.kill()
        if number is not None:
            stop = _flwr("stop", number, _CONNECTION)
            subprocess.run(stop, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        print(f"interrupted: the rounds so far are in {out}; python -m fed resume {out} continues", file=sys.stderr)
        return INTERRUPTED
    finally:
        process.stdout.close()
    if number is None:
        said = " ".join(_BOXED.findall(tail)) or tail
        raise FedError(f"the SuperLink at {engine.address} did not take the run: {' '.join(said.split())[-600:]}")
    status = _status(number, environment)
    if status == "unknown":
        raise FedError(
            f"the SuperLink at {engine.address} no longer answers; once it does, python -m fed resume {out} continues"
        )
    if not status.startswith("finished"):
        raise FedError(
            f"the connection to the SuperLink at {engine.address} broke, which has the run as {status!r}: once flwr "
            f"list shows that it has ended, python -m fed resume {out} continues"
        )
    if status != "finished:completed":
        raise FedError(f"the run ended as {status!r} at the SuperLink; what it said is above")
    return 0


def _status(number: str, environment: dict[str, str]) -> str:
    """Return how Flower says that a run stands, such as "finished:completed"."""
    asked = _flwr("list", _CONNECTION, "--run-id", number, "--format", "json")
    listed = subprocess.run(
        asked, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
    )
    try:
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    except (ValueError, KeyError, IndexError, TypeError):
        return "unknown"
