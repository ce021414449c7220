"""Runs of `python -m bench.gpu`: their order, what a crash costs, how they continue, and what options leave out."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu
from bench.cases import Case
from bench.checks import operators
from bench.checks.inputs import CheckShape
from bench.checks.operators import GATE_SHAPES, check_shapes
from bench.device import run as device_run
from bench.device import simulations
from bench.device.jobs import Check, Timing, default_blocks_alone, perform
from bench.device.state import Run, Work, left
from bench.gpu_cases import GATE, TINY, device_cases
from bench.harness import machine, records
from bench.harness.processes import LostProcessError, Outcome, note, outcomes
from bench.harness.records import SIMULATION, RecordFile, load_records
from bench.harness.timing import Plan
from bench.measure import Warmup, untimed
from bench.models.cases import TINY_MODELS, ModelCase
from bench.models.measure import ModelStep, train_model
from bench.models.providers import EAGER, PROVIDERS
from bench.simulation.cases import DIGITS_VIT, SimulationCase
from bench.simulation.measure import Simulation, blamed, simulate, simulation_records
from bench.simulation.providers import COMPILED as COMPILED_STEPS
from plora_kernels.tuning import lookup
from plora_kernels.tuning.blocks import MatmulBlocks, ShapeClass
from plora_kernels.tuning.defaults import default_blocks
from plora_kernels.tuning.tables import Entry, Table

FORWARD = Case("forward", TINY, 32, 4, "float32")
QUICK = ["--device", "cpu", "--rounds", "2", "--providers", "base", "peft", "inplace", "fused"]
STEP = SimulationCase(DIGITS_VIT, 2, 17, 10, "float32")
WHOLE = ModelCase(TINY_MODELS[0], 2, 8, "float32")


def a_run(tmp_path: Path, workers: int = 0, providers: Sequence[str] = gpu.PROVIDERS, seconds: float = 60.0) -> Run:
    now = time.monotonic()
    file = RecordFile(tmp_path / "cpu.json", {"op": "meta"})
    return Run("cpu", file, tuple(providers), workers, Plan(0.0, 2), False, now, now + seconds)


def of_provider(run: Run) -> dict[str, tuple[str, str | None]]:
    return {record["provider"]: (record["status"], record.get("cause")) for record in run.file.records}


def timed(case: Case, names: Sequence[str]) -> list[dict[str, object]]:
    made = [untimed(case, "cpu", name, "timed", "") for name in names]
    return [record | {"time_ms": 1.0, "ratio_to_base": 1.0} for record in made]


def ends_in_inplace(work: Warmup | Timing, *, defaults: bool = False) -> Any:
    """Work whose process ends while *inplace* is warmed up."""
    if isinstance(work, Warmup):
        for name in work.providers:
            note(name)
            if name == "inplace":
                os._exit(9)
        return {}
    assert isinstance(work, Timing)
    failed = [device_run._untimed(work, name, cause) for name, cause in work.failed.items()]
    return timed(work.case, [name for name in work.providers if name not in work.failed]) + failed


def hangs_in_fused(work: Warmup | Timing, *, defaults: bool = False) -> Any:
    """Work whose device fails once *fused* was timed, and which hangs in *peft-compiled*."""
    if isinstance(work, Warmup):
        return {}
    assert isinstance(work, Timing)
    for name in work.providers:
        note(name)
        if name == "fused" and name not in work.failed:
            raise LostProcessError("an illegal address")
        if name == "peft-compiled" and name not in work.failed:
            time.sleep(600.0)
    return ends_in_inplace(work)


def hangs_in_a_form(work: Check, *, defaults: bool = False) -> Any:
    """A check that hangs in its second form."""
    shape, found = work.shape, []
    for form in work.forms:
        if form == "folded mask":
            time.sleep(600.0)
        found.append(operators.check_record(shape, form) | {"status": "passed"})
        note(found[-1])
    return found


@pytest.mark.slow
def test_who_really_ran_is_blamed_for_a_death_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_run, "perform", ends_in_inplace)
    run = a_run(tmp_path, workers=1)
    device_run.do(run, Work([], [FORWARD], [], []))
    found = of_provider(run)
    assert found.pop("inplace") == ("not available", "its process ended with status 9")
    assert {status for status, _ in found.values()} == {"timed"}
    assert "fused" in found


@pytest.mark.slow
def test_a_lost_device_and_a_hang_while_timing_cost_one_provider_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_run, "perform", hangs_in_fused)
    monkeypatch.setattr(device_run, "TIMING_SECONDS", 2.0)
    run = a_run(tmp_path, workers=1)
    device_run.do(run, Work([], [FORWARD], [], []))
    found = of_provider(run)
    assert found.pop("fused") == ("wrong", "an illegal address")
    assert found.pop("peft-compiled") == ("not available", "not done after 2 s; its process was stopped")
    assert {status for status, _ in found.values()} == {"timed"}
    assert list(found) == ["base", "peft", "peft-autocast", "inplace"]


@pytest.mark.slow
def test_a_form_that_hangs_is_wrong_and_the_others_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_run, "perform", hangs_in_a_form)
    monkeypatch.setattr(device_run, "AHEAD_SECONDS", 2.0)
    shape = CheckShape("cpu", "bfloat16", 3, 4, 5, 2)
    run = a_run(tmp_path, workers=1)
    device_run.do(run, Work([shape], [], [], []))
    found = {record["form"]: record["status"] for record in run.file.records}
    assert set(found) == set(shape.forms())
    assert [form for form, status in found.items() if status == "wrong"] == ["folded mask"]


@pytest.mark.slow
def test_at_the_end_of_the_time_a_hang_is_stopped_and_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_run, "perform", hangs_in_a_form)
    shape = CheckShape("cpu", "bfloat16", 3, 4, 5, 2)
    run = a_run(tmp_path, workers=1, seconds=12.0)
    work = Work([], [], [], [shape])
    device_run.do(run, work)
    assert time.monotonic() - run.started < 20.0
    assert [record["form"] for record in run.file.records] == ["all"]  # results until then are kept
    assert left(run, work) == ["check bfloat16 M 3 K 4 N 5 R 2"]


def jobs_of(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return a list that receives all work; none is done."""
    seen: list[object] = []

    def record(work: Check | Timing | Simulation | ModelStep, *, defaults: bool) -> Any:
        seen.append(work)
        if isinstance(work, Check):
            return [operators.check_record(work.shape, form) | {"status": "passed"} for form in work.forms]
        if isinstance(work, Timing):
            return timed(work.case, work.providers)
        assert isinstance(work, Simulation | ModelStep)
        names = dict.fromkeys(["base", "peft-loop" if isinstance(work, Simulation) else "peft", *work.providers])
        return [{**work.case.facts(), "provider": name, "status": "timed"} for name in names]

    for module in (device_run, simulations):
        monkeypatch.setattr(module, "perform", record)
    return seen


