"""Train a small causal language model on local text, to try instruction tuning without downloading a checkpoint.

    python examples/small_llama.py path/to/tasks --without task1058,task1059 --out runs/llama
    python -m fed run instructions-paper --set model.path=runs/llama data.path=path/to/tasks data.max_length=128

The first command trains a Llama and its byte-level BPE tokenizer on the rows of a JSON, CSV or Parquet file, or of a
folder of such files, and saves a `transformers` checkpoint. The second command uses it as the base model of a run.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fed.cli import run_app
from fed.config import RunConfig, parse
from fed.config.data import PROMPT
from fed.console import Screen
from fed.data import text_tables
from fed.data.pretrained import quiet
from fed.data.rows import Rows, remarks
from fed.data.sources import read_local
from fed.data.tables import DenseTable, Split
from fed.errors import INTERRUPTED, FedError
from fed.experiments.run import limits
from fed.models.base_model import Progress, pretrain
from fed.seeding import torch_seed
from fed.simulation.run_directory import RunDirectory

START, END = "<s>", "</s>"
_HEAD = 32  # the width of an attention head


@dataclass(frozen=True)
class Recipe:
    """The size and training of a Llama.

    It has `layers` layers of `width` features, a multiple of 32, with width / 32 heads each, and at most `vocabulary`
    tokens. It is trained for `steps` steps, each on `batch_size` rows of `length` tokens, which is also the longest
    sequence that it can read. All random numbers are drawn from `seed`.
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

    The texts, each between a start and an end token, are concatenated and cut into rows; all tokens of a row count in
    the loss. The weights are fp32; input and output embeddings share theirs. Returns the number of parameters of the
    model and the number of tokens of the texts. Raises FedError if the texts are too short for one row.
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
    """Return a byte-level BPE tokenizer; as Llama's, it begins texts with a start token and has no padding token."""
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
        initializer_range=recipe.width**-0.5,  # the usual 0.02 is for wide models; in narrow ones signals would shrink
    )
    with torch_seed(torch.device("cpu"), recipe.seed, "weights"):
        return LlamaForCausalLM(architecture)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def save_model(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A JSON, CSV or Parquet file, or a folder of them.")],
    out: Annotated[Path | None, typer.Option(help="The directory.", show_default="runs/model-NAME")] = None,
    without: Annotated[str, typer.Option(metavar="NAME,…", help="Files of the folder, or tasks, to leave out.")] = "",
    text: Annotated[
        str, typer.Option(help="A row as text, columns in braces.", show_default="data.prompt's default, then {output}")
    ] = f"{PROMPT}{{output}}",
    layers: Annotated[int, typer.Option(min=1, max=64)] = 4,
    width: Annotated[int, typer.Option(min=32, max=4096, help="A multiple of 32.")] = 128,
    vocabulary: Annotated[int, typer.Option(min=300, max=100_000, help="Tokens, at most.")] = 4000,
    length: Annotated[int, typer.Option(min=8, max=8192, help="Tokens of a row, and most the model can read.")] = 128,
    steps: Annotated[int, typer.Option(min=1, max=100_000)] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 16,
    learning_rate: Annotated[float, typer.Option(min=1e-8, help="The highest.")] = 3e-3,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int, typer.Option(min=0, max=1024, help="0: as many as torch takes.")] = 0,
) -> int:
    """Train a small Llama and its tokenizer on local text and save a checkpoint, to try instruction tuning with."""
    recipe = Recipe(layers, width, vocabulary, length, steps, batch_size, learning_rate, seed)
    left_out = [name.strip() for name in without.split(",") if name.strip()]
    target = out or Path("runs", f"model-{Path(path).stem}")
    began, screen, directory = time.perf_counter(), Screen(), RunDirectory(target, overwrite=False)
    rows = read_local(path, "the path", left_out=left_out, stage=screen.stage)
    for line in remarks(rows):
        screen.warn(line)
    written = text_tables.fill_in(text, _with_first_answers(rows), "--text")
    try:
        with limits(threads), directory:
            with screen.stage("step", recipe.steps, every=max(1, recipe.steps // 10)) as advance:
                numbers, tokens = make(
                    written, recipe, directory.path, lambda step, loss: advance(step, f"training loss {loss:.3f}")
                )
            directory.publish()
            directory.commit()
    except KeyboardInterrupt:
        screen.warn("interrupted: nothing is left of this model")
        return INTERRUPTED
    screen.say(f"{len(written)} texts of {tokens} tokens; a model of {numbers} numbers: --set model.path={target}")
    screen.say(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def _with_first_answers(rows: Rows) -> Rows:
    """Return the rows with the first of several answers, the one that a run trains on."""

    def first(value: Any) -> Any:
        return value[0] if isinstance(value, list) and value else value

    return replace(rows, rows=[{column: first(value) for column, value in row.items()} for row in rows.rows])


if __name__ == "__main__":
    run_app(app, "python examples/small_llama.py")
