"""Batches of texts in parts or in one sequence: less padding, and the results of padded batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import plora_kernels as pk
from fed.data.federated_data import FederatedData
from fed.data.tables import InstructionTable, Sequences, Split, TextTable
from fed.errors import FedError
from fed.models.head import head_names
from fed.models.shared_model import adapted
from fed.simulation.rounds import Federation
from fed.training import batching
from fed.training.batching import buckets, can_pack, divide, find_way
from fed.training.cohort import Cohort, train_together
from fed.training.compiled_loss import CompiledLosses
from fed.training.local import BatchOrder
from tests.fed.training.test_cohort import alone, assert_same, reading_texts, texts
from tests.support.models import SIZES, tiny_bert, tiny_distilbert, tiny_llama
from tests.support.tiers import slow
from tests.support.tiny_federation import HEAD, TinyClassifier, jobs_of, make_config, make_data

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=9)


@pytest.fixture
def eager_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a part so cheap that a batch has several."""
    monkeypatch.setitem(batching.PART_TOKENS, "cpu", 1)


def cost(parts: list[list[int]], lengths: list[int], part_tokens: int) -> int:
    return sum(len(part) * max(lengths[place] for place in part) + part_tokens for part in parts)


@given(LENGTHS, st.integers(0, 100))
def test_buckets_cost_least_of_all_ways_to_cut_the_sorted_rows(lengths: list[int], part_tokens: int) -> None:
    found = [part.tolist() for part in buckets(torch.tensor(lengths), part_tokens)]
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert all(part == sorted(part) for part in found)
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    ways = itertools.product([False, True], repeat=len(lengths) - 1)
    least = min(cost([list(part) for part in cut(order, way)], lengths, part_tokens) for way in ways)
    assert cost(found, lengths, part_tokens) == least


def cut(order: list[int], way: tuple[bool, ...]) -> list[list[int]]:
    parts = [[order[0]]]
    for place, begins in zip(order[1:], way, strict=True):
        if begins:
            parts.append([])
        parts[-1].append(place)
    return parts


@pytest.mark.usefixtures("eager_parts")
def test_parts_hold_every_row_of_every_client_once() -> None:
    """Rows of 1, 5, 1 and of 5, 2 tokens; the answer is the last token of each but the first row, which has none."""
    rows = [[1], [2, 3, 4, 5, 6], [7], [8, 9, 10, 11, 12], [13, 14]]
    table = InstructionTable(
        Sequences.of(rows), torch.tensor([1, 4, 1, 4, 1]), [("",)] * 5, SimpleNamespace(pad_token_id=0), 4
    )
    clients = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    long, middle, short = divide(table, clients, "bucketed")
    assert long.batch["input_ids"].tolist() == [rows[1], rows[3]]
    assert middle.batch["input_ids"].tolist() == [[13, 14]]
    assert short.batch["input_ids"].tolist() == [[1], [7]]
    assert [part.sizes for part in (long, middle, short)] == [[1, 1], [0, 1], [2, 0]]
    assert [part.shares.tolist() for part in (long, middle, short)] == [[1.0, 0.5], [0.0, 0.5], [0.0, 0.0]]
    assert [part.positions for part in (long, middle, short)] == [[5, 5], [0, 2], [2, 0]]
    # As in batches padded to 5 tokens: rows 0, 1, 2 of the first client begin at 0, 5, 10.
    assert long.numbers.tolist() == [5, 6, 7, 8, 9, 0, 1, 2, 3, 4]
    assert [middle.numbers.tolist(), short.numbers.tolist()] == [[5, 6], [0, 10]]
    (packed,) = divide(table, clients, "packed")
    assert packed.batch["input_ids"].tolist() == [list(range(1, 15))]
    assert packed.batch["position_ids"].tolist() == [[0, 0, 1, 2, 3, 4, 0, 0, 1, 2, 3, 4, 0, 1]]
    assert packed.counted.tolist() == [4, 10, 12]
    assert packed.sizes == packed.positions == [7, 7]
    assert packed.numbers.tolist() == [0, 5, 6, 7, 8, 9, 10, 0, 1, 2, 3, 4, 5, 6]


def undropped_distilbert() -> Any:
    """A model whose head is two layers, without dropout of its own."""
    model = tiny_distilbert()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


CASES = [
    (tiny_bert, TextTable, "bucketed"),
    (undropped_distilbert, TextTable, "bucketed"),
    (tiny_llama, InstructionTable, "bucketed"),
    (tiny_llama, InstructionTable, "packed"),
]


