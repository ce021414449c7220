"""The examples of federated runs: the new method is what it says, and the runs leave what they promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fed import methods
from fed.types import Adapter, Client, ClientUpdate, ServerState

Example = Callable[[str], Any]


def test_the_new_method_takes_the_median_of_those_who_trained_a_module(example: Example) -> None:
    rank, k, n = 5, 7, 3
    server = ServerState(Adapter({"layer": (torch.randn(rank, k), torch.randn(n, rank))}, scale=0.5))
    selections = [(0, 1, 3), (1, 3), (0, 3), (3,)]  # nobody trains 2 and 4, two clients 0 and 1, four 3
    updates = [
        ClientUpdate(
            client=Client(number, len(chosen), 10),
            factors={"layer": (torch.randn(len(chosen), k), torch.randn(n, len(chosen)))},
            selected={"layer": chosen},
            head={},
            weight=1.0,
            steps=1,
            loss=0.0,
        )
        for number, chosen in enumerate(selections)
    ]
    following = example("new_method").aggregate(server, updates)
    A, B = following.adapter.factors["layer"]
    for module in range(rank):
        sent = [
            (*update.factors["layer"], chosen.index(module))
            for update, chosen in zip(updates, selections, strict=True)
            if module in chosen
        ]
        a, b = server.adapter.factors["layer"][0][module], server.adapter.factors["layer"][1][:, module]
        if sent:
            a = np.median([a[at].double().numpy() for a, _, at in sent], axis=0)
            b = np.median([b[:, at].double().numpy() for _, b, at in sent], axis=0)
        torch.testing.assert_close(A[module], torch.as_tensor(a).float(), rtol=1e-6, atol=0)
        torch.testing.assert_close(B[:, module], torch.as_tensor(b).float(), rtol=1e-6, atol=0)
    assert following.round == 1
    assert following.visits["layer"].tolist() == [2, 2, 0, 4, 0]


def test_the_new_method_runs_beside_fed_plora(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "METHODS", dict(methods.METHODS))
    small = ["model.pretrain_steps=20", "clients.count=4", "clients.per_round=3", "measure.similarity=false"]
    accuracies = example("new_method").main(["--out", str(tmp_path), "--rounds", "1", "--set", *small])
    assert accuracies.keys() == {"fed-plora", "median"}
    assert "Fed-PLoRA, medians: accuracy" in capsys.readouterr().out


def test_a_small_language_model_s_run_loads_in_plain_transformers_and_peft(
    example: Example, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = example("slm_federated").main(["--out", str(tmp_path), "--rounds", "2", "--model-steps", "10"])
    said = capsys.readouterr().out
    assert "14 of 14 LoRA layers fused" in said
    assert "asked for the last letter of 'rain':" in said
    assert (run / "finished.json").is_file()