def test_the_order_is_first_checks_eager_compiled_steps_and_then_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = jobs_of(monkeypatch)
    other = Case("forward", GATE, 32, 4, "float32")
    alike = Case("forward_backward", TINY, 16, 4, "float32")
    first, last = (CheckShape("cpu", name, 3, 4, 5, 2) for name in ("bfloat16", "float16"))
    steps = [STEP, SimulationCase(DIGITS_VIT, 2, 17, 5, "float32")]
    run = a_run(tmp_path)
    work = Work([first], [FORWARD, other, alike], steps, [last], [WHOLE, replace(WHOLE, dtype="bfloat16")])
    device_run.do(run, work)
    timings = [(work.case, "peft-compiled" in work.providers) for work in seen if isinstance(work, Timing)]
    assert timings == [(case, compiled) for compiled in (False, True) for case in (FORWARD, alike, other)]
    simulated = [(work.case.cohort, work.providers) for work in seen if isinstance(work, Simulation)]
    eager = ("base", "peft-loop", "vmap", "sequential", "cohort")
    assert simulated == [(10, eager), (5, eager), (10, (COMPILED_STEPS,))]
    kinds = [type(work) for work in seen]
    assert kinds == [Check, *[Timing] * 6, *[Simulation] * 3, *[ModelStep] * 10, Check]
    trained = [(work.case.dtype, work.providers) for work in seen if isinstance(work, ModelStep)]
    dtypes = ("float32", "bfloat16")
    assert trained[:2] == [(dtype, EAGER) for dtype in dtypes]
    assert trained[2:] == [(dtype, (name,)) for dtype in dtypes for name in PROVIDERS[len(EAGER) :]]
    assert (seen[0].shape, seen[-1].shape) == (first, last)  # type: ignore[attr-defined]
    keys = [(records.case_key(record), record["provider"]) for record in run.file.records]
    assert len(set(keys)) == len(keys)
    assert left(run, work) == []


