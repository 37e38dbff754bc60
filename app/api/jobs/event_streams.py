"""GET /v1/jobs/ID/events: a job's events as they happen, as server-sent events.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from http import HTTPStatus
from typing import Annotated, Any, Final, cast

from fastapi import APIRouter, Header, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse

from app.api.caller import Who
from app.api.jobs.calls import JobId
from app.api.live.events import Begun, Ended, Event, NewTokens, Queued, Silence, event_id, events
from app.api.live.sse import HEADERS, KEEP_ALIVE, written
from app.api.problems import documented
from app.api.services import Here
from app.jobs import job_id_of

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

RETRY_MS: Final = 1_000
"""How long a client waits before it comes back."""

_EVENTS: Final[dict[int | str, dict[str, Any]]] = {
    200: {
        "description": "The events, until the job has ended.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    }
}


@router.get(
    "/{job_id}/events",
    response_class=StreamingResponse,  # the other class would want the events themselves
    response_model=None,
    responses=_EVENTS
    | documented(HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.SERVICE_UNAVAILABLE),
    summary="Follow a job's events",
    response_description="The events, until the job has ended.",
)
async def follow(
    here: Here,
    who: Who,
    job_id: JobId,
    last_event_id: Annotated[
        str | None,
        Header(
            description="The id of the last event that was had: what follows it is told. Without "
            "one, all is.",
            examples=["1-17"],
        ),
    ] = None,
) -> Response:
    """Where it waits (`queued`), when the engine begins (`started`, or `restarted`: tokens of
    before are void), its `tokens`, and the job itself at its `end`. Tokens are told of jobs that
    were submitted with `stream_events`."""
    happening = cast(
        "AsyncGenerator[Event, None]",
        events(here, who.tenant, job_id_of(job_id), event_id(last_event_id)),
    )
    first = await anext(happening)  # what is wrong is an answer of its own
    return EventSourceResponse(_told(first, happening), headers=HEADERS)


async def _told(first: Event, happening: AsyncGenerator[Event, None]) -> AsyncIterator[bytes]:
    async with aclosing(happening):
        yield b"retry: %d\n\n" % RETRY_MS
        yield as_sse(first)
        async for event in happening:
            yield as_sse(event)


def as_sse(event: Event) -> bytes:
    """One event on the wire."""
    match event:
        case NewTokens(id, index, text, tokens):
            told: dict[str, Any] = {"index": index, "text": text, "tokens": len(tokens.token_ids)}
            if tokens.logprobs:
                told["logprobs"] = [each.logprob for each in tokens.logprobs]
            return written(told, "tokens", id)
        case Queued(position, eta):
            return written({"position": position, "eta": eta}, "queued")
        case Begun(id, batch_id, size):
            batch = {"id": batch_id, "size": size}
            name = "restarted" if event.is_restart else "started"
            return written({"attempt": id.attempt, "batch": batch}, name, id)
        case Silence():
            return KEEP_ALIVE
        case Ended(job, is_whole):
            whole = b"true" if is_whole else b"false"
            return written(b'{"complete":%b,"job":%b}' % (whole, job.body), "end")
