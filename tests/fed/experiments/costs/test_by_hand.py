"""The equations of the cost model on cases small enough to compute by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fed.config import load
from fed.errors import FedError
from fed.experiments.costs.compute import (
    Adapted,
    Operations,
    Products,
    Traced,
    evaluation_operations,
    fold_operations,
    server_operations,
    step_operations,
)
from fed.experiments.costs.memory import client_file_bytes, disk, server_memory
from fed.experiments.costs.quantities import seconds, sized
from fed.experiments.costs.timing import RoundTime, Speeds, most_useful_machines, round_time
from fed.experiments.costs.workload import Workload, workload
from fed.models.weightless import outline, weightless

IMAGE = Workload(tokens=1, answer=0, client_rows=7, test_rows=11)
LAYER = Adapted(rows=5, K=3, N=4, d_x=True)


@pytest.mark.parametrize(
    ("rank", "held", "sides", "d_x", "forward", "backward"),
    [
        # 2·5·(3·4 + 2·7) each way, and 2·5·2·7 for dA and dB.
        (2, 0, "AB", True, 260, 260 + 140),
        (2, 0, "AB", False, 260, 2 * 5 * 2 * 4 + 140),  # without dX only dS is left of the first part
        (2, 0, "B", True, 260, 260 + 2 * 5 * 2 * 4),
        (2, 0, "B", False, 260, 2 * 5 * 2 * 4),
        (2, 0, "A", False, 260, 2 * 5 * 2 * 4 + 2 * 5 * 2 * 3),
        # Six frozen modules enter, and the gradients of two are computed in a buffer of sixteen.
        (2, 6, "AB", True, 2 * 5 * (12 + 42), 2 * 5 * (12 + 42) + 2 * 5 * 16 * 7),
    ],
)
def test_a_layer_s_step(rank: int, held: int, sides: str, d_x: bool, forward: int, backward: int) -> None:
    traced = Traced(Operations(100, 1000), (LAYER._replace(d_x=d_x),))
    found = step_operations(traced, IMAGE, 3, rank, held, sides)
    assert found == (3 * (forward + 100), 3 * (backward + 1000))
    again = step_operations(traced, IMAGE, 3, rank, held, sides, again=True)
    assert again == (found.forward, found.backward + found.forward)


def test_what_a_batch_shares_is_counted_once_however_many_rows_it_has() -> None:
    """Three rows of data and six rows of a table of positions are 3·5 + 6 rows of x."""
    traced = Traced(Operations(100, 1000), (LAYER._replace(once=6),), once=Operations(7, 70))
    forward, gradients = 2 * 21 * (12 + 14), 2 * 21 * 14
    assert step_operations(traced, IMAGE, 3, rank=2) == (300 + 7 + forward, 3000 + 70 + forward + gradients)


def test_an_output_layer_s_step_and_its_evaluation() -> None:
    """Eight tokens of which three are the answer; an output layer of width 5 over 7 tokens: 2·5·7 for each."""
    text = Workload(tokens=8, answer=3, client_rows=1, test_rows=10, generated_rows=4, new_tokens=6)
    plain = Traced(Operations(800, 0), (), logits=70)
    assert step_operations(plain, text, 2, rank=1) == (2 * (800 + 2 * 3 * 70), 0)
    assert evaluation_operations(plain, text, 1) == 10 * (800 + 3 * 70) + 4 * (800 + 6 * (100 + 70))
    adapted = Traced(Operations(800, 0), (), output=Adapted(4, 5, 7, True))
    forward = 2 * 4 * (35 + 2 * 12)
    assert step_operations(adapted, text, 1, rank=2) == (800 + forward, 2 * forward + 2 * 4 * 2 * 12)


def test_products_are_recorded_with_the_gradients_that_they_have() -> None:
    x, free = torch.zeros(5, 3), torch.zeros(3, 2, requires_grad=True)
    cases: list[tuple[Any, int, int]] = [
        (lambda: x @ free, 2 * 5 * 3 * 2, 1),
        (lambda: torch.matmul(x, x.T), 2 * 5 * 3 * 5, 0),
        (lambda: functional.linear(x, free.T, torch.zeros(2)), 60, 1),
        (lambda: torch.addmm(torch.zeros(2), x @ torch.zeros(3, 3), free), 60 + 90, -1),
        (lambda: torch.bmm(torch.zeros(2, 4, 3), torch.zeros(2, 3, 6)), 2 * 2 * 4 * 3 * 6, 0),
        (lambda: functional.conv2d(torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 2, 2)), 2 * 27 * 8, 0),
    ]
    for run, forward, gradients in cases:
        with Products() as found:
            run()
        assert found.forward == forward
        assert found.backward == (60 if gradients < 0 else gradients * forward)


@pytest.mark.parametrize(("dropout", "backward"), [(0.0, 5), (0.5, 4)])
def test_fused_attention_computes_its_scores_again(dropout: float, backward: int) -> None:
    query, key = torch.zeros(1, 2, 5, 3, requires_grad=True), torch.zeros(1, 2, 7, 3)
    with Products() as found:
        functional.scaled_dot_product_attention(query, key, key, None, dropout)
    product = 2 * 2 * 5 * 7 * 3
    assert (found.forward, found.backward) == (2 * product, backward * product)


def test_folding_and_aggregation() -> None:
    layers = [(3, 4), (5, 2)]
    assert fold_operations(layers, 6) == 2 * 6 * (12 + 10)
    quiet = ["measure.noise=false"]
    mean = load("digits", quiet)
    assert server_operations(mean, layers, 9, trained=50) == 100 + 2 * 9 * (7 + 7)
    flora = load("digits", [*quiet, "method=flora"])
    assert server_operations(flora, layers, 9, trained=0) == 2 * 9 * (12 + 10)
    fedex = load("digits", [*quiet, "method=fedex-lora", "clients.ranks=[16]"])
    assert server_operations(fedex, layers, 32, trained=0) == 2 * 32 * 14 + 2 * 48 * 22
    one, two = (
        server_operations(load("digits", [*quiet, "method=flexlora"]), [(1000, 1000)], n, 0) for n in (100, 200)
    )
    assert 3.0 < two / one < 4.5  # decompositions grow with the square of the modules, where they are few
    assert server_operations(load("digits", []), layers, 9, 0) > server_operations(mean, layers, 9, 0)


def test_the_server_s_memory_and_the_disk() -> None:
    """The ViT's 24 matrices: 16 of 64 by 64 and 8 of 64 by 128, a head of 650 numbers, ranks 2 and 4 in a round."""
    wide, numbers = 16 * 128 + 8 * 192, 16 * 64 * 64 + 8 * 64 * 128
    for settings, adapter, folded, updates in (
        ((), 16 * wide * 4 + 2600 + 24 * 8 * 16, 0, 6 * wide * 4 + 2 * 2600),
        (("method=flora",), 16 * wide * 4 + 2600, 8 * numbers, 2 * 6 * wide * 4 + 2 * 2600),
        (("server.optimizer=fedadam",), 16 * wide * 20 + 2600 + 24 * 8 * 16, 0, 6 * wide * 4 + 2 * 2600),
    ):
        config = load("digits", ["train.head=train", "measure.noise=false", *settings])
        with weightless(config) as shared:
            found = server_memory(config, shared, [2, 4])
            kept = client_file_bytes(config, shared)
            file = disk(config, shared, [2, 4], clients=1000, kept=0, rounds=10)
        assert found[:3] == (adapter, folded, updates)
        assert kept == 0
        assert file.total_bytes(0) == 2 * (file.tensors_bytes + file.text_bytes)
    personal = load("digits", ["method=fedsa-lora", "clients.ranks=[16]", "train.head=personal", "measure.noise=false"])
    with weightless(personal) as shared:
        up = 16 * (16 * 64 + 4 * 64 + 4 * 128)
        assert client_file_bytes(personal, shared) == 4 * (up + 650)


