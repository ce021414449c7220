"""A BERT-style checkpoint made here, with no download: random weights, a WordPiece vocabulary of the task's own text.

It shows that a run takes any local transformers checkpoint: all that it learns, it learns in the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

MAX_LENGTH = 128


def make_tiny_bert(
    directory: Path,
    texts: Iterable[str],
    *,
    hidden: int = 128,
    layers: int = 2,
    vocabulary: int = 4000,
    labels: tuple[str, ...] = ("one", "two"),
    seed: int = 0,
) -> Path:
    """Train a WordPiece vocabulary on `texts`, draw a BERT of width `hidden`, and save both to `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    pieces = BertWordPieceTokenizer(lowercase=True)
    pieces.train_from_iterator(texts, vocab_size=vocabulary, min_frequency=2, show_progress=False)
    pieces.save_model(str(directory))
    tokenizer = BertTokenizerFast.from_pretrained(directory, do_lower_case=True, model_max_length=MAX_LENGTH)
    tokenizer.save_pretrained(directory)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertForSequenceClassification(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=max(1, hidden // 32),
                intermediate_size=2 * hidden,
                max_position_embeddings=MAX_LENGTH,
                pad_token_id=tokenizer.pad_token_id,
                initializer_range=0.1,  # at 0.02 the outputs of so small a model hardly depend on its input
                id2label=dict(enumerate(labels)),
            )
        )
    model.save_pretrained(directory)
    return directory
