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
from fastapi.sse import EventSourceResponse, format_sse_event

from app.api.caller import Who
from app.api.jobs.calls import JobId
from app.api.jobs.schemas_events import BatchOf, EventQueued, EventStarted, EventTokens
from app.api.live.events import Begun, Ended, Event, NewTokens, Queued, Silence, event_id, events
from app.api.live.sse import HEADERS, KEEP_ALIVE
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
        case Queued(position, eta):
            data = EventQueued(position=position, eta=eta).model_dump_json()
            return format_sse_event(event="queued", data_str=data)
        case Begun(id, batch_id, size):
            batch = BatchOf(id=batch_id, size=size)
            return format_sse_event(
                event="restarted" if event.is_restart else "started",
                data_str=EventStarted(attempt=id.attempt, batch=batch).model_dump_json(),
                id=str(id),
            )
        case NewTokens(id, index, text, tokens):
            logprobs = [each.logprob for each in tokens.logprobs] or None
            told = EventTokens(
                index=index, text=text, tokens=len(tokens.token_ids), logprobs=logprobs
            )
            data = told.model_dump_json(exclude_none=True)
            return format_sse_event(event="tokens", data_str=data, id=str(id))
        case Silence():
            return KEEP_ALIVE
        case Ended(job, is_whole):
            whole = "true" if is_whole else "false"
            data = f'{{"complete":{whole},"job":{job.body.decode()}}}'
            return format_sse_event(event="end", data_str=data)
