"""The cost model against runs: bytes and operations are exactly those that a run counts, memory is its estimate."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf

from bench.harness.operations import CountedOperations
from fed import methods
from fed.config import RunConfig, load
from fed.data import federated_data
from fed.data.federated_data import FederatedData
from fed.data.tables import InstructionTable, Sequences, Split, TextTable
from fed.experiments.costs.compute import step_operations, trace
from fed.experiments.costs.estimate import costs
from fed.experiments.costs.memory import client_memory
from fed.experiments.costs.traffic import Messages, expected_traffic, round_traffic
from fed.experiments.costs.workload import Workload, workload
from fed.models import base_model
from fed.models.head import head_names
from fed.models.shared_model import adapted, started
from fed.models.weightless import weightless
from fed.simulation.clients import estimate
from fed.simulation.rounds import Federation
from fed.training.local import train
from tests.support.tiers import slow

SMALL = (
    *("clients.count=6", "clients.per_round=3", "rounds=5", "data.rows_per_client=8", "data.test_rows=12"),
    *("train.local_steps=1", "train.batch_size=8", "measure.noise=false", "measure.clients=false"),
)
MIXED, EQUAL = "clients.ranks=[2,5,16]", "clients.ranks=[16]"
LENGTH, ANSWER, WIDTH = 12, 5, 3
CLASSIFIERS = {"bert": tf.BertForSequenceClassification, "deberta": tf.DebertaV2ForSequenceClassification}


def settings_of(method: str) -> list[str]:
    return [f"method={method}", EQUAL if methods.find(method).equal_ranks else MIXED]


def played(config: RunConfig) -> list[dict[str, Any]]:
    data = federated_data.load(config)
    model = base_model.build(config, data)
    with adapted(config, model, head_names(model)) as shared:
        federation = Federation(config, data, shared, lambda message: pytest.fail(str(message)))
        return [dict(one.row) for one in federation.play(federation.beginning())]


@pytest.mark.parametrize("method", methods.METHODS)
@pytest.mark.parametrize("head", ["train", *slow("personal", "freeze")])
def test_the_bytes_of_every_round_are_those_that_the_run_counts(method: str, head: str) -> None:
    config = load("digits", [*SMALL, *settings_of(method), f"train.head={head}"])
    with weightless(config) as shared:
        found = round_traffic(Messages.of(config, shared), config.clients.ranks, config.rounds)
    rows = played(config)[1:]
    assert [one.upload_bytes for one in found] == [row["upload_bytes"] for row in rows]
    assert [one.download_bytes for one in found] == [row["download_bytes"] for row in rows]


@pytest.mark.parametrize("selection", ["largest-norm", "least-visited", "gradient"])
def test_how_modules_are_selected_costs_no_bytes(selection: str) -> None:
    config = load("digits", [*SMALL, "rounds=2", MIXED, f"adapter.selection={selection}"])
    with weightless(config) as shared:
        found = round_traffic(Messages.of(config, shared), config.clients.ranks, 2)
    assert [one.upload_bytes for one in found] == [row["upload_bytes"] for row in played(config)[1:]]


@pytest.mark.parametrize("method", ["rolora", *slow("fed-plora", "flora", "fedex-lora", "fedsa-lora")])
def test_expected_bytes_are_the_mean_over_seeds(method: str) -> None:
    config = load("digits", [*SMALL, *settings_of(method), "clients.count=12", "rounds=8"])
    with weightless(config) as shared:
        messages, ranks = Messages.of(config, shared), config.clients.ranks
        expected = expected_traffic(messages, ranks, 12, 3, 8)
        drawn = [
            Messages(config.model_copy(update={"seed": seed}), messages.server, messages.folded) for seed in range(24)
        ]
        rounds = [one for each in drawn for one in round_traffic(each, ranks, 8)]
    for side in ("upload_bytes", "download_bytes"):
        mean = sum(getattr(one, side) for one in rounds) / len(rounds)
        assert getattr(expected, side) == pytest.approx(mean, rel=0.06)


def small_base(kind: str, path: Path) -> None:
    """Save the configuration of a small model: that is all that is read of it."""
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        architecture: Any = tf.BertConfig(vocab_size=50, max_position_embeddings=32, num_labels=3, **sizes)
    elif kind == "deberta":
        positions = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
        architecture = tf.DebertaV2Config(vocab_size=50, num_labels=3, share_att_key=True, **positions, **sizes)
    elif kind == "vit":
        architecture = tf.ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=3, **sizes)
    elif kind == "gpt2":
        architecture = tf.GPT2Config(vocab_size=50, n_positions=32, n_embd=24, n_layer=2, n_head=4)
    else:
        architecture = tf.LlamaConfig(vocab_size=50, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    architecture.architectures = []
    architecture.save_pretrained(path)


def texts(kind: str, rows: int) -> FederatedData:
    tokens = torch.randint(3, 50, (rows, LENGTH)).tolist()
    if kind in CLASSIFIERS:
        table: Any = TextTable({"input_ids": Sequences.of(tokens)}, torch.arange(rows) % 3, 0)
    else:
        tokenizer: Any = SimpleNamespace(pad_token_id=0)
        table = InstructionTable(
            Sequences.of(tokens), torch.full((rows,), LENGTH - ANSWER), [("x",)] * rows, tokenizer, 4
        )
    own = tuple(Split(table, torch.arange(rows)) for _ in range(4))
    return FederatedData(own, own[0], None, None, ("a", "b", "c") if kind in CLASSIFIERS else ())


def prepared(kind: str, path: Path, *settings: str) -> tuple[RunConfig, Workload, Any, FederatedData]:
    """Return a run on a small model: its configuration and rows, and the model with weights and data for it."""
    shared = [f"train.batch_size={WIDTH}", "train.local_steps=1", "clients.count=4", "clients.per_round=4", *settings]
    if kind == "digits":
        config = load("digits", [*shared, f"data.rows_per_client={WIDTH}"])
        data = federated_data.load(config)
        return config, workload(config), base_model.build(config, data), data
    small_base(kind, path)
    task = "classification" if kind in CLASSIFIERS else "instruction"
    config = load(
        "digits",
        [
            *(f"model.path={path}", f"data.path={path}", f"data.task={task}", 'data.shift="none"'),
            *(f"data.max_length={LENGTH}", "data.max_new_tokens=4", "data.name=files", *shared),
        ],
    )
    answer = None if kind in CLASSIFIERS else ANSWER
    kinds = {**CLASSIFIERS, "gpt2": tf.GPT2LMHeadModel, "llama": tf.LlamaForCausalLM}
    model = kinds[kind](tf.AutoConfig.from_pretrained(path))
    return config, workload(config, answer=answer, client_rows=WIDTH), model, texts(kind, WIDTH)


RUNS = (
    ("digits", "fed-plora", ()),
    ("digits", "fed-plora", ("adapter.unselected=frozen",)),
    ("digits", "fed-plora", ("train.head=freeze",)),
    ("digits", "fed-plora", ('adapter.target_modules=["q_proj"]',)),
    ("digits", "flora", ("adapter.unselected=frozen",)),
    ("digits", "ffa-lora", ()),
    ("digits", "fedit", ()),
    ("bert", "fed-plora", ()),
    ("bert", "flexlora", ()),
    ("bert", "fed-plora", ("model.attention=eager",)),
    # Its adapted layers also project a table of relative positions, once for a batch.
    ("deberta", "fed-plora", ('adapter.target_modules=["query_proj","key_proj"]',)),
    ("llama", "fed-plora", ()),
    ("llama", "fed-plora", ("adapter.unselected=frozen",)),
    ("llama", "fed-plora", ('adapter.target_modules=["down_proj","lm_head"]',)),
)


@pytest.mark.parametrize(("kind", "method", "settings"), RUNS)
def test_operations_are_those_that_torch_counts(
    kind: str, method: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    config, rows, model, data = prepared(kind, tmp_path, *settings_of(method), *settings)
    if config.model.attention != "auto":
        model.set_attn_implementation(config.model.attention)
    with weightless(config) as outlined:
        traced = trace(outlined, rows)
    frozen = config.adapter.unselected == "frozen"
    with adapted(config, model, head_names(model)) as shared:
        federation = Federation(config, data, shared, print)
        for job in federation.jobs(federation.beginning(), federation.beginning().clients[:3]):
            with started(shared, job.start, job.head):
                train(shared, job, config.train)  # what is looked up once is not part of a step
                with CountedOperations() as counted:
                    train(shared, job, config.train)
            held = (config.adapter.rank if method == "fed-plora" else job.client.rank) if frozen else 0
            found = step_operations(traced, rows, WIDTH, job.client.rank, held, job.start.trained)
            assert found.total == counted.total


@pytest.mark.parametrize("settings", [(), ("adapter.unselected=frozen",), ("train.optimizer=sgd",)])
@pytest.mark.parametrize("kind", ["digits", "bert"])
def test_a_classifier_s_memory_is_the_estimate_of_its_run(kind: str, settings: tuple[str, ...], tmp_path: Path) -> None:
    config, rows, model, data = prepared(kind, tmp_path, MIXED, *settings)
    with weightless(config) as outlined:
        found = [client_memory(config, outlined, rows, rank).total_bytes for rank in (2, 5, 16)]
    with adapted(config, model, head_names(model)) as shared:
        need = estimate(shared, config, data.clients[0])
    assert found == [need.of(rank) for rank in (2, 5, 16)]


@pytest.mark.slow
def test_a_7b_model_needs_no_weights(tmp_path: Path) -> None:
    architecture = tf.LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    architecture.dtype = torch.bfloat16
    architecture.save_pretrained(tmp_path)
    config = load("flan-fedrora", [f"model.path={tmp_path}", f"data.path={tmp_path}", "device=cpu", "rounds=2"])
    found = costs(config, workload(config, client_rows=100, test_rows=8))
    assert found.parameters == 6_738_415_616
    assert found.trained == 64 * 64 * 2 * 4096
    (smallest, *_) = found.by_rank
    # 13 steps of 8 rows of 512 tokens: a forward and a backward of the frozen base, two products each way.
    products = 4 * (found.parameters - 2 * 32000 * 4096) * 13 * 8 * 512
    assert products < smallest.train_operations < 1.1 * products
    assert smallest.memory.base_bytes == pytest.approx(2 * found.parameters, rel=1e-4)