def test_only_missing_providers_are_timed_again_and_against_the_base_of_their_loop(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path), *QUICK, "--ops", "forward", "--cases", "1", "--no-checks"]
    assert gpu.main(out) == 0
    path = tmp_path / "cpu.json"
    saved = json.loads(path.read_text())
    kept = [record for record in saved if record["provider"] != "inplace"]
    for record in kept[1:]:
        record["time_ms"] = record["base_ms"] = 1e6
    path.write_text(json.dumps(kept))
    assert gpu.main(out) == 0
    again = load_records(path)[1]
    assert again[:-1] == kept[1:]
    (new,) = again[len(kept) - 1 :]
    assert (new["provider"], new["status"]) == ("inplace", "timed")
    assert new["base_ms"] < 1e5
    assert new["ratio_to_base"] == pytest.approx(new["time_ms"] / new["base_ms"])
    assert new["ratio_to_peft"] > 0


@pytest.mark.slow
def test_a_run_goes_on_with_other_tables_and_every_record_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "PACKAGED", tmp_path / "packaged")
    out = ["--out", str(tmp_path), *QUICK, "--no-checks"]
    assert gpu.main([*out, "--ops", "forward", "--cases", "1"]) == 0
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cpu.json").write_text("{}")
    assert gpu.main([*out, "--ops", "forward", SIMULATION, "--cases", "2"]) == 0
    assert gpu.main([*out, "--ops", "forward", "--cases", "1", "--defaults"]) == 0
    found = load_records(tmp_path / "cpu.json")[1]
    first, second = ({r["tables"] for r in found if (r.get("m") == 32) is is_first} for is_first in (True, False))
    assert first == {"none"}
    assert second == {machine.tables_digest()}
    assert {record["tables"] for record in load_records(tmp_path / "cpu-defaults.json")[1]} == {None}
    assert "tables" not in load_records(tmp_path / "cpu.json")[0]


def test_default_blocks_are_taken_whatever_tables_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    shape = ShapeClass("forward", "float32", 64, 64, 64, 16)
    default = default_blocks(shape, lookup.hardware_of(device), aligned=True)
    assert isinstance(default, MatmulBlocks)
    other = replace(default, block_m=default.block_m * 2)
    table = Table({}, (Entry(shape, other, 1.0),))
    monkeypatch.setattr(lookup, "_tables_of", functools.cache(lambda device: (table,)))
    lookup.forget_tables()

    def taken() -> object:
        return lookup.find_blocks(MatmulBlocks, shape, device, aligned=True)

    assert taken() == other
    with default_blocks_alone():
        assert taken() == default
    assert taken() == other


