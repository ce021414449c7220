"""A run's files read by plain transformers and PEFT: the base model, what was folded into it, and the adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import nn

from fed import methods
from fed.models.shared_model import SharedBase, adapted, started
from fed.simulation.evaluation import evaluate
from fed.simulation.noise import start_noise
from fed.simulation.simulate import BASE_DELTA, simulate
from fed.types import Adapter, ClientStart, ServerState
from tests.support.equality import assert_equal
from tests.support.models import tiny_bert
from tests.support.tiny_federation import HEAD, TinyClassifier, make_config, make_data, make_factors

TARGETS = {"target_modules": ["query", "value"]}
SHAPES = {"body.first": (11, 7), "body.second": (5, 11)}


def text_data() -> object:
    """Token rows for the tiny BERT, two labels told apart by their first token."""
    from fed.data.federated_data import FederatedData
    from fed.data.tables import DenseTable, Split

    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 60, (60, 6), generator=generator)
    table = DenseTable({"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, (tokens[:, 0] > 32).long())
    parts = torch.arange(60).split(10)
    clients = tuple(Split(table, rows) for rows in parts[:4])
    return FederatedData(clients, Split(table, torch.arange(40, 60)), None, None, ("low", "high", "none"))


@pytest.mark.parametrize("name", methods.METHODS)
def test_plain_transformers_and_peft_reproduce_the_last_row(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = tiny_bert()
    base = tmp_path / "base"
    model.save_pretrained(base)
    data = text_data()
    ranks = [6] if methods.find(name).equal_ranks else [1, 2, 3, 6]
    train = {"learning_rate": 5e-2}
    config = make_config(method=name, clients={"ranks": ranks}, adapter=TARGETS, train=train, rounds=2)
    rows = simulate(config, data, model, ("classifier",), tmp_path / "run")

    plain = type(model).from_pretrained(base)
    assert (tmp_path / "run" / BASE_DELTA).exists() == methods.find(name).folds
    if methods.find(name).folds:
        weights = dict(plain.named_parameters())
        with torch.no_grad():
            for key, delta in load_file(tmp_path / "run" / BASE_DELTA).items():
                assert delta.dtype == torch.float32
                weights[key].copy_(weights[key] + delta)
    reloaded = evaluate(PeftModel.from_pretrained(plain, tmp_path / "run" / "adapter"), data.test)
    assert reloaded["accuracy"] == rows[-1]["accuracy"]
    assert reloaded["loss"] == pytest.approx(rows[-1]["loss"], rel=1e-5)
    assert rows[-1]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-3)


def test_the_model_comes_back_bit_for_bit_from_a_method_that_folds(tmp_path: Path) -> None:
    for name in ("flora", "flexlora", "fedex-lora"):
        model, ranks = TinyClassifier(), [6] if name == "fedex-lora" else [1, 2, 3, 6]
        simulate(make_config(method=name, clients={"ranks": ranks}), make_data(), model, HEAD, tmp_path / name)
        assert_equal(model.state_dict(), TinyClassifier().state_dict())


def test_the_shared_base_rounds_once_from_the_original() -> None:
    """In bf16 256 + 0.6 is 256 and 256 + 1.2 is 258: folding 0.6 twice from the original gives the second."""
    config = make_config()
    with adapted(config, TinyClassifier().to(torch.bfloat16), HEAD) as shared:
        layer = shared.handle.layers["body.first"]
        with torch.no_grad():
            layer.weight.fill_(256.0)
        base = SharedBase(shared.handle.layers)
        delta = torch.full((11, 7), 0.6)
        base.apply_delta({"body.first": delta})
        assert torch.equal(layer.weight.float(), torch.full((11, 7), 256.0))
        base.apply_delta({"body.first": 2 * delta})
        assert torch.equal(layer.weight.float(), torch.full((11, 7), 258.0))
        assert list(base.changed()) == ["body.first"]
        base.apply_delta({})
        assert torch.equal(layer.weight.float(), torch.full((11, 7), 256.0))
        assert base.changed() == {}


def test_noise_of_a_start_on_a_folded_base_is_the_rounding_of_its_weights() -> None:
    delta = {name: torch.randn(shape, generator=torch.Generator().manual_seed(2)) for name, shape in SHAPES.items()}
    noise = {}
    for dtype in (torch.float32, torch.bfloat16):
        factors = {name: (A.to(dtype), B.to(dtype)) for name, (A, B) in make_factors(6, 1, SHAPES).items()}
        server = ServerState(Adapter(factors, 2.0), base_delta=delta)
        start = ClientStart(factors, {name: tuple(range(6)) for name in SHAPES}, 2.0, "folded")
        with adapted(make_config(), TinyClassifier().to(dtype), HEAD) as shared:
            head = {name: parameter.detach().clone() for name, parameter in shared.head.items()}
            with started(shared, start, head, delta):
                noise[dtype] = start_noise(server, start, shared.base.changed())
    assert 0.0 < noise[torch.float32] < 1e-6 < 1e-3 < noise[torch.bfloat16] < 1.0


def test_layers_take_the_rank_of_what_they_are_given() -> None:
    with adapted(make_config(), TinyClassifier(), HEAD) as shared:
        head = {name: parameter.detach().clone() for name, parameter in shared.head.items()}
        for rank in (2, 6, 1):
            factors = make_factors(rank, rank, SHAPES)
            shared.load(factors, head, 0.25)
            layer = shared.handle.layers["body.second"]
            x = torch.randn(3, 11)
            A, B = factors["body.second"]
            expected = nn.functional.linear(x, layer.weight) + 0.25 * x @ A.T @ B.T
            torch.testing.assert_close(layer(x), expected)
            assert layer.rank == rank
