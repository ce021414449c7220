"""Machines with rows of their own, which the server has never seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fed import config as configuration
from fed.config import RunConfig
from fed.data import federated_data
from tests.fed.flower.test_training import OWN, assert_same_run, play
from tests.support.flower_network import FlowerNetwork
from tests.support.memory_grid import MemoryGrid
from tests.support.processes import Process
from tests.support.text_data import PETS, write_rows

CLINICS = ("north", "south", "west")


def rows() -> list[dict[str, str]]:
    """Return rows of text about pets, of three clinics; the label is the animal that is named last."""
    found = []
    for number in range(48):
        text = f"{PETS[number % len(PETS)]} {number}"
        label = "cat" if text.rfind("cat") > text.rfind("dog") else "dog"
        found.append({"text": text, "label": label, "clinic": CLINICS[number % 5 % 3]})
    return found


def settings(folder: Path, bert: Path) -> list[str]:
    """Write all rows, and return the settings of a run in one process, in which a clinic is a client."""
    (folder / "pets.toml").write_text("rounds = 2\n")
    write_rows(folder / "all.jsonl", rows())
    write_rows(folder / "test.jsonl", [{**row, "text": f"{row['text']} again"} for row in rows()[:12]])
    return [
        *(f"model.path={bert}", "model.dtype=float64", f"data.path={folder / 'all.jsonl'}", "data.name=files"),
        *(f"data.test_path={folder / 'test.jsonl'}", "data.max_length=16", "data.cache=false", "threads=1"),
        *("data.partition=natural", "data.partition_by=clinic", "clients.count=3", "clients.per_round=3"),
        *("clients.ranks=[1, 2, 4]", "adapter.rank=4", "train.batch_size=4", "engine.wait=60"),
    ]


def node_configs(config: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Write the rows of each client to a file of its own, and return the nodes' configs."""
    everything = rows()
    configs = []
    for number, split in enumerate(federated_data.load(config).clients):
        own = [everything[row] for row in split.rows.tolist()]
        assert len({row["clinic"] for row in own}) == 1
        configs.append({"partition-id": number, "rows": str(write_rows(folder / f"own-{number}.jsonl", own))})
    return configs


def on_the_server(folder: Path) -> list[str]:
    """Return the settings of a server that has other rows: only the test's, and the same labels."""
    write_rows(folder / "few.jsonl", [{**row, "text": f"{row['text']} elsewhere"} for row in rows()[:15]])
    return [f"data.path={folder / 'few.jsonl'}", "engine.mode=deployment"]


def test_machines_with_rows_of_their_own_train_as_clients_with_these_rows(tmp_path: Path, bert: Path) -> None:
    own = settings(tmp_path, bert)
    config = configuration.load(str(tmp_path / "pets.toml"), own)
    grid = MemoryGrid(node_configs(config, tmp_path), tmp_path)
    told: list[str] = []
    play(
        configuration.load(str(tmp_path / "pets.toml"), [*own, *on_the_server(tmp_path)]),
        tmp_path / "there",
        grid,
        told,
    )
    grid.close()
    assert not [line for line in told if "waiting" not in line]
    play(config, tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)  # a server cannot tell how its clients' rows look


@pytest.mark.slow
def test_supernodes_with_rows_of_their_own(tmp_path: Path, bert: Path) -> None:
    own = settings(tmp_path, bert)
    config = configuration.load(str(tmp_path / "pets.toml"), own)
    with FlowerNetwork(tmp_path / "network", node_configs(config, tmp_path), idle_seconds=0.2) as network:
        asked = [
            "run",
            str(tmp_path / "pets.toml"),
            *own,
            *on_the_server(tmp_path),
            "--flower",
            f"http://{network.address}",
        ]
        with Process(tmp_path / "command", *asked, "--no-centralised", "--out", str(tmp_path / "there")) as command:
            outcome = command.wait(600)
        assert outcome.status == 0, f"{outcome}\n{network.tails()}"
    play(config, tmp_path / "here")
    assert_same_run(tmp_path / "there", tmp_path / "here", OWN)  # a server cannot tell how its clients' rows look
