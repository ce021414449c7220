"""The plan of a comparison: its runs, their settings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed import config as configuration
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments.plan import Plan, parse_seeds


def planned(*settings: str, **asked: object) -> Plan:
    return plans.plan(plans.request("digits", settings, **{"methods": ("fed-plora",), "seeds": (0,)} | asked))


def test_every_method_runs_with_every_seed_and_nothing_else_differs() -> None:
    plan = planned(methods=("fed-plora", "fedit"), seeds=(4, 1))
    assert [(cell.variant.name, cell.seed) for cell in plan.cells] == [
        ("fed-plora", 4),
        ("fedit", 4),
        ("fed-plora", 1),
        ("fedit", 1),
    ]
    assert [str(cell.path) for cell in plan.cells[:2]] == ["runs/fed-plora/seed-4", "runs/fedit/seed-4"]
    assert all(cell.config.seed == cell.seed and cell.config.method == cell.variant.name for cell in plan.cells)
    every = set(configuration.settings_of(plan.cells[0].config))
    assert every - set(plan.common()) == {"method", "clients.ranks"}
    assert plan.reference.name == "fed-plora"


def test_a_method_that_needs_equal_ranks_runs_at_the_full_rank_and_says_so() -> None:
    plan = planned(methods=("fed-plora", "fedit"))
    mixed, equal = (cell.config for cell in plan.cells)
    assert (mixed.clients.ranks, equal.clients.ranks) == ([2, 4, 8, 16], [16])
    assert [variant.label for variant in plan.variants] == ["Fed-PLoRA", "FedIT (rank 16)"]
    assert [variant.notes for variant in plan.variants] == [
        (),
        ("FedIT runs with every client at rank 16 of R = 16 (it needs equal ranks)",),
    ]
    already_equal = planned("clients.ranks=[16]", methods=("fed-plora", "fedit"))
    assert [variant.label for variant in already_equal.variants] == ["Fed-PLoRA", "FedIT"]


@pytest.mark.parametrize(("stabilised", "alpha"), [("false", 4.0), ("true", 32 * 8**-0.5)])
def test_a_rank_after_the_method_keeps_the_scale(stabilised: str, alpha: float) -> None:
    plan = planned(f"adapter.rank_stabilized={stabilised}", methods=("fedit@2", "fedit@16", "fed-plora@2"))
    low, high, ours = (cell.config for cell in plan.cells)
    assert (low.adapter.rank, low.clients.ranks, low.adapter.alpha) == (2, [2], pytest.approx(alpha))
    assert (high.adapter.rank, high.clients.ranks, high.adapter.alpha) == (16, [16], 32.0)
    assert (ours.method, ours.clients.ranks) == ("fed-plora", [2])
    assert [variant.name for variant in plan.variants] == ["fedit@2", "fedit@16", "fed-plora@2"]
    assert "as asked for, alpha" in plan.variants[0].notes[0]


def test_a_way_to_select_modules_is_left_to_the_method_that_selects() -> None:
    plan = planned("adapter.selection=first", methods=("fed-plora", "flora", "fedit@2"))
    assert [cell.config.adapter.selection for cell in plan.cells] == ["first", "random", "random"]
    ours, flora, fedit = (variant.notes for variant in plan.variants)
    assert ours == ()
    assert flora == ("adapter.selection = 'first' is for Fed-PLoRA alone: other methods do not select modules",)
    assert fedit[0].startswith("FedIT runs with every client at rank 2")
    assert fedit[1:] == flora
    with pytest.raises(FedError, match=r"adapter.selection is 'first': FLoRA does not select modules"):
        planned(methods=("fed-plora", "flora"), vary="adapter.selection=random,first")


def test_a_key_is_varied_with_every_method() -> None:
    plan = planned(methods=("fed-plora", "fedit"), vary="train.local_steps=1,3")
    assert [variant.label for variant in plan.variants] == [
        "Fed-PLoRA, local_steps 1",
        "Fed-PLoRA, local_steps 3",
        "FedIT (rank 16), local_steps 1",
        "FedIT (rank 16), local_steps 3",
    ]
    assert [cell.config.train.local_steps for cell in plan.cells] == [1, 3, 1, 3]


def test_values_may_hold_commas_inside_brackets() -> None:
    plan = planned(vary="clients.ranks=[2,4],[16]", reference="fed-plora.ranks-16")
    assert [cell.config.clients.ranks for cell in plan.cells] == [[2, 4], [16]]
    assert [variant.name for variant in plan.variants] == ["fed-plora.ranks-2-4", "fed-plora.ranks-16"]
    assert plan.reference == plan.variants[1]


def test_a_request_reads_back_to_the_same_plan(tmp_path: Path) -> None:
    asked = plans.request("digits", ["rounds=3"], ["fed-plora", "fedit@2"], (0, 5), vary="train.local_steps=1,2")
    plans.write(asked, tmp_path)
    assert plans.read(tmp_path) == asked
    assert plans.plan(plans.read(tmp_path)) == plans.plan(asked)
    assert [path.name for path in tmp_path.iterdir()] == ["comparison.toml"]


def test_the_request_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    asked = plans.request("digits", ["execution=cohort", "clients_per_pass=3"], ["fed-plora"], (0,))
    plans.write(asked, tmp_path)
    path = tmp_path / "comparison.toml"
    earlier = path.read_text().split("\n", 1)[1]  # without the digest
    path.write_text(earlier.replace("clients_per_pass = 3", "cohort_size = 3"))
    assert plans.read(tmp_path) == asked
    assert plans.plan(plans.read(tmp_path)).cells[0].config.clients_per_pass == 3


def test_the_first_setting_that_differs_is_named() -> None:
    before, now = planned("rounds=3").common(), planned("train.learning_rate=0.5", "rounds=3").common()
    assert plans.difference(before, now) == "train.learning_rate = 0.002 there, 0.5 here"
    assert plans.difference(before, before) is None
    assert plans.difference(before, planned("rounds=3", 'tracker=["tensorboard"]').common()) is None


@pytest.mark.parametrize(("text", "seeds"), [("0", (0,)), ("3,1", (3, 1)), ("0-3", (0, 1, 2, 3)), ("7,0-1", (7, 0, 1))])
def test_seeds_are_numbers_and_ranges(text: str, seeds: tuple[int, ...]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,", "3-1", "-1"])
def test_what_is_no_seed_is_refused(text: str) -> None:
    with pytest.raises(FedError, match=r"--seeds is '.*': it should be numbers such as 0,1,2"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"methods": ("fed-plra",)}, r"method is 'fed-plra'; one of fed-plora, fedit"),
        ({"methods": ("fedit@17",)}, r"--methods holds 'fedit@17': .* a rank from 1 to adapter.rank \(16\)"),
        ({"methods": ("fedit@",)}, r"--methods holds 'fedit@'"),
        ({"methods": ("fedit", "fedit")}, r"'fedit' would be compared with itself"),
        ({"seeds": (1, 1)}, r"--seeds is '1,1': it should name each seed once"),
        ({"vary": "train.lerning_rate=1,2"}, r"unknown key 'train.lerning_rate'; the nearest is 'train.learning_rate'"),
        ({"vary": "rounds"}, r"--vary takes key=value,value"),
        ({"vary": "rounds=1,,2"}, r"--vary takes key=value,value"),
        ({"vary": "seed=1,2"}, r"--vary seed is what --seeds is for"),
        ({"vary": "rounds=1,x"}, r"rounds is 'x'"),
        ({"reference": "fedit"}, r"--reference is 'fedit'; one of fed-plora would be right"),
    ],
)
def test_what_cannot_be_compared_is_refused(asked: dict, message: str) -> None:
    with pytest.raises(FedError, match=message):
        planned(**asked)


def test_what_is_no_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FedError, match=r"is not a comparison's directory: there is no comparison\.toml in it"):
        plans.read(tmp_path)
    (tmp_path / "comparison.toml").write_text("seeds = 3")
    with pytest.raises(FedError, match="is not what a comparison writes"):
        plans.read(tmp_path)


def test_a_setting_is_varied_within_the_files_own_method_unless_methods_are_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('method = "hetlora"\n[compare]\nmethods = ["flora", "flexlora"]\n')
    assert plans.request(path).methods == ("flora", "flexlora")
    assert plans.request(path, vary="rounds=1,2").methods == ("hetlora",)
    assert plans.request(path, methods=("flora",), vary="rounds=1,2").methods == ("flora",)
