"""Admission: how much may wait, and when to come back if that much does.

Counting a long queue is not free, so it is counted now and then, by one caller, and what this
process let in since is added to it. The limits are therefore kept to within what other processes
let in between two counts, and room is seen up to that much later. Counts are at most
`COUNT_EVERY_S` old, `COUNT_FULL_S` where somebody is refused, or `COUNT_SHARE` times as long as
counting takes: a million rows take some tenths of a second, so then it is a few seconds.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from app.errors import QueueFull
from app.store import counts
from app.store.counts import Load
from app.store.database import Database
from app.store.tenancy import EVERYBODY, acting_for

COUNT_EVERY_S: Final = 1.0
COUNT_FULL_S: Final = 0.1
"""In a queue that is small against its drain, room that is seen late leaves the device idle."""
COUNT_SHARE: Final = 20
"""Counting has at most one part in so many of the time."""
MAX_COUNT_AGE_S: Final = 10.0
"""Whatever the last count took: it may have been slow for once."""

DRAIN_WINDOW_S: Final = 30.0
"""The drain rate is that of the jobs that ended within this time."""

MAX_RETRY_AFTER_S: Final = 60
"""Also the answer while nothing drains."""


class Admission:
    """Holds what is queued against the limits. Threads may share it."""

    def __init__(self, database: Database, max_queued: Load) -> None:
        self._database = database
        self._max = max_queued
        self._lock = threading.Lock()
        self._counting = threading.Lock()  #: held by whoever counts
        self._counted = Load(0, 0)
        self._counted_at = -math.inf
        self._count_took_s = 0.0
        self._entering = Load(0, 0)  #: being written now, so perhaps not counted
        self._let_in = Load(0, 0)  #: written since the count began
        self._rates = (0.0, 0.0)  #: jobs and tokens that end per second
        self._room_at = 0.0  #: when all who were told to come back will have

    def queued(self) -> Load:
        """What waits, as far as this process knows."""
        self._count_if_older(COUNT_EVERY_S)
        with self._lock:
            return _sum(self._counted, _sum(self._let_in, self._entering))

    def has_room(self, num_jobs: int) -> bool:
        """Whether there is room by a count that is fresh, so that nobody need be asked."""
        with self._lock:
            return self._is_fresh(COUNT_EVERY_S) and self._excess(Load(num_jobs, 0)) == Load(0, 0)

    def expect_room(self, num_jobs: int, num_tokens: int = 0) -> None:
        """Raises `QueueFull` if so many more are too many, by default whatever their tokens.

        Asked before the jobs are looked at: under an overload a refusal has to be cheap.
        """
        asked = Load(num_jobs, num_tokens)
        self._count_if_needed(asked)
        with self._lock:
            self._refuse_excess(asked)

    @contextmanager
    def admitted(self, asked: Load) -> Iterator[None]:
        """Let so much more in, which is written inside; raises `QueueFull` if there is no room."""
        self._count_if_needed(asked)
        with self._lock:
            self._refuse_excess(asked)
            self._entering = _sum(self._entering, asked)
        try:
            yield
        finally:  # it may have been written, whatever was raised: the next count tells
            with self._lock:
                self._entering = _less(self._entering, asked)
                self._let_in = _sum(self._let_in, asked)

    def _refuse_excess(self, asked: Load) -> None:
        excess = self._excess(asked)
        if excess == Load(0, 0):
            return
        what, limit = ("jobs", self._max.jobs) if excess.jobs else ("tokens", self._max.tokens)
        raise QueueFull(
            f"The queue takes {limit} {what} and has no room for these.",
            retry_after=self._retry_after(asked),
        )

    def _excess(self, asked: Load) -> Load:
        inside = _sum(self._counted, _sum(self._let_in, self._entering))
        return _excess(_sum(inside, asked), self._max)

    def _count_if_needed(self, asked: Load) -> None:
        """Nobody is refused for a count that may be over by now."""
        self._count_if_older(COUNT_EVERY_S)
        with self._lock:
            has_room = self._excess(asked) == Load(0, 0)
        if not has_room:
            self._count_if_older(COUNT_FULL_S)

    def _count_if_older(self, age_s: float) -> None:
        """One caller at a time counts: the others go on with the count there is."""
        if self._is_fresh(age_s) or not self._counting.acquire(blocking=False):
            return
        try:
            self._count()
        finally:
            self._counting.release()

    def _is_fresh(self, age_s: float) -> bool:
        age_s = max(age_s, min(COUNT_SHARE * self._count_took_s, MAX_COUNT_AGE_S))
        return time.monotonic() < self._counted_at + age_s

    def _count(self) -> None:
        began = time.monotonic()
        with self._lock:
            before = self._let_in
        with acting_for(EVERYBODY), self._database.begin() as connection:
            counted, rates = counts.queued(connection), self._rates
            half = Load(self._max.jobs // 2, self._max.tokens // 2)
            if _excess(_sum(counted, before), half) != Load(0, 0):
                ended = counts.ended(connection, DRAIN_WINDOW_S)
                rates = (ended.jobs / DRAIN_WINDOW_S, ended.tokens / DRAIN_WINDOW_S)
        with self._lock:
            self._counted, self._rates = counted, rates
            self._let_in = _less(self._let_in, before)
            self._counted_at, self._count_took_s = began, time.monotonic() - began

    def _retry_after(self, asked: Load) -> int:
        """Whole seconds until the queue should have room for these.

        Each who is refused gets a turn of its own behind those refused before, at the pace at which
        the queue drains. So all come back spread out, and not at once.
        """
        now = time.monotonic()
        turn_s = max(
            amount / rate if rate else math.inf
            for amount, rate in zip((asked.jobs, asked.tokens), self._rates, strict=True)
            if amount
        )
        self._room_at = min(max(self._room_at, now) + turn_s, now + MAX_RETRY_AFTER_S)
        # A sum of floats may be rounded up.
        return min(MAX_RETRY_AFTER_S, max(1, math.ceil(self._room_at - now)))


def _sum(one: Load, other: Load) -> Load:
    return Load(one.jobs + other.jobs, one.tokens + other.tokens)


def _less(one: Load, other: Load) -> Load:
    return Load(one.jobs - other.jobs, one.tokens - other.tokens)


def _excess(load: Load, limit: Load) -> Load:
    """By how much a load is beyond a limit, each part for itself."""
    over = _less(load, limit)
    return Load(max(0, over.jobs), max(0, over.tokens))
