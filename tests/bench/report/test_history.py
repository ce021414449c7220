"""The history of benchmark runs: what is kept of a run, which means are compared, the table and the picture."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.harness.records import ResultsError, blank, open_records
from bench.report import command
from bench.report.figures import draw_history
from bench.report.history import HISTORY, history_markdown, keep, load_history, means, read_run
from tests.bench.saved import saved_run, saved_run_of_every_op, write_run


def run_of(day: int, commit: str, factor: float = 1.0, **changes: Any) -> dict[str, Any]:
    """Return the saved run of another day and commit, the fused provider slower by `factor`."""
    run = saved_run(commit) | {"datetime": f"2026-01-{day:02}T03:04:05+00:00"} | changes
    for item in run["benchmarks"]:
        facts = item["extra_info"]
        if facts["provider"] == "fused":
            facts["ratio_to_base"] *= factor
            facts["ratio_to_peft"] *= factor
    return run


@pytest.fixture
def history(tmp_path: Path) -> Path:
    """Two runs, kept in the wrong order; the later lacks the large forward shape and is slower."""
    later = run_of(5, "b" * 40, factor=2.0)
    later["benchmarks"] = [item for item in later["benchmarks"] if item["extra_info"]["projection"] != "up"]
    folder = tmp_path / "history"
    keep(write_run(tmp_path / "later.json", later), folder)
    keep(write_run(tmp_path / "first.json", run_of(2, "a" * 40)), folder)
    return folder


def test_a_run_is_kept_small_and_named_by_day_commit_and_device(history: Path) -> None:
    names = sorted(path.name for path in history.iterdir())
    assert names == [f"2026-01-{day}-changed-example-cpu.json" for day in ("02-" + "a" * 12, "05-" + "b" * 12)]
    saved = json.loads((history / names[0]).read_text(encoding="utf-8"))
    assert saved["versions"]["torch"] == "2.13.0"
    assert {ratio["provider"] for ratio in saved["ratios"]} == {"base", "peft", "peft-compiled", "fused"}
    assert (history / names[0]).stat().st_size < 5000


def test_means_are_over_the_shapes_every_run_has(history: Path) -> None:
    runs = load_history(history)
    assert [run.date[:10] for run in runs] == ["2026-01-02", "2026-01-05"]
    first, later = means(runs, "forward")
    assert first.run.commit == "a" * 40 + "+"
    assert first.to_base == pytest.approx(math.sqrt(1.1 * 2.0))  # query at ranks 16 and 32; only the first run has up
    assert first.to_peft == pytest.approx(math.sqrt(0.55 * 0.5))
    assert (later.to_base, later.to_peft) == pytest.approx((2 * first.to_base, 2 * first.to_peft))


def test_the_table_has_a_line_a_run(history: Path) -> None:
    lines = history_markdown(load_history(history)).splitlines()
    assert lines[0].startswith("**Example CPU**, fused")
    assert "| 2026-01-02 aaaaaaa+ | 2.13.0 | 1.483 / 0.524 | 1.500 / 0.167 |" in lines
    assert "| 2026-01-05 bbbbbbb+ | 2.13.0 | 2.966 / 1.049 | 3.000 / 0.333 |" in lines


def test_the_other_ops_are_kept_and_have_columns(history: Path, tmp_path: Path) -> None:
    newer = saved_run_of_every_op() | {"datetime": "2026-01-07T03:04:05+00:00"}
    keep(write_run(tmp_path / "newer.json", newer), history)
    runs = load_history(history)
    lines = history_markdown(runs).splitlines()
    assert lines[2].endswith("| fold out of place ÷ base / ÷ PEFT | fold of many ÷ base / ÷ PEFT |")
    mixed = "1.500 / 0.375 | 1.500 / 0.300"
    assert lines[-1].endswith(
        f"| 1.500 / 0.600 | {mixed} | 1.500 / 0.500 | 1.500 / 0.500 | 2.000 / 0.250 | 1.250 / 0.312 |"
    )
    assert lines[-2].endswith("| 3.000 / 0.333 | – | – | – | – | – | – | – |")
    draw_history(runs, tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 0


def test_devices_do_not_mix(history: Path, tmp_path: Path) -> None:
    other = run_of(3, "c" * 40)
    other["machine_info"] = other["machine_info"] | {"device_name": "Other"}
    keep(write_run(tmp_path / "other.json", other), history)
    text = history_markdown(load_history(history))
    assert text.count("| run | torch |") == 2
    assert "| 2026-01-03 ccccccc+ | 2.13.0 | 1.342 / 0.671 |" not in text.split("**Other**")[0]


def test_a_device_s_records_are_kept_too(tmp_path: Path) -> None:
    meta = {"device_name": "A GPU", "versions": {"torch": "2.11"}, "commit": "d" * 40, "date": "2026-02-01T00:00:00"}
    facts = {"op": "forward", "model": "tiny", "projection": "query", "dtype": "bfloat16", "provider": "fused"}
    facts |= {"m": 1, "k": 2, "n": 3, "r": 4}
    timed = blank(**facts, time_ms=1.0, ratio_to_base=1.25, ratio_to_peft=None, status="timed")
    wrong = blank(**facts | {"r": 8}, status="wrong")
    open_records(tmp_path / "a-gpu.json", meta, fresh=True).add([timed, wrong])
    run = read_run(tmp_path / "a-gpu.json")
    assert [(ratio.r, ratio.ratio_to_base) for ratio in run.ratios] == [(4, 1.25)]
    assert run.file_name == "2026-02-01-dddddddddddd-a-gpu.json"
    kept = keep(tmp_path / "a-gpu.json", tmp_path / "history")
    assert load_history(kept.parent) == [run]


def test_the_command_keeps_shows_and_draws(
    history: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    png = tmp_path / "history.png"
    assert command.main(["--history", str(history), "--png", str(png)]) == 0
    assert capsys.readouterr().out == history_markdown(load_history(history))
    assert png.read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(command, "keep", lambda path: keep(path, history))
    results = write_run(tmp_path / "third.json", run_of(9, "e" * 40))
    assert command.main([str(results), "--keep"]) == 0
    assert "kept: " in capsys.readouterr().err
    assert len(load_history(history)) == 3


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"date": "x", "ratios": [{}]}'])
def test_a_file_that_is_no_kept_run_is_named(text: str, history: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (history / "broken.json").write_text(text, encoding="utf-8")
    assert command.main(["--history", str(history)]) == 2
    assert "broken.json is no kept run" in capsys.readouterr().err


def test_an_empty_history_says_how_to_fill_it(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="make bench"):
        load_history(tmp_path)


def test_the_committed_history_can_be_read_and_holds_the_committed_result() -> None:
    assert read_run(HISTORY.parent / "cpu.json") in load_history()
