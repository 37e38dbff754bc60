"""Hooks: the process that delivers webhooks.

It is a process of its own, so that slow and hostile receivers hold up nobody else, and so that it
alone has to be let out of the network. Several may run at once: they take deliveries with leases
and skip each other's, as workers do with jobs.

    claim what is due ──▶ sign, send, many at once ──▶ record, or the lease runs out

A delivery that was sent and not recorded is sent again, with the same `webhook-id`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from app.alive import Alive
from app.config.settings import Settings
from app.errors import ConfigError, GristmillError, RequestError, Unavailable
from app.ids import name_of
from app.store import webhook_endpoints, webhooks
from app.store.database import Database
from app.store.webhooks import Due, Receiver, Tried
from app.webhooks.addresses import Reach
from app.webhooks.ids import EVENT
from app.webhooks.post import Outcome, Postman, SystemResolver
from app.webhooks.schedule import pause_s, wait_s
from app.webhooks.signing import body_of, headers_of
from app.webhooks.urls import HookUrl, parse_url
from app.webhooks.vault import Vault

log = logging.getLogger(__name__)

THREADS: Final = 2
"""Statements at once, and connections to Postgres."""

SPARE_S: Final = 30.0
"""A lease is so much longer than an attempt: time to record it while Postgres is slow or away."""

TIDY_EVERY_S: Final = 60.0
SOON_S: Final = 0.02
"""Pause between looks while there is something due."""
MAX_PAUSE_S: Final = 5.0
"""Longest pause between looks while Postgres is away."""
RECORD_PAUSE_S: Final = 0.5
END_S: Final = 2.0
"""At the end, time for what is being sent; the rest is sent again by whoever comes next."""

_TROUBLED: Final = (429, *range(500, 600))
"""Answers of a receiver that is not well. Others are about one webhook."""

T = TypeVar("T")


class Deliverer:
    """Delivers in one event loop."""

    def __init__(self, settings: Settings, database: Database, postman: Postman) -> None:
        """Raises `ConfigError` if the key for secrets is none."""
        given = settings.webhooks
        self._room = given.max_at_once
        self._each = given.max_at_once_each
        self._lease_s = given.timeout_s + SPARE_S
        self._database = database
        self._postman = postman
        self._vault = Vault(given.encryption_key)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._sending: set[asyncio.Task[None]] = set()
        self._busy: Counter[Receiver] = Counter()
        self._tidy_at = 0.0

    async def look(self) -> int:
        """Begin to send what is due, as far as there is room; how many. Raises `Unavailable`."""
        if time.monotonic() >= self._tidy_at:
            self._tidy_at = time.monotonic() + TIDY_EVERY_S
            await self._store(webhooks.give_up)
            await self._store(webhooks.tidy)
        room = self._room - len(self._sending)
        if room <= 0:
            return 0
        due = await self._store(
            lambda connection: webhooks.claim(
                connection, room=room, each=self._each, lease_s=self._lease_s, busy=self._busy
            )
        )
        for each in due:
            self._busy[each.receiver] += 1
            task = asyncio.create_task(self._deliver(each))
            self._sending.add(task)
            task.add_done_callback(self._sending.discard)
        return len(due)

    async def finish(self, timeout_s: float | None = None) -> None:
        """Wait for what is being sent."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=timeout_s)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _deliver(self, due: Due) -> None:
        try:
            outcome = await self._sent(due)
            await self._record(due, outcome)
        except Exception as error:  # of ours: its lease runs out, and it comes again
            log.error(
                "A webhook was not delivered: %s",
                error if isinstance(error, GristmillError) else type(error).__name__,
                extra={"action": "delivery_failed", "delivery": due.id},
            )
        finally:
            self._busy[due.receiver] -= 1
            self._busy += Counter()  # without those that are none

    async def _sent(self, due: Due) -> Outcome:
        try:
            url = parse_url(due.url)
        except RequestError:  # written by hand
            return Outcome(None, "address_refused", 0.0)
        try:
            secrets = await self._secrets(due)
        except ConfigError as error:
            log.error("%s", error, extra={"action": "secret_sealed", "tenant": due.tenant})
            return Outcome(None, "secret_sealed", 0.0)
        return await self._post(due, url, secrets)

    async def _post(self, due: Due, url: HookUrl, secrets: list[str]) -> Outcome:
        event_id = name_of(EVENT, due.event_id)
        body = body_of(event_id, due.type, due.created_at, due.object_id)
        return await self._postman.post(url, headers_of(event_id, body, due.now, secrets), body)

    async def _secrets(self, due: Due) -> list[str]:
        kept = due.secret
        if kept is None:
            _, made = self._vault.make()
            kept = await self._store(
                lambda connection: webhook_endpoints.own_secret(connection, made, tenant=due.tenant)
            )
        return [self._vault.open(each) for each in (kept, due.old_secret) if each is not None]

    async def _record(self, due: Due, outcome: Outcome) -> None:
        """As long as the lease lasts."""
        tried = _tried(due, outcome)
        until_s = time.monotonic() + SPARE_S
        while True:
            try:
                await self._store(lambda connection: webhooks.record(connection, tried))
            except Unavailable:
                if time.monotonic() > until_s:
                    raise
                await asyncio.sleep(RECORD_PAUSE_S)
            else:
                return

    async def _store(self, call: Callable[..., T]) -> T:
        def run() -> T:
            with self._database.begin() as connection:
                return call(connection)

        return await asyncio.get_running_loop().run_in_executor(self._threads, run)


