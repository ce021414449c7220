"""Small transformers with random weights, into which tests inject adapters."""

from __future__ import annotations

from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import plora_kernels as pk

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}


def tiny_bert(labels: int = 3, **sizes: int) -> BertForSequenceClassification:
    """Return a two-layer BERT classifier without dropout."""
    without_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 40, **sizes}
    return BertForSequenceClassification(BertConfig(num_labels=labels, **without_dropout, **sizes)).eval()


def tiny_llama(tied: bool = False, **sizes: int) -> LlamaForCausalLM:
    """Return a two-layer Llama."""
    sizes = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    return LlamaForCausalLM(LlamaConfig(tie_word_embeddings=tied, **sizes)).eval()


def tiny_distilbert() -> DistilBertForSequenceClassification:
    """Return a one-layer DistilBERT classifier, whose head is `pre_classifier` and `classifier`."""
    config = DistilBertConfig(
        vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=40, num_labels=3
    )
    return DistilBertForSequenceClassification(config).eval()


def adapted(model: nn.Module, targets: object, rank: int = 4, std: float = 1.0, **options: object) -> pk.Injected:
    """Inject adapters into a model, with a random B, so that every module has an effect."""
    handle = pk.inject(model, pk.PLoRAConfig(rank=rank, target_modules=targets, **options))
    for layer in handle.layers.values():
        nn.init.normal_(layer.lora_B, std=std)
    return handle
