"""Where tokens leave the engine process, beside its answers, on a socket of their own.

So they meet neither the runner, which may be waiting for Postgres, nor its turns, and the engine
waits for nobody: what the other end does not take in time is dropped, and that end is told whose
tokens are missing. An answer never needs them.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Collection, Iterable
from typing import Final

from app.engines.base import NewTokens
from app.worker.engine.pipe import WorkerEnd
from app.worker.engine.wire import Streamed

MAX_UNSENT_BYTES: Final = 4_000_000
LAST_WORD_S: Final = 1.0
"""How long an engine that has nothing to do waits for the other end to take the rest."""


class Outlet:
    """The engine's end. Nothing in it raises: without the other end, tokens are just not told."""

    def __init__(self, sock: socket.socket) -> None:
        self._end: WorkerEnd | None = WorkerEnd(sock)
        self._lost: set[int] = set()  #: sequences whose tokens were dropped, not told yet

    def send(self, tokens: Iterable[NewTokens], ended: Collection[int]) -> None:
        """What is new of sequences that stream, and those of them of which nothing more comes."""
        if self._end is None:
            return
        fresh = [(each.sequence_id, each.text, each.token_ids, each.logprobs) for each in tokens]
        try:
            self._end.flush()
            if self._end.unsent_bytes > MAX_UNSENT_BYTES:
                self._lost.update((each[0] for each in fresh), ended)
            elif fresh or ended or self._lost:
                self._end.send(Streamed(fresh, tuple(ended), tuple(self._lost)))
                self._lost.clear()
        except OSError:
            self.close()

    def rest(self) -> None:
        """There is nothing to do for now: whoever reads slowly gets what is left."""
        if self._end is None or not self._end.wants_write:
            return
        try:
            select.select([], [self._end], [], LAST_WORD_S)
            self._end.flush()
        except OSError:
            self.close()

    def close(self) -> None:
        """Tell no more."""
        if self._end is not None:
            self._end.close()
            self._end = None
