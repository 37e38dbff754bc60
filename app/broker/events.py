"""What a job's stream holds while it runs: its events, their ids, and how a reader goes on. Pure.

An id is `attempt-number`: attempts of a job are numbered from 1, and the events of each from 0 on
without a gap. Ids of later events are greater, whatever became of workers and of Redis between
them, and each is written under its own id, so that

- what an attempt writes that has lost its job is refused by Redis, once the next one has begun;
- an event whose writing was not answered for can be written again;
- a reader knows what it has seen, and when something is missing.

A run of an attempt begins with `Started`: what was told before it is void. An attempt has several
where its engine was lost, and `Whole` says that all tokens of its last run have been told.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self
from uuid import UUID

from app.engines.base import TokenLogprob, finite

_ID: Final = re.compile(r"([0-9]{1,9})-([0-9]{1,15})")


class EventId(NamedTuple):
    """Where in a job's events one is: greater is later."""

    attempt: int
    number: int

    @classmethod
    def read(cls, text: str) -> Self | None:
        """The id that `str` of one gives; None if it is none."""
        found = _ID.fullmatch(text)
        return cls(int(found[1]), int(found[2])) if found else None

    def __str__(self) -> str:
        return f"{self.attempt}-{self.number}"

    @property
    def next(self) -> EventId:
        """Of the event that follows it in its attempt."""
        return EventId(self.attempt, self.number + 1)


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun the job. Tokens of before are void."""

    batch_id: UUID
    batch_size: int  #: jobs that were claimed together


@dataclass(frozen=True, slots=True)
class Tokens:
    """New of one sequence. All its texts since `Started` together are its answer's."""

    index: int  #: of the sequence, among those of the job: that of its choice
    text: str  #: whole characters
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Whole:
    """All tokens of all sequences have been told; the result is about to be committed."""


Told = Started | Tokens | Whole


@dataclass(frozen=True, slots=True)
class Entry:
    id: EventId
    told: Told


def encode(told: Told) -> str:
    """As short as JSON allows: there is one for each token."""
    match told:
        case Started(batch_id, size):
            value: list[Any] = [batch_id.hex, size]
        case Tokens(index, text, token_ids, ()):
            value = [index, text, token_ids]
        case Tokens(index, text, token_ids, logprobs):
            value = [index, text, token_ids, [*map(_scored, logprobs)]]
        case Whole():
            value = []
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _scored(each: TokenLogprob) -> list[Any]:
    return [each.token_id, finite(each.logprob), [(id, finite(p)) for id, p in each.top]]


def decode(text: str | bytes) -> Told | None:
    """What `encode` wrote; None if somebody else did, or a later version."""
    try:
        match json.loads(text):
            case []:
                return Whole()
            case [str(batch_id), int(size)]:
                return Started(UUID(batch_id), size)
            case [int(index), str(text), list(ids), *scored]:
                logprobs = (
                    TokenLogprob(id, p, tuple((other, q) for other, q in top))
                    for id, p, top in (scored[0] if scored else ())
                )
                return Tokens(index, text, tuple(map(int, ids)), tuple(logprobs))
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return None


class Reading:
    """What one reader has been told, and what follows. Owns `after`: the last event told.

    Events come in order, some perhaps more than once, and some never: a stream is cut to a length,
    kept for a time, and may be lost with Redis. From the first one that is missing on nothing is
    told but the next `Started`.
    """

    def __init__(self, after: EventId | None = None) -> None:
        """`after` is the last event that the reader had, on whatever connection."""
        self.after = after
        self.has_gap = False
        """Something of the last run was missing: its answer is to be read from the result."""
        self.is_whole = False  #: all of the last run has been told

    def take(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """Those that are news, and go on where the last one ended."""
        new = [each for each in entries if self.after is None or each.id > self.after]
        starts = [at for at, each in enumerate(new) if isinstance(each.told, Started)]
        for entry in new[starts[-1] if starts else 0 :]:  # runs before the last one are void
            is_start = isinstance(entry.told, Started)
            if is_start:
                self.has_gap = False
            elif self.after is None or entry.id != self.after.next:
                self.has_gap = True
            self.after = entry.id
            self.is_whole = isinstance(entry.told, Whole) and not self.has_gap
            if not self.has_gap and not isinstance(entry.told, Whole):
                yield entry
