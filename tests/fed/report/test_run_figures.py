"""The picture of a run: what its axes show."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from fed.config import load
from fed.report.run_figures import draw
from fed.simulation.run_directory import write_centralised
from tests.support.saved_runs import make_row, make_run


@pytest.fixture
def axes(monkeypatch: pytest.MonkeyPatch) -> list:
    """The axes of every figure that the test draws."""
    drawn: list = []
    subplots = Figure.subplots

    def keep(figure: Figure, *sizes: int, **options: object) -> object:
        made = subplots(figure, *sizes, **options)
        drawn.extend(made.flat)
        return made

    monkeypatch.setattr(Figure, "subplots", keep)
    return drawn


def labels(axes: object) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_picture_shows_accuracy_noise_and_bytes(tmp_path: Path, axes: list) -> None:
    directory = make_run(tmp_path / "run", [make_row(number) for number in range(5)])
    write_centralised(directory, [{"steps": 20, "accuracy": 0.6}, {"steps": 200, "accuracy": 0.7}])
    path = draw(directory)
    assert path == directory / "report.png"
    content = path.read_bytes()
    width, height = struct.unpack(">II", content[16:24])
    assert content.startswith(b"\x89PNG\r\n")
    assert width > 2 * height > 800
    accuracy, noise, traffic = axes
    assert accuracy.lines[0].get_ydata().tolist() == pytest.approx([10, 20, 30, 40, 50])
    assert labels(accuracy) == [
        "federated: 50.0 %",
        "unadapted: 10.0 %",
        "centralised LoRA, 20 steps: 60.0 %",
        "centralised LoRA, 200 steps: 70.0 %",
    ]
    assert noise.get_yscale() == "log"
    assert [line.get_xdata().tolist() for line in noise.lines] == [[1, 2, 3, 4], [2, 3, 4]]
    assert traffic.lines[0].get_ydata().tolist() == pytest.approx([0.003] * 4)
    assert labels(traffic) == ["down, 0.012 MB in all", "up, 0.01 MB in all"]
    files = {file.name for file in directory.iterdir()}
    assert files == {"centralised.json", "config.toml", "report.png", "rounds.jsonl"}


def test_noise_that_is_zero_throughout_says_so(tmp_path: Path, axes: list) -> None:
    rows = [make_row(0)] + [make_row(number, init_noise=0.0, agg_noise=0.0) for number in (1, 2)]
    config = load("digits", ["method=fedit", "clients.ranks=[16]"])
    draw(make_run(tmp_path / "run", rows, config))
    assert axes[1].get_yscale() == "linear"
    assert all(label.endswith("0 in every round") for label in labels(axes[1]))


def test_a_run_that_stopped_at_once_and_rounds_without_measurements_still_draw(tmp_path: Path, axes: list) -> None:
    draw(make_run(tmp_path / "first", [make_row(0)]))
    nothing = make_row(1, loss=None, init_noise=None, agg_noise=None, upload_bytes=0)
    draw(make_run(tmp_path / "second", [make_row(0), nothing, make_row(2)]))
    assert len(axes) == 6


def test_the_same_run_draws_the_same_picture(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "run", [make_row(number) for number in range(3)])
    assert draw(directory).read_bytes() == draw(directory).read_bytes()
