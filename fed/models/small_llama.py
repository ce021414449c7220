"""A small causal language model made of local text, to try instructions where there is no checkpoint to hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fed.config import RunConfig, parse
from fed.data.pretrained import quiet
from fed.data.tables import DenseTable, Split
from fed.errors import FedError
from fed.models.base_model import Progress, pretrain
from fed.seeding import torch_seed

START, END = "<s>", "</s>"
_HEAD = 32  # the width of an attention head


@dataclass(frozen=True)
class Recipe:
    """A Llama's size, and how long it is trained.

    `layers` of `width` (a multiple of 32), as many heads as 32 goes into it; at most `vocabulary` tokens. It is trained
    for `steps` on `batch_size` rows of `length` tokens, which is also the most it can read. Everything random is drawn
    from `seed`.
    """

    layers: int = 4
    width: int = 256
    vocabulary: int = 4000
    length: int = 256
    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-3
    seed: int = 0


def make(texts: Sequence[str], recipe: Recipe, directory: Path, progress: Progress | None = None) -> tuple[int, int]:
    """Save a Llama and its byte-level BPE tokenizer, both trained on `texts`, as a `transformers` checkpoint.

    Each text stands between a start and an end token; the texts end to end are cut into rows, all of whose tokens are
    learnt. The weights are fp32, those of input and output embeddings the same. Returns how many numbers the model
    has and how many tokens the texts. Raises FedError where the texts fill no row.
    """
    if recipe.width % _HEAD:
        raise FedError(f"--width is {recipe.width}: it should be a multiple of {_HEAD}, the width of a head")
    tokenizer = _tokenizer(texts, recipe)
    stream = [token for ids in tokenizer(list(texts)).input_ids for token in [*ids, tokenizer.eos_token_id]]
    rows = torch.tensor(stream[: len(stream) - len(stream) % recipe.length]).view(-1, recipe.length)
    if len(rows) == 0:
        raise FedError(f"--length is {recipe.length}: the texts have {len(stream)} tokens, which fill no such row")
    model = _llama(tokenizer, recipe)
    pretrain(model, Split.whole(DenseTable({"input_ids": rows}, rows)), _training(recipe), progress)
    tokenizer.model_max_length = recipe.length
    with quiet():
        tokenizer.save_pretrained(directory)
        model.save_pretrained(directory)
    return sum(parameter.numel() for parameter in model.parameters()), len(stream)


def _training(recipe: Recipe) -> RunConfig:
    model = {
        "pretrain_steps": recipe.steps,
        "pretrain_learning_rate": recipe.learning_rate,
        "pretrain_batch_size": recipe.batch_size,
    }
    return parse({"seed": recipe.seed, "model": model}, where="the recipe")


def _tokenizer(texts: Sequence[str], recipe: Recipe) -> Any:
    """A byte-level BPE tokenizer: it begins texts with a start token and has, as Llama's, none to pad with."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.processors import TemplateProcessing
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    pieces = Tokenizer(BPE())
    pieces.pre_tokenizer = ByteLevel(add_prefix_space=False)
    pieces.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[START, END],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    pieces.post_processor = TemplateProcessing(single=f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token=START, eos_token=END, padding_side="right")


def _llama(tokenizer: Any, recipe: Recipe) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    architecture = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.width // _HEAD,
        intermediate_size=2 * recipe.width,
        max_position_embeddings=recipe.length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        tie_word_embeddings=True,
        initializer_range=recipe.width**-0.5,  # the usual 0.02 belongs to wide models: narrow ones pass little on
    )
    with torch_seed(torch.device("cpu"), recipe.seed, "weights"):
        return LlamaForCausalLM(architecture)
