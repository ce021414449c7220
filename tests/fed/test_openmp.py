"""Programs let OpenMP's threads sleep while they wait, before torch is imported; the library sets nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fed import openmp
from fed.experiments import parallel

ROOT = Path(__file__).resolve().parent.parent.parent
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
# Prints the setting at the moment torch is imported, and ends.
AT_TORCH = """
import os, runpy, sys
class Look:
    def find_spec(self, name, *rest):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"))
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Look())
"""


def printed(code: str, **choices: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in CHOICES} | choices
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


PROGRAMS = {
    "fed": "sys.argv = ['fed', 'run', 'digits']; runpy.run_module('fed', run_name='__main__')",
    "plora-fed": "from fed.cli import main; main(['report', 'nowhere'])",
    "bench.gpu": "runpy.run_module('bench.gpu', run_name='__main__')",
    "bench.clients": "runpy.run_module('bench.clients', run_name='__main__')",
    "bench.tune": "runpy.run_module('bench.tune', run_name='__main__')",
    "the suites": "import pytest; pytest.main(['bench', '--collect-only', '-qs'])",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_sets_a_passive_wait_before_torch_is_imported(program: str) -> None:
    assert printed(AT_TORCH + program).splitlines()[-1] == "PASSIVE"


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_the_user_stays(choice: str) -> None:
    wanted = "ACTIVE" if choice == "OMP_WAIT_POLICY" else "None"
    assert printed(AT_TORCH + PROGRAMS["plora-fed"], **{choice: "ACTIVE"}) == wanted


def test_the_library_leaves_the_environment_alone() -> None:
    code = "import os; before = dict(os.environ); import fed.cli, fed.commands, plora_kernels; "
    assert printed(code + "print([name for name in os.environ if os.environ[name] != before.get(name)])") == "[]"


def test_nothing_is_set_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    openmp.wait_passively()
    assert dict(os.environ) == before


def test_workers_wait_passively_and_the_process_that_starts_them_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []
    started = "multiprocessing.process.BaseProcess.start"
    monkeypatch.setattr(started, lambda process: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    before = dict(os.environ)
    parallel._Worker(tmp_path)
    assert seen == ["PASSIVE"]
    assert dict(os.environ) == before
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    parallel._Worker(tmp_path)
    assert seen == ["PASSIVE", None]
    assert os.environ["GOMP_SPINCOUNT"] == "7"
