"""Server-sent events for the tests, read as the standard says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True, slots=True)
class Sse:
    event: str
    data: Any
    id: str  #: of the last event that had one


def read_events(lines: Iterator[str]) -> Iterator[Sse]:
    event, data, last = "message", [], ""
    for line in lines:
        if not line:
            if data:
                yield Sse(event, json.loads("\n".join(data)), last)
            event, data = "message", []
        field, _, value = line.partition(": ")
        match field:
            case "event":
                event = value
            case "data":
                data.append(value)
            case "id":
                last = value


@contextmanager
def following(
    api: httpx.Client, job_id: str, after: str | None = None, **options: Any
) -> Iterator[Iterator[Sse]]:
    """The events of a job; the connection is cut with the block."""
    headers = {} if after is None else {"Last-Event-ID": after}
    url = f"/v1/jobs/{job_id}/events"
    with api.stream("GET", url, headers=headers, **options) as response:
        if response.status_code != 200:
            response.read()
        assert response.status_code == 200, response.text
        yield read_events(response.iter_lines())


def text_of(events: list[Sse], index: int = 0) -> str:
    """The text of an answer, as a client puts it together."""
    text = ""
    for each in events:
        if each.event in ("started", "restarted"):
            text = ""
        elif each.event == "tokens" and each.data["index"] == index:
            text += each.data["text"]
    return text
