"""Reports of a comparison of runs written by hand: tables, verdicts, files and the HTML page."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fed.errors import FedError
from fed.experiments import plan as plans
from fed.report import tables
from fed.report.comparison import Comparison, as_json, collect
from fed.report.summary import ACCURACY, COST, METRICS, NOISE, OUTCOME
from fed.report.write import comparison_page, publish_comparison
from tests.support.saved_runs import make_finished_run, make_row

# Final accuracies by seed: a mean of 60 against 50 and a mean of 52 against 50, seed by seed +2, −4, +8.
FINAL = {"fed-plora": (0.40, 0.50, 0.60), "fedit": (0.50, 0.60, 0.71), "fedit@2": (0.42, 0.46, 0.68)}


def make_comparison(directory: Path, finals: dict[str, tuple[float, ...]] = FINAL) -> Path:
    asked = plans.request("digits", ["rounds=2"], list(finals), range(len(next(iter(finals.values())))))
    directory.mkdir(exist_ok=True)
    plans.write(asked, directory)
    for cell in plans.plan(asked).cells:
        last = finals[cell.variant.name][cell.seed]
        rows = [make_row(0, accuracy=0.1), make_row(1), make_row(2, accuracy=last)]
        make_finished_run(directory / cell.path, rows, cell.config)
    return directory


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    return collect(make_comparison(tmp_path))


def test_mean_and_deviation_by_hand(comparison: Comparison) -> None:
    assert tables.table(comparison, OUTCOME) == [
        ("3 seeds", "accuracy (%)", "gain (points)", "loss"),
        ("Fed-PLoRA", "50.0 ± 10.0", "40.0 ± 10.0", "1.800"),
        ("FedIT (rank 16)", "60.3 ± 10.5", "50.3 ± 10.5", "1.800"),
        ("FedIT (rank 2)", "52.0 ± 14.0", "42.0 ± 14.0", "1.800"),
    ]


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((68.0, 142.0), "105 ± 52"),
        ((0.84, 0.886), "0.863 ± 0.033"),
        ((26_800.0, 28_240.0), "27,520 ± 1,018"),
        ((0.0071, 0.0066), "0.00685 ± 0.00035"),
        ((7.1e-7, 6.9e-7), "7e-07 ± 1.4e-08"),
        ((3.0, 3.0), "3"),
        ((3.14159,), "3.14"),
        ((), "—"),
    ],
)
def test_a_mean_has_the_decimals_of_its_deviation(values: tuple[float, ...], shown: str) -> None:
    plain = next(metric for metric in METRICS if metric.name == "agg_noise")
    assert tables.spread(values, plain) == shown


def test_noise_is_a_mean_over_rounds_and_bytes_and_times_are_sums(comparison: Comparison) -> None:
    assert tables.table(comparison, NOISE)[1] == ("Fed-PLoRA", "5e-07", "0.5")
    assert tables.table(comparison, COST)[:2] == [
        ("3 seeds", "up (MB)", "down (MB)", "training (s)"),
        ("Fed-PLoRA", "0.003", "0.006", "1.5"),
    ]


def test_differences_are_paired_by_seed_and_said_in_words(comparison: Comparison) -> None:
    # +10, +10, +11: mean 31/3, s = 1/√3, half = 4.3026527 · (1/√3) / √3 = 1.4342176
    # +2, −4, +8: mean 2, s = 6, half = 4.3026527 · 6 / √3 = 14.9048
    assert tables.paired_table(comparison, ACCURACY) == [
        ("accuracy less Fed-PLoRA's", "difference", "95 % interval", "seeds", "verdict"),
        ("FedIT (rank 16)", "+10.33 points", "+8.90 to +11.77", "3", "ahead"),
        ("FedIT (rank 2)", "+2.00 points", "-12.90 to +16.90", "3", "tie"),
    ]
    ahead, tie = tables.verdicts(comparison)
    assert ahead == ("FedIT (rank 16) is 10.33 points ahead of Fed-PLoRA (95 % interval +8.90 to +11.77, 3 seeds).")
    assert tie.startswith("FedIT (rank 2) and Fed-PLoRA tie: the difference of +2.00 points")


def test_ranks_made_equal_are_noted(comparison: Comparison) -> None:
    assert tables.notes(comparison)[:2] == [
        "FedIT runs with every client at rank 16 of R = 16 (it needs equal ranks).",
        "FedIT runs with every client at rank 2 of R = 16 (as asked for, alpha 4 for the same scale).",
    ]


def test_json_holds_every_figure(comparison: Comparison) -> None:
    found = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert found["seeds"] == [0, 1, 2]
    assert found["shared_settings"]["rounds"] == 2
    fedit = found["variants"][1]
    assert fedit["figures"]["accuracy"]["by_seed"] == pytest.approx({"0": 50, "1": 60, "2": 71})
    assert fedit["figures"]["accuracy"]["mean"] == pytest.approx(181 / 3)
    assert found["paired_with_reference"]["accuracy"]["fedit"]["verdict"] == "above"
    assert "fed-plora" not in found["paired_with_reference"]["accuracy"]


def test_runs_that_are_not_finished_are_left_out_and_counted(tmp_path: Path) -> None:
    directory = make_comparison(tmp_path)
    (directory / "runs/fedit/seed-1/finished.json").unlink()
    rows = (directory / "runs/fedit@2/seed-0/rounds.jsonl").read_text().splitlines()
    (directory / "runs/fedit@2/seed-0/rounds.jsonl").write_text("\n".join(rows[:2]) + "\n")
    found = collect(directory)
    assert found.missing == 2
    assert found.paired(found.plan.variants[1]).n == 2
    assert "2 of 9 runs are not finished and are left out." in tables.notes(found)
    for cell in found.plan.cells:
        (directory / cell.path / "rounds.jsonl").unlink()
    with pytest.raises(FedError, match=r"holds no finished run yet; python -m fed resume .* continues it"):
        collect(directory)


def test_one_seed_gives_no_interval(tmp_path: Path) -> None:
    found = collect(make_comparison(tmp_path, {"fed-plora": (0.4,), "fedit": (0.5,)}))
    assert tables.table(found, ("accuracy",))[0][0] == "1 seed"
    assert tables.paired_table(found, ACCURACY)[1] == ("FedIT (rank 16)", "+10.00 points", "—", "1", "one seed")
    assert "on one seed, which says nothing of chance" in tables.verdicts(found)[0]


@pytest.mark.parametrize("drawn", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_single_variant_is_shown_without_differences(
    drawn: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not drawn:
        request.getfixturevalue("undrawn")
    found = collect(make_comparison(tmp_path, {"fed-plora": (0.4, 0.5)}))
    assert found.others == []
    publish_comparison(found, tmp_path)
    assert "less Fed-PLoRA's" not in (tmp_path / "comparison.md").read_text()


class Page(HTMLParser):
    """Collects a page's references and its rows of cells, and checks that its tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.references: list[str] = []
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def test_the_page_stands_alone_for_light_and_dark_and_phones(comparison: Comparison) -> None:
    text = comparison_page(comparison)
    page = Page()
    page.feed(text)
    assert page.open == []
    assert len(page.references) == 16  # eight panels, light and dark
    assert len(set(page.references)) == 16
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert "http" not in text
    assert "@import" not in text
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert {"FedIT (rank 16)", "+10.33 points", "ahead", "tie"} <= set(page.cells)


