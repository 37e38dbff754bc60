"""Answers that their callers read while they come: server-sent events, as their door writes them.

Until the engine begins nothing is answered, so that what fails before is an answer of its own, with
its status; after some seconds it is, and then comments keep the connection. Whatever fails later is
an event with the error, and the last one. A caller that goes takes its job along.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Any, Final, Protocol, cast

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from app.api import problems
from app.api.envelopes import Problem
from app.api.live import calls
from app.api.live.calls import Placed
from app.api.live.events import Begun, Ended, Event, NewTokens, Queued, Silence, events
from app.api.live.sse import HEADERS, KEEP_ALIVE
from app.api.services import Services
from app.engines.text.tokenizer import Tokenizer
from app.errors import GristmillError, Unavailable
from app.requests import bodies
from app.requests.prepare import prompts_heard
from app.store.submissions import NewJob


class Teller(Protocol):
    """Owner of what one caller was told of a job: its events as its door writes them.

    Where an answer is begun anew, after its worker was lost, nothing is told twice: the new one has
    to begin with what was told. All but `failed` raise `Restarted` if it does not.
    """

    def begun(self) -> Iterator[bytes]:
        """The engine has begun, perhaps anew."""
        ...

    def tokens(self, new: NewTokens) -> Iterator[bytes]: ...

    def ended(self, response: dict[str, Any]) -> Iterator[bytes]:
        """The job has completed, with this response."""
        ...

    def failed(self, problem: Problem) -> bytes:
        """There is no more to tell than this."""
        ...


Tell = Callable[[bodies.Request, Tokenizer, Sequence[Sequence[int]]], Teller]
"""Makes the teller of a request, whose prompts come as `prompts_heard` gives them."""

_BYTES_OF_TOKEN: Final = 4


async def stream(
    request: Request, here: Services, job: NewJob, placed: Placed, tell: Tell
) -> StreamingResponse:
    """The answer to a caller that waits for a job. Raises what the job ended with before it was
    begun, and `ClientDisconnect`."""
    num_bytes = _BYTES_OF_TOKEN * (job.input_tokens or 0)
    making = here.work.run(num_bytes, _teller, here, job, tell)
    teller = await calls.while_there(request, here, placed, making)
    happening = cast("AsyncGenerator[Event, None]", events(here, placed.tenant, placed.id))
    first = await calls.while_there(request, here, placed, _begun(placed, happening))
    return _Stream(here, placed, request.url.path, teller, first, happening)


def _teller(here: Services, job: NewJob, tell: Tell) -> Teller:
    """May compute for a while."""
    model = here.submitter.models[job.model]
    asked = bodies.parse_stored(job.request, job.url, bodies.FORMAT)
    prompts = prompts_heard(asked, model.tokenizer, model.settings, model.card)
    return tell(asked, model.tokenizer, prompts)


async def _begun(placed: Placed, happening: AsyncGenerator[Event, None]) -> Event:
    """The first event that is to be told. Raises what the job ended with, and `TimedOut`."""
    is_silent = False
    async for event in happening:
        match event:
            case Ended(seen):
                calls.completed(seen)
                return event
            case Begun() | NewTokens():
                return event
            case Silence() if is_silent:
                placed.expect_time()
                return event
        placed.expect_time()
        is_silent = True  # the first event of a job that runs is one
    raise Unavailable(calls.STOPPING)


class _Stream(StreamingResponse):
    media_type = "text/event-stream"

    def __init__(
        self,
        here: Services,
        placed: Placed,
        path: str,
        teller: Teller,
        first: Event,
        happening: AsyncGenerator[Event, None],
    ) -> None:
        self._here, self._placed, self._path = here, placed, path
        self._teller, self._first, self._happening = teller, first, happening
        self._is_over = False  #: the job has ended
        super().__init__(self._told(), headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if not self._is_over:  # the caller has gone, or is told no more
                self._here.later(calls.cancel(self._here, self._placed))

    async def _told(self) -> AsyncIterator[bytes]:
        async with aclosing(self._happening):
            try:
                for chunk in self._of(self._first):
                    yield chunk
                async for event in self._happening:
                    for chunk in self._of(event):
                        yield chunk
                if not self._is_over:
                    raise Unavailable(calls.STOPPING)
            except GristmillError as error:
                yield self._teller.failed(problems.describe(error, instance=self._path))

    def _of(self, event: Event) -> Iterator[bytes]:
        match event:
            case Begun():
                yield from self._teller.begun()
            case NewTokens():
                yield from self._teller.tokens(event)
            case Ended(seen):
                self._is_over = True
                job = calls.completed(seen)
                yield from self._teller.ended(job.response or {})
            case Queued():
                self._placed.expect_time()
            case Silence():
                self._placed.expect_time()
                yield KEEP_ALIVE
