"""Turns: of many that could go on at once, a few do in each turn of the event loop.

A hundred that are woken together, by one answer or at one time, would otherwise keep everybody else
waiting until the last of them is done.
"""

from __future__ import annotations

import asyncio
from collections import deque


class Turns:
    """First come, first served. Belongs to the event loop's thread."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._in_line: deque[asyncio.Future[None]] = deque()

    async def come(self) -> None:
        """Returns when it is the caller's turn."""
        loop = asyncio.get_running_loop()
        passed = loop.create_future()
        self._in_line.append(passed)
        if len(self._in_line) == 1:
            loop.call_soon(self._let_pass, loop)
        await passed

    def _let_pass(self, loop: asyncio.AbstractEventLoop) -> None:
        for _ in range(min(self._at_once, len(self._in_line))):
            passed = self._in_line.popleft()
            if not passed.done():  # whoever went away has cancelled it
                passed.set_result(None)
        if self._in_line:
            loop.call_soon(self._let_pass, loop)
