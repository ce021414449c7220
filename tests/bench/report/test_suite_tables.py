"""Saved results turned into a table, a picture and a README section."""

import math
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench.cases import MAIN_OPS, OPS
from bench.harness.records import ResultsError
from bench.report.command import main
from bench.report.figures import draw
from bench.report.markdown import markers, rewrite_section
from bench.report.runs import geometric_mean, load_run
from bench.report.suite_tables import common_rank, markdown, mean_ratios
from tests.bench.saved import saved_run, saved_run_of_every_op, write_run

BEGIN, END = markers("bench")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return write_run(tmp_path / "results.json", saved_run())


def test_geometric_mean_by_hand() -> None:
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4.0)
    assert geometric_mean([8.0, 2.0]) == pytest.approx(4.0)
    assert math.isnan(geometric_mean([]))


def test_means_are_over_the_common_rank_and_what_was_measured(results: Path) -> None:
    run = load_run(results)
    assert common_rank(run, "forward") == 16
    means = mean_ratios(run, "forward", 16)
    assert means["fused"] == pytest.approx((math.sqrt(1.1 * 4.4), math.sqrt(0.55 * 1.1)))
    assert means["peft-compiled"] == pytest.approx((1.5, 0.75))
    assert mean_ratios(run, "forward", 32)["fused"] == pytest.approx((2.0, 0.5))


def test_the_table_holds_times_ratios_means_and_causes(results: Path) -> None:
    lines = markdown(load_run(results)).splitlines()
    assert "Example CPU, 2 CPU threads" in lines[0]
    assert "0123456789ab with uncommitted changes, 2026-01-02" in lines[0]
    assert "triton" not in lines[0]
    assert "| tiny query 64×128, R 16 | 2 (1.00) | 4 (2.00) | 3 (1.50) | 2.2 (1.10) | 0.55 | 3.0 | 3.0 |" in lines
    without = next(line for line in lines if line.startswith("| tiny up"))
    assert "| not available: no C++ compiler \\| none |" in without
    assert "| 440 (4.40) | 1.10 |" in without
    assert "| geometric mean, R 16 | (1.00) | (2.83) | (1.50) | (2.20) | 0.78 |  |  |" in lines
    assert "| tiny query 64×128, R 16 | 1 (1.00) | 9 (9.00) | 1.5 (1.50) | 0.17 | 3.0 | 3.0 |" in lines


def test_the_other_ops_have_sections_of_their_own(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "every.json", saved_run_of_every_op()))
    assert run.ops == tuple(op for op in OPS if op != "forward_backward")
    text = markdown(run)
    lines = text.splitlines()
    assert text.index("**Fold.**") < text.index("**LoRA dropout.**") < text.index("**Fold of many weights.**")
    assert "training, p = 0.1" in text
    apart = "| shape | base | peft | peft-compiled | fused-apart | fused | fused ÷ peft | fused ÷ apart | peak peft | "
    assert lines.count(apart + "peak fused |") == 2
    columns = "| shape | base | peft | peft-autocast | fused | fused-mixed | mixed ÷ peft | mixed ÷ autocast | "
    assert f"{columns}mixed ÷ fused | peak peft | peak mixed |" in lines
    times = "4 (1.00) | 20 (5.00) | 10 (2.50) | 5 (1.25) | 6 (1.50)"
    assert f"| tiny query 64×128, R 16 | {times} | 0.30 | 0.60 | 1.20 | 3.0 | 3.0 |" in lines
    means = "(1.00) | (5.00) | (2.50) | (1.25) | (1.50)"
    assert f"| geometric mean, R 16 | {means} | 0.30 | 0.60 | 1.20 |  |  |" in lines
    assert "float32, in mixed precision bfloat16. Medians" in lines[0]
    label = "tiny q, k, v 64×(64+32+32), R 16"
    assert f"| {label} | 2 (1.00) | 6 (3.00) | 4 (2.00) | 4 (2.00) | 3 (1.50) | 0.50 | 0.75 | 3.0 | 3.0 |" in lines
    assert (
        "| tiny query 64×128, R 16 | 1 (1.00) | 8 (8.00) | 1.6 (1.60) | 2 (2.00) | 0.25 | 1.25 | 3.0 | 3.0 |" in lines
    )
    assert f"| {label} | 4 (1.00) | 16 (4.00) | 10 (2.50) | 5 (1.25) | 0.31 | 0.50 | 3.0 | 3.0 |" in lines
    assert "| geometric mean, R 16 | (1.00) | (4.00) | (2.50) | (1.25) | 0.31 | 0.50 |  |  |" in lines


def test_a_run_without_the_other_ops_is_shown_as_ever(results: Path, tmp_path: Path) -> None:
    every = markdown(load_run(write_run(tmp_path / "every.json", saved_run_of_every_op())))
    older = markdown(load_run(results)).strip()
    assert every.replace(", in mixed precision bfloat16", "").startswith(older)
    assert "fused ÷ apart" not in markdown(load_run(results))