def test_checks_are_of_what_is_timed_first_unless_told_otherwise() -> None:
    def chosen(*options: str, device: str = "cuda") -> tuple[list[CheckShape], list[CheckShape]]:
        return gpu.choose_checks(gpu.parse(["--out", "x", "--device", device, *options]))

    first, last = chosen()
    assert first == [CheckShape("cuda", "bfloat16", *size) for size in GATE_SHAPES["cuda"]]
    assert {*first, *last} == set(check_shapes("cuda"))
    assert len(first) + len(last) == len(check_shapes("cuda"))
    assert (2048, GATE.k, GATE.n, 16) in GATE_SHAPES["cuda"]
    assert all(k % 16 == 0 and n % 16 == 0 for _, k, n, _ in GATE_SHAPES["cuda"])
    assert chosen("--no-checks") == ([], [])
    assert chosen("--check-dtypes", "float16", "--check-shapes", "gate", "5x6x7x8") == (
        [CheckShape("cuda", "float16", *size) for size in (*GATE_SHAPES["cuda"], (5, 6, 7, 8))],
        [],
    )
    first, last = chosen("--check-dtypes", "float32")
    assert (first, {shape.dtype for shape in last}) == ([], {"float32"})
    assert len(chosen("--check-shapes", "all", "gate")[0]) == len(check_shapes("cuda"))
    on_cpu = {shape.dtype for shape in chosen("--check-shapes", "gate", device="cpu")[0]}
    assert on_cpu == {"bfloat16", "mixed-bfloat16", "float16", "mixed-float16", "float32"}


@pytest.mark.parametrize("option", [("--check-shapes", "4x5"), ("--rounds", "1"), ("--cases", "-1")])
def test_what_makes_no_sense_is_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        gpu.parse(["--out", "x", *option])
    assert raised.value.code == 2
    assert option[1] in capsys.readouterr().err


def test_the_first_cases_and_fewer_rounds() -> None:
    options = gpu.parse(["--out", "x", "--device", "cuda", "--cases", "12", "--ops", "forward", "fold"])
    cases = gpu.choose_work(options).cases
    assert len(cases) == 12
    assert cases[0] == device_cases("cuda")[0]
    assert {case.op for case in cases} == {"forward", "fold"}
    assert gpu.choose_plan(None).max_rounds == 24
    assert (gpu.choose_plan(5).min_rounds, gpu.choose_plan(5).max_rounds) == (5, 5)
    keys = [records.case_key(case.facts()) for case in gpu.choose_work(gpu.parse(["--out", "x"])).cases]
    assert len(set(keys)) == len(keys)


def test_a_full_disk_is_said_and_leaves_the_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path), *QUICK, "--no-checks", "--ops", "forward"]
    assert gpu.main([*out, "--cases", "1"]) == 0
    before = (tmp_path / "cpu.json").read_bytes()

    def full(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert gpu.main(out) == 2
    printed = capsys.readouterr()
    assert f"No space left on device: '{tmp_path / 'cpu.json'}'" in printed.err
    assert re.search(r"left: forward .*\nthe same command goes on from here", printed.out)
    assert (tmp_path / "cpu.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["cpu.json"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_cut_run_leaves_a_whole_file_and_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--out", str(tmp_path), *QUICK, "--workers", "1", "--ops", "forward"]
    path = tmp_path / "cpu.json"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    end = time.monotonic() + 120
    while not (path.exists() and len(load_records(path)[1]) > 4) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(30)
    cut = load_records(path)[1]
    assert cut
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    assert load_records(path)[1][: len(cut)] == cut


@pytest.mark.parametrize("workers", [0])
def test_training_steps_note_who_runs_and_what_is_known_after_every_round(workers: int) -> None:
    work = Simulation(SimulationCase(DIGITS_VIT, 2, 17, 2, "float32"), "cpu", ("base", "vmap"))
    ((_, outcome),) = outcomes(simulate, [work], workers=workers, seconds_each=60.0)
    names = [told for told in outcome.notes if isinstance(told, str)]
    assert names == ["base", "peft-loop", "vmap"]
    lists = [told for told in outcome.notes if isinstance(told, list)]
    assert len(lists) == outcome.value[0]["rounds"] - 1
    assert lists[-1] == outcome.value
    stopped = Outcome(error="not done after 9 s", notes=outcome.notes[:-2])
    assert [record["provider"] for record in simulation_records(work, stopped)] == ["base", "vmap"]
    assert {record["status"] for record in simulation_records(work, stopped)} == {"timed"}
    assert simulation_records(work, stopped)[0]["rounds"] == outcome.value[0]["rounds"] - 2


def steps_hang_in_vmap(work: Simulation, *, defaults: bool = False) -> Any:
    """Training steps that hang in *vmap*, and in the compiled cohort after its gradients were checked."""
    names = dict.fromkeys(["base", "peft-loop", *work.providers])
    for name in names:
        note(name)
        if name in ("vmap", COMPILED_STEPS) and name not in work.failed:
            time.sleep(600.0)
    known = [name for name in names if name not in work.failed]
    return [{**work.case.facts(), "provider": name, "status": "timed"} for name in known]


@pytest.mark.slow
def test_a_step_that_hangs_costs_its_provider_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "perform", steps_hang_in_vmap)
    monkeypatch.setattr(simulations, "SECONDS_EACH", 2.0)
    run = a_run(tmp_path, workers=1)
    simulations.time_simulations(run, [STEP])
    found = of_provider(run)
    why = "not done after 2 s; its process was stopped"
    assert found.pop("vmap") == found.pop(COMPILED_STEPS) == ("not available", why)
    assert list(found) == ["base", "peft-loop", "sequential", "cohort"]
    assert {status for status, _ in found.values()} == {"timed"}
    assert run.missing_steps(STEP) == ()