def test_everything_is_written_and_the_same_twice(comparison: Comparison, tmp_path: Path) -> None:
    paths = publish_comparison(comparison, tmp_path)
    names = ["accuracy.png", "noise.png", "cost.png", "comparison.json", "comparison.md", "report.html"]
    assert [path.name for path in paths] == names
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in publish_comparison(comparison, tmp_path)] == before
    markdown = (tmp_path / "comparison.md").read_text()
    assert "| FedIT (rank 2) | +2.00 points | -12.90 to +16.90 | 3 | tie |" in markdown
    assert "python -m fed compare digits --methods fed-plora,fedit,fedit@2 --seeds 0,1,2 --set rounds=2" in markdown
    assert "![noise](noise.png)" in markdown
    assert not list(tmp_path.glob("*.tmp"))


def test_a_comparison_of_values_is_called_by_its_key(tmp_path: Path) -> None:
    asked = plans.request("digits", ["rounds=2"], ["fed-plora"], (0,), vary="train.local_steps=1,3")
    plans.write(asked, tmp_path)
    for cell in plans.plan(asked).cells:
        make_finished_run(tmp_path / cell.path, [make_row(0), make_row(1), make_row(2)], cell.config)
    assert tables.title(collect(tmp_path)) == "Fed-PLoRA by train.local_steps on digits turned by 90°"
