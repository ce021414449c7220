"""The estimate of a cohort's memory: by hand, for large models, and against the peaks of real training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from torch import nn

import plora_kernels as pk
from bench.harness.memory import peak_bytes
from fed.config import parse
from fed.config.training import TrainConfig
from fed.data.federated_data import FederatedData
from fed.data.tables import InstructionTable, Sequences, Split
from fed.errors import FedError
from fed.models.shared_model import adapted
from fed.simulation.rounds import Federation
from fed.training.cohort import train_together
from fed.training.memory import parts_of
from fed.training.memory_estimate import CohortMemory, cohort_memory
from tests.support.models import tiny_llama

ADAPTER = pk.PLoRAConfig(rank=16, target_modules="all-linear")
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def on_meta(dtype: torch.dtype, **sizes: Any) -> nn.Module:
    with torch.device("meta"):
        return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).to(dtype)


def small(dtype: torch.dtype = torch.float32) -> nn.Module:
    return on_meta(
        dtype, vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )


def test_adapters_by_hand() -> None:
    """A layer has four matrices of 32 + 32 and three of 32 + 48; AdamW: values, gradients, two moments, counts."""
    numbers, factors = 2 * 3 * (4 * 64 + 3 * 80), 2 * 7 * 2
    config = pk.PLoRAConfig(rank=3, target_modules="all-linear")
    for dtype, adapter, width in (
        (torch.float32, config, 4),
        (torch.bfloat16, config, 4),
        (torch.bfloat16, pk.PLoRAConfig(rank=3, target_modules="all-linear", adapter_dtype="bfloat16"), 2),
    ):
        found = cohort_memory(small(dtype), adapter, TrainConfig(batch_size=2), clients=5, length=8)
        assert found.adapter_bytes == 5 * (4 * numbers * width + 4 * factors)
    plain = cohort_memory(small(), config, TrainConfig(batch_size=2, optimizer="sgd"), clients=5, length=8)
    assert plain.adapter_bytes == 5 * 2 * numbers * 4
    assert plain.total_bytes == sum(plain)


def test_memory_grows_with_the_answers_as_far_as_a_slice_and_not_with_the_vocabulary_beyond() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    settings = TrainConfig(batch_size=4)
    few, many = (
        cohort_memory(on_meta(torch.float32, vocab_size=50_000, **sizes), ADAPTER, settings, 4, 128, answer)
        for answer in (1, 128)
    )
    assert few.buffer_bytes == 2 * 16 * 50_000 * 4
    assert many.buffer_bytes == 2 * 2**26  # 2048 tokens would be 400 MB
    assert few.base_bytes == many.base_bytes


def test_an_8b_model_with_a_cohort_of_ten_fits_its_gpu() -> None:
    """In bfloat16 80 GB; in NF4, with activations computed again, 24 GB. No weight is allocated."""

    def memory(quantize: str, again: bool) -> CohortMemory:
        model = on_meta(torch.bfloat16, vocab_size=128_256, num_key_value_heads=8, **LLAMA_8B)
        settings = TrainConfig(batch_size=4, gradient_checkpointing=again)
        return cohort_memory(model, ADAPTER, settings, clients=10, length=128, quantize=quantize, device_type="cuda")

    whole, fourbit = memory("none", again=False), memory("nf4", again=True)
    assert whole.base_bytes == pytest.approx(2 * 8.03e9, rel=1e-3)
    assert fourbit.base_bytes == pytest.approx(2 * 2 * 128_256 * 4096 + 6.98e9 * (0.5 + 1 / 16), rel=2e-3)
    assert 40e9 < whole.total_bytes < 80e9 * 0.9
    assert 10e9 < fourbit.total_bytes < 24e9 * 0.9


def test_a_model_with_weights_is_refused() -> None:
    model = tiny_llama()
    with pytest.raises(FedError, match="LlamaForCausalLM holds weights; a memory estimate needs it on the meta device"):
        cohort_memory(model, ADAPTER, TrainConfig(), 1, 8)


def test_a_quantised_weight_is_counted_with_its_scales() -> None:
    weight: Any = nn.Parameter(torch.zeros(32, 1, dtype=torch.uint8), requires_grad=False)
    second = SimpleNamespace(absmax=torch.zeros(1), code=torch.zeros(256))
    weight.quant_state = SimpleNamespace(
        absmax=torch.zeros(2), code=torch.zeros(16), offset=torch.zeros(()), state2=second
    )
    assert sum(part.nbytes for part in parts_of(weight)) == 32 + 4 * (2 + 16 + 1 + 1 + 256)
    rows: Any = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    rows.CB, rows.SCB = rows.data, torch.zeros(4)  # the first is the weight itself
    assert sum(part.nbytes for part in parts_of(rows)) == 32 + 16
    assert parts_of(torch.zeros(3))[0].nbytes == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary", "dtype", "again"),
    [
        (128, 4, 8000, "float32", False),
        (256, 6, 16_000, "float32", False),
        (256, 6, 16_000, "float32", True),
        (512, 8, 32_000, "float32", False),
        (512, 8, 32_000, "bfloat16", False),
    ],
)
def test_peaks_of_random_llamas(hidden: int, layers: int, vocabulary: int, dtype: str, again: bool) -> None:
    """The peak is that of torch's allocator: a process's pages also count what its libraries and kernels take."""
    sizes = {
        **{"vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": hidden * 11 // 4},
        **{"num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64},
    }
    settings = TrainConfig(batch_size=4, gradient_checkpointing=again)
    found = cohort_memory(on_meta(getattr(torch, dtype), **sizes), ADAPTER, settings, 4, 128, answer=32)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).to(getattr(torch, dtype)).requires_grad_(False)
    tokens = torch.randint(3, vocabulary, (16, 128)).tolist()
    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    table = InstructionTable(Sequences.of(tokens), torch.full((16,), 96), [("x",)] * 16, tokenizer, 4)
    own = tuple(Split(table, torch.arange(4 * client, 4 * client + 4)) for client in range(4))
    sections: dict[str, Any] = {
        **{"model": {"path": "x"}, "data": {"path": "x", "task": "instruction"}},
        **{"execution": "cohort", "clients_per_pass": 4, "clients": {"count": 4, "per_round": 4, "ranks": [16]}},
        **{"adapter": {"target_modules": "all-linear"}},
        "train": {"batch_size": 4, "local_steps": 2, "gradient_checkpointing": again},
    }
    config = parse(sections, where="here")
    with adapted(config, model, ()) as shared:
        federation = Federation(config, FederatedData(own, own[0], None, None, ()), shared, print)
        state = federation.beginning()
        jobs = federation.jobs(state, list(state.clients))
        peak = peak_bytes(lambda: train_together(shared, jobs, config.train), torch.device("cpu"))
    assert peak == pytest.approx(found.total_bytes - found.base_bytes, rel=0.03 if dtype == "float32" else 0.1)
