"""The streams of the jobs that run here: from the engine process to Redis, past the runner.

A thread of its own reads what the engine tells of tokens and writes it, so that neither waits for
the runner, nor the runner for Redis. While Redis is away tokens are gathered, up to a limit; beyond
it they are dropped, and nothing more is told of those runs, whose streams so are never whole.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Final
from uuid import UUID

from app.broker.events import EventId, Started, Tokens, Told, Whole, encode
from app.broker.streams import Written
from app.engines import base
from app.engines.base import TokenLogprob
from app.errors import Unavailable
from app.threads import Background
from app.worker.engine.pipe import WorkerEnd
from app.worker.engine.wire import Streamed
from app.worker.work import Job

log = logging.getLogger(__name__)

RETRY_S: Final = 0.5
MAX_RETRY_S: Final = 5.0
"""Pauses between tries while Redis is away, the first and the longest: a frozen one keeps each
connection that was tried."""
MAX_WRITTEN: Final = 2_000
"""Events that are written at once: a few hundred kilobytes."""
MAX_HELD: Final = 1_000_000
"""Tokens that are gathered while Redis is away, of all jobs together."""


@dataclass(slots=True)
class _New:
    """Of one sequence, not written yet."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Stream:
    """Of one attempt of a job."""

    job_id: UUID
    next: EventId
    started: Started
    open: set[int]  #: its sequences that have not ended
    is_begun: bool = False
    is_told: bool = False  #: that it has begun
    is_broken: bool = False  #: something was lost, and no more is told of this run
    is_over: bool = False  #: all is written
    new: dict[int, _New] = field(default_factory=dict)  #: by the sequence's place


@dataclass(frozen=True, slots=True)
class _Enter:
    """The sequences of a job are about to be handed to the engine, from the first again."""

    job_id: UUID
    first: EventId  #: of this attempt
    started: Started
    sequence_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Begin:
    job_id: UUID


@dataclass(frozen=True, slots=True)
class _Leave:
    job_id: UUID
    attempt: int