def _tried(due: Due, outcome: Outcome) -> Tried:
    """What an attempt's outcome means for its delivery and its receiver."""
    wait = None
    if not (outcome.is_delivered or outcome.is_gone or due.is_test):
        age_s = due.age_s + outcome.took_ms / 1e3
        wait = wait_s(due.tries, age_s, random.random(), outcome.retry_after_s)
    is_well = outcome.status is not None and outcome.status not in _TROUBLED
    return Tried(
        id=due.id,
        lease=due.lease,
        took_ms=outcome.took_ms,
        status_code=outcome.status,
        error=outcome.error,
        wait_s=wait,
        pause_s=None if is_well else pause_s(due.failures + 1),
        is_well=is_well,
        is_gone=outcome.is_gone,
    )


def alive(settings: Settings) -> Alive:
    return Alive(settings.cache_dir, "hooks")


def serve(settings: Settings) -> None:
    """Deliver until SIGTERM or SIGINT; wait out times without Postgres.

    Raises `SchemaError` if the database does not fit this code, and `ConfigError`.
    """
    given = settings.database
    database = Database(
        given.url,
        pool_size=THREADS,
        application_name="gristmill hooks",
        connect_timeout_s=given.connect_timeout_s,
        statement_timeout_ms=given.statement_timeout_ms,
        lock_timeout_ms=given.lock_timeout_ms,
    )
    alive(settings).forget()  # what an earlier process noted says nothing
    try:
        asyncio.run(_deliver(settings, database))
    finally:
        alive(settings).forget()
        database.close()


async def _deliver(settings: Settings, database: Database) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    resolver = SystemResolver()
    postman = Postman(Reach.of(settings.webhooks), settings.webhooks.timeout_s, resolver)
    deliverer = Deliverer(settings, database, postman)
    poll_s = settings.webhooks.poll_ms / 1000
    pause = 0.0
    is_schema_checked = False
    while not await _is_set(stop, pause):
        try:
            if not is_schema_checked:
                await asyncio.to_thread(database.check_schema)
                is_schema_checked = True
                log.info("Hooks are up.", extra={"action": "start"})
            found = await deliverer.look()
        except Unavailable as error:
            pause = min(max(2 * pause, poll_s), MAX_PAUSE_S)
            log.warning("%s Trying again.", error, extra={"action": "wait", "pause_s": pause})
            alive(settings).note(has_worked=False)
        else:
            pause = min(SOON_S, poll_s) if found else poll_s
            alive(settings).note(has_worked=True)
    await deliverer.finish(END_S)
    deliverer.close()
    resolver.close()


async def _is_set(stop: asyncio.Event, pause: float) -> bool:
    """Whether to stop, after a pause or at once."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), pause)
    return stop.is_set()
