"""What the handlers work with: built once by `create_app`, owned by the app."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, Concatenate, Final, ParamSpec, TypeVar
from uuid import UUID

from fastapi import Depends, Request

from app.api import keyring
from app.api.keyring import Keyring
from app.api.live.followers import Listeners
from app.api.live.waiting import Waiters
from app.api.metrics import Metrics
from app.api.probe import Probe
from app.api.reader import Outcome, Reader, Snapshot, snapshots
from app.api.threads import Call, Threads
from app.api.wire.room import Room
from app.api.wire.uploads import Uploads
from app.api.work import LARGE_AT_ONCE, Work
from app.api.writer import Writer
from app.broker.publisher import Publisher
from app.broker.rates import Rates
from app.config.host import is_loopback
from app.config.settings import Settings
from app.errors import Busy, Unavailable
from app.intake.decision import Decision
from app.intake.submit import Stored, Submitter
from app.objects import Objects
from app.store import cancellation
from app.store.database import Database
from app.store.isolation import Connection
from app.store.keys import Known
from app.store.submissions import NewJob
from app.store.tables import DEFAULT_TENANT
from app.store.tenancy import acting_for

log = logging.getLogger(__name__)

MAX_BULKS: Final = 4
"""Bulk submissions worked on at once: each may take many megabytes, and the next ones wait."""

BULK_WAIT_S: Final = 10.0
"""How long a bulk that has arrived waits for its turn."""

SCRAPE_S: Final = 8.0
"""Longest look at what Prometheus asks for; its own patience is 10 s by default."""

SEND_S: Final = 1.0
"""How long an answer waits for what it does not depend on, so that its message is there first."""

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
    listeners: Listeners
    metrics: Metrics
    objects: Objects  #: files of callers
    rates: Rates = field(init=False)
    uploads: Uploads = field(init=False)
    room: Room = field(init=False)  #: for bodies, arriving and worked on
    work: Work = field(init=False)  #: on what has arrived
    bulk_turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_BULKS))
    readers: Threads = field(init=False)
    writers: Threads = field(init=False)
    senders: Threads = field(init=False)  #: for what follows an answer
    tellers: Threads = field(default_factory=lambda: Threads(LARGE_AT_ONCE))  #: of bulks
    behind: set[asyncio.Future[object]] = field(default_factory=set)  #: answers, on its way
    reader: Reader = field(init=False)
    writer: Writer = field(init=False)
    keyring: Keyring = field(init=False)
    postgres: Probe[None] = field(init=False)
    redis: Probe[None] = field(init=False)
    scrape: Probe[bytes] = field(init=False)

    def __post_init__(self) -> None:
        api = self.settings.api
        room = Room(api.max_held_bytes, max(api.max_body_bytes, api.max_bulk_bytes))
        object.__setattr__(self, "room", room)
        object.__setattr__(self, "work", Work())
        object.__setattr__(self, "rates", Rates(self.settings))
        object.__setattr__(self, "uploads", Uploads(self.settings.files.max_uploads))
        # One thread a connection: requests queue for a thread, not with a thread for a connection.
        # Reads have half of them, so that no storm of polls keeps a submission waiting.
        pool_size = self.settings.database.pool_size
        object.__setattr__(self, "readers", Threads(pool_size // 2))
        object.__setattr__(self, "writers", Threads(pool_size))
        object.__setattr__(self, "senders", Threads(pool_size))
        object.__setattr__(self, "postgres", Probe(self._store_takes_jobs))
        object.__setattr__(self, "redis", Probe(self.submitter.sender.try_to_send))
        object.__setattr__(self, "scrape", Probe(self.metrics.text, SCRAPE_S))
        outlook = self.submitter.outlook

        async def look(tenant: str, ids: Sequence[UUID]) -> Mapping[UUID, Outcome]:
            with acting_for(tenant):  # it may be asked for in another's task
                return await self.read(snapshots, self.database, outlook, tenant, ids)

        object.__setattr__(self, "reader", Reader(look))

        async def find(id: str, digest: bytes) -> Known | None:
            return await self.read(keyring.look_up, self.database, id, digest)

        async def any_made() -> bool:
            return await self.read(keyring.any_made, self.database)

        ring = Keyring(find, any_made, is_open=is_loopback(api.host))
        object.__setattr__(self, "keyring", ring)
        object.__setattr__(self, "writer", Writer(self._store, self.send))

    def _store_takes_jobs(self) -> None:
        self.database.check_schema()
        with acting_for(DEFAULT_TENANT):
            self.submitter.try_to_store()

    async def job(self, tenant: str, job_id: UUID) -> Snapshot:
        """A tenant's job as it is now. Raises `JobNotFound` and `Unavailable`."""
        # Timeouts of Postgres hold only while it runs. One that is frozen keeps the thread and its
        # connection until the system gives up on it; who waits is told in time to try again.
        try:
            async with asyncio.timeout(self._limit_s):
                return await self.reader.read(tenant, job_id)
        except TimeoutError:
            raise Unavailable("Postgres does not answer.") from None

    @asynccontextmanager
    async def bulk_turn(self) -> AsyncIterator[None]:
        """To be taken with the whole body at hand: who has sent nothing keeps nobody waiting.

        Raises `Busy` if it does not come in time.
        """
        try:
            async with asyncio.timeout(BULK_WAIT_S):
                await self.bulk_turns.acquire()
        except TimeoutError:
            raise Busy("Too many bulk submissions are being worked on. Try again.") from None
        try:
            yield
        finally:
            self.bulk_turns.release()

    async def read(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what only reads in a thread. Raises `Unavailable` if Postgres keeps it for too
        long."""
        work = Call(partial(call, *args, **kwargs), self.readers)
        if not await work.ends(self._limit_s):
            work.leave()
            raise Unavailable("Postgres does not answer.")
        return work.result()

    async def write(
        self, call: Callable[Concatenate[Decision, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """The same for what is committed under a decision: raises `Unavailable` only if it never
        will be, or if the commit itself is not answered for as long again. Postgres has the whole
        time for each step of the decision."""
        decision = Decision()
        work = Call(partial(call, decision, *args, **kwargs), self.writers)
        is_over, num_steps = False, -1
        while not is_over and num_steps < decision.num_steps:  # it goes on
            num_steps = decision.num_steps
            is_over = await work.ends(self._limit_s)
        if not is_over and not decision.refuse():
            is_over = await work.ends(self._limit_s)
        if not is_over:
            work.leave()
            raise Unavailable("Postgres does not answer.")
        return work.result()

    async def query(
        self, find: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`read` of one transaction."""

        def found() -> T:
            with self.database.begin() as connection:
                return find(connection, *args, **kwargs)

        return await self.read(found)

    async def commit(
        self, change: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`write` of one transaction."""

        def done(decision: Decision) -> T:
            with self.database.begin() as connection:
                result = change(connection, *args, **kwargs)
                decision.commit()
            return result

        return await self.write(done)

    async def expect_room(self, num_jobs: int) -> None:
        """Raises `QueueFull` if so many more jobs are too many, before they are looked at, and
        `Unavailable`."""
        if not self.submitter.admission.has_room(num_jobs):
            await self.read(self.submitter.admission.expect_room, num_jobs)

    async def _store(self, jobs: Sequence[NewJob]) -> Stored:
        with acting_for(jobs[0].tenant):  # of all of a group
            return await self.write(self.submitter.store, jobs)

    async def send(self, stored: Stored) -> None:
        """Send messages."""
        await self._behind(partial(self.submitter.send, stored))

    async def tell_workers(self, cancelled: Collection[UUID]) -> None:
        """Tell those who run jobs that these were cancelled. Who is not told finds it in the row,
        with the next heartbeat."""
        if cancelled:
            await self._behind(partial(self._tell_workers, cancelled))

    def _tell_workers(self, cancelled: Collection[UUID]) -> None:
        try:
            with self.database.autocommit() as connection:
                told = cancellation.who_runs(connection, cancelled)
            self.submitter.sender.tell_cancelled(told)
        except Unavailable as error:
            log.warning("A cancel was not told: %s", error, extra={"action": "news_away"})

    def later(self, work: Coroutine[Any, Any, object]) -> None:
        """Do what no answer waits for; what is wrong with it is logged."""
        self._keep(asyncio.ensure_future(work))

    async def _behind(self, call: Callable[[], object]) -> None:
        """Do what an answer does not depend on; it waits a moment for that."""
        await asyncio.wait({self._keep(self.senders.begin(call))}, timeout=SEND_S)

    def do_behind(self, call: Callable[[], object]) -> None:
        """The same, and the answer does not wait at all."""
        self._keep(self.senders.begin(call))

    def _keep(self, work: asyncio.Future[object]) -> asyncio.Future[object]:
        self.behind.add(work)
        work.add_done_callback(self._ended)
        return work

    def _ended(self, work: asyncio.Future[object]) -> None:
        self.behind.discard(work)
        if not work.cancelled() and (error := work.exception()):
            log.error("After an answer: %s.", type(error).__name__, extra={"action": "send_failed"})

    @property
    def _limit_s(self) -> float:
        database = self.settings.database
        return database.connect_timeout_s + database.statement_timeout_ms / 1000 + SPARE_S

    async def close(self) -> None:
        if self.behind:
            await asyncio.wait(self.behind, timeout=SEND_S)
        for threads in (self.readers, self.writers, self.senders, self.tellers):
            threads.close()
        for probe in (self.postgres, self.redis, self.scrape):
            probe.close()
        self.work.close()
        self.listeners.close()
        self.publisher.close()
        self.rates.close()
        self.database.close()


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_services)]
