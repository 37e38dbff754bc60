"""Work on many rows, a page in a transaction of its own.

A page that takes too long is halved, not repeated; and of a page that holds a row which cannot be
handled, the others are. Such a row is logged by its id, left out, and tried again after a while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from typing import Final
from uuid import UUID

from sqlalchemy import Connection

from app.errors import NotStorable
from app.store.translation import TookTooLong

log = logging.getLogger(__name__)

QUICK_S: Final = 1.0
"""After a page that took less, the next may be twice as large again."""

LEFT_OUT_S: Final = 600.0
"""For how long a row that cannot be handled is left out: what keeps it may pass."""

Find = Callable[[Connection, int, Collection[UUID]], list[UUID]]
"""Finds and locks up to so many rows, other than some."""

Move = Callable[[Connection, Sequence[UUID]], Sequence[object]]
"""Moves those of the rows that are still as they were found; one answer each."""


class Pages:
    """Of one process. Not for several threads at once."""

    def __init__(
        self,
        begin: Callable[[], AbstractContextManager[Connection]],
        size: int,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._begin = begin
        self._size = size
        self._now_s = now_s
        self._sizes: dict[str, int] = {}  #: by name of the work, where smaller
        self._left_out: dict[UUID, float] = {}  #: and until when

    def repeat(self, name: str, step: Callable[[Connection, int], int], most: int) -> int:
        """Do up to `most` pages, until one is not full. `step` gets its size, says how many rows
        it found; how many in all."""
        total = 0
        for _ in range(most):
            found, size = self._once(name, step)
            total += found
            if found < size:
                break
        return total

    def move(self, name: str, find: Find, move: Move, most: int) -> int:
        """Find rows and move them, up to `most` pages; how many were moved."""
        moved = 0

        def step(connection: Connection, size: int) -> int:
            nonlocal moved
            found[:] = find(connection, size, self._left_out)
            done = len(move(connection, found)) if found else 0
            moved += done
            return len(found)

        found: list[UUID] = []
        now_s = self._now_s()
        self._left_out = {id: until_s for id, until_s in self._left_out.items() if until_s > now_s}
        for _ in range(most):
            try:
                num_found, size = self._once(name, step)
            except NotStorable as error:
                moved += self._move_parts(name, move, found, error)
            else:
                if num_found < size:
                    break
        return moved

    def _move_parts(self, name: str, move: Move, ids: Sequence[UUID], error: NotStorable) -> int:
        """Move rows of which one or more cannot be moved, down to these."""
        if len(ids) == 1:
            self._left_out[ids[0]] = self._now_s() + LEFT_OUT_S
            extra = {"action": "row_left_out", "work": name, "job_id": ids[0]}
            log.error("A row cannot be handled and is left out for now: %s", error, extra=extra)
            return 0
        moved = 0
        for part in (ids[: len(ids) // 2], ids[len(ids) // 2 :]):
            try:
                with self._begin() as connection:
                    moved += len(move(connection, part))
            except NotStorable as refused:
                moved += self._move_parts(name, move, part, refused)
        return moved

    def _once(self, name: str, step: Callable[[Connection, int], int]) -> tuple[int, int]:
        """One page of a size that Postgres can do: rows found, and the size."""
        while True:
            size = self._sizes.get(name, self._size)
            began_s = time.monotonic()
            try:
                with self._begin() as connection:
                    found = step(connection, size)
            except TookTooLong:
                if size == 1:
                    raise
                self._sizes[name] = size // 2
            else:
                if time.monotonic() - began_s < QUICK_S:
                    self._sizes[name] = min(self._size, 2 * size)
                return found, size
