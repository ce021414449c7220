"""The two short runs on a GPU: their plans fit the time, a hang costs its step only, both run under the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from bench import gpu, sitting, timeline
from bench.device import state
from bench.gpu_cases import TIMELINE_CASES
from bench.harness.records import load_records
from bench.sitting import Step
from bench.tune import command

ROOT = Path(__file__).parents[2]
# Libraries that a GPU machine need not have: those of other extras than `bench`.
ABSENT = ("pydantic", "typer", "tomli_w", "flwr", "flwr_datasets", "datasets", "dp_accounting", "trl")
PARSERS = {"bench.gpu": gpu.parse, "bench.tune": command.parse, "bench.timeline": timeline.parse}


def run(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    command = [sys.executable, "-m", "bench.sitting", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def python(name: str, code: str, limit_s: float = 20.0) -> Step:
    return Step(name, "timeit", ("-n", "1", "-r", "1", code), 1.0, limit_s, budget=False)


def sit(out: Path, steps: Sequence[Step], seconds: float) -> list[sitting.Done]:
    return sitting.sit("first", steps, out, "cpu", time.monotonic() + seconds)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", list(sitting.LIMITS))
def test_the_plan_fits_its_sitting(name: str, device: str, tmp_path: Path) -> None:
    assert sitting.LIMITS == {"first": 300.0, "second": 420.0}
    steps = sitting.plan(name, tmp_path, device)
    assert all(step.seconds <= step.limit_s for step in steps)
    # Even where every step hangs.
    assert sum(step.limit_s for step in steps) + sitting.OVERHEAD_SECONDS <= sitting.LIMITS[name]
    assert sum(step.seconds for step in steps) + sitting.OVERHEAD_SECONDS <= sitting.LIMITS[name] - 10


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("name", list(sitting.LIMITS))
def test_every_step_is_a_command_that_exists(name: str, device: str, tmp_path: Path) -> None:
    for step in sitting.plan(name, tmp_path, device):
        if step.module != "pytest":
            parsed = PARSERS[step.module]([*step.arguments, "--budget-seconds", "9"])
            assert (parsed.out, parsed.device) == (tmp_path, device)


def test_the_first_sitting_tunes_the_gate_and_times_it_with_and_without_what_was_found(tmp_path: Path) -> None:
    steps = {step.name: step for step in sitting.plan("first", tmp_path, "cuda")}
    assert list(steps) == ["facts", "tests", "tuner", "tuned", "timeline", "defaults"]
    classes = command.choose_classes(command.parse(steps["tuner"].arguments))
    assert [shape.op for shape in classes] == [
        *("side_product", "output_gradient", "factor_gradient", "forward", "input_gradient", "fold")
    ]
    tuned, defaults = (gpu.parse(steps[name].arguments) for name in ("tuned", "defaults"))
    assert gpu.choose_work(tuned).cases == gpu.choose_work(defaults).cases
    assert len(gpu.choose_work(tuned).cases) == sitting.FIRST_CASES
    assert {*TIMELINE_CASES} <= {*gpu.choose_work(tuned).cases}
    assert (tuned.defaults, defaults.defaults) == (False, True)
    assert {shape.dtype for shape in gpu.choose_work(tuned).first_checks} == {"bfloat16", "mixed-bfloat16"}
    assert gpu.choose_work(tuned).last_checks == []
    assert gpu.choose_work(gpu.parse(steps["facts"].arguments)) == state.Work([], [], (), [])


def test_a_full_disk_ends_a_sitting_that_says_what_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(sitting, "write_text", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*sitting\.json'"):
        sit(tmp_path, [python("first", "print(1)", 8.0), python("second", "print(2)", 8.0)], 20.0)
    assert "left: first, second; the same command goes on from here" in capsys.readouterr().out


def test_records_name_the_code_where_there_is_no_git(tmp_path: Path) -> None:
    for name in sitting.LIMITS:
        steps = [step for step in sitting.plan(name, tmp_path, "cuda", "0a1b2c3") if step.module != "pytest"]
        assert steps
        assert {PARSERS[step.module](step.arguments).commit for step in steps} == {"0a1b2c3"}


def test_a_hang_costs_its_share_and_what_is_not_used_goes_to_the_next(tmp_path: Path) -> None:
    steps = [
        python("quick", "print('said')", 2.0),
        python("hangs", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)", 2.0),
        python("fails", "import os; os._exit(7)", 6.0),
    ]
    began = time.monotonic()
    done = sit(tmp_path, steps, 12.0)
    assert time.monotonic() - began < 12.0
    assert [(step.step, step.status) for step in done] == [("quick", 0), ("hangs", None), ("fails", 7)]
    assert done[0].limit_s == pytest.approx(4.0, abs=1.0)
    assert done[1].limit_s > 2.0
    assert "said" in (tmp_path / "sitting.log").read_text()
    assert [step["step"] for step in json.loads((tmp_path / "sitting.json").read_text())] == ["quick", "hangs", "fails"]


def test_a_step_that_says_much_is_cut_in_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sitting, "LOG_BYTES", 1000)
    (done,) = sit(tmp_path, [python("loud", "for i in range(100000): print(i)")], 30.0)
    assert done.status == 0
    log = (tmp_path / "sitting.log").read_text()
    assert len(log) < 2000
    assert "(the rest is left out)" in log


def test_records_of_other_code_are_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text("[]")
    code = f"""
