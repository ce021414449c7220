"""Programs let OpenMP's threads sleep while they wait if the machine is busy; the library sets nothing."""

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


BUSY, IDLE = (f"from fed import openmp; openmp.idle_cores = lambda: {cores}; " for cores in (0.0, 1e9))
PROGRAMS = {
    "fed": "sys.argv = ['fed', 'run', 'digits']; runpy.run_module('fed', run_name='__main__')",
    "plora-fed": "from fed.cli import main; main(['report', 'nowhere'])",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
@pytest.mark.parametrize(("machine", "wanted"), [(BUSY, "PASSIVE"), (IDLE, "None")], ids=["busy", "idle"])
def test_a_program_waits_passively_on_a_busy_machine_alone(program: str, machine: str, wanted: str) -> None:
    assert printed(AT_TORCH + machine + program).splitlines()[-1] == wanted


def test_benchmarks_do_not_depend_on_what_runs_beside_them() -> None:
    assert printed(AT_TORCH + BUSY + "runpy.run_module('bench.gpu', run_name='__main__')") == "None"


def test_idle_cores_are_counted_from_ticks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # Of 4 cores and 40 ticks each, 60 of all 160 were idle or waiting for a disk: 1.5 cores.
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 100 1000 50 0 0 0 0 0\ncpu0 1 1 1 1\n")
    later = "cpu  170 5 120 1040 70 1 2 2 0 0\ncpu0 1 1 1 1\n"
    monkeypatch.setattr(openmp, "_STAT", stat)
    monkeypatch.setattr(openmp.os, "cpu_count", lambda: 4)
    monkeypatch.setattr(openmp.time, "sleep", lambda seconds: stat.write_text(later))
    assert openmp.idle_cores() == 60 / 160 * 4
    for unreadable in ("", "cpu  one two\n", "cpu  1 2\n"):
        stat.write_text(unreadable)
        assert openmp.idle_cores() == float("inf")
    monkeypatch.setattr(openmp, "_STAT", tmp_path / "none")
    assert openmp.idle_cores() == float("inf")


@pytest.mark.parametrize("choice", CHOICES)
def test_a_choice_of_the_user_stays(choice: str) -> None:
    wanted = "ACTIVE" if choice == "OMP_WAIT_POLICY" else "None"
    assert printed(AT_TORCH + BUSY + PROGRAMS["plora-fed"], **{choice: "ACTIVE"}) == wanted


def test_the_library_leaves_the_environment_alone() -> None:
    code = "import os; before = dict(os.environ); import fed.cli, fed.commands, plora_kernels; "
    assert printed(code + "print([name for name in os.environ if os.environ[name] != before.get(name)])") == "[]"


def test_nothing_is_set_once_torch_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(openmp, "idle_cores", lambda: 0.0)
    before = dict(os.environ)
    openmp.wait_passively_if_busy()
    assert dict(os.environ) == before


def test_crowded_workers_wait_passively_and_the_process_that_starts_them_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    seen: list[str | None] = []
    started = "multiprocessing.process.BaseProcess.start"
    monkeypatch.setattr(started, lambda process: seen.append(os.environ.get("OMP_WAIT_POLICY")))
    before = dict(os.environ)
    parallel._Worker(tmp_path, crowded=False)
    parallel._Worker(tmp_path, crowded=True)
    assert seen == [None, "PASSIVE"]
    assert dict(os.environ) == before
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    parallel._Worker(tmp_path, crowded=True)
    assert seen == [None, "PASSIVE", None]
    assert os.environ["GOMP_SPINCOUNT"] == "7"
