"""Small transformers, drawn at random: what tests put adapters into."""

from __future__ import annotations

from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)


def tiny_bert(labels: int = 3) -> BertForSequenceClassification:
    """Return a two-layer BERT classifier without dropout."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        num_labels=labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config).eval()


def tiny_llama(tied: bool = False) -> LlamaForCausalLM:
    """Return a two-layer Llama."""
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tiny_distilbert() -> DistilBertForSequenceClassification:
    """Return a one-layer DistilBERT classifier, whose head is `pre_classifier` and `classifier`."""
    config = DistilBertConfig(
        vocab_size=60, dim=32, n_layers=1, n_heads=2, hidden_dim=48, max_position_embeddings=40, num_labels=3
    )
    return DistilBertForSequenceClassification(config).eval()
