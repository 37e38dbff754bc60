"""A message of Anthropic's API as a stream: its events, in their order. Pure.

    message_start ─▶ (content_block_start ─▶ content_block_delta … ─▶ content_block_stop) …
                  ─▶ message_delta ─▶ message_stop

A thought comes first, then what is said, then the calls, each in a block of its own and only what
is certain of it; see `app.requests.saying`. https://docs.claude.com/en/docs/build-with-claude/streaming
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from pydantic_core import to_json

from app.jobs import Usage
from app.requests.message_answer import message_of
from app.requests.saying import Delta, Saying

Event = dict[str, Any]
"""Its `type` is also the name of the event."""


class MessageEvents:
    """The events of one message. Owns which block is open."""

    def __init__(self, saying: Saying, *, job_id: str, model: str, input_tokens: int) -> None:
        self._saying = saying
        self._start = message_of(job_id, model, [], None, None, Usage(input_tokens, 0))
        self._index = -1  #: of the last block that was opened
        self._open: Literal["thinking", "text"] | None = None

    def begin(self) -> Iterator[Event]:
        yield {"type": "message_start", "message": self._start}
        yield {"type": "ping"}

    def again(self) -> None:
        """It runs anew, after its worker was lost."""
        self._saying.again()

    def take(self, text: str, token_ids: Sequence[int]) -> Iterator[Event]:
        """Of new tokens. Raises `Restarted` if something else was told before."""
        yield from self._say(self._saying.take(text, token_ids))

    def end(self, message: dict[str, Any]) -> Iterator[Event]:
        """What is left of the whole message. Raises `Restarted` if something else was told."""
        blocks = message["content"]
        told = {each["type"]: each for each in blocks if each["type"] in ("thinking", "text")}
        content = told.get("text", {}).get("text")
        yield from self._say(self._saying.rest(content, told.get("thinking", {}).get("thinking")))
        yield from self._close()
        for block in blocks:
            if block["type"] == "tool_use":
                yield self._opened(block | {"input": {}})
                written = to_json(block["input"]).decode()
                yield self._delta({"type": "input_json_delta", "partial_json": written})
                yield self._closed()
        reason = {name: message[name] for name in ("stop_reason", "stop_sequence")}
        usage = {k: v for k, v in message["usage"].items() if k != "service_tier"}
        yield {"type": "message_delta", "delta": reason, "usage": usage}
        yield {"type": "message_stop"}

    def _say(self, new: Delta) -> Iterator[Event]:
        if new.reasoning:
            yield from self._in("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": new.reasoning})
        if new.content:
            yield from self._in("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": new.content})

    def _in(self, kind: Literal["thinking", "text"], empty: dict[str, Any]) -> Iterator[Event]:
        """A block of this kind is open."""
        if self._open != kind:
            yield from self._close()
            yield self._opened({"type": kind} | empty)
            self._open = kind

    def _close(self) -> Iterator[Event]:
        if self._open is not None:
            self._open = None
            yield self._closed()

    def _opened(self, block: dict[str, Any]) -> Event:
        self._index += 1
        return {"type": "content_block_start", "index": self._index, "content_block": block}

    def _delta(self, delta: dict[str, Any]) -> Event:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}

    def _closed(self) -> Event:
        return {"type": "content_block_stop", "index": self._index}
