"""A response as server-sent events, from its first event or from one on.

All of them are told anew for each listener, from the job's stream of tokens as far as that is
there and from its row at its end, and those that the listener has are left out. They are the same
each time (`app.requests.response_events`), so nothing is missing or told twice, whichever process
tells them.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing
from typing import Any, cast

from fastapi.sse import EventSourceResponse
from starlette.types import Receive, Scope, Send

from app.api.live import events
from app.api.live.events import Begun, Ended, NewTokens, Silence
from app.api.live.sse import HEADERS, KEEP_ALIVE, written
from app.api.openai.response_rows import Row, response_of, shell_of, whole
from app.api.services import Services
from app.errors import RequestError, Restarted
from app.requests.answers import Said
from app.requests.bodies import Request, Url
from app.requests.prepare import prompts_heard
from app.requests.response_answer import hex_of, output_of
from app.requests.response_events import LAST, Event, Narration
from app.requests.saying import Saying

Close = Callable[[bool], Coroutine[Any, Any, None]]
"""What is to be done at the end; with whether the response has ended."""


async def stream(
    here: Services, tenant: str, row: Row, after: int | None, close: Close | None = None
) -> EventSourceResponse:
    """The answer that streams a response, without the events up to `after`."""
    telling = Telling(row, await here.work.run(0, _listener, here, row))
    happening = cast("AsyncGenerator[events.Event, None]", events.events(here, tenant, row.job.id))
    first = await anext(happening)  # what is wrong is an answer of its own
    return _Stream(here, telling, first, happening, after, close)


class _Stream(EventSourceResponse):
    def __init__(
        self,
        here: Services,
        telling: Telling,
        first: events.Event,
        happening: AsyncGenerator[events.Event, None],
        after: int | None,
        close: Close | None,
    ) -> None:
        self._here, self._telling, self._close = here, telling, close
        self._has_ended = False
        super().__init__(_on_the_wire(self._told(first, happening), after), headers=HEADERS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            if self._close is not None:  # the listener may have gone before the first word
                self._here.later(self._close(self._has_ended))

    async def _told(
        self, first: events.Event, happening: AsyncGenerator[events.Event, None]
    ) -> AsyncGenerator[Event | None, None]:
        """The response's events; None while nothing happens."""
        async with aclosing(happening):
            for told in self._telling.queued():
                yield told
            for each in self._telling.of(first):
                yield each
            async for event in happening:
                self._has_ended = isinstance(event, Ended)
                for each in self._telling.of(event):
                    yield each


async def _on_the_wire(
    told: AsyncGenerator[Event | None, None], after: int | None
) -> AsyncIterator[bytes]:
    async with aclosing(told):
        async for event in told:
            if event is None:
                yield KEEP_ALIVE
            elif after is None or event["sequence_number"] > after:
                yield written(event, event["type"])
            elif event["type"] in LAST:  # it has had more events than there are now
                yield written(event | {"sequence_number": after + 1}, event["type"])


def _listener(here: Services, row: Row) -> Saying | None:
    """None if the model is not configured any more, or would not take this now."""
    model = here.submitter.models.get(row.job.model)
    if model is None:
        return None
    request = Request(Url.RESPONSES, row.body, row.asked.request)
    try:
        [prompt] = prompts_heard(request, model.tokenizer, model.settings, model.card)
    except RequestError:
        return None
    return Saying(row.body.meant, model.tokenizer, prompt)


class Telling:
    """From the events of a job to those of its response."""

    def __init__(self, row: Row, saying: Saying | None) -> None:
        self._row = row
        self._saying = saying
        self._narration = Narration(shell_of(row.job, row.body))
        self._digits = hex_of(shell_of(row.job, row.body))
        self._content = self._reasoning = ""

    def queued(self) -> Iterator[Event]:
        return self._narration.queued()

    def of(self, event: events.Event) -> Iterator[Event | None]:
        match event:
            case Begun():
                yield from self._narration.started()
                if event.is_restart:
                    self._again()
            case NewTokens():
                yield from self._spoken(event)
            case Ended():
                job = whole(event.job.job)
                yield from self._narration.end(response_of(job, self._row.body))
            case Silence():
                yield None

    def _again(self) -> None:
        if self._saying is not None:
            try:
                self._saying.again()
            except Restarted:
                self._narration.has_parted = True

    def _spoken(self, event: NewTokens) -> Iterator[Event]:
        if self._saying is None or self._narration.has_parted:
            return
        try:
            new = self._saying.take(event.text, event.tokens.token_ids)
        except Restarted:
            self._narration.has_parted = True
            return
        self._content += new.content
        self._reasoning += new.reasoning
        if self._content or self._reasoning:
            found = Said(self._content, self._reasoning or None)
            yield from self._narration.so_far(output_of(found, [], self._digits))
