"""The streams of jobs in Redis: one key for each job that asked for it, written by the worker that
runs it, read by whoever serves its events.

Nothing depends on them: whoever cannot write or read goes on without, and the row has the answer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

import redis
from celery import Celery

from app.broker.events import Entry, EventId, decode
from app.broker.refusal import as_unavailable
from app.errors import Unavailable

log = logging.getLogger(__name__)

MAX_ENTRIES: Final = 10_000
"""Of a stream: of a longer one the oldest are dropped."""
KEPT_S: Final = 600
"""After its last event. Whoever comes back later reads the result."""
PAGE: Final = 128
"""Entries of one stream that are read at once."""
BLOCK_S: Final = 0.5
"""Longest read that nothing ends, and longest time until a stream is followed that Redis could not
be told of."""
_FIRST: Final = "0-0"
_LAST: Final = f"{10**9}-0"  #: what comes after it is refused
AWAY_S: Final = 0.5
MAX_AWAY_S: Final = 5.0
"""Pauses between tries while Redis is away, the first and the longest."""

_WRITE: Final = """
local refused = false
for place, key in ipairs(KEYS) do
  local written = redis.pcall('XADD', key, 'MAXLEN', '~', ARGV[1], ARGV[2 * place + 1], 'e',
    ARGV[2 * place + 2])
  if type(written) == 'table' and written.err and not string.find(written.err, 'equal or smaller')
  then refused = written end
  redis.call('PEXPIRE', key, ARGV[2])
end
return refused or #KEYS
"""
"""One event for each key, each under its own id. An id that is not greater than those there was
written before, or is of an attempt that has lost its job."""


def key_of(job_id: UUID, prefix: str = "") -> str:
    return f"{prefix}gristmill.events.{job_id}"


@dataclass(frozen=True, slots=True)
class Written:
    """An event on its way into a stream, as `events.encode` wrote it."""

    job_id: UUID
    id: EventId
    text: str


class Streams:
    """Writes and reads them. Any thread may call it. Raises `Unavailable` alone."""

    def __init__(self, app: Celery, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    def write(self, events: Sequence[Written]) -> None:
        """All at once. If it fails some may be there: write the same again."""
        keys = [key_of(each.job_id, self._prefix) for each in events]
        arguments: list[Any] = [MAX_ENTRIES, KEPT_S * 1_000]
        for each in events:
            arguments += (str(each.id), each.text)
        with as_unavailable(), self._client() as client:
            client.register_script(_WRITE)(keys=keys, args=arguments)

    def read(self, job_id: UUID, after: EventId | None) -> list[Entry]:
        """A page of a job's events after one, oldest first."""
        since = "-" if after is None else f"({after}"
        with as_unavailable(), self._client() as client:
            found = client.xrange(key_of(job_id, self._prefix), since, "+", PAGE)
        return _entries(found)

    def forget(self, job_ids: Collection[UUID]) -> None:
        """Remove what was told of these jobs, and let no more be told."""
        with as_unavailable(), self._client() as client:
            pipe = client.pipeline(transaction=False)
            for job_id in job_ids:
                key = key_of(job_id, self._prefix)
                pipe.xadd(key, {"e": "null"}, id=_LAST, maxlen=1, approximate=False)
                pipe.pexpire(key, KEPT_S * 1_000)
            pipe.execute()

    def follow(self) -> Following:
        return Following(self._app, self._prefix)

    def _client(self) -> Any:
        return _pooled(self._app)


class _pooled:
    """A client over one of the app's connections, which is left if it fails: a server that was
    demoted keeps its clients, and refuses them."""

    def __init__(self, app: Celery) -> None:
        self._resource = app.pool.acquire(block=True)

    def __enter__(self) -> redis.Redis:
        client: redis.Redis = self._resource.default_channel.plain
        return client

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is not None:
            self._resource.collect()
        self._resource.release()


class Following:
    """One connection of a process, which waits for all the streams that anybody there follows.

    `follow` and `leave` may be called from any thread, `wake` from one beside that of `heard`.
    """

    def __init__(self, app: Celery, prefix: str) -> None:
        self._app = app
        self._prefix = prefix
        self._lock = threading.Lock()
        self._after: dict[UUID, str] = {}  #: by job, the id of the last entry that was read
        self._begun = threading.Event()  #: somebody follows something
        self._wake_key = f"{prefix}gristmill.events.wake.{uuid4()}"
        self._woken = _FIRST

    def follow(self, job_id: UUID, after: EventId | None) -> None:
        """From the next read on; `wake` ends the one that waits."""
        with self._lock:
            self._after[job_id] = str(after or _FIRST)
            self._begun.set()

    def leave(self, job_id: UUID) -> None:
        with self._lock:
            self._after.pop(job_id, None)
            if not self._after:
                self._begun.clear()

    def wake(self) -> None:
        """End the read that waits. Raises `Unavailable`; then it ends by itself, somewhat later."""
        with as_unavailable(), _pooled(self._app) as client:
            pipe = client.pipeline(transaction=False)
            pipe.xadd(self._wake_key, {"e": ""}, maxlen=1)
            pipe.pexpire(self._wake_key, KEPT_S * 1_000)
            pipe.execute()

    def heard(self, stop: threading.Event) -> Iterator[Mapping[UUID, list[Entry]]]:
        """What comes new of the streams that are followed, by job, till `stop` is set. Reconnects
        by itself, and goes on where it was."""
        away_s = 0.0
        while not stop.is_set():
            if not self._begun.wait(BLOCK_S):
                continue
            try:
                with as_unavailable(), self._app.connection_for_read() as connection:
                    client = connection.default_channel.plain
                    while self._begun.is_set() and not stop.is_set():
                        if heard := self._read(client):
                            yield heard
                        away_s = 0.0
            except Unavailable as error:
                if not away_s:
                    log.warning("No events: %s", error, extra={"action": "events_away"})
                away_s = min(2 * away_s or AWAY_S, MAX_AWAY_S)
                stop.wait(away_s)

    def _read(self, client: redis.Redis) -> dict[UUID, list[Entry]]:
        with self._lock:
            asked = dict(self._after)
        keys = {key_of(job_id, self._prefix).encode(): job_id for job_id in asked}
        timeout_s = client.connection_pool.connection_kwargs.get("socket_timeout") or 2 * BLOCK_S
        block_ms = max(1, int(1_000 * min(BLOCK_S, timeout_s / 2)))
        cursors = dict(zip(keys, asked.values(), strict=True))
        cursors[self._wake_key.encode()] = self._woken
        answer: Any = client.xread(cursors, count=PAGE, block=block_ms)  # type: ignore[arg-type]
        heard: dict[UUID, list[Entry]] = {}
        with self._lock:
            for key, found in answer:
                last = found[-1][0].decode()
                if (job_id := keys.get(key)) is None:
                    self._woken = last
                elif job_id in self._after:
                    self._after[job_id] = last
                    heard[job_id] = _entries(found)
        return heard


def _entries(found: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> list[Entry]:
    """Those of ours."""
    entries = []
    for id, fields in found:
        read, told = EventId.read(id.decode()), decode(fields.get(b"e", b""))
        if read is not None and told is not None:
            entries.append(Entry(read, told))
    return entries