def models_hang_in_inject(work: ModelStep, *, defaults: bool = False) -> Any:
    """Whole models that hang in *inject*, and in the compiled PEFT."""
    names = dict.fromkeys(["base", "peft", *work.providers])
    for name in names:
        note(name)
        if name in ("inject", "peft-compiled") and name not in work.failed:
            time.sleep(600.0)
    known = [name for name in names if name not in work.failed]
    return [{**work.case.facts(), "provider": name, "status": "timed"} for name in known]


@pytest.mark.slow
def test_a_model_that_hangs_costs_its_provider_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulations, "perform", models_hang_in_inject)
    monkeypatch.setattr(simulations, "MODEL_SECONDS", 2.0)
    run = a_run(tmp_path, workers=1)
    simulations.time_models(run, [WHOLE])
    found = of_provider(run)
    why = "not done after 2 s; its process was stopped"
    assert found.pop("inject") == found.pop("peft-compiled") == ("not available", why)
    assert set(found) == set(PROVIDERS) - {"inject", "peft-compiled"}
    assert {status for status, _ in found.values()} == {"timed"}
    assert run.missing_steps(WHOLE) == ()


def test_whole_models_note_who_runs_and_what_is_known_after_every_round() -> None:
    case = replace(WHOLE, compiled=False)
    work = ModelStep(case, "cpu", ("base", "fuse-peft", "inject"), {"fuse-peft": "it ended"})
    ((_, outcome),) = outcomes(train_model, [work], workers=0, seconds_each=60.0)
    assert [told for told in outcome.notes if isinstance(told, str)] == ["base", "peft", "inject"]
    lists = [told for told in outcome.notes if isinstance(told, list)]
    assert lists[-1] == outcome.value
    kept = simulation_records(work, Outcome(error="not done after 9 s", notes=outcome.notes))
    assert [(record["provider"], record["status"]) for record in kept] == [
        ("base", "timed"),
        ("fuse-peft", "not available"),
        ("inject", "timed"),
    ]


def test_who_is_blamed_for_a_step() -> None:
    for notes, cut, expected in (
        ((), False, None),
        (("base",), False, None),
        (("base", "peft-loop", "vmap"), False, "vmap"),
        (("base", "vmap"), True, None),
        (("vmap", None), False, None),
    ):
        assert blamed(Outcome(error="ended", notes=notes, cut=cut)) == expected
    of_models = Outcome(error="ended", notes=("base", "peft"))
    assert (blamed(of_models), blamed(of_models, ("base", "peft"))) == ("peft", None)
    nothing = simulation_records(Simulation(STEP, "cpu", ("base", "vmap")), Outcome(error="ended"))
    assert [(record["provider"], record["cause"]) for record in nothing] == [("base", "ended")]


def test_work_is_done_by_kind() -> None:
    assert perform(Warmup(FORWARD, "cpu", ("base", "fused"))) == {}
    check = Check(CheckShape("cpu", "float32", 3, 4, 5, 2), ("fold",))
    assert [record["form"] for record in perform(check)] == ["fold"]
