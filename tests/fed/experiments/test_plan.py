"""The plan of a comparison: its runs, their settings, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fed import config as configuration
from fed.errors import FedError
from fed.experiments import plan as plans
from fed.experiments.plan import Plan, parse_seeds
from tests.support.hostile import watched


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


def written(directory: Path, asked: plans.Request | None = None) -> Path:
    """Return the file of a comparison in this directory."""
    plans.write(asked or plans.request("digits", ["rounds=3"], ["fed-plora"], (0, 5)), directory)
    return directory / "comparison.toml"


def test_a_file_that_was_changed_is_refused_unless_the_digest_is_deleted(tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text()
    digest, rest = text.split("\n", 1)
    assert digest.startswith('digest = "')
    for other in (
        text.replace("rounds = 3", "rounds = 4"),
        text[:-5],
        text + "\n",
        "\n" + text,
        text.replace('digest = "', 'digest = "0'),
        rest.replace("[config]", "digest = 3\n[config]", 1),
    ):
        path.write_text(other)
        with pytest.raises(FedError, match=r"comparison.toml was changed or damaged: .* new --out, or delete the line"):
            plans.read(tmp_path)
    path.write_text(rest.replace("rounds = 3", "rounds = 4"))
    assert plans.plan(plans.read(tmp_path)).cells[0].config.rounds == 4
    path.write_bytes(text.replace("\n", "\r\n").encode())  # as an editor elsewhere may save it
    assert plans.plan(plans.read(tmp_path)).cells[0].config.rounds == 3


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            "seeds = [\n    0,\n    5,\n]",
            'seeds = ["0"]',
            r"seeds is \['0'\]; it should be a list of numbers from 0 to",
        ),
        ("seeds = [\n    0,\n    5,\n]", "seeds = [-1]", r"seeds is \[-1\]; it should be a list of numbers"),
        ("seeds = [\n    0,\n    5,\n]", "seeds = [true]", r"seeds is \[True\]; it should be a list of numbers"),
        ("seeds = [\n    0,\n    5,\n]", "", r"seeds is missing; it should be a list of numbers"),
        ("seeds = [\n    0,\n    5,\n]", "seeds = []", r"--seeds is ''"),
        ('vary = ""', "vary = {a = 1}", r"vary is \{'a': 1\}; it should be text"),
        ('vary = ""', r'vary = "\u0000"', r"vary is '\\x00'; it should be text"),
        ('vary = ""', 'vary = "x"', r"--vary takes key=value"),
        ('reference = ""', "reference = []", r"reference is \[\]; it should be text"),
        ('source = "digits"', "source = 3", r"source is 3; it should be text"),
        ('    "fed-plora",\n', "    {a = 1},\n", r"methods is \[\{'a': 1\}\]; it should be a list of names"),
        ('    "rounds=3",\n', "    [3],\n", r"settings is \[\[3\]\]; it should be a list of texts"),
        ("[config]", "[other]", r"unknown key 'other'"),
        ("[config]", "[config]\n[config.data]", r"comparison.toml is not TOML"),
        ("[config.train]", "[config.trane]", r"unknown key 'trane.optimizer'"),
        ("rounds = 3", "rounds = 'x'", r"rounds is 'x': it should be a valid integer"),
    ],
)
def test_a_malformed_file_is_one_line(before: str, after: str, message: str, tmp_path: Path) -> None:
    path = written(tmp_path)
    text = path.read_text().split("\n", 1)[1]
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(FedError, match=message):
        plans.plan(plans.read(tmp_path))


def test_paths_are_the_same_from_another_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    given = ["model.path=a", "data.path=a/rows.jsonl", "data.cache=tokens", "data.shift=none", "data.name=files"]
    asked = plans.request("digits", given, ["fed-plora"], (0,), vary="data.path=a/rows.jsonl,b/rows.jsonl")
    before = plans.plan(asked)
    assert [cell.config.data.path for cell in before.cells] == ["a/rows.jsonl", "b/rows.jsonl"]
    written(tmp_path, asked)
    monkeypatch.chdir("/")
    after = plans.plan(plans.read(tmp_path))
    assert [cell.path for cell in after.cells] == [cell.path for cell in before.cells]
    assert [cell.config.data.path for cell in after.cells] == [f"{tmp_path}/{name}/rows.jsonl" for name in "ab"]
    assert (after.cells[0].config.model.path, after.cells[0].config.data.cache) == (
        str(tmp_path / "a"),
        str(tmp_path / "tokens"),
    )
    written(tmp_path, plans.read(tmp_path))  # again, from elsewhere
    assert plans.plan(plans.read(tmp_path)) == after
    monkeypatch.chdir(tmp_path)
    assert plans.difference(after.common(), before.common()) is None
    assert plans.difference({"model.path": "a"}, {"model.path": "b"}) == "model.path = 'a' there, 'b' here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0-1000000000", r"a comparison has at most 10000 runs"),
        ("0-9999,10000", r"a comparison has at most 10000 runs"),
        ("4294967296", r"a seed is at most 4294967295"),
        ("9" * 5000, r"it should be numbers such as 0,1,2"),
    ],
)
def test_too_many_or_too_large_seeds_are_refused_at_once(text: str, message: str) -> None:
    with watched(2), pytest.raises(FedError, match=message) as refused:
        parse_seeds(text)
    assert len(str(refused.value)) < 250


def test_too_many_runs_are_refused_at_once() -> None:
    with watched(5), pytest.raises(FedError, match=r"ask for 20000 runs; a comparison has at most 10000"):
        planned(vary=f"rounds={','.join(map(str, range(1, 20_001)))}")


def test_a_long_value_gets_a_directory_that_a_file_system_takes() -> None:
    long = "x" * 5000
    plan = planned(vary=f"data.prompt={long},{long}y,z")
    names = [variant.name for variant in plan.variants]
    assert names[2] == "fed-plora.prompt-z"
    assert len(set(names)) == 3
    assert max(map(len, names)) == 200
    assert [cell.config.data.prompt for cell in plan.cells] == [long, f"{long}y", "z"]