@given(st.integers(1, 1000), st.integers(1, 200), st.floats(0.01, 100), st.floats(0, 100), st.integers(0, 10**9))
def test_more_machines_never_take_longer_and_never_less_than_the_serial_part(
    per_round: int, machines: int, speed: float, server: float, crossing: int
) -> None:
    speeds = Speeds(speed, server, network_bytes_per_second=1e6)
    fewer, more = (round_time(speeds, per_round, count, crossing) for count in (machines, machines + 1))
    assert more.total_seconds <= fewer.total_seconds
    assert more.total_seconds >= max(1 / speed, server + crossing / 1e6)
    assert 0 <= more.serial_share < 1
    assert 1 <= most_useful_machines(speeds, per_round, crossing) <= per_round


def test_a_round_on_machines_by_hand() -> None:
    speeds = Speeds(clients_per_second=2.0, server_seconds=1.5, network_bytes_per_second=100.0)
    assert round_time(speeds, 10, 3, round_bytes=50) == RoundTime(4 / 2, 0.5, 1.5)
    assert round_time(speeds, 10, 100).train_seconds == 0.5  # one client cannot be shared out
    assert most_useful_machines(speeds, 10, 50) == 2
    assert most_useful_machines(Speeds(2.0), 10) == 10


def test_rows_follow_from_the_configuration() -> None:
    digits = workload(load("digits", []))
    assert (digits.tokens, digits.client_rows, digits.test_rows) == (1, 31, 449)
    assert workload(load("digits", ["data.rows_per_client=5"])).width(load("digits", [])) == 5
    text = load("flan-fedrora", ["model.path=x", "data.path=x", "train.local_epochs=0"])
    found = workload(text)
    assert (found.tokens, found.answer, found.client_rows, found.test_rows) == (512, 64, 8, 0)
    assert workload(text, tokens=20, test_rows=9, client_rows=3) == Workload(20, 19, 3, 9, 9, 64)


