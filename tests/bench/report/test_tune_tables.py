"""The tuner's log as a table, from a log written by hand."""

from pathlib import Path

import pytest

from bench.harness.records import RecordFile, blank
from bench.report.command import main
from bench.report.markdown import markers

FACTS = {"op": "forward", "m": 8192, "k": 64, "n": 48, "r": 16, "dtype": "bfloat16"}
TILE = {"block_m": 128, "block_n": 256, "block_k": 64}


def record(design: str, time_ms: float | None, status: str = "timed", **blocks: object) -> dict[str, object]:
    way = {"design": design, **TILE, "resident": 1, "dependent": False, "gradient_beside": False, **blocks}
    return blank(**FACTS, provider=design, time_ms=time_ms) | {"status": status, "blocks": way}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    meta = {"device_name": "Thing 1", "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05"}
    file = RecordFile(tmp_path / "thing-1.json", meta)
    file.add(
        [
            record("two_launch", 0.25, "best", dependent=True),
            record("two_launch", 0.5, block_n=128),
            record("two_launch", 0.4),
            record("tile", None, "wrong"),
            record("algebra", 0.3, overlap="none"),
            record("two_launch", 0.6, overlap="early", resident=2),
            record("two_launch", 0.7, "best") | {"m": 1},  # another class: only the first is shown
            record("two_launch", 0.8, "best") | {"op": "fold"},
        ]
    )
    return file.path


def test_each_way_has_a_line_with_its_fastest_tile_and_what_was_wrong(
    log: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(log)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Thing 1, commit 0123456789ab, 2026-01-02.",
        "",
        "**Forward**, M 8192, K 64, N 48, R 16, bfloat16:",
        "",
        "| design | overlap | beside | tried | best tile | best, µs |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| two_launch |  | side product | 1 | 128×256×64 | 250.0 |",
        "| algebra |  |  | 1 | – | 300.0 |",
        "| two_launch |  |  | 2 | 128×256×64 | 400.0 |",
        "| two_launch | early, two programs |  | 1 | 128×256×64 | 600.0 |",
        "| tile |  |  | 0, 1 wrong | – | – |",
    ]


def test_a_document_s_section_is_named_after_the_log(log: Path, tmp_path: Path) -> None:
    page, (begin, end) = tmp_path / "page.md", markers("tune-thing-1")
    page.write_text(f"before\n{begin}\nstale\n{end}\nafter\n", encoding="utf-8")
    assert main([str(log), "--document", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| two_launch |  | side product | 1 | 128×256×64 | 250.0 |" in text
    assert "stale" not in text
    page.write_text("no markers\n", encoding="utf-8")
    assert main([str(log), "--document", str(page)]) == 2
    assert page.read_text(encoding="utf-8") == "no markers\n"
