"""The command line from end to end: a run's files, its messages, and that bad input leaves no files."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fed import config as configuration
from fed.data.federated_data import load as load_data
from fed.errors import FedError
from fed.simulation.evaluation import evaluate
from tests.support.command_line import FIELDS, Call, Outcome, assert_refused, failing, rows_of, without_times
from tests.support.text_data import write_rows

ROOT = Path(__file__).resolve().parents[3]
SMALL = (
    *("rounds=2", "clients.count=4", "clients.per_round=3", "train.local_steps=2"),
    *("model.pretrain_steps=30", "adapter.target_modules=['q_proj','v_proj']"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of one small run, made by a separate process."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    command = [sys.executable, "-m", "fed", "run", "digits", "--out", str(out), "--set", *SMALL]
    environment = {key: value for key, value in os.environ.items() if key not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    (out.parent / "printed").write_text(result.stdout)
    return out


def test_a_run_leaves_everything_it_should(made: Path) -> None:
    names = {path.name for path in made.iterdir()}
    folders = {"base", "adapter", "checkpoint", "similarity"}
    assert names == folders | {"config.toml", "rounds.jsonl", "report.png", "similarity.png", "report.html"} | {
        "centralised.json",
        "finished.json",
    }
    assert {path.name for path in (made / "adapter").iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    rows = rows_of(made)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(list(row) == FIELDS for row in rows)
    assert rows[0]["init_noise"] is rows[0]["agg_noise"] is None
    assert configuration.load(made / "config.toml") == configuration.load("digits", SMALL)
    assert [row["steps"] for row in json.loads((made / "centralised.json").read_text())] == [4, 12]


def test_a_run_says_how_it_goes_and_what_it_gained(made: Path) -> None:
    printed = (made.parent / "printed").read_text()
    rows = rows_of(made)
    for row in rows:
        assert re.search(rf"round {row['round']}/2  accuracy +{100 * row['accuracy']:.1f} %  loss", printed)
    before, after = rows[0]["accuracy"], rows[-1]["accuracy"]
    assert f"{100 * before:.1f} %" in printed
    assert re.search(rf"2 rounds × 2 local steps +{100 * after:.1f} % +\{100 * (after - before):+.1f} points", printed)
    for row in json.loads((made / "centralised.json").read_text()):
        gain = row["accuracy"] - before
        ratio = f"{(after - before) / gain:.2f}" if gain > 0 else "—"
        line = rf"{row['steps']} steps +{100 * row['accuracy']:.1f} % +\{100 * gain:+.1f} points +{ratio}"
        assert re.search(line, printed)
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 110


def test_base_and_adapter_reproduce_the_final_accuracy_with_plain_transformers_and_peft(made: Path) -> None:
    base = AutoModelForImageClassification.from_pretrained(made / "base")
    test = load_data(configuration.load(made / "config.toml")).test
    accuracy, loss = evaluate(base, test).values()
    assert accuracy == rows_of(made)[0]["accuracy"]
    assert loss == pytest.approx(rows_of(made)[0]["loss"], rel=1e-6)
    accuracy, loss = evaluate(PeftModel.from_pretrained(base, made / "adapter"), test).values()
    assert accuracy == rows_of(made)[-1]["accuracy"] != rows_of(made)[0]["accuracy"]
    assert loss == pytest.approx(rows_of(made)[-1]["loss"], rel=1e-5)


@pytest.mark.usefixtures("undrawn")
def test_the_same_configuration_gives_the_same_files(made: Path, tmp_path: Path, fed_cli: Call) -> None:
    again = tmp_path / "again"
    assert fed_cli("run", str(made / "config.toml"), "--out", str(again), "--no-centralised").status == 0
    assert without_times(again) == without_times(made)
    assert (again / "config.toml").read_bytes() == (made / "config.toml").read_bytes()
    for name in ("base/model.safetensors", "adapter/adapter_model.safetensors"):
        assert load_file(again / name).keys() == load_file(made / name).keys()
        assert (again / name).read_bytes() == (made / name).read_bytes()
    assert not (again / "centralised.json").exists()


def test_report_prints_the_result_and_draws_again(made: Path, fed_cli: Call) -> None:
    (made / "report.png").unlink()
    outcome = fed_cli("report", str(made))
    assert outcome.status == 0
    assert (made / "report.png").is_file()
    printed = (made.parent / "printed").read_text()
    assert outcome.out.split("report  ")[0].strip() in printed


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    animals = ("cat", "dog") * 20
    rows = [{"input": f"{'a' if i % 3 else 'the'} {animal}", "output": animal} for i, animal in enumerate(animals)]
    return write_rows(tmp_path / "pets.jsonl", rows)


@pytest.mark.usefixtures("undrawn")
def test_a_local_checkpoint_learns_a_local_jsonl_file(bert: Path, pets: Path, tmp_path: Path, fed_cli: Call) -> None:
    toml, out = tmp_path / "my.toml", tmp_path / "out"
    toml.write_text(
        "rounds = 4\n[clients]\ncount = 4\nper_round = 4\nranks = [2, 4]\n[adapter]\nrank = 4\n"
        "[train]\nlearning_rate = 0.01\nlocal_steps = 4\n[data]\nmax_length = 16\n"
    )
    settings = (f"model.path={bert}", f"data.path={pets}", "data.text=input", "data.label=output")
    outcome = fed_cli("run", str(toml), "--out", str(out), "--no-centralised", "--set", *settings)
    assert (outcome.status, outcome.err) == (0, "")
    rows = rows_of(out)
    assert rows[-1]["accuracy"] == 1.0 > rows[0]["accuracy"]
    # The base has its labels and its tokenizer, and the checkpoint the weights.
    assert not (out / "base" / "model.safetensors").exists()
    assert json.loads((out / "base" / "checkpoint.json").read_text())["path"] == str(bert)
    base = AutoModelForSequenceClassification.from_pretrained(bert, config=AutoConfig.from_pretrained(out / "base"))
    model = PeftModel.from_pretrained(base, out / "adapter").eval()
    tokens = AutoTokenizer.from_pretrained(out / "base")(["the dog", "a cat"], return_tensors="pt")
    with torch.no_grad():
        found = [model.config.id2label[number] for number in model(**tokens).logits.argmax(-1).tolist()]
    assert found == ["dog", "cat"]


def test_a_client_whose_update_is_not_finite_is_left_out_and_named(tmp_path: Path, fed_cli: Call) -> None:
    settings = (*SMALL, "train.optimizer=sgd", "train.learning_rate=1e30")
    outcome = fed_cli("run", "digits", "--out", str(tmp_path / "out"), "--no-centralised", "--set", *settings)
    assert outcome.status == 0
    assert re.search(r"warning: round 1: client \d is left out: ", outcome.err)
    assert all(row["skipped"] for row in rows_of(tmp_path / "out")[1:])


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_usable_updates_ends_and_says_what_lets_it_go_on(tmp_path: Path, fed_cli: Call) -> None:
    settings = (*SMALL, "rounds=3", "train.optimizer=sgd", "train.learning_rate=1e30", "server.patience=1")
    outcome = fed_cli("run", "digits", "--out", str(tmp_path / "out"), "--no-centralised", "--set", *settings)
    assert outcome.status == 2
    said = outcome.err.splitlines()[-1]
    assert said.startswith(
        "error: no client sent a usable update in 1 rounds in a row, up to round 1: server.patience is 1"
    )
    assert said.endswith("or server.patience = 0 in the run's config.toml to go on regardless")
    written = (tmp_path / "out" / "config.toml").read_text()
    (tmp_path / "out" / "config.toml").write_text(written.replace("patience = 1", "patience = 0"))
    assert fed_cli("resume", str(tmp_path / "out"), "--no-centralised").status == 0


@pytest.mark.usefixtures("undrawn")
def test_a_longer_run_has_centralised_lora_of_its_own_steps(made: Path, tmp_path: Path, fed_cli: Call) -> None:
    out = Path(shutil.copytree(made, tmp_path / "out"))
    (out / "config.toml").write_text((out / "config.toml").read_text().replace("rounds = 2", "rounds = 3"))
    assert fed_cli("resume", str(out)).status == 0
    assert [row["steps"] for row in json.loads((out / "centralised.json").read_text())] == [6, 18]
    (out / "adapter" / "adapter_model.safetensors").write_bytes(b"cut")
    before = (out / "centralised.json").read_bytes()
    assert fed_cli("resume", str(out)).status == 0
    assert (out / "centralised.json").read_bytes() == before
    (out / "centralised.json").write_text(before.decode().replace("6", "7"))
    assert_refused(fed_cli("report", str(out)), "centralised.json' is damaged; delete it")


@pytest.mark.parametrize(
    ("error", "came", "status", "said"),
    [
        (MemoryError(), False, 2, "error: there is not enough memory; smaller batches, cohorts or models"),
        (OSError(28, "No space left on device", "runs/a"), False, 2, "error: runs/a: No space left on device"),
        (RuntimeError("error of a library"), True, 130, "error: interrupted"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    error: Exception, came: bool, status: int, said: str, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr("fed.commands.noise", fail)
    monkeypatch.setattr("fed.interruption.came", lambda: came)
    outcome = fed_cli("noise", "nowhere")
    assert (outcome.status, outcome.err.startswith(said)) == (status, True)
    assert len(outcome.err.splitlines()) == 1


BAD = {
    "unknown key": (("--set", "train.lerning_rate=1"), r"unknown key 'train.lerning_rate'; .*'train.learning_rate'"),
    "unknown key later": (("--set", "rounds=1", "sed=1"), r"unknown key 'sed'; the nearest is 'seed'"),
    "impossible value": (("--set", "clients.ranks=[0]"), r"clients.ranks\[0\] is 0: it should be greater than"),
    "mixed ranks": (("--set", "method=fedit"), r"clients.ranks is .*: FedIT needs every rank equal"),
    "no value": (("--set", "rounds"), r"--set takes key=value"),
    "too many clients": (("--set", "clients.count=999"), r"clients.count is 999: 630 training rows allow at most 315"),
    "unknown option": (("--sett", "rounds=1"), r"No such option:? '?--sett.*see python -m fed --help"),
    "target modules": (("--set", "adapter.target_modules=['q_prj']"), r"'q_prj'.*q_proj"),
    "no device": (("--set", "device=cuda"), r"device is 'cuda', which is not available here"),
}


def check_refused(outcome: Outcome, message: str, directory: Path, left: set[str]) -> None:
    assert_refused(outcome, message)
    assert "Traceback" not in outcome.out
    assert {path.name for path in directory.iterdir()} == left


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    arguments: tuple[str, ...], message: str, tmp_path: Path, fed_cli: Call
) -> None:
    if "device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    outcome = fed_cli("run", "digits", "--out", str(tmp_path / "deep" / "out"), *arguments)
    check_refused(outcome, message, tmp_path, set())
    assert outcome.out == ""


def test_a_missing_toml_is_refused(tmp_path: Path, fed_cli: Call) -> None:
    outcome = fed_cli("run", str(tmp_path / "my.toml"), "--out", str(tmp_path / "out"))
    check_refused(outcome, r"no preset or file is called '.*my.toml'; presets: digits", tmp_path, set())


TEXT = '[data]\ntext = "input"\nlabel = "output"\n[clients]\ncount = 4\nper_round = 2'


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.path=nowhere", r"model.path is 'nowhere': no such directory"),
        ("data.path=nowhere.jsonl", r"data.path is 'nowhere.jsonl': there is no such file"),
        ("data.label=ouput", r"line 1: data.label is 'ouput'; the columns there are input, output"),
        ("data.text=txt", r"line 1: data.text is 'txt'; the columns there are input, output"),
        ("data.max_length=1000", r"data.max_length is 1000: the checkpoint takes at most 128 tokens"),
        ("data.shift=invert", r"data.shift is 'invert': text takes 'none'"),
    ],
)
def test_bad_text_data_is_one_line_and_leaves_nothing(
    change: str, message: str, bert: Path, pets: Path, tmp_path: Path, fed_cli: Call
) -> None:
    (tmp_path / "my.toml").write_text(TEXT)
    settings = (f"model.path={bert}", f"data.path={pets}", change)
    outcome = fed_cli("run", str(tmp_path / "my.toml"), "--out", str(tmp_path / "out"), "--set", *settings)
    check_refused(outcome, message, tmp_path, {"my.toml", "pets.jsonl"})


def test_a_checkpoint_that_breaks_in_its_weights_leaves_nothing(
    bert: Path, pets: Path, tmp_path: Path, fed_cli: Call
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in bert.iterdir():
        (broken / file.name).write_bytes(b"?" if file.suffix == ".safetensors" else file.read_bytes())
    (tmp_path / "my.toml").write_text(TEXT)
    settings = (f"model.path={broken}", f"data.path={pets}")
    outcome = fed_cli("run", str(tmp_path / "my.toml"), "--out", str(tmp_path / "out"), "--set", *settings)
    check_refused(outcome, "the checkpoint does not load", tmp_path, {"my.toml", "pets.jsonl", "broken"})


@pytest.mark.usefixtures("undrawn")
def test_an_existing_directory_is_replaced_only_if_it_is_empty_or_a_run_and_only_on_request(
    tmp_path: Path, fed_cli: Call
) -> None:
    out, call = tmp_path / "out", ("run", "digits", "--no-centralised", "--set", *SMALL, "rounds=1", "--out")
    out.mkdir()
    check_refused(fed_cli(*call, str(out)), r"--out is '.*out', which exists; --overwrite", tmp_path, {"out"})
    assert fed_cli(*call, str(out), "--overwrite").status == 0
    (out / "mine.txt").write_text("of the old run")
    assert fed_cli(*call, str(out), "--overwrite", "--set", "seed=3").status == 0
    assert configuration.load(out / "config.toml").seed == 3
    assert not (out / "mine.txt").exists()
    (out / "rounds.jsonl").unlink()
    check_refused(fed_cli(*call, str(out), "--overwrite"), r"which --overwrite leaves alone", tmp_path, {"out"})
    (tmp_path / "file").write_text("mine")
    check_refused(fed_cli(*call, str(tmp_path / "file"), "--overwrite"), "not a directory", tmp_path, {"out", "file"})


def test_overwrite_never_replaces_the_working_directory_or_one_that_holds_it(
    tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for out in (".", ".."):
        outcome = fed_cli("run", "digits", "--overwrite", "--out", out)
        check_refused(outcome, "holds the working directory", tmp_path, {"here"})


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FedError("the adapter does not fit"), 2, "error: the adapter"),
        (KeyboardInterrupt(), 130, "warning: interrupted: nothing is left"),
    ],
)
def test_what_fails_before_the_first_row_leaves_the_old_run_as_it_was(
    error: BaseException, status: int, said: str, tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("config.toml", "rounds.jsonl"):
        (out / name).write_text("old")
    monkeypatch.setattr("fed.experiments.run.simulate", failing(error, 0))
    outcome = fed_cli("run", "digits", "--overwrite", "--out", str(out), "--set", *SMALL)
    assert (outcome.status, outcome.err.startswith(said)) == (status, True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "rounds.jsonl").read_text() == (out / "config.toml").read_text() == "old"


def interrupt(out: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch, *settings: str) -> Outcome:
    """Begin a run and end it by Ctrl-C after row 1."""
    with monkeypatch.context() as patched:
        patched.setattr("fed.experiments.run.simulate", failing(KeyboardInterrupt(), 2))
        return fed_cli("run", "digits", "--out", str(out), "--set", *SMALL, *settings)


@pytest.mark.usefixtures("undrawn")
def test_an_interrupted_run_keeps_its_rounds_and_goes_on_to_the_same_files(
    made: Path, tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    outcome = interrupt(out, fed_cli, monkeypatch)
    assert outcome.status == 130
    assert outcome.err == (
        f"warning: interrupted: the rounds so far are in {out}; python -m fed resume {out} continues\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [row["round"] for row in rows_of(out)] == [0, 1]
    assert fed_cli("report", str(out)).status == 0
    outcome = fed_cli("resume", str(out))
    assert (outcome.status, outcome.err) == (0, "")
    assert "round 2/2" in outcome.out
    assert "round 1/2" not in outcome.out
    assert without_times(out) == without_times(made)
    for name in ("config.toml", "base/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (out / name).read_bytes() == (made / name).read_bytes()
    reached = [json.loads((run / "centralised.json").read_text()) for run in (out, made)]
    assert [row["accuracy"] for row in reached[0]] == [row["accuracy"] for row in reached[1]]


@pytest.mark.usefixtures("undrawn")
def test_a_run_that_is_finished_plays_nothing_again(made: Path, fed_cli: Call) -> None:
    before = (made / "rounds.jsonl").read_bytes()
    outcome = fed_cli("resume", str(made))
    assert (outcome.status, outcome.err) == (0, "")
    assert f"{made}: all 2 rounds are there already" in outcome.out
    assert (made / "rounds.jsonl").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
def test_a_run_without_a_checkpoint_cannot_go_on_and_stays(
    tmp_path: Path, fed_cli: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupt(out, fed_cli, monkeypatch, "checkpoint_every=0")
    check_refused(fed_cli("resume", str(out)), "holds no checkpoint to go on from", tmp_path, {"out"})
    assert [row["round"] for row in rows_of(out)] == [0, 1]


def test_what_is_no_run_neither_goes_on_nor_is_reported(tmp_path: Path, fed_cli: Call) -> None:
    for command in ("resume", "report"):
        check_refused(fed_cli(command, str(tmp_path)), "is not a run's directory", tmp_path, set())


def test_help_says_what_there_is(fed_cli: Call) -> None:
    outcome = fed_cli("--help")
    assert outcome.status == 0
    assert "run" in outcome.out
    assert "report" in outcome.out
    assert fed_cli().status == 2


@contextmanager
def unread() -> Iterator[None]:
    """Make standard output a pipe that was closed at its other end."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w", encoding="utf-8") as output, redirect_stdout(output):
        yield


