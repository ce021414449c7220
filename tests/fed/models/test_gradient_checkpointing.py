"""Gradient checkpointing: the same update with less memory, and a model that is restored afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fed import methods
from fed.data.tables import DenseTable, Split
from fed.errors import FedError
from fed.models.head import head_names
from fed.models.shared_model import adapted, started
from fed.seeding import ClientRandom
from fed.simulation.clients import estimate
from fed.simulation.rounds import first_state
from fed.simulation.simulate import simulate
from fed.training.local import Job, train
from fed.types import Client, ClientUpdate
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert, tiny_llama
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data

ADAPTER = {"target_modules": "all-linear", "dropout": 0.2, "unselected": "frozen"}


def make_split(of_tokens: bool) -> Split:
    """Return eight rows of ten tokens with a label each, or with their own tokens as labels."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(60, (8, 10), generator=generator)
    labels = tokens if of_tokens else torch.randint(3, (8,), generator=generator)
    return Split.whole(DenseTable({"input_ids": tokens}, labels))


def train_one(model: nn.Module, split: Split, on: bool) -> ClientUpdate:
    """Train two steps with LoRA dropout and the model's own dropout."""
    config = make_config(adapter=ADAPTER, train={"gradient_checkpointing": on})
    client = Client(0, 3, len(split))
    with adapted(config, model, head_names(model)) as shared:
        server, rng = first_state(shared, config), ClientRandom(0, 1, 0)
        start = methods.find("fed-plora").start(server, client, rng)
        with started(shared, start, server.head):
            job = Job(client, start, server.head, split, 2, 2e-2, rng)
            return train(shared, job, config.train, measure=True)


@pytest.mark.parametrize(("make", "of_tokens"), [(tiny_bert, False), (tiny_llama, True)], ids=["bert", "llama"])
def test_recomputing_changes_what_is_kept_and_nothing_else(make: Callable[[], Any], of_tokens: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    split, cached = make_split(of_tokens), model.config.use_cache
    plain, again = train_one(model, split, on=False), train_one(model, split, on=True)
    assert again.loss == plain.loss
    assert_equal(again.factors, plain.factors)
    assert 0 < again.footprint.activation_bytes < plain.footprint.activation_bytes / 2
    assert not model.is_gradient_checkpointing
    assert model.config.use_cache is cached
    assert not any(module._forward_hooks for module in model.modules())


def test_budgets_reckon_with_it() -> None:
    model, split = tiny_bert(), make_split(of_tokens=False)
    needs = []
    for on in (False, True):
        config = make_config(adapter=ADAPTER, train={"gradient_checkpointing": on})
        with adapted(config, model, head_names(model)) as shared:
            needs.append(estimate(shared, config, split))
    assert needs[1].fixed_bytes < needs[0].fixed_bytes


def test_a_model_that_cannot_is_refused_before_anything_runs(tmp_path: Path) -> None:
    config, model = make_config(train={"gradient_checkpointing": True}), TinyClassifier()
    with pytest.raises(FedError, match=r"train.gradient_checkpointing is true: TinyClassifier has no layers that can"):
        simulate(config, make_data(), model, HEAD, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert type(model.body["first"]) is nn.Linear
