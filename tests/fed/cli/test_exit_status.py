"""What an interrupted process ends with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fed.errors import INTERRUPTED

ROOT = Path(__file__).resolve().parents[3]
# A command that is interrupted while C code, as a library's that is just imported, runs Python. Python notes that, and
# would end the process by SIGINT whatever its status.
COMMAND = """
import ctypes
import fed.cli

def main():
    run = ctypes.pythonapi.PyRun_String
    run.restype, run.argtypes = ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int, ctypes.py_object, ctypes.py_object]
    try:
        run(b"raise KeyboardInterrupt", 257, {}, {})
    except KeyboardInterrupt:
        raise SystemExit(STATUS) from None

fed.cli.main = main
"""


@pytest.mark.parametrize("status", [INTERRUPTED, -2])
def test_an_interrupted_process_ends_with_its_status(status: int, tmp_path: Path) -> None:
    """The second one, which is not the status of an interrupted run, shows that Python would end it by the signal."""
    command = COMMAND.replace("STATUS", str(INTERRUPTED if status == INTERRUPTED else 1))
    (tmp_path / "sitecustomize.py").write_text(command, encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    ended = subprocess.run([sys.executable, "-m", "fed"], env=environment, cwd=ROOT, check=False)
    assert ended.returncode == status
