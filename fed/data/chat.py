"""Conversations with a chat model, as the chat template of its checkpoint writes them."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from fed.config import CHAT
from fed.data.pretrained import failing_as
from fed.errors import FedError

_ANSWER, _QUESTION = "zqanswerqz", "zqquestionqz"  # words that no template has
_MOST_SECONDS = 5.0  # for a conversation, which takes a template well below a millisecond


class Turn(NamedTuple):
    """A prompt, and the answer with spaces that the template writes before it and with what ends it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a checkpoint: what it writes before and after an answer, and the token that ends it.

    A conversation is what the template writes for the prompt to generate from, then `lead` (of most templates nothing),
    the answer, and `close`, up to and with the token `end`. If the template ends an answer by no token, `close` is that
    text and `ends` is False; the tokenizer's end token `end` then comes after it.
    """

    tokenizer: Any
    what: str
    lead: str
    close: str
    end: int
    ends: bool

    @classmethod
    def of(cls, tokenizer: Any, path: str, user: str, system: str | None = None) -> ChatTemplate:
        """Return the template of a tokenizer, loaded from `path`, as it writes an answer to this message.

        Raises FedError if there is none, if it fails, or if there is no token to end answers with.
        """
        what = f"data.prompt is {CHAT!r}: the chat template of model.path ({path!r})"
        if not getattr(tokenizer, "chat_template", None):
            raise FedError(
                f"data.prompt is {CHAT!r}: model.path ({path!r}) has no chat template; a prompt with columns in braces "
                "would be right, or the checkpoint of a chat model"
            )
        blank = cls(tokenizer, what, "", "", -1, False)
        asked = blank._written(system, user, None, "the first row")
        whole = blank._written(system, user, _ANSWER, "the first row")
        before, found, close = whole.partition(_ANSWER)
        if not found or not before.startswith(asked):
            raise FedError(f"{what} does not continue the prompt by the answer; another checkpoint would be right")
        at = {close.find(token): token for token in sorted(_special(tokenizer), key=len)}
        at.pop(-1, None)
        if not at:
            if tokenizer.eos_token_id is None:
                raise FedError(f"{what} ends no answer by a token, and its tokenizer has no end token")
            return cls(tokenizer, what, before[len(asked) :], close.rstrip(), tokenizer.eos_token_id, False)
        first = min(at)
        end = tokenizer.convert_tokens_to_ids(at[first])
        return cls(tokenizer, what, before[len(asked) :], close[: first + len(at[first])], end, True)

    def special_in(self, texts: Iterable[str]) -> list[str]:
        """Return the texts that hold a special token, which the tokenizer would take for one of the template's."""
        special = re.compile("|".join(map(re.escape, _special(self.tokenizer))) or "(?!)")
        return [text for text in texts if special.search(text)]

    def turn(self, system: str | None, user: str, answer: str, place: str) -> Turn:
        """Return a row's prompt and answer as the template writes them; raise FedError if it writes others."""
        asked = self._written(system, user, None, place)
        whole = self._written(system, user, answer, place)
        if not whole.startswith(asked + self.lead + answer + self.close):
            raise FedError(f"{self.what} does not write the answer of {place} as it stands there")
        prompt = (asked + self.lead).rstrip(" ")  # a space is in one token with the word after it
        return Turn(prompt, whole[len(prompt) : len(asked + self.lead + answer + self.close)])

    def tokens(self, turn: Turn, prompt: list[int], whole: list[int], place: str) -> list[int]:
        """Return the tokens of a turn with the end token last, given those of its prompt and of all its text.

        Raises FedError if a model that is given the prompt could not go on with the rest, or the answer ends early.
        """
        row = whole if self.ends else [*whole, self.end]
        if row[: len(prompt)] != prompt:
            raise FedError(f"{self.what} writes {place} so that its prompt's last token goes on into the answer")
        if row.index(self.end, len(prompt)) != len(row) - 1:
            token = self.tokenizer.convert_ids_to_tokens(self.end)
            raise FedError(f"{place}: its answer holds {token!r}, by which the chat template ends answers; remove it")
        return row

    def shortened(self, system: str | None, prompt: list[int], most: int, place: str) -> list[int]:
        """Return a prompt of at most `most` tokens: what is cut is the beginning of the user's message."""
        if len(prompt) <= most:
            return prompt
        opening = self._written(system, _QUESTION, None, place).partition(_QUESTION)[0]
        kept: list[int] = self.tokenizer(opening, add_special_tokens=False).input_ids
        if kept != prompt[: len(kept)] or len(kept) >= most:
            raise FedError(
                f"{self.what} begins the conversation of {place} with {len(kept)} tokens, and there is room for {most} "
                "before the answer; a larger data.max_length or a shorter data.chat_system would be right"
            )
        return kept + prompt[len(prompt) - most + len(kept) :]

    def _written(self, system: str | None, user: str, answer: str | None, place: str) -> str:
        """Return a conversation as text: with an answer, or without one as a prompt to generate it from."""
        messages = [{"role": "user", "content": user}]
        if system:
            messages.insert(0, {"role": "system", "content": system})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        with failing_as(f"{self.what} fails on {place}"), _limited():
            # Models that can think before they answer are asked not to, for rows hold answers alone.
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer is None, enable_thinking=False
            )
        return text


def _special(tokenizer: Any) -> set[str]:
    """Return the special tokens of a tokenizer, as text."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return added if tokenizer.eos_token is None else {*added, tokenizer.eos_token}


@contextmanager
def _limited() -> Iterator[None]:
    """Within the context, raise TimeoutError if it lasts too long, for a template may hold loops without end.

    Only a process's main thread can be interrupted; elsewhere there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def expire(number: int, frame: object) -> NoReturn:
        raise TimeoutError(f"it takes more than {_MOST_SECONDS:g} s")

    before = signal.signal(signal.SIGALRM, expire)
    left, interval = signal.setitimer(signal.ITIMER_REAL, _MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, left, interval)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if before is None else before)
