"""Tokenising texts by the checkpoint's tokenizer; the tokens are cached, so that this is done once for each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.data.pretrained import load_tokenizer, tokenizer_files
from fed.data.tables import Sequences
from fed.data.token_cache import cached, user_directory
from fed.errors import FedError

# Opens a progress display, given a title and a number of steps. The context yields a function to call with the number
# of steps done and a note. `fed.console.Screen.stage` is one.
Stage = Callable[[str, int], AbstractContextManager[Callable[[int, str], object]]]

_CHUNK = 2000  # texts tokenised at a time, which takes less than a second


def text_tokens(
    config: RunConfig,
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    on_event: Callable[[str], object],
    stage: Stage | None,
) -> tuple[Any, dict[str, Sequences]]:
    """Return the tokenizer and the tokens of every text or pair of texts, by the names of the model's arguments.

    A text or pair is cut to `data.max_length` tokens; one without tokens becomes one padding token.
    """
    tokenizer, length = load_tokenizer(config), config.data.max_length

    def make() -> dict[str, Tensor]:
        parts: dict[str, list[list[int]]] = {}
        for chunk in _chunks(len(texts), stage):
            second = None if pairs is None else list(pairs[chunk])
            encoded = tokenizer(
                list(texts[chunk]), second, truncation=True, max_length=length, return_attention_mask=False
            )
            for name, values in encoded.items():
                filler = tokenizer.pad_token_id if name == "input_ids" else 0
                parts.setdefault(name, []).extend(ids or [filler] for ids in values)
        return _flat({name: Sequences.of(values) for name, values in parts.items()})

    key = {"what": "texts", "texts": _hash(texts), "pairs": None if pairs is None else _hash(pairs), "length": length}
    return tokenizer, _sequences(_kept(config, key, make, on_event))


def instruction_tokens(
    config: RunConfig,
    prompts: Sequence[str],
    answers: Sequence[str],
    on_event: Callable[[str], object],
    stage: Stage | None,
) -> tuple[Any, Sequences, Tensor, int]:
    """Return the tokenizer, each row's tokens and number of prompt tokens (n,) int64, and how many rows were cut.

    A row is prompt, answer and end token. A prompt longer than `data.max_length` − `data.max_new_tokens` tokens loses
    its first ones, except the start token. A row that is then longer than `data.max_length` tokens loses its last ones,
    which are the end token and the end of the answer.
    """
    tokenizer, length, room = load_tokenizer(config), config.data.max_length, config.data.max_new_tokens
    if tokenizer.eos_token_id is None:
        raise FedError(f"model.path is {config.model.path!r}: its tokenizer needs an end token, to end answers with")

    def make() -> dict[str, Tensor]:
        rows: list[list[int]] = []
        sizes: list[int] = []
        cut = 0
        for chunk in _chunks(len(prompts), stage):
            asked = tokenizer(list(prompts[chunk])).input_ids
            answered = tokenizer(list(answers[chunk]), add_special_tokens=False).input_ids
            for prompt, answer in zip(asked, answered, strict=True):
                whole = _prompt(tokenizer, prompt)
                head = _shortened(tokenizer, whole, length - room)
                row = [*head, *answer, tokenizer.eos_token_id]
                cut += len(head) < len(whole) or len(row) > length
                rows.append(row[:length])
                sizes.append(len(head))
        return _flat({"tokens": Sequences.of(rows)}) | {"prompts": torch.tensor(sizes), "cut": torch.tensor([cut])}

    key = {
        **{"what": "instructions", "texts": _hash(prompts), "answers": _hash(answers)},
        **{"length": length, "room": room},
    }
    found = _kept(config, key, make, on_event)
    prompt_lengths, cut = found.pop("prompts"), int(found.pop("cut"))
    return tokenizer, _sequences(found)["tokens"], prompt_lengths, cut


def _prompt(tokenizer: Any, ids: list[int]) -> list[int]:
    """Return a prompt's tokens without an end token, which some tokenizers add.

    A prompt without tokens becomes the start token, or the end token if the tokenizer has no start token.
    """
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    start = tokenizer.bos_token_id
    return ids or [tokenizer.eos_token_id if start is None else start]


def _shortened(tokenizer: Any, ids: list[int], most: int) -> list[int]:
    if len(ids) <= most:
        return ids
    kept = [ids[0]] if most > 1 and ids[0] == tokenizer.bos_token_id else []
    return kept + ids[len(ids) - most + len(kept) :]


def _kept(
    config: RunConfig, key: Mapping[str, Any], make: Callable[[], dict[str, Tensor]], on_event: Callable[[str], object]
) -> dict[str, Tensor]:
    """Return the result of `make`, cached under `key`, the tokenizer's files and the versions of the libraries."""
    import tokenizers
    import transformers

    files = {path.name: blake2b(path.read_bytes(), digest_size=16).hexdigest() for path in tokenizer_files(config)}
    versions = {"transformers": transformers.__version__, "tokenizers": tokenizers.__version__}
    return cached(_directory(config), {**key, "tokenizer": files, "versions": versions}, make, on_event)


def _directory(config: RunConfig) -> Path | None:
    setting = config.data.cache
    if isinstance(setting, str):
        return Path(setting)
    return user_directory() / "tokens" if setting else None


def _chunks(rows: int, stage: Stage | None) -> Iterator[slice]:
    """Yield slices that cover all rows; if there is more than one, show the progress by a stage."""
    starts = range(0, rows, _CHUNK)
    if stage is None or len(starts) < 2:
        yield from (slice(start, start + _CHUNK) for start in starts)
        return
    with stage("tokens: thousand rows", -(-rows // 1000)) as advance:
        for start in starts:
            yield slice(start, start + _CHUNK)
            advance(-(-min(start + _CHUNK, rows) // 1000), "")


def _hash(texts: Sequence[str]) -> str:
    digest = blake2b(digest_size=16)
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _flat(sequences: Mapping[str, Sequences]) -> dict[str, Tensor]:
    tensors = {}
    for name, tokens in sequences.items():
        tensors[f"{name}.values"], tensors[f"{name}.offsets"] = tokens.values, tokens.offsets
    return tensors


def _sequences(tensors: Mapping[str, Tensor]) -> dict[str, Sequences]:
    names = sorted({name.rsplit(".", 1)[0] for name in tensors})
    return {name: Sequences(tensors[f"{name}.values"], tensors[f"{name}.offsets"]) for name in names}