def test_a_report_that_nobody_reads_ends_quietly(fed_cli: Call, made: Path) -> None:
    with unread():
        assert fed_cli("report", str(made), "--markdown") == Outcome(141, "", "")


def test_a_run_that_nobody_watches_stops_and_says_so(fed_cli: Call, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with unread():
        outcome = fed_cli("run", "digits", "--out", str(out), *SMALL)
    assert outcome == Outcome(130, "", "warning: interrupted: nothing is left of this run\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "a\x1b[2Jb"), r"no preset or file is called 'a\\x1b\[2Jb'"),
        (("run", "digits", "--\x1b[2J"), r"No such option:? '?--\\x1b\[2J"),
        (("run", "digits", "\x9b=\u202e"), r"unknown key '\\x9b'"),
        (("report", "a\x1b\nb"), r"'a\\x1b\\nb' is not a run's directory"),
        (("run", "digits", "--out", "x" * 300), r"--out is 'x+…: it should be a path with names of at most 255 bytes"),
        (("run", "digits", "--out", "x/" * 3000), r"--out is '[x/]+…: it should be a path of at most 4095 bytes"),
        (("run", "digits", "--out", "a\udcff"), r"--out is 'a\\udcff': it holds half a surrogate pair"),
        (("compare", "digits", "--seeds", "0-1000000000"), r"--seeds is '0-1000000000': .* at most 10000 runs"),
    ],
)
def test_odd_names_are_one_line_without_control_characters(
    arguments: tuple[str, ...], message: str, fed_cli: Call
) -> None:
    outcome = fed_cli(*arguments)
    assert_refused(outcome, message)
    assert outcome.err[:-1].isprintable()
