"""Messages that are done with, on their way from whoever ends a job to the hub."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Final


class Acks:
    """What is to be settled, of one connection. Any thread adds; the hub settles all at once."""

    def __init__(self, consumer: Any) -> None:
        self._consumer: Final = consumer
        self._waiting: Final[deque[tuple[Callable[..., object], tuple[object, ...]]]] = deque()
        self._is_asked = False  #: the hub will come

    def add(self, settle: Callable[..., object], *args: object) -> None:
        """Have the hub call this soon."""
        self._waiting.append((settle, args))
        if not self._is_asked:
            self._ask()

    def _ask(self) -> None:
        self._is_asked = True
        self._consumer.call_soon_ack(self._settle)

    def _settle(self) -> None:
        self._is_asked = False  # before a look: what is added from here on asks again
        try:
            while self._waiting:
                settle, args = self._waiting.popleft()
                settle(*args)
                self._restore_prefetch()
        finally:
            if self._waiting:
                self._ask()

    def _restore_prefetch(self) -> None:
        """Celery takes less after a reconnect, and with each message that is done more again."""
        if not self._consumer._maximum_prefetch_restored:
            self._consumer._restore_prefetch_count_after_connection_restart(None)