from pathlib import Path
if Path({str(path)!r}).exists():
    print("error: made with source 1, now it is 2; --fresh starts over")
    import os, sys
    sys.stdout.flush()
    os._exit(2)"""
    (done,) = sit(tmp_path, [python("gpu", code)], 30.0)
    assert done.status == 0
    assert sorted(p.name for p in tmp_path.glob("*.json")) == ["device-before.json", "sitting.json"]


def test_an_earlier_sitting_is_taken_up_where_nothing_is_in_its_place(tmp_path: Path) -> None:
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    (earlier / "tables").mkdir(parents=True)
    (earlier / "tables" / "a.json").write_text("table")
    (earlier / "timeline").mkdir()
    (earlier / "timeline" / "a.json").write_text("timeline")
    (earlier / "a.json").write_text("old")
    (earlier / "sitting.log").write_text("log")
    out.mkdir()
    (out / "a.json").write_text("new")
    sitting.take_up(earlier, out)
    assert (out / "a.json").read_text() == "new"
    assert (out / "tables" / "a.json").read_text() == "table"
    assert (out / "timeline" / "a.json").read_text() == "timeline"
    assert not (out / "sitting.log").exists()


def test_the_caller_s_kernel_cache_is_left_alone(tmp_path: Path) -> None:
    for device in ("cuda", "cpu"):
        assert "TRITON_CACHE_DIR" not in sitting.environment_of(tmp_path, device)
    assert sitting.environment_of(tmp_path, "cuda")["PLORA_KERNELS_CACHE"] == str(tmp_path / "tables")


@pytest.mark.slow
def test_both_sittings_go_through_under_the_interpreter(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    path = tmp_path / "path"
    path.mkdir()
    (path / "sitecustomize.py").write_text(f"import sys; sys.modules |= dict.fromkeys({ABSENT})")
    absent = {"PYTHONPATH": os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])}
    done = run("first", "--out", str(first), "--device", "cpu", "--limit-seconds", "600", **absent)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = {step["step"]: step["status"] for step in json.loads((first / "sitting.json").read_text())}
    assert steps == dict.fromkeys(("facts", "tests", "tuner", "tuned", "timeline", "defaults"), 0)
    meta, tuned = load_records(first / "cpu.json")
    assert meta["ceilings"]
    table = {record["tables"] for record in tuned}
    assert len(table) == 1
    assert None not in table
    assert {record["tables"] for record in load_records(first / "cpu-defaults.json")[1]} == {None}
    assert {record["op"] for record in tuned} == {"check", "forward", "forward_backward"}
    profiled = load_records(first / "timeline" / "cpu.json")[1]
    assert [record["provider"] for record in profiled] == ["fused", "inplace"]
    done = run(
        "second", "--out", str(second), "--device", "cpu", "--earlier", str(first), "--limit-seconds", "900", **absent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 left" in (second / "sitting.log").read_text()
    _, everything = load_records(second / "cpu.json")
    assert everything[: len(tuned)] == tuned
    assert {record["op"] for record in everything} > {"simulation", "fold", "check"}
    assert "forward 32 64 48 4 float32" in done.stdout
    for folder in (first, second):
        files = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
        assert len(files) <= 8
        assert all(len(path.parts) <= 2 for path in files)
        assert max((folder / path).stat().st_size for path in files) < 16 * 2**20
