"""Tokenising texts by the checkpoint's tokenizer; the tokens are cached, so that this is done once for each text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fed.config import RunConfig
from fed.data.chat import ChatTemplate
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

    def tokenize(chunk: slice) -> Iterator[_Row]:
        asked = tokenizer(list(prompts[chunk])).input_ids
        answered = tokenizer(list(answers[chunk]), add_special_tokens=False).input_ids
        for prompt, answer in zip(asked, answered, strict=True):
            whole = _prompt(tokenizer, prompt)
            yield _Row(whole, _shortened(tokenizer, whole, length - room), [*answer, tokenizer.eos_token_id])

    key = {
        **{"what": "instructions", "texts": _hash(prompts), "answers": _hash(answers)},
        **{"length": length, "room": room},
    }
    return tokenizer, *_answered(config, key, len(prompts), tokenize, on_event, stage)


def chat_tokens(
    config: RunConfig,
    messages: Sequence[tuple[str | None, str]],
    answers: Sequence[str],
    places: Sequence[str],
    on_event: Callable[[str], object],
    stage: Stage | None,
) -> tuple[Any, Sequences, Tensor, int]:
    """Return what `instruction_tokens` does, for conversations that the checkpoint's chat template writes.

    `messages` are each row's system message, or None, and user message; `places` say where the rows are. A row is the
    prompt to generate an answer from, the answer, and the token that ends it, which becomes the tokenizer's end token.
    A prompt that is too long loses the beginning of the user's message.
    """
    tokenizer, length, room = load_tokenizer(config), config.data.max_length, config.data.max_new_tokens
    system, user = messages[0]
    template = ChatTemplate.of(tokenizer, str(config.model.path), user, system)
    if not template.ends:
        on_event("the chat template ends an answer by no token; the tokenizer's end token comes after it")
    if found := template.special_in(f"{own or ''}\n{text}" for own, text in messages):
        on_event(
            f"{len(found)} of {len(messages)} rows have a special token in their messages, which is taken for one of "
            "the chat template's own"
        )

    def tokenize(chunk: slice) -> Iterator[_Row]:
        found = zip(messages[chunk], answers[chunk], places[chunk], strict=True)
        turns = [template.turn(*message, answer, place) for message, answer, place in found]
        asked = tokenizer([turn.prompt for turn in turns], add_special_tokens=False).input_ids
        whole = tokenizer([turn.prompt + turn.answer for turn in turns], add_special_tokens=False).input_ids
        for turn, prompt, ids, place, (own, _) in zip(turns, asked, whole, places[chunk], messages[chunk], strict=True):
            row = template.tokens(turn, prompt, ids, place)
            yield _Row(prompt, template.shortened(own, prompt, length - room, place), row[len(prompt) :])

    key = {
        **{"what": "conversations", "systems": _hash([own or "" for own, _ in messages])},
        **{"texts": _hash([text for _, text in messages]), "answers": _hash(answers)},
        **{"length": length, "room": room},
    }
    tokens = _answered(config, key, len(messages), tokenize, on_event, stage)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(template.end)
    return tokenizer, *tokens


class _Row(NamedTuple):
    """The tokens of a row: its prompt, what is left of that where it is too long, and the answer with what ends it."""

    prompt: list[int]
    kept: list[int]
    answer: list[int]


def _answered(
    config: RunConfig,
    key: Mapping[str, Any],
    count: int,
    tokenize: Callable[[slice], Iterator[_Row]],
    on_event: Callable[[str], object],
    stage: Stage | None,
) -> tuple[Sequences, Tensor, int]:
    """Return the tokens of `count` rows, their numbers of prompt tokens (n,) int64, and how many rows were cut.

    `tokenize` yields the rows of a slice; all are cached under `key`.
    """
    length = config.data.max_length

    def make() -> dict[str, Tensor]:
        rows: list[list[int]] = []
        sizes: list[int] = []
        cut = 0
        for chunk in _chunks(count, stage):
            for prompt, kept, answer in tokenize(chunk):
                row = [*kept, *answer]
                cut += len(kept) < len(prompt) or len(row) > length
                rows.append(row[:length])
                sizes.append(len(kept))
        return _flat({"tokens": Sequences.of(rows)}) | {"prompts": torch.tensor(sizes), "cut": torch.tensor([cut])}

    found = _kept(config, key, make, on_event)
    prompt_lengths, cut = found.pop("prompts"), int(found.pop("cut"))
    return _sequences(found)["tokens"], prompt_lengths, cut


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
