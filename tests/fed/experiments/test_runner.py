"""Comparisons on the command line: shared bases, continuing after an interruption, and what is refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import fed.simulation.simulate
from fed import config as configuration
from fed.cli import main
from fed.data.digits import load_digits
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments.runner import SharedInputs, check, in_turn
from tests.support.command_line import Call, assert_refused, failing, rows_of, without_times
from tests.support.text_data import PROMPT, instructions, write_rows

ROOT = Path(__file__).resolve().parents[3]
SMALL = (
    *("rounds=2", "clients.count=4", "clients.per_round=2", "train.local_steps=1", "model.pretrain_steps=20"),
    "adapter.target_modules=['q_proj']",
)
ASKED = ("compare", "digits", "--methods", "fed-plora,fedit", "--seeds", "0,1", "--set", *SMALL)
CELLS = [f"runs/{name}/seed-{seed}" for seed in (0, 1) for name in ("fed-plora", "fedit")]


pytestmark = pytest.mark.usefixtures("undrawn_throughout")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a comparison that was never interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with pytest.raises(SystemExit) as exit_:
        main([*ASKED, "--out", str(out)])
    assert not exit_.value.code
    return out


def test_a_comparison_leaves_every_run_and_its_reports(whole: Path) -> None:
    written = {"accuracy.png", "noise.png", "cost.png", "comparison.json", "comparison.md", "report.html"}
    assert {path.name for path in whole.iterdir()} == {"comparison.toml", "bases", "runs", *written}
    for cell in CELLS:
        names = {path.name for path in (whole / cell).iterdir()}
        assert names >= {"config.toml", "rounds.jsonl", "adapter", "base"}
        assert [row["round"] for row in rows_of(whole / cell)] == [0, 1, 2]
        assert (whole / cell / "base" / "model.safetensors").is_file()
    found = json.loads((whole / "comparison.json").read_text())
    last = rows_of(whole / "runs/fedit/seed-1")[-1]["accuracy"]
    assert found["variants"][1]["figures"]["accuracy"]["by_seed"]["1"] == pytest.approx(100 * last)


def test_methods_of_a_seed_share_the_base_and_begin_alike(whole: Path) -> None:
    assert len(list((whole / "bases").iterdir())) == 2
    ours, theirs, other, _ = (without_times(whole / cell)[:2] for cell in CELLS)
    assert ours[0] == theirs[0]
    assert ours[1]["clients"] == theirs[1]["clients"]
    assert ours[0]["loss"] != other[0]["loss"]


def test_an_interrupted_comparison_goes_on_to_the_same_files(
    whole: Path, tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patched:
        patched.setattr("fed.experiments.run.simulate", failing(KeyboardInterrupt(), 5))
        outcome = fed_cli(*ASKED, "--out", str(out))
    assert outcome.status == 130
    assert outcome.err == (
        f"warning: interrupted: 1 of 4 runs are finished and kept in {out}; python -m fed resume {out} continues\n"
    )
    kept = (out / CELLS[0] / "rounds.jsonl").read_bytes()
    assert fed_cli("report", str(out)).status == 0
    assert "3 of 4 runs are not finished" in (out / "comparison.md").read_text()
    outcome = fed_cli("resume", str(out))
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.startswith("1 of 4 runs are finished already\n")
    assert (out / CELLS[0] / "rounds.jsonl").read_bytes() == kept
    for cell in CELLS:
        assert without_times(out / cell) == without_times(whole / cell)
        name = "adapter/adapter_model.safetensors"
        assert (out / cell / name).read_bytes() == (whole / cell / name).read_bytes()


def test_a_finished_comparison_plays_nothing_again_and_takes_more_seeds(
    whole: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fed.experiments.run.simulate", failing(KeyboardInterrupt(), 1))
    outcome = fed_cli(*ASKED, "--out", str(whole))
    assert (outcome.status, outcome.err) == (0, "")
    assert "4 of 4 runs are finished already" in outcome.out
    more = [*ASKED[:5], "0-2", *ASKED[6:]]
    assert fed_cli(*more, "--out", str(whole)).status == 130
    assert fed_cli(*ASKED, "--out", str(whole)).status == 0


def test_a_comparison_of_other_settings_is_refused_and_left_alone(whole: Path, fed_cli: Call) -> None:
    before = (whole / "comparison.toml").read_bytes()
    outcome = fed_cli(*ASKED, "train.learning_rate=0.5", "--out", str(whole))
    assert_refused(
        outcome, r"holds a comparison of other settings \(.*train.learning_rate = 0.002 there, 0.5 here\); give"
    )
    assert (whole / "comparison.toml").read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--methods", "fed-plra"), r"method is 'fed-plra'"),
        (("--seeds", "x"), r"--seeds is 'x'"),
        (("--vary", "clients.ranks=[2],[99]"), r"clients.ranks is \[99\]"),
        (("--set", "clients.count=999"), r"clients.count is 999"),
        (("--set", "adapter.target_modules=['q_prj']"), r"'q_prj'.*q_proj"),
        (("--jobs", "0"), r"--jobs"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, fed_cli: Call
) -> None:
    assert_refused(fed_cli("compare", "digits", "--out", str(tmp_path / "deep" / "out"), *arguments), message)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_no_comparison_is_left_alone(tmp_path: Path, fed_cli: Call) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert_refused(fed_cli(*ASKED, "--out", str(tmp_path)), "which exists and is no comparison; give another name")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_run_that_cannot_be_played_is_named_and_the_others_stay(
    tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate = fed.simulation.simulate.simulate

    def fail(config: object, *rest: object, **options: object) -> object:
        if (config.method, config.seed) == ("fedit", 0):
            raise FedError("the moon is full")
        return simulate(config, *rest, **options)

    monkeypatch.setattr("fed.experiments.run.simulate", fail)
    outcome = fed_cli(*ASKED, "--out", str(tmp_path / "out"))
    assert outcome.status == 2
    assert outcome.err.splitlines() == [
        "warning: FedIT (rank 16), seed 0 cannot be played: the moon is full",
        "error: 1 of 4 runs could not be played: FedIT (rank 16), seed 0: the moon is full",
    ]
    assert "1 of 4 runs are not finished" in (tmp_path / "out" / "comparison.md").read_text()


def test_what_there_is_to_say_of_the_data_is_said_once(tmp_path: Path, llama: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", instructions())
    data = ("data.task=instruction", f"data.prompt={PROMPT!r}", "data.partition=iid", f"data.path={rows}")
    short = ("data.max_length=12", "data.max_new_tokens=4", "clients.count=2", "clients.per_round=2")
    (tmp_path / "empty.toml").touch()
    source, methods = tmp_path / "empty.toml", ("fed-plora", "flora", "fedit@2")
    asked = plans.request(source, (f"model.path={llama}", *data, *short), methods, (0, 1))
    said: list[str] = []
    check(plans.plan(asked).cells, SharedInputs(tmp_path / "out"), said.append)
    assert said == ["12 of 12 rows have more than data.max_length (12) tokens and are cut"]


DRAWN = ("compare", "digits", "--methods", "fed-plora,fedit", "--seeds", "0,1", "--set", *SMALL, "rounds=1")


@pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_what_the_data_of_a_seed_have_to_say_is_said_once(jobs: int, tmp_path: Path, fed_cli: Call) -> None:
    asked = (*DRAWN, "data.rows_per_client=100", "--jobs", str(jobs), "--out", str(tmp_path / "out"))
    first, second = fed_cli(*asked).err.splitlines()
    assert re.fullmatch(r"warning: data.rows_per_client is 100: \d+ of 630 training rows go to no client", first)
    assert re.fullmatch(r"warning: .*, seed 1: data.rows_per_client is 100: \d+ of 630 training rows go to .*", second)


@pytest.mark.slow
def test_runs_at_once_give_the_same_files_as_in_turn(whole: Path, tmp_path: Path, fed_cli: Call) -> None:
    out = tmp_path / "out"
    outcome = fed_cli(*ASKED, "--jobs", "2", "--out", str(out))
    assert (outcome.status, outcome.err) == (0, "")
    for cell in CELLS:
        assert without_times(out / cell) == without_times(whole / cell)


@pytest.mark.slow
def test_ctrl_c_ends_the_workers_and_keeps_what_is_finished(whole: Path, tmp_path: Path, fed_cli: Call) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "fed", *ASKED, "--jobs", "2", "--out", str(out)]
    heeding = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # as for a background job of a shell
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeding, **pipes) as process:
        for line in process.stdout:
            if line.startswith("run 1 of 4"):
                process.send_signal(signal.SIGINT)
                break
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert re.fullmatch(r"warning: interrupted: [1-3] of 4 runs are finished and kept in .* continues\n", errors)
    assert fed_cli("resume", str(out), "--jobs", "2").status == 0
    for cell in CELLS:
        assert without_times(out / cell) == without_times(whole / cell)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_damaged_runs_are_left_out_by_name_and_healed_or_refused(whole: Path, tmp_path: Path, fed_cli: Call) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out, symlinks=True)
    flip(out / CELLS[0] / "adapter" / "adapter_model.safetensors", -1)
    flip(out / CELLS[3] / "rounds.jsonl", 20)
    (out / CELLS[1] / "finished.json").unlink()
    shutil.rmtree(out / CELLS[1] / "checkpoint")
    reported = fed_cli("report", str(out))
    assert reported.status == 0
    assert [line.split(": ")[1] for line in reported.err.splitlines()] == [
        "Fed-PLoRA, seed 0 is left out",
        "FedIT (rank 16), seed 1 is left out",
    ]
    resumed = fed_cli("resume", str(out))
    assert resumed.status == 2
    said = resumed.err.splitlines()[-1]
    assert said.startswith("error: 1 of 4 runs could not be played: FedIT (rank 16), seed 1: ")
    assert re.search(r"rounds.jsonl' is damaged: .*; without '.*/runs/fedit/seed-1' it would be played anew$", said)
    anew = "warning: FedIT (rank 16), seed 0: it has no checkpoint to go on from and is played anew"
    assert anew in resumed.err.splitlines()
    for cell in CELLS[:2]:
        adapter = Path(cell, "adapter", "adapter_model.safetensors")
        assert (out / adapter).read_bytes() == (whole / adapter).read_bytes()


def test_runs_of_a_comparison_begin_with_the_same_data_and_base(
    whole: Path, tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / CELLS[1])
    images, labels, names = load_digits()
    with monkeypatch.context() as patched:
        patched.setattr("fed.data.federated_data.load_digits", lambda: (images.flip(0), labels, names))
        message = r"'.*/runs/\S+/seed-\d' began with other inputs: the rows of the data changed since"
        assert_refused(fed_cli("resume", str(out)), message)
    base = next((out / "bases").glob("seed-0-*"))
    flip(base / "model.safetensors", -1)
    outcome = fed_cli("resume", str(out))
    assert outcome.status == 2
    assert re.search(r"FedIT \(rank 16\), seed 0: .*model.safetensors", outcome.err)
    assert not (out / CELLS[1] / "rounds.jsonl").exists()


def test_a_run_that_has_begun_keeps_its_base_whatever_that_is_called(whole: Path, tmp_path: Path) -> None:
    config = configuration.load_saved(whole / CELLS[0] / "config.toml")
    own = tmp_path / "as an earlier version called it"
    shutil.copytree(whole / CELLS[0] / "base", own)
    _, path = SharedInputs(tmp_path / "out").base(config, print, own)
    assert path == own
    assert not (tmp_path / "out").exists()


def test_bases_of_a_comparison_are_made_of_one_checkpoint(bert: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(bert, tmp_path / "bert"))
    asked = plans.request("digits", ())
    config = plans.plan(asked).cells[0].config
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": str(checkpoint)})})
    bench = SharedInputs(tmp_path / "out")
    bench.compare_checkpoint(config)  # there are no bases yet
    (tmp_path / "out" / "bases").mkdir(parents=True)
    for _ in range(2):
        bench.compare_checkpoint(config)
    flip(checkpoint / "model.safetensors", -1)
    with pytest.raises(FedError, match=r"began with other inputs: the checkpoint at model.path changed since"):
        bench.compare_checkpoint(config)


def test_an_error_that_a_library_makes_of_ctrl_c_is_no_failed_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise FedError("the file ends early")

    told: list[object] = []
    monkeypatch.setattr("fed.experiments.runner.play", fail)
    monkeypatch.setattr("fed.interruption.came", lambda: True)
    with pytest.raises(KeyboardInterrupt):
        in_turn(plans.plan(plans.request("digits", ())).cells, None, lambda *event: told.append(event))
    assert told == []
