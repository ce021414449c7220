"""Messages that machines have lost while Flower counts these as connected, found by asking the machines.

A SuperNode that is killed and soon started again under its old number, as its key gives it, is never seen missing. The
message that it had is not delivered again, and no error comes in place of its reply.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from flwr.app import ConfigRecord, Message, RecordDict

from fed.flower.protocol import ASK, MESSAGE, WORKING

# From when on a machine is asked about a message, and how long between two questions at least; in seconds, as is the
# time after which a question is asked anew. One that works on a message answers no question before it is done.
FIRST_SECONDS, LEAST_SECONDS, ANSWER_SECONDS = 60.0, 60.0, 120.0
SHARE = 1 / 8  # of the time that a message took so far, between two questions about it
# So many answers in a row must say that a machine has no such message: its reply may be on the way as one is given.
ANSWERS = 2

# Pushes a message and returns its number, "" if it was not taken; pulls the replies to messages of these numbers.
Push = Callable[[Message], str]
Pull = Callable[[Sequence[str]], Iterable[Message]]


@dataclass
class _Watched:
    """A message under way: when its machine is asked about it next, and the question that is open."""

    since: float
    ask_from: float
    question: str = ""
    until: float = 0.0
    missing: int = 0  # answers in a row that say that the machine does not have it


class Watch:
    """Asks machines whether they still work on what they were sent."""

    def __init__(self, push: Push, pull: Pull) -> None:
        self._push, self._pull = push, pull
        self._watched: dict[str, _Watched] = {}

    def lost(self, under_way: Mapping[str, int], now: float) -> list[str]:
        """Return the numbers of the messages that their machines have lost; ask about those that take long.

        `under_way` are the machines by the numbers of the messages that they have not answered, and `now` is in
        seconds of `time.monotonic`.
        """
        self._watched = {
            number: self._watched.get(number) or _Watched(now, now + FIRST_SECONDS) for number in under_way
        }
        self._take_answers(now)
        for number, own in self._watched.items():
            if own.question and now >= own.until:
                own.question = ""
            if not own.question and now >= own.ask_from:
                self._ask(number, under_way[number], own, now)
        return [number for number, own in self._watched.items() if own.missing >= ANSWERS]

    def _ask(self, number: str, machine: int, own: _Watched, now: float) -> None:
        content = RecordDict({ASK: ConfigRecord({MESSAGE: number})})
        question = Message(content, machine, ASK, ttl=ANSWER_SECONDS, group_id="ask")
        own.question = self._push(question)
        own.until, own.ask_from = now + ANSWER_SECONDS, now + max(LEAST_SECONDS, SHARE * (now - own.since))

    def _take_answers(self, now: float) -> None:
        asked = {own.question: own for own in self._watched.values() if own.question}
        for reply in self._pull(list(asked)) if asked else ():
            own = asked.get(reply.metadata.reply_to_message_id)
            if own is None:
                continue
            own.question = ""
            working = _says(reply)
            if working is not None:
                own.missing = 0 if working else own.missing + 1


def is_working(message: Message, works_on: Callable[[str], bool]) -> Message:
    """Return a machine's answer to a question; `works_on` says whether it works on the message of a number."""
    asked = message.content.get(ASK)
    number = asked.get(MESSAGE) if isinstance(asked, ConfigRecord) else None
    working = isinstance(number, str) and works_on(number)
    return Message(RecordDict({ASK: ConfigRecord({WORKING: working})}), reply_to=message)


def _says(reply: Message) -> bool | None:
    """Return what a machine says of a message; None if that is an error, or nothing that can be read."""
    record = None if reply.has_error() else reply.content.get(ASK)
    said = record.get(WORKING) if isinstance(record, ConfigRecord) else None
    return said if isinstance(said, bool) else None
