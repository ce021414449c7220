"""The presets: with a model and data each is a valid configuration, and so is every run it compares."""

from __future__ import annotations

import pytest

from fed.config import load, preset_names
from fed.config.loader import PRESETS
from fed.errors import FedError
from fed.experiments import plan as plans

NEEDED = {
    "digits": (),
    "flan-fedrora": ("model.path=llama", "data.path=flan"),
    "glue-fedrora": ("model.path=roberta",),
    "glue-paper": ("model.path=bert",),
    "instructions-paper": ("model.path=llama",),
}


def test_every_preset_is_tested() -> None:
    assert preset_names() == tuple(sorted(NEEDED))


@pytest.mark.parametrize(("name", "settings"), NEEDED.items(), ids=NEEDED)
def test_everything_a_preset_compares_is_a_run(name: str, settings: tuple[str, ...]) -> None:
    config = load(name, settings)
    asked = plans.request(name, settings)
    plan = plans.plan(asked)
    assert len(plan.cells) == len(asked.methods) * len(asked.seeds)
    assert len(asked.methods) >= 4
    assert len(asked.seeds) >= 3
    assert all(cell.config.rounds == config.rounds for cell in plan.cells)


@pytest.mark.parametrize(("name", "settings"), NEEDED.items(), ids=NEEDED)
def test_a_preset_without_its_model_names_what_is_missing(name: str, settings: tuple[str, ...]) -> None:
    for setting in settings:
        others = [other for other in settings if other != setting]
        with pytest.raises(FedError, match=f"{setting.partition('=')[0]} is missing"):
            load(name, others)


@pytest.mark.parametrize("name", [name for name in NEEDED if name != "digits"])
def test_a_preset_says_where_its_settings_come_from_and_which_were_chosen(name: str) -> None:
    lines = (PRESETS / f"{name}.toml").read_text().splitlines()
    comment = " ".join(line.removeprefix("# ") for line in lines if line.startswith("#"))
    assert "FedRoRA" in comment or "arXiv 2602.16936" in comment
    assert "hosen here" in comment
    assert f"python -m fed compare {name} --set model.path=" in comment


def test_the_published_settings_are_there() -> None:
    glue = load("glue-fedrora", NEEDED["glue-fedrora"])
    assert (glue.clients.count, glue.clients.ranks, glue.clients.dirichlet_alpha) == (20, [8, 16, 32, 64], 0.5)
    assert (glue.data.train_rows, glue.rounds, glue.adapter.dropout) == (20_000, 40, 0.05)
    assert (glue.train.batch_size, glue.train.local_epochs, glue.train.learning_rate) == (128, 2, 5e-4)
    assert (glue.train.head, glue.adapter.target_modules) == ("freeze", ["query", "value"])
    flan = load("flan-fedrora", NEEDED["flan-fedrora"])
    assert (flan.clients.count, flan.train.batch_size, flan.rounds, flan.train.learning_rate) == (16, 8, 10, 3e-4)
