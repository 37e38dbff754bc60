"""A job's events as they happen: server-sent events, and how one goes on where they broke off.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx

from gristmill_client.errors import GristmillError
from gristmill_client.exchange import Exchange, Patience
from gristmill_client.job import Job

MAX_LINE: Final = 256_000_000
"""Bytes of a line at most: the last event has the whole job."""


@dataclass(frozen=True, slots=True)
class JobEvent:
    """What happened to a job: see the API's documentation of GET /v1/jobs/{job_id}/events."""

    event: str  #: queued, started, tokens, restarted or end
    data: dict[str, Any] = field(repr=False)
    id: str = ""  #: of the last event that had one: `after` of a later `stream`

    @property
    def text(self) -> str:
        """What is new of an answer, of `tokens`; else nothing."""
        return str(self.data.get("text", "")) if self.event == "tokens" else ""

    @property
    def index(self) -> int:
        """The choice that `text` is of."""
        return int(self.data.get("index", 0))

    @property
    def job(self) -> Job | None:
        """The job, of `end`."""
        return Job.of(self.data.get("job")) if self.event == "end" else None


class EventReader:
    """Puts events together from the pieces that they come in."""

    def __init__(self, last_id: str = "") -> None:
        self.last_id = last_id  #: of the last event that was whole
        self._id = last_id
        self._held: list[bytes] = []  #: of a line whose end has not come
        self._num_held = 0
        self._event, self._data = "", list[str]()

    def read(self, piece: bytes) -> Iterator[JobEvent]:
        """The events that end with this piece. Raises `GristmillError` if it is none of them."""
        self._held.append(piece)
        self._num_held += len(piece)
        if self._num_held > MAX_LINE:
            raise GristmillError("An event of the API is too long.")
        if b"\n" not in piece:
            return
        *lines, rest = b"".join(self._held).split(b"\n")
        self._held, self._num_held = [rest], len(rest)
        for line in lines:
            if line.rstrip(b"\r"):
                self._take(line.rstrip(b"\r").decode("utf-8", "replace"))
            elif self._data:
                yield self._whole()

    def _take(self, line: str) -> None:
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                self._event = value
            case "data":
                self._data.append(value)
            case "id":
                self._id = value

    def _whole(self) -> JobEvent:
        event, data = self._event, "\n".join(self._data)
        self._event, self._data, self.last_id = "", [], self._id
        try:
            value = json.loads(data)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise GristmillError("The API told an event that is none: is it Gristmill's?")
        return JobEvent(event, value, self.last_id)


@dataclass(frozen=True, slots=True)
class Open:
    """To be sent, and answered by the response before its body has come, or by an error."""

    request: httpx.Request


@dataclass(frozen=True, slots=True)
class Read:
    """To be answered by the next piece of what was opened last: nothing at its end."""


Listening = Generator[Open | Read | float | JobEvent, Any, None]
"""Yields what to open and read, pauses in seconds, and events, which are to be handed out."""


def listen(api: Exchange, path: str, after: str | None) -> Listening:
    """The events of a job until its end, over as many connections as that takes.

    Raises what the API says of the job, and `Unavailable` if it is away for longer than the
    client's patience, which any event renews.
    """
    patience, tries, last_id = Patience(api.patience_s), 0, after or ""
    while True:
        tries += 1
        outcome = yield Open(api.request("GET", path, headers=_headers(last_id)))
        if isinstance(outcome, httpx.Response) and outcome.is_success:
            reader = EventReader(last_id)
            while isinstance(outcome := (yield Read()), bytes) and outcome:
                patience.renew()
                tries = 0
                for event in reader.read(outcome):
                    yield event
                    if event.event == "end":
                        return
            last_id = reader.last_id
            if isinstance(outcome, bytes):
                outcome = httpx.RemoteProtocolError("the stream of events ended too early")
        yield api.pause_s(outcome, tries, patience)


def _headers(last_id: str) -> dict[str, str]:
    return {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