def test_a_way_of_ours_that_was_not_measured_leaves_a_dash(tmp_path: Path) -> None:
    saved = saved_run_of_every_op()
    lost = next(item for item in saved["benchmarks"] if item["extra_info"]["provider"] == "fused-inplace")
    saved["benchmarks"].remove(lost)
    saved["not_available"].append(lost["extra_info"] | {"cause": "none"})
    lines = markdown(load_run(write_run(tmp_path / "every.json", saved))).splitlines()
    row = "| 1 (1.00) | 8 (8.00) | not available: none | 2 (2.00) | 0.25 | – | 3.0 | 3.0 |"
    assert f"| tiny query 64×128, R 16 {row}" in lines


def test_the_picture_shows_the_main_ops_or_says_that_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = write_run(tmp_path / "every.json", saved_run_of_every_op())
    draw(load_run(every), tmp_path / "every.png")
    draw(load_run(write_run(tmp_path / "main.json", saved_run())), tmp_path / "main.png")
    assert (tmp_path / "every.png").read_bytes() == (tmp_path / "main.png").read_bytes()
    saved = saved_run_of_every_op()
    saved["benchmarks"] = [item for item in saved["benchmarks"] if item["extra_info"]["op"] not in MAIN_OPS]
    saved["not_available"] = []
    assert main([str(write_run(tmp_path / "rest.json", saved)), "--png", str(tmp_path / "rest.png")]) == 2
    assert "the picture shows forward, forward_backward, fold alone" in capsys.readouterr().err


def test_a_picture_that_cannot_be_drawn_leaves_what_was_there(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(canvas: FigureCanvasAgg, name: str) -> None:
        Path(name).write_bytes(b"half")
        raise ValueError("no such font")

    monkeypatch.setattr(FigureCanvasAgg, "print_png", fail)
    png = tmp_path / "bench.png"
    png.write_bytes(b"old")
    with pytest.raises(ValueError, match="no such font"):
        draw(load_run(results), png)
    assert png.read_bytes() == b"old"
    assert not list(tmp_path.rglob("*.tmp"))


def test_every_row_of_a_table_has_as_many_cells(results: Path) -> None:
    for run in (saved_run(), saved_run_of_every_op()):
        widths: set[int] = set()
        for line in markdown(load_run(write_run(results, run))).splitlines():
            if line.startswith("|"):
                widths.add(line.replace("\\|", "").count("|"))
            else:
                assert len(widths) <= 1
                widths.clear()
        assert len(widths) == 1


def test_the_command_writes_table_picture_and_readme(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{BEGIN}\nold figures\n{END}\n\nThe rest.\n", encoding="utf-8")
    png, table = tmp_path / "docs" / "bench.png", tmp_path / "table.md"
    status = main([str(results), "--png", str(png), "--markdown", str(table), "--readme", str(readme)])
    assert status == 0
    assert png.read_bytes().startswith(b"\x89PNG")
    text = readme.read_text(encoding="utf-8")
    assert text.startswith(f"# Title\n\n{BEGIN}\n\n![")
    assert "](docs/bench.png)" in text
    assert table.read_text(encoding="utf-8").strip() in text
    assert text.endswith(f"\n\n{END}\n\nThe rest.\n")
    assert "old figures" not in text
    assert not list(tmp_path.rglob("*.tmp"))


def test_without_a_destination_the_table_is_printed(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(results)]) == 0
    assert capsys.readouterr().out == markdown(load_run(results))


def test_rewriting_twice_changes_nothing() -> None:
    once = rewrite_section(f"a\n{BEGIN}\n{END}\nb\n", "bench", "new")
    assert once == f"a\n{BEGIN}\n\nnew\n\n{END}\nb\n"
    assert rewrite_section(once, "bench", "new") == once


@pytest.mark.parametrize("text", ["no markers", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(ResultsError, match="bench:begin"):
        rewrite_section(text, "bench", "new")


def broken(change: str) -> dict[str, Any]:
    run = saved_run()
    if change == "benchmarks":
        run["benchmarks"] = []
    elif change == "time_ms":
        del run["benchmarks"][0]["extra_info"]["time_ms"]
    else:
        del run[change]
    return run


@pytest.mark.parametrize("change", ["benchmarks", "time_ms", "machine_info", "not_available"])
def test_files_that_are_not_results_are_refused_by_name(
    change: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "broken.json", broken(change))
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "broken.json" in error
    assert change in error


def test_a_missing_file_and_a_file_that_is_not_json_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "absent.json")]) == 2
    assert "absent.json does not exist" in capsys.readouterr().err
    (tmp_path / "text.json").write_text("{", encoding="utf-8")
    assert main([str(tmp_path / "text.json")]) == 2
    assert "text.json is not JSON" in capsys.readouterr().err


def test_nothing_is_half_written_when_the_readme_has_no_markers(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n", encoding="utf-8")
    assert main([str(results), "--readme", str(readme)]) == 2
    assert readme.read_text(encoding="utf-8") == "# Title\n"
