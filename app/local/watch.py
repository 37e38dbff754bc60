"""One part and what is done about it: the rules of `upkeep` on a real process.

A look takes no time: whatever may wait, for a server, a disk or an answer, is done by a thread that
is not waited for. Processes are started from the looking thread all the same, since they end with
the thread that started them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, Protocol, TypeVar

from app.errors import GristmillError
from app.local.upkeep import Answer, Phase, Upkeep
from app.threads import place_of

T = TypeVar("T")

ASK_S: Final = 5.0
"""Pause between questions to a part that is ready."""
ASK_SOON_S: Final = 0.5
"""The same while it is not."""
ASKED_S: Final = 60.0
"""A question that has no answer by then is given up: who asks may hang, too."""


class Part(Protocol):
    """A process that is started again and again."""

    @property
    def name(self) -> str: ...

    @property
    def exit_code(self) -> int | None: ...

    def prepare(self) -> None:
        """What comes before the start and may take long; in any thread."""

    def launch(self) -> None: ...

    def kill(self) -> None: ...


class Watched:
    """Looked at again and again, by one thread."""

    def __init__(
        self,
        part: Part,
        ask: Callable[[], Answer | None],
        tell: Callable[[str], None],
        *,
        start_s: float,
        hang_s: float,
    ) -> None:
        """`ask` is called in another thread; it tells nothing, None, if it could not ask."""
        self.part = part
        self.ask = ask
        self._tell = tell
        self._state = Upkeep(start_s, hang_s)
        self._preparing: Future[None] | None = None
        self._asking: Future[Answer | None] | None = None
        self._asked_s = 0.0

    def has_started(self, now_s: float) -> None:
        """Somebody else has started it and found it ready."""
        self._state = self._state.started(now_s).answered(Answer.READY, now_s)

    def look(self, now_s: float) -> None:
        """Do what is to be done now. Raises nothing, whatever the part does."""
        if self._state.phase is Phase.DOWN:
            if self._state.should_start(now_s):
                self._bring_up(now_s)
        elif self.part.exit_code is not None:
            self._down(f"ended with exit code {self.part.exit_code} and starts again", now_s)
        elif self._state.is_running:
            self._question(now_s)

    def _bring_up(self, now_s: float) -> None:
        if self._preparing is None:
            self._preparing = in_background(f"prepare {self.part.name}", self.part.prepare)
        if not self._preparing.done():
            return
        prepared, self._preparing = self._preparing, None
        try:
            prepared.result()
            self.part.launch()
        except Exception as error:
            self._down(f"cannot start ({_said(error)}) and is tried again", now_s)
        else:
            self._state = self._state.started(now_s)
            self._asked_s = now_s

    def _question(self, now_s: float) -> None:
        if self._asking is None:
            is_ready = self._state.phase is Phase.READY
            if now_s >= self._asked_s + (ASK_S if is_ready else ASK_SOON_S):
                self._asking = in_background(f"ask {self.part.name}", self.ask)
                self._asked_s = now_s
        elif self._asking.done():
            asking, self._asking = self._asking, None
            self._heard(None if asking.exception() else asking.result(), now_s)
        elif now_s > self._asked_s + ASKED_S:
            self._asking = None
            self._heard(None, now_s)

    def _heard(self, answer: Answer | None, now_s: float) -> None:
        before, self._state = self._state, self._state.answered(answer, now_s)
        if self._state.phase is not before.phase:
            self._tell(f"{self.part.name} is ready again.")
        if self._state.is_hung:
            self._tell(
                f"{self.part.name} has not answered for {self._state.silent_s:.0f} s: it is killed "
                "and started again."
            )
            self._state = self._state.killed()
            self.part.kill()

    def _down(self, what: str, now_s: float) -> None:
        self._asking = None
        self._state = self._state.ended(now_s)
        self._tell(f"{self.part.name} {what} in {self._state.backoff_s:g} s.")


def in_background(name: str, do: Callable[[], T]) -> Future[T]:
    """Do it in a thread that nobody waits for, at the process's end neither."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(do())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _said(error: Exception) -> str:
    """In one line."""
    if isinstance(error, GristmillError):
        return "; ".join(line.strip() for line in error.message.splitlines() if line.strip())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return place_of(error)
