"""Answers as OpenAI's clients read them while they come: chunks, up to `[DONE]`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from app.api import envelopes
from app.api.envelopes import Problem
from app.api.live.events import NewTokens
from app.api.live.sse import written
from app.api.openai.chunks import Chunks

DONE: Final = b"data: [DONE]\n\n"


class ChunkTeller:
    """See `app.api.live.streams.Teller`."""

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks

    def begun(self) -> Iterator[bytes]:
        return map(written, self._chunks.begun())

    def tokens(self, new: NewTokens) -> Iterator[bytes]:
        return map(written, self._chunks.tokens(new))

    def ended(self, response: dict[str, Any]) -> Iterator[bytes]:
        yield from map(written, self._chunks.ended(response))
        yield DONE

    def failed(self, problem: Problem) -> bytes:
        return written(envelopes.openai(problem))
