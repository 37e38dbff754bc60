"""A message that is told as it comes, as Anthropic's clients read it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from uuid import UUID

from app.api import envelopes
from app.api.envelopes import Problem
from app.api.live.events import NewTokens
from app.api.live.sse import written
from app.engines.text.tokenizer import Tokenizer
from app.requests.bodies import Request
from app.requests.chat import ChatBody
from app.requests.message_events import Event, MessageEvents
from app.requests.saying import Saying
from app.store.submissions import NewJob


def teller_of(
    job: NewJob,
    job_id: UUID,
    request: Request,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
) -> MessageTeller:
    """Of a job that was just submitted."""
    assert isinstance(request.body, ChatBody)
    [prompt] = prompts
    saying = Saying(request.body, tokenizer, prompt)
    input_tokens = job.input_tokens or 0
    return MessageTeller(
        MessageEvents(saying, job_id=str(job_id), model=job.model, input_tokens=input_tokens)
    )


class MessageTeller:
    """See `app.api.live.streams.Teller`."""

    def __init__(self, events: MessageEvents) -> None:
        self._events = events
        self._has_begun = False

    def begun(self) -> Iterator[bytes]:
        if self._has_begun:
            self._events.again()
        else:
            self._has_begun = True
            yield from _written(self._events.begin())

    def tokens(self, new: NewTokens) -> Iterator[bytes]:
        yield from self._first()
        yield from _written(self._events.take(new.text, new.tokens.token_ids))

    def ended(self, response: dict[str, Any]) -> Iterator[bytes]:
        yield from self._first()
        yield from _written(self._events.end(response))

    def failed(self, problem: Problem) -> bytes:
        return b"".join(_written([envelopes.anthropic(problem)]))

    def _first(self) -> Iterator[bytes]:
        if not self._has_begun:
            yield from self.begun()


def _written(events: Iterable[Event]) -> Iterator[bytes]:
    for event in events:
        yield written(event, event["type"])
