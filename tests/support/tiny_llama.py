"""A Llama-style checkpoint made here, with no download: a byte-level BPE vocabulary of the task's own text.

    python -m tests.support.tiny_llama FOLDER_OF_JSONL DIRECTORY [STEPS]

Its weights are random, or with STEPS trained that long to continue those texts, so that an adapter has something to
adapt. It has a start and an end token and, as Llama's, none to pad with.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

START, END = "<s>", "</s>"
MAX_LENGTH = 512


def make_tiny_llama(
    directory: Path,
    texts: Sequence[str],
    *,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = 1000,
    steps: int = 0,
    seed: int = 0,
) -> Path:
    """Train a vocabulary on `texts`, draw a Llama of width `hidden`, train it for `steps`, and save all of it."""
    tokenizer = _tokenizer(texts, vocabulary)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                num_hidden_layers=layers,
                num_attention_heads=max(1, hidden // 32),
                intermediate_size=2 * hidden,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=None,
                initializer_range=0.1,  # at 0.02 so small a model passes next to nothing of its input on
            )
        )
        _train(model, tokenizer, texts, steps)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)
    return directory


def _tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = ByteLevel(add_prefix_space=False)
    pieces.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[START, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=START, eos_token=END, model_max_length=MAX_LENGTH, padding_side="right"
    )


def _train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], steps: int) -> None:
    """Next-token training on the texts end to end, in rows of 64 tokens, 16 a step."""
    stream = torch.tensor([token for text in texts for token in [*tokenizer(text).input_ids, tokenizer.eos_token_id]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(steps):
        starts = torch.randint(max(1, len(stream) - 64), (16,))
        rows = torch.stack([stream[start : start + 64] for start in starts])
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


if __name__ == "__main__":
    source, target, *more = sys.argv[1:]
    disable_progress_bar()
    lines = [line for path in sorted(Path(source).glob("*.jsonl")) for line in path.read_text("utf-8").splitlines()]
    rows = [json.loads(line) for line in lines]
    written = [f"{row['instruction']}\n\nInput: {row['input']}\n\nOutput:\n{row['output']}" for row in rows]
    print(make_tiny_llama(Path(target), written, hidden=128, vocabulary=4000, steps=int(more[0]) if more else 0))