class TokenStreams:
    """Owner of the streams. The runner's thread says which jobs come and go; until `start`, and
    once its thread has failed for good, nothing is told and nothing else is different."""

    def __init__(self, write: Callable[[Sequence[Written]], None]) -> None:
        """`write` raises `Unavailable` alone, and then is called with the same again."""
        self._write_all = write
        self._commands: deque[_Enter | _Begin | _Leave | WorkerEnd] = deque()
        self._stopping = threading.Event()
        self._thread = Background("streams", self._run, self._stopping, give_up=_say_failed)
        self._wake_out = self._wake_in = -1
        self._streams: dict[UUID, _Stream] = {}
        self._owners: dict[int, tuple[_Stream, int]] = {}  #: by sequence id
        self._ends: list[WorkerEnd] = []  #: one for each engine process
        self._left: list[_Leave] = []  #: of which nothing more comes
        self._fresh: dict[UUID, _Stream] = {}  #: there is something to write of
        self._writing: list[Written] = []  #: a write that may have failed
        self._held = 0  #: tokens in `new` of all streams
        self._retry_at = 0.0
        self._retry_s = 0.0  #: the last pause, while Redis is away

    # ── the runner's thread ──────────────────────────────────────────────────────────────────

    def start(self) -> None:
        self._wake_out, self._wake_in = os.pipe()
        os.set_blocking(self._wake_in, False)
        os.set_blocking(self._wake_out, False)
        self._thread.start()

    def stop(self) -> None:
        """May be called again, and without `start`."""
        if self._wake_in >= 0 and not self._stopping.is_set():
            self._stopping.set()
            self._wake()
            self._thread.join()
            os.close(self._wake_in)
            os.close(self._wake_out)
            for end in self._ends:
                end.close()

    def hear(self, sock: socket.socket) -> None:
        """Over this an engine process will tell of tokens."""
        self._post(WorkerEnd(sock))

    def enter(self, jobs: Iterable[Job], sequences: Iterable[base.Sequence]) -> None:
        """These jobs are about to be handed to the engine, as these sequences."""
        rest = iter(sequences)
        for job in jobs:
            ids = tuple(each.id for each in islice(rest, job.num_sequences))
            if job.stream_events:
                run = job.claimed_run
                started = Started(run.batch.id, run.batch.num_jobs)
                self._post(_Enter(job.id, EventId(run.number, 0), started, ids))

    def begin(self, job: Job) -> None:
        """The engine has begun it."""
        if job.stream_events:
            self._post(_Begin(job.id))

    def leave(self, job: Job) -> None:
        """Its attempt has ended, or is not run here any more."""
        if job.stream_events:
            self._post(_Leave(job.id, job.claimed_run.number))

    def _post(self, command: _Enter | _Begin | _Leave | WorkerEnd) -> None:
        if self._thread.is_alive():
            self._commands.append(command)
            self._wake()

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full pipe wakes as well
            os.write(self._wake_in, b"!")

    # ── its own thread ───────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._sleep()
            self._turn()
        self._turn()  # what came last

    def _sleep(self) -> None:
        poll = select.poll()
        poll.register(self._wake_out, select.POLLIN)
        for end in self._ends:
            poll.register(end, select.POLLIN)
        wait_ms = None
        if self._writing or self._fresh:
            wait_ms = max(0.0, 1_000 * (self._retry_at - time.monotonic()))
        poll.poll(wait_ms)
        with suppress(BlockingIOError):
            os.read(self._wake_out, 65_536)

    def _turn(self) -> None:
        self._take_commands()
        left, self._left = self._left, []
        self._read()
        if time.monotonic() >= self._retry_at:
            self._write()
        for leave in left:  # and all that the engine told of them is read
            self._forget(leave)

    def _take_commands(self) -> None:
        while self._commands:
            match self._commands.popleft():
                case _Enter() as enter:
                    self._enter(enter)
                case _Begin(job_id):
                    self._begin(self._streams.get(job_id))
                case _Leave() as leave:
                    self._left.append(leave)
                case WorkerEnd() as end:
                    self._ends.append(end)

    def _enter(self, enter: _Enter) -> None:
        before = self._streams.get(enter.job_id)
        first = enter.first
        if before is not None:
            self._drop_new(before)
            self._disown(before)
            self._fresh.pop(enter.job_id, None)
            if before.next.attempt == first.attempt:
                first = before.next
        made = _Stream(enter.job_id, first, enter.started, set(enter.sequence_ids))
        self._streams[enter.job_id] = made
        self._owners |= {id: (made, place) for place, id in enumerate(enter.sequence_ids)}

    def _begin(self, stream: _Stream | None) -> None:
        if stream is not None and not stream.is_begun:
            stream.is_begun = True
            self._fresh[stream.job_id] = stream

    def _read(self) -> None:
        for end in list(self._ends):
            try:
                while end.poll():
                    self._take(end.recv())
            except (EOFError, OSError):
                end.close()
                self._ends.remove(end)

    def _take(self, streamed: Streamed) -> None:
        self._take_commands()  # whose tokens these are was posted before the engine had them
        for sequence_id in streamed.lost:
            if (owner := self._owners.get(sequence_id)) is not None:
                self._break(owner[0])
        for sequence_id, text, token_ids, logprobs in streamed.tokens:
            if (owner := self._owners.get(sequence_id)) is None or owner[0].is_broken:
                continue  # of a run that was given up
            stream, place = owner
            self._begin(stream)
            new = stream.new.setdefault(place, _New())
            new.texts.append(text)
            new.token_ids += token_ids
            new.logprobs += logprobs
            self._held += len(token_ids)
            self._fresh[stream.job_id] = stream
        for sequence_id in streamed.ended:
            if (owner := self._owners.pop(sequence_id, None)) is not None:
                stream = owner[0]
                stream.open.discard(sequence_id)
                self._begin(stream)
                self._fresh[stream.job_id] = stream
        if self._held > MAX_HELD:
            for stream in self._fresh.values():
                self._break(stream)

    def _break(self, stream: _Stream) -> None:
        """Tell no more of this run, which so is never whole."""
        self._drop_new(stream)
        stream.is_broken = True

    def _drop_new(self, stream: _Stream) -> None:
        self._held -= sum(len(new.token_ids) for new in stream.new.values())
        stream.new = {}

    def _write(self) -> None:
        """All that is new, in one round trip."""
        while self._writing or self._fresh:
            if not self._writing:
                self._writing = list(self._due())
            try:
                if self._writing:
                    self._write_all(self._writing)
            except Unavailable as error:
                if not self._retry_s:
                    log.warning("No streams: %s", error, extra={"action": "streams_away"})
                self._retry_s = min(2 * self._retry_s or RETRY_S, MAX_RETRY_S)
                self._retry_at = time.monotonic() + self._retry_s
                return
            self._writing, self._retry_s = [], 0.0

    def _due(self) -> Iterator[Written]:
        """Takes from `_fresh` what goes into one write."""
        number = 0
        while self._fresh and number < MAX_WRITTEN:
            _, stream = self._fresh.popitem()
            for told in self._news(stream):
                yield Written(stream.job_id, stream.next, encode(told))
                stream.next = stream.next.next
                number += 1

    def _news(self, stream: _Stream) -> Iterator[Told]:
        if stream.is_begun and not stream.is_told:
            stream.is_told = True
            yield stream.started
        new, stream.new = stream.new, {}
        for place, each in new.items():
            self._held -= len(each.token_ids)
            text = "".join(each.texts)
            if text or each.token_ids:
                yield Tokens(place, text, tuple(each.token_ids), tuple(each.logprobs))
        if not stream.open and not stream.is_over:
            stream.is_over = True
            if not stream.is_broken:
                yield Whole()

    def _forget(self, leave: _Leave) -> None:
        """What is not written yet still will be."""
        stream = self._streams.get(leave.job_id)
        if stream is not None and stream.next.attempt == leave.attempt:
            self._disown(stream)
            del self._streams[leave.job_id]

    def _disown(self, stream: _Stream) -> None:
        for sequence_id in stream.open:
            self._owners.pop(sequence_id, None)


def _say_failed(why: str) -> None:
    """Jobs run on."""
    log.error("No streams any more: %s", why, extra={"action": "streams_failed"})