@pytest.mark.usefixtures("eager_parts")
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("dropout", [*slow(0.0), 0.4])
@pytest.mark.parametrize(("make", "table", "way"), CASES)
def test_updates_are_those_of_padded_batches(
    make: Any, table: type, way: str, dropout: float, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after another and together; heads are trained where there are any."""
    train = {"optimizer": "sgd", "client_steps": [2, 3, 1], "gradient_checkpointing": checkpointing}
    updates = {}
    computed: list[int] = []
    forward = batching.divide

    def noting(*arguments: Any) -> Any:
        parts = forward(*arguments)
        computed.append(len(parts))
        return parts

    for module in ("cohort_steps", "local"):
        monkeypatch.setattr(f"fed.training.{module}.divide", noting)
    for batched in ("padded", way):
        config = make_config(
            clients={"count": 3, "ranks": [2, 4, 6]},
            adapter={"dropout": dropout, "target_modules": "all-linear"},
            train={**train, "batching": batched, "max_grad_norm": 0.5},
        )
        with reading_texts(make, table, config) as (shared, jobs):
            computed.clear()
            updates[batched] = [
                train_together(shared, jobs, config.train),
                [alone(shared, job, config.train) for job in jobs],
            ]
    bucketed = way == "bucketed" and not (dropout and table is TextTable)
    assert (max(computed) > 1) is (bucketed or way == "packed")  # a sequence for each client of the cohort
    for padded, others in zip(updates["padded"], updates[way], strict=True):
        for wanted, found in zip(padded, others, strict=True):
            assert_same(found, wanted)
            assert found.tokens == wanted.tokens < wanted.positions
            assert found.positions <= wanted.positions
    together = updates[way][0]
    if way == "packed":
        assert all(update.positions == update.tokens for update in together)
    elif bucketed:
        assert sum(update.positions for update in together) < sum(update.positions for update in updates["padded"][0])


@pytest.mark.usefixtures("eager_parts")
@pytest.mark.parametrize("way", ["padded", "bucketed", "packed"])
def test_a_client_that_is_not_finite_touches_no_other(way: str) -> None:
    """Attention under a mask would multiply its values by 0, which leaves NaN, if others shared its sequence."""
    config = make_config(
        clients={"count": 3, "ranks": [2, 4, 6]},
        adapter={"target_modules": "all-linear"},
        train={"batching": way, "optimizer": "sgd"},
    )
    with reading_texts(tiny_llama, InstructionTable, config) as (shared, jobs):
        matrix = next(iter(jobs[1].start.factors))
        A, B = jobs[1].start.factors[matrix]
        poisoned = replace(jobs[1].start, factors={**jobs[1].start.factors, matrix: (A * torch.nan, B)})
        fine = train_together(shared, jobs, config.train)
        found = train_together(shared, [jobs[0], jobs[1]._replace(start=poisoned), jobs[2]], config.train)
    assert not torch.isfinite(torch.tensor(found[1].loss))
    for place in (0, 2):
        assert_same(found[place], fine[place])


def test_rows_whose_attention_reads_no_others_share_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(clients={"count": 3}, adapter={"target_modules": "all-linear"}, train={"batching": "packed"})
    with reading_texts(tiny_llama, InstructionTable, config) as (shared, jobs):
        assert Cohort(shared, jobs, config.train).way == "packed-by-client"
        monkeypatch.setitem(batching._packs, shared.model, batching.Packing(True, True))
        assert Cohort(shared, jobs, config.train).way == "packed"


def test_what_is_trained_and_what_is_padding_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 3, 8, 4, … tokens; in each of three clients' steps all are padded to the longest of the cohort."""
    clients = texts(InstructionTable)
    config = make_config(clients={"count": 3, "per_round": 3, "ranks": [6]}, train={"batching": "padded"}, rounds=1)
    data = FederatedData(clients, Split(clients[0].table, torch.arange(4)), None, None, ())
    monkeypatch.setattr(
        "fed.simulation.round_metrics.evaluate_held_out", lambda *a, **k: {"loss": 1.0, "accuracy": 0.0}
    )
    rows = {}
    for execution in ("sequential", "cohort"):
        chosen = config.model_copy(update={"execution": execution, "clients_per_pass": 3})
        model = tiny_llama()
        chosen = chosen.model_copy(
            update={"adapter": chosen.adapter.model_copy(update={"target_modules": "all-linear"})}
        )
        with adapted(chosen, model, head_names(model)) as shared:
            federation = Federation(chosen, data, shared, pytest.fail)
            (row,) = [one.row for one in federation.play(federation.beginning()) if one.row["round"] == 1]
            rows[execution] = row
            jobs = jobs_of(shared, chosen, data)
    tokens = positions = together = 0
    for step in range(3):
        lengths = [job.split.lengths(batching_rows(job, step)) for job in jobs]
        tokens += sum(int(own.sum()) for own in lengths)
        positions += sum(len(own) * int(own.max()) for own in lengths)
        together += sum(map(len, lengths)) * max(int(own.max()) for own in lengths)
    assert rows["sequential"]["padding_share"] == pytest.approx(1 - tokens / positions)
    assert rows["cohort"]["padding_share"] == pytest.approx(1 - tokens / together)
    for row in rows.values():
        assert row["tokens_per_second"] == pytest.approx(tokens / row["train_seconds"])


def batching_rows(job: Any, step: int) -> Tensor:
    return BatchOrder(len(job.split), 4, job.rng).rows(step)


def test_rows_that_are_no_texts_have_neither_tokens_nor_padding() -> None:
    config, data = make_config(rounds=1), make_data()
    with adapted(config, TinyClassifier(), HEAD) as shared:
        federation = Federation(config, data, shared, pytest.fail)
        *_, last = federation.play(federation.beginning())
    assert (last.row["tokens_per_second"], last.row["padding_share"]) == (None, None)


class TestWays:
    def settings(self, asked: str) -> Any:
        return make_config(train={"batching": asked}).train

    def table(self, kind: type = InstructionTable) -> Any:
        return texts(kind)[0].table

    @pytest.mark.parametrize(
        ("asked", "kind", "whole", "found"),
        [
            ("auto", InstructionTable, False, "bucketed"),
            ("packed", InstructionTable, False, "packed"),
            ("packed", InstructionTable, True, "padded"),
            ("auto", TextTable, False, "bucketed"),
            ("bucketed", TextTable, True, "padded"),
            ("padded", TextTable, False, "padded"),
        ],
    )
    def test_by_setting(self, asked: str, kind: type, whole: bool, found: str) -> None:
        assert find_way(self.settings(asked), frozen_llama(), self.table(kind), whole) == found

    def test_dense_rows_stay_as_they_are(self) -> None:
        assert find_way(self.settings("packed"), tiny_llama(), make_data().test.table) == "padded"

    def test_flash_attention_on_a_gpu_packs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, table = tiny_llama(), self.table()
        monkeypatch.setattr(InstructionTable, "device", SimpleNamespace(type="cuda"))
        monkeypatch.setattr(batching, "can_pack", lambda *arguments: True)
        assert find_way(self.settings("auto"), model, table) == "bucketed"
        model.config._attn_implementation = "flash_attention_2"
        assert find_way(self.settings("auto"), model, table) == "packed"
        monkeypatch.setattr(batching, "can_pack", lambda *arguments: False)
        assert find_way(self.settings("auto"), model, table) == "bucketed"

    @pytest.mark.parametrize(
        ("make", "kind", "why"),
        [
            (tiny_bert, TextTable, "texts to classify cannot"),
            (lambda: adapted_output(), InstructionTable, "LlamaForCausalLM, which mixes them or has a trained output"),
            (lambda: mixing(), InstructionTable, "MambaForCausalLM, which mixes them"),
            (lambda: without_positions(), InstructionTable, "BloomForCausalLM, which mixes them"),
        ],
    )
    def test_what_cannot_be_packed_is_refused(self, make: Callable[[], Any], kind: type, why: str) -> None:
        with pytest.raises(FedError, match=rf"train.batching is 'packed': {why}.*'bucketed' or 'auto' would be right"):
            find_way(self.settings("packed"), make(), self.table(kind))

    def test_before_the_first_round(self) -> None:
        config = make_config(
            train={"batching": "packed"}, adapter={"target_modules": "all-linear"}, clients={"count": 3}
        )
        with (
            pytest.raises(FedError, match="texts to classify cannot"),
            reading_texts(tiny_bert, TextTable, config),
        ):
            pytest.fail("the jobs of a run that cannot begin")

    def test_a_compiled_cohort_pads(self) -> None:
        config = make_config(clients={"count": 3}, adapter={"target_modules": "all-linear"})
        with reading_texts(tiny_llama, InstructionTable, config) as (shared, jobs):
            assert Cohort(shared, jobs, config.train, CompiledLosses(print)).way == "padded"
            assert Cohort(shared, jobs, config.train).way == "bucketed"


def frozen_llama() -> Any:
    return tiny_llama().requires_grad_(False)


def adapted_output() -> Any:
    model = frozen_llama()
    pk.inject(model, pk.PLoRAConfig(rank=2, target_modules=["lm_head"]))
    return model


def mixing() -> Any:
    """A model whose state runs on from one row to the next."""
    config = tf.MambaConfig(vocab_size=60, hidden_size=32, num_hidden_layers=1, state_size=4)
    return tf.MambaForCausalLM(config).requires_grad_(False)


def without_positions() -> Any:
    config = tf.BloomConfig(vocab_size=60, hidden_size=32, n_layer=1, n_head=4)
    return tf.BloomForCausalLM(config).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_that_mix_a_little_are_found_in_any_precision(dtype: torch.dtype) -> None:
    """A change of the first row moves these models' second row by less than a hundredth of its hidden states."""
    table = texts(InstructionTable)[0].table
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    convolving = tf.Lfm2ForCausalLM(tf.Lfm2Config(layer_types=["conv", "full_attention"], **sizes))
    for model in (without_positions(), convolving):
        assert not can_pack(model.requires_grad_(False).to(dtype).eval(), table)
    assert can_pack(frozen_llama().to(dtype).eval(), table)


def test_models_whose_rows_can_be_packed() -> None:
    table = texts(InstructionTable)[0].table
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
    for model in (
        frozen_llama(),
        tf.MistralForCausalLM(tf.MistralConfig(sliding_window=3, **sizes)),
        tf.Gemma2ForCausalLM(tf.Gemma2Config(head_dim=8, **sizes)),
    ):
        assert can_pack(model.requires_grad_(False).eval(), table)
