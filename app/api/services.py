"""What the handlers work with: built once by `create_app`, owned by the app."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Final, ParamSpec, TypeVar
from uuid import UUID

from anyio import CapacityLimiter, fail_after, to_thread
from fastapi import Depends, Request

from app.api.metrics import Metrics
from app.api.reader import Reader, Snapshot, snapshots
from app.api.waiting import Waiters
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import Unavailable
from app.intake.submit import Submitter
from app.store.database import Database

MAX_BULKS: Final = 4
"""Bulk submissions read at once: each may take many megabytes, and the next ones wait."""

SPARE_S: Final = 2.0
"""What a request may take beyond the timeouts of the statements in it."""

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    database: Database
    publisher: Publisher
    submitter: Submitter
    waiters: Waiters
    metrics: Metrics
    bulk_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_BULKS))
    read_slots: CapacityLimiter = field(init=False)  #: threads that reads may take
    reader: Reader = field(init=False)

    def __post_init__(self) -> None:
        # Half of the connections, so that no storm of polls keeps a submission waiting.
        slots = CapacityLimiter(self.settings.database.pool_size // 2)
        object.__setattr__(self, "read_slots", slots)
        reader = Reader(lambda ids: self.read(snapshots, self.database, ids))
        object.__setattr__(self, "reader", reader)

    async def job(self, job_id: UUID) -> Snapshot:
        """A job as it is now. Raises `JobNotFound` and `Unavailable`."""
        with self._in_time():
            return await self.reader.read(job_id)

    async def run(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks in a thread. Raises `Unavailable` if Postgres keeps it for too long."""
        return await self._in_thread(partial(call, *args, **kwargs), None)

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The same for what only reads: no more at once than `read_slots`."""
        return await self._in_thread(partial(call, *args, **kwargs), self.read_slots)

    async def _in_thread(self, call: Callable[[], T], slots: CapacityLimiter | None) -> T:
        with self._in_time():
            return await to_thread.run_sync(call, abandon_on_cancel=True, limiter=slots)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        # Timeouts of Postgres hold only while it runs. One that is frozen keeps the thread and its
        # connection until the system gives up on it; who waits is told in time to try again.
        database, broker = self.settings.database, self.settings.broker
        limit_s = database.connect_timeout_s + database.statement_timeout_ms / 1000
        try:
            with fail_after(limit_s + broker.publish_timeout_s + SPARE_S):
                yield
        except TimeoutError:
            raise Unavailable("Postgres does not answer.") from None

    def close(self) -> None:
        self.publisher.close()
        self.database.close()


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_services)]
