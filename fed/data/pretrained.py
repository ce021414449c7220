"""What text data needs from a checkpoint: its tokenizer, its label names and its number of positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fed.config import RunConfig
from fed.errors import FedError

_TOKENIZER_FILES = {".json", ".txt", ".model", ".jinja", ".vocab", ".bpe", ".tiktoken"}


def load_tokenizer(config: RunConfig) -> Any:
    """Load the checkpoint's tokenizer; if it has no padding token, it pads with its end token."""
    from transformers import AutoTokenizer

    path = checkpoint_of(config)
    with quiet(), failing_as(f"model.path is {str(path)!r}: its tokenizer does not load"):
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
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
    """Return the label names of the checkpoint's head, in the order of its outputs."""
    names = require_positions(config).id2label or {}
    return tuple(str(names[number]) for number in sorted(names))


def require_positions(config: RunConfig) -> Any:
    """Return the checkpoint's transformers configuration.

    Raises FedError if the model has fewer positions than `data.max_length`.
    """
    from transformers import AutoConfig

    path = checkpoint_of(config)
    with quiet(), failing_as(f"model.path is {str(path)!r}: its config.json does not load"):
        architecture = AutoConfig.from_pretrained(path, local_files_only=True)
    positions = getattr(architecture, "max_position_embeddings", None)
    if positions is not None and config.data.max_length > positions:
        raise FedError(f"data.max_length is {config.data.max_length}: the checkpoint takes at most {positions} tokens")
    return architecture


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