@pytest.mark.parametrize(
    ("settings", "given", "said"),
    [
        ((), {"tokens": 5}, "--tokens is 5: the rows of data.name = 'digits' are images of 16 patches"),
        ((), {"answer": 5}, "--answer-tokens is 5: it goes with data.task = 'instruction'"),
        (
            ("data.name=files", "data.path=x", "model.path=x"),
            {"tokens": 999},
            "--tokens is 999: it should be at most data.max_length",
        ),
        (
            ("data.name=files", "data.path=x", "model.path=x", "train.local_epochs=1"),
            {},
            "--rows is missing: with train.local_epochs",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused(settings: tuple[str, ...], given: dict[str, int], said: str) -> None:
    config = load("digits", ['data.shift="none"', *settings])
    with pytest.raises(FedError, match=said.replace("(", r"\(")):
        workload(config, **given)


def test_a_model_without_weights_is_the_run_s(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load("digits", ["model.dtype=bfloat16"])
    found = outline(config)
    assert {value.device.type for value in found.parameters()} == {"meta"}
    assert found.vit.embeddings.cls_token.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert found.classifier.weight.dtype == torch.float32  # type: ignore[union-attr]
    with weightless(config) as shared:
        assert shared.head.keys() == {"classifier.weight", "classifier.bias"}
        assert not any(value.requires_grad for name, value in shared.model.named_parameters() if "embeddings" in name)
        assert all(layer.lora_A.requires_grad for layer in shared.handle.layers.values())


def test_tensors_that_modules_share_stay_shared() -> None:
    from fed.models.weightless import _replace_tensors

    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    _replace_tensors(both)
    assert first.weight is second.weight
    assert first.bias is not second.bias


def test_figures_as_text() -> None:
    assert [sized(value, "B") for value in (0, 1, 999.4, 999.6, 1e6, 9.996e6, 1.5e19)] == [
        *("0 B", "1.00 B", "999 B", "1.00 kB", "1.00 MB", "10.0 MB", "15.0 EB"),
    ]
    assert [seconds(value) for value in (0.5, 1, 119, 120, 7200)] == [
        "500.0 ms",
        "1.0 s",
        "119.0 s",
        "2.0 min",
        "2.0 h",
    ]


def test_a_model_that_needs_values_is_named() -> None:
    from fed.experiments.costs.compute import trace

    class Reads(nn.Module):
        config = SimpleNamespace(image_size=8, num_channels=1)

        def forward(self, pixel_values: torch.Tensor) -> None:
            if pixel_values.sum() > 0:
                raise AssertionError

    with weightless(load("digits", [])) as shared:
        other: Any = SimpleNamespace(model=Reads(), handle=shared.handle)
        with pytest.raises(FedError, match="Reads does not run on shapes alone, so its work cannot be estimated"):
            trace(other, IMAGE)
