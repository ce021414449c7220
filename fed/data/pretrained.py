"""What text data needs from a checkpoint: its tokenizer, its label names and its number of positions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed.config import RunConfig
from fed.errors import FedError

# What architectures call their number of positions, which transformers has one name for in most of them.
_POSITIONS = ("max_position_embeddings", "max_seq_len", "max_encoder_position_embeddings")
# Fields of a configuration that may name a kernel of the Hugging Face Hub.
_KERNEL_FIELDS = ("attn_implementation", "attn_implementation_internal", "experts_implementation")
_TOKENIZER_FILES = {".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".tiktoken"}


def load_tokenizer(config: RunConfig) -> Any:
    """Load the checkpoint's tokenizer; if it has no padding token, it pads with its end token."""
    return tokenizer_in(checkpoint_of(config))


def tokenizer_in(path: Path) -> Any:
    """Load the tokenizer in a folder, as `load_tokenizer` does."""
    from transformers import AutoTokenizer

    with quiet(), failing_as(f"model.path is {str(path)!r}: its tokenizer does not load"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    # Without tokenizer files transformers makes a tokenizer that has only special tokens.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise FedError(f"model.path is {str(path)!r}: its tokenizer knows no words; its files should lie there")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise FedError(f"model.path is {str(path)!r}: its tokenizer needs a padding or an end token")
    return tokenizer


def tokenizer_files(config: RunConfig) -> list[Path]:
    """Return the checkpoint's files that may define its tokenizer, chosen by suffix and sorted by name."""
    return sorted(
        path for path in checkpoint_of(config).iterdir() if path.suffix in _TOKENIZER_FILES and path.is_file()
    )


def saved_label_names(config: RunConfig) -> tuple[str, ...]:
    """Return the label names of the checkpoint's classification head, in the order of its outputs.

    There are none if its head is for another task, such as regression or a label for every token.
    """
    architecture = require_positions(config)
    classes = getattr(architecture, "architectures", None) or ["ForSequenceClassification"]
    names = architecture.id2label or {}
    if not classes[0].endswith("ForSequenceClassification") or architecture.problem_type == "regression":
        return ()
    return tuple(str(names[number]) for number in range(len(names))) if sorted(names) == [*range(len(names))] else ()


def require_positions(config: RunConfig) -> Any:
    """Return the checkpoint's transformers configuration.

    Raises FedError if the model has fewer positions than `data.max_length`.
    """
    path = checkpoint_of(config)
    with quiet(), failing_as(f"model.path is {str(path)!r}: its config.json does not load"):
        architecture = load_architecture(path)
        positions = _positions(architecture, config.data.max_length)
    if positions is not None and config.data.max_length > positions:
        raise FedError(f"data.max_length is {config.data.max_length}: the checkpoint takes at most {positions} tokens")
    return architecture


def load_architecture(directory: Path) -> Any:
    """Return the transformers configuration of a checkpoint.

    Raises FedError if it names code: that of a kernel of the Hugging Face Hub, which transformers would fetch and run.
    """
    from transformers import AutoConfig

    parts: list[Any] = [json.loads((directory / "config.json").read_bytes())]
    while parts:
        part = parts.pop()
        for name, value in part.items() if isinstance(part, dict) else ():
            if name.lstrip("_") in _KERNEL_FIELDS and "/" in str(value):
                raise FedError(f"its config.json has {name} = {value!r}, code that would be fetched and run; remove it")
            parts.append(value)
    return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _positions(architecture: Any, wanted: int) -> int | None:
    """Return how many tokens a model takes, at least if that may be fewer than `wanted`, or None if it has no limit."""
    text = architecture.get_text_config()
    positions = next((limit for name in _POSITIONS if (limit := getattr(text, name, None)) is not None), None)
    if positions is None or positions < 1:  # XLNet says -1 for no limit
        return None
    # The padding token is that of the configuration, or 1 in MPNet whatever that says.
    if wanted + max(1, getattr(text, "pad_token_id", None) or 0) < positions:
        return int(positions)
    import torch
    from transformers import AutoModel

    with torch.device("meta"):  # a model without memory for its weights
        padding = position_padding(AutoModel.from_config(architecture, trust_remote_code=False))
    return positions if padding is None else positions - padding - 1


def position_padding(model: Any) -> int | None:
    """Return p if the model numbers the positions of tokens from p + 1 on, where p is its padding token, else None.

    RoBERTa and its relatives do so: they have p + 1 positions fewer than `max_position_embeddings`. They are known by
    their table of position embeddings, which has a row for padding.
    """
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if padding is not None and "position" in name.rpartition(".")[2] and hasattr(module, "weight"):
            return int(padding)
    return None


def checkpoint_of(config: RunConfig) -> Path:
    path = Path(config.model.path or "")
    if not path.is_dir():
        raise FedError(f"model.path is {str(path)!r}: no such directory; it should hold a checkpoint")
    if not (path / "config.json").is_file():
        raise FedError(f"model.path is {str(path)!r}: no config.json there, so it is not a checkpoint")
    return path


@contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn any exception within the context into a FedError: `what` and the first line of the exception."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise FedError(f"{what}: {reason}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Within the context, switch off transformers' warnings and progress bars."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
