"""Answers of a causal language model, generated greedily in batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fed.samples import InstructionTable


def answer(model: Any, table: InstructionTable, rows: Tensor) -> list[str]:
    """Return the model's answers to the prompts of `rows` (b,), in their order.

    Every token is the likeliest; an answer ends before its end token, or after `max_new_tokens` tokens.
    """
    from transformers import GenerationConfig

    prompts = table.prompts(rows)
    ends = _end_tokens(model, table.tokenizer)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=table.max_new_tokens,
        pad_token_id=table.tokenizer.pad_token_id,
        eos_token_id=ends,
        use_cache=True,
    )
    with torch.no_grad():
        tokens = model.generate(**prompts, generation_config=greedy)
    return [_text(table.tokenizer, row, ends) for row in tokens[:, prompts["input_ids"].shape[1] :].tolist()]


def _end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokenizer's end token, and those the checkpoint says end what it generates."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = configured if isinstance(configured, list) else [configured]
    return sorted({end for end in [*ends, tokenizer.eos_token_id] if end is not None})


def _text(tokenizer: Any, tokens: list[int], ends: list[int]) -> str:
    first = next((index for index, token in enumerate(tokens) if token in ends), len(tokens))
    text: str = tokenizer.decode(tokens[:first], skip_special_tokens=True)
    return text.strip()
