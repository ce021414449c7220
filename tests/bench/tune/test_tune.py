"""`python -m bench.tune` on interpreted kernels: checks, timing, the table, resuming, and notes on what is left out."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.checks.correctness import WrongResultError
from bench.gpu_cases import SHARED_INPUTS
from bench.harness.processes import Outcome
from bench.harness.records import load_records, open_records
from bench.tune import classes as tuned_classes
from bench.tune import command, search, trials, tuner
from bench.tune.trials import Trial, for_checking, make_trial
from plora_kernels.tuning.blocks import OPS, Blocks, FoldBlocks, Hardware, ShapeClass
from plora_kernels.tuning.candidates import candidates
from plora_kernels.tuning.defaults import default_blocks
from plora_kernels.tuning.tables import load_table

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter's sizes")
CPU = torch.device("cpu")
CPU_ALONE = Hardware(0, 1)
FOLD = ShapeClass("fold", "float32", 48, 64, 48, 16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernels: None) -> Path:
    """Set up an empty user cache, interpreted kernels, two rounds per stage and one class of shapes."""
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "STAGES", (2, 2))
    monkeypatch.setattr(command, "shape_classes", lambda device_type: [FOLD])
    return tmp_path / "cache"


def run(*options: str) -> int:
    tuner._trial.cache_clear()
    return command.main(["--device", "cpu", "--workers", "0", "--candidates", "2", *options])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("op", OPS)
def test_every_op_is_right_with_its_default_and_a_wrong_result_is_not(op: str) -> None:
    shape = next(shape for shape in tuned_classes.shape_classes("cpu") if shape.op == op)
    trial = make_trial(replace(shape, m=16) if op != "fold" else shape, CPU)
    blocks = default_blocks(shape, CPU_ALONE, aligned=True)
    trial.check(blocks)
    name, value = next(iter(trial.expected(torch.float64).items()))
    off = replace(trial, expected=lambda dtype: {**trial.expected(dtype), name: value * 1.001})
    with pytest.raises(WrongResultError, match=name):
        off.check(blocks)


def test_the_table_and_the_log_are_written_and_a_second_run_does_nothing(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--out", str(tmp_path / "out")) == 0
    table = load_table(cache / "cpu.json")
    assert [entry.shape for entry in table.entries] == [FOLD]
    assert table.entries[0].blocks in candidates(FOLD, CPU_ALONE)
    assert load_table(tmp_path / "out" / "tables" / "cpu.json").entries == table.entries
    meta, records = load_records(tmp_path / "out" / "tune" / "cpu.json")
    assert meta["device_name"]
    assert [record["status"] for record in records] == ["best", "timed"]
    assert records[0]["time_ms"] == table.entries[0].time_ms
    assert "fold float32 m 48 d_in 64 d_out 48 r 16: FoldBlocks" in capsys.readouterr().out
    before = (cache / "cpu.json").read_bytes()
    assert run("--out", str(tmp_path / "out")) == 0
    assert "0 of 1 classes to tune" in capsys.readouterr().out
    assert (cache / "cpu.json").read_bytes() == before


def test_measuring_anew_keeps_what_is_known_until_then(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(FOLD, d_in=32)
    for shape, options in ((other, ()), (FOLD, ("--fresh",))):
        monkeypatch.setattr(command, "shape_classes", lambda device_type, shape=shape: [shape])
        assert run("--out", str(tmp_path / "out"), *options) == 0
    assert {entry.shape for entry in load_table(cache / "cpu.json").entries} == {other, FOLD}


@pytest.mark.usefixtures("cache")
def test_a_wrong_candidate_is_dropped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default = default_blocks(FOLD, CPU_ALONE, aligned=True)
    check = Trial.check

    def refuse(self: Trial, blocks: Blocks) -> None:
        if blocks == default:
            raise WrongResultError("weight is off by 7")
        check(self, blocks)

    monkeypatch.setattr(Trial, "check", refuse)
    assert run("--log", str(tmp_path / "log.json")) == 0
    assert "DROPPED 1, first FoldBlocks" in capsys.readouterr().out
    records = load_records(tmp_path / "log.json")[1]
    assert [(record["status"], record.get("cause")) for record in records] == [
        ("best", None),
        ("wrong", "WrongResultError: weight is off by 7"),
    ]


def test_where_nothing_is_right_nothing_is_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trial, "check", lambda self, blocks: (_ for _ in ()).throw(WrongResultError("off")))
    assert run() == 1
    assert not (cache / "cpu.json").exists()


@pytest.mark.usefixtures("cache")
def test_without_time_nothing_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--budget-seconds", "0") == 0
    assert "1 classes left" in capsys.readouterr().out


@pytest.mark.usefixtures("cache")
def test_the_package_s_table_is_written_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(command, "LOGS", tmp_path / "logs")
    assert run("--package") == 0
    assert load_table(tmp_path / "packaged" / "cpu.json").entries
    assert load_records(tmp_path / "logs" / "cpu.json")


def test_without_kernels_there_is_nothing_to_tune(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PLORA_BACKEND", "torch")
    assert run() == 2
    assert capsys.readouterr().err == "error: the kernels do not run on cpu here, so there is nothing to tune\n"


def test_what_is_tuned_stands_once_and_the_gate_first() -> None:
    classes = tuned_classes.shape_classes("cuda")
    assert len(set(classes)) == len(classes)
    assert {shape.op for shape in classes} == set(OPS)
    assert next(shape for shape in classes if shape.op == "forward") == ShapeClass(
        "forward", "bfloat16", 8192, 4096, 4096, 16
    )
    assert {shape.dtype for shape in classes} == {"bfloat16", "float16", "float32"}
    assert {shape.m for shape in classes if shape.op == "forward"} >= {1, 16, 8192}


def test_projections_are_tuned_at_the_widths_they_are_timed_at() -> None:
    for shared in SHARED_INPUTS:
        assert trials.projection_widths(shared.n) == shared.widths


def test_a_check_needs_fewer_rows_but_a_fold_all_of_its_weight() -> None:
    assert for_checking(ShapeClass("forward", "bfloat16", 8192, 64, 64, 16)).m == trials.CHECK_ROWS
    assert for_checking(ShapeClass("fold", "bfloat16", 8192, 64, 8192, 16)).m == 8192
    assert isinstance(default_blocks(FOLD, CPU_ALONE, aligned=True), FoldBlocks)


def chosen(*options: str) -> list[ShapeClass]:
    return command.choose_classes(command.parse(["--device", "cuda", *options]))


def test_the_gate_alone_is_chosen_by_shape_and_rank() -> None:
    gate = chosen("--shapes", "4096x4096", "--ranks", "16")
    assert [shape.op for shape in gate[:5]] == [
        *("side_product", "output_gradient", "factor_gradient", "forward", "input_gradient")
    ]
    assert chosen("--shapes", "4096x4096", "--ranks", "16", "--classes", "5") == gate[:5]
    assert {(shape.d_in, shape.d_out, shape.r) for shape in gate} == {(4096, 4096, 16), (4096, 16, 16)}
    assert {shape.op for shape in gate} >= {"fold"}
    assert [shape.op for shape in chosen("--ops", "forward", "--classes", "2")] == ["forward"] * 2
    assert chosen() == tuned_classes.shape_classes("cuda")


@pytest.mark.parametrize("option", [("--shapes", "4096"), ("--classes", "0")])
def test_what_is_no_choice_is_refused(option: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.parse([*option])
    assert option[1] in capsys.readouterr().err


def test_the_user_s_tables_may_be_those_of_the_folder(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLORA_KERNELS_CACHE", str(tmp_path / "out" / "tables"))
    assert run("--out", str(tmp_path / "out")) == 0
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")) == [
        *("out/tables/cpu.json", "out/tune/cpu.json")
    ]


@pytest.mark.usefixtures("cache")
def test_every_candidate_is_said_as_it_is_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 0
    shown = capsys.readouterr().out
    assert "[1/2] fold FoldBlocks(" in shown
    assert "[2/2] fold FoldBlocks(" in shown
    assert shown.count(": right\n") == 2


def test_what_is_not_checked_within_a_class_s_time_is_not_timed(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = Trial.check

    def slow(self: Trial, blocks: Blocks) -> None:
        check(self, blocks)
        time.sleep(1.0)

    monkeypatch.setattr(Trial, "check", slow)
    assert run("--class-seconds", "0.5", "--log", str(tmp_path / "log.json")) == 0
    (record,) = load_records(tmp_path / "log.json")[1]
    assert record["status"] == "best"
    assert load_table(cache / "cpu.json").entries


def test_only_the_named_designs_and_the_default_are_tried(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ShapeClass("forward", "float32", 32, 64, 48, 16)
    monkeypatch.setattr(command, "shape_classes", lambda device_type: [FOLD, forward])
    assert run("--designs", "algebra", "--log", str(tmp_path / "log.json")) == 0
    tried = {(record["op"], record["provider"]) for record in load_records(tmp_path / "log.json")[1]}
    assert default_blocks(forward, CPU_ALONE, True).design == "tile"  # type: ignore[union-attr]
    assert tried == {("fold", "FoldBlocks"), ("forward", "tile"), ("forward", "algebra")}


def test_a_candidate_that_ends_its_process_at_full_size_is_dropped_and_the_others_timed(tmp_path: Path) -> None:
    known = candidates(FOLD, CPU_ALONE)[:3]

    class Timer:
        """A timer that is called twice: the second candidate ends its process, then the others are timed."""

        def outcomes(self, items: list, deadline: float, end: float) -> Iterator[tuple[int, Outcome]]:
            yield 0, Outcome(error="its process ended", notes=(0, 1))
            yield 1, Outcome([search.Timed(blocks, 1.0, 2) for blocks in items[1].candidates])

    log = open_records(tmp_path / "log.json", {}, fresh=True)
    tuning = tuner.Tuning(CPU, CPU_ALONE, (), log, 9, 0.0, float("inf"), float("inf"), 1.0)
    dropped: dict = {}
    found = tuner._time(tuning, FOLD, known, dropped, Timer())  # type: ignore[arg-type]
    assert [timed.blocks for timed in found] == [known[0], known[2]]
    assert dropped == {known[1]: "its process ended"}
