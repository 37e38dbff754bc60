"""One process's connections to Postgres."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timedelta
from typing import Any, Final, LiteralString

import psycopg
from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import ExceptionContext, ExecutionContext
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from app.store import schema, tenancy
from app.store.address import Address, quote
from app.store.link import Found, Link, connect, is_lost
from app.store.translation import translated_errors
from app.store.turns import Turns

log = logging.getLogger(__name__)

PING_AFTER_S: Final = 0.5
"""A connection that was idle for longer is tried before it is used."""

CLOCK_S: Final = 10.0
"""How long this machine's clock may go on from a reading of the database's."""

_PLANNED_EACH_TIME: Final = {"plan_cache_mode": "force_custom_plan", "enable_seqscan": "on"}
"""A plan that was made while a table was empty is of no use when it is full."""

_PLANNED_ONCE: Final = {"plan_cache_mode": "force_generic_plan", "enable_seqscan": "off"}
"""To plan a statement for one job takes longer than to run it. Where all is looked up by key, there
is one plan that is right however full the tables are."""

_PLAN: Final = """
    SELECT
        set_config('plan_cache_mode', %(plan_cache_mode)s, false),
        set_config('enable_seqscan', %(enable_seqscan)s, false)
"""


Sent = tuple[LiteralString, Mapping[str, object]]
"""SQL in the driver's format, and its parameters."""


class Database:
    """The connection pool of this process: `pool_size` that are kept, and up to `spare` more that
    are opened where all are in use for longer than `patience_s`, and closed after it.

    Timeouts hold for every statement: `statement_timeout_ms` for its whole time, `lock_timeout_ms`
    for a wait on a row. A client that stands still inside a transaction is cut off after
    `statement_timeout_ms` as well, so that its row locks end with it. Stamps come back in UTC.
    Whether that is so is looked at on each new connection, see `app.store.link`.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        spare: int = 0,
        patience_s: float = 0.0,
        application_name: str = "gristmill",
        connect_timeout_s: int = 3,
        statement_timeout_ms: int = 15_000,
        lock_timeout_ms: int = 3_000,
        looks_up_only: bool = False,
        is_limited: bool = False,
    ) -> None:
        """`looks_up_only`: whoever this is for reads and writes rows by their keys alone; others
        say so for each use. `is_limited`: sees the rows of `tenancy.acting_for` alone."""
        settings = {
            "statement_timeout": str(statement_timeout_ms),
            "idle_in_transaction_session_timeout": str(statement_timeout_ms),
            "lock_timeout": str(lock_timeout_ms),
            "timezone": "UTC",
        } | (_PLANNED_ONCE if looks_up_only else _PLANNED_EACH_TIME)
        if is_limited:
            settings["role"] = tenancy.API_ROLE
        address = (
            Address.of(url)
            .with_defaults(
                application_name=application_name, connect_timeout=str(connect_timeout_s)
            )
            .with_settings(settings)
        )
        self._engine: Final = make_engine(
            address, pool_size=pool_size, max_overflow=spare, pool_timeout=connect_timeout_s
        )
        self._turns: Final = Turns(pool_size, patience_s) if patience_s else None
        self._clock: Final = Clock()
        self._is_pooler_told = False
        event.listen(self._engine, "connect", self._note_connected)
        _try_what_was_idle(self._engine)
        self._looks_up_only: Final = looks_up_only
        self._transactions: Final = {
            once: in_transactions(self._engine, plans_once=once, is_limited=is_limited)
            for once in (False, True)
        }
        self._statements: Final = _one_by_one(self._engine, is_limited=is_limited)

    @contextmanager
    def begin(self, *, looks_up: bool = False) -> Iterator[Connection]:
        """A connection in a transaction: committed at the end, rolled back on an error.

        `looks_up`: its statements read and write rows by their keys alone, and are planned once.

        Raises `Unavailable` when Postgres cannot be reached or cannot serve now. If that happens
        at the commit, it is unknown whether it took place; `claim`, `finish`, `insert_jobs` and
        `receive` may simply be repeated.
        """
        transactions = self._transactions[looks_up or self._looks_up_only]
        with self._turn(), translated_errors(), transactions.begin() as connection:
            yield connection

    @contextmanager
    def autocommit(
        self, *, looks_up: bool = False, then: Sent | None = None
    ) -> Iterator[Connection]:
        """A connection on which every statement is a transaction of its own.

        For moves that are one statement: one round trip to Postgres where `begin` takes three.
        `looks_up` is as there. `then`: SQL that follows each statement in the same round trip, as
        the next transaction; if that fails, `Unavailable` comes after a commit, and is to be
        repeated. Raises as `begin` does, and leaves the same unknown.
        """
        with self._turn(), translated_errors(), self._statements.connect() as connection:
            _plan(connection, looks_up or self._looks_up_only)
            yield connection.execution_options(**{_THEN: then}) if then else connection

    def _turn(self) -> AbstractContextManager[None]:
        return self._turns.taken() if self._turns else nullcontext()

    def now(self) -> datetime:
        """The time by the database's clock, which all times of jobs are judged by.

        Asks for it now and then, and counts on from there. Raises `Unavailable`.
        """
        if self._clock.is_stale:
            with self.autocommit() as connection:
                now = connection.scalar(text("SELECT clock_timestamp()"))
                self._clock.set(now, time.monotonic())
        return self._clock.now()

    def found(self) -> Found:
        """What a connection of the pool found when it was opened. Raises `Unavailable`."""
        with self.autocommit() as connection:
            return link_of(connection).found

    def check_schema(self) -> None:
        """Raise `SchemaError` unless this code runs on the schema, see `schema.check`."""
        with self.begin() as connection:
            schema.check(connection)

    def close(self) -> None:
        self._engine.dispose()

    def _note_connected(self, link: Link, _: ConnectionPoolEntry) -> None:
        link.plans_once = self._looks_up_only
        if self._looks_up_only and not link.is_shared:
            link.prepare_threshold = 0  # what is planned once, at once: it all comes again
        self._clock.set(link.found.server_time, link.found.asked_s)
        if link.is_shared and not self._is_pooler_told:
            self._is_pooler_told = True
            log.info(
                "Postgres is behind a pooler: settings go with every transaction, and nothing is "
                "prepared.",
                extra={"action": "pooler_found"},
            )


class Clock:
    """The database's clock as this process knows it. Threads may share it."""

    def __init__(self) -> None:
        self._known: tuple[datetime, float] | None = None  #: and when, monotonic

    @property
    def is_stale(self) -> bool:
        return self._known is None or time.monotonic() - self._known[1] > CLOCK_S

    def set(self, now: datetime, at_s: float) -> None:
        self._known = (now, at_s)

    def now(self) -> datetime:
        assert self._known is not None
        then, at_s = self._known
        return then + timedelta(seconds=time.monotonic() - at_s)


def make_engine(address: Address, **given: Any) -> Engine:
    """An engine whose connections are links, and go with the whole pool when one is lost."""
    engine = create_engine(
        "postgresql+psycopg://",
        creator=functools.partial(connect, address),
        hide_parameters=True,
        use_native_hstore=False,
        **given,
    )

    @event.listens_for(engine, "handle_error")
    def drop(context: ExceptionContext) -> None:
        if is_lost(context.original_exception):
            context.is_disconnect = True

    return engine


def in_transactions(
    engine: Engine, *, plans_once: bool | None = None, is_limited: bool = False
) -> Engine:
    """The engine for blocks of statements that are one transaction; None: planned as it comes."""
    blocks = engine.execution_options()

    @event.listens_for(blocks, "begin")
    def begin(connection: Connection) -> None:
        _plan(connection, plans_once)
        options = {"no_parameters": True}  # so that it may be two statements
        begins = _begins(link_of(connection), is_limited)
        connection.exec_driver_sql(begins, execution_options=options)

    return blocks


_NAME: Final = f"SELECT set_config('{tenancy.SETTING}', %s, true)"
_OF_A_TENANT: Final = "of_a_tenant"
_THEN: Final = "then"


def _begins(link: Link, is_limited: bool) -> str:
    """SQL that begins a transaction, and says whose it is."""
    if not is_limited:
        return link.begin
    return f"{link.begin}; SET LOCAL {tenancy.SETTING} = {quote(tenancy.tenant_now())}"


def _one_by_one(engine: Engine, *, is_limited: bool) -> Engine:
    """The engine for statements each of which is a transaction by itself."""
    single = engine.execution_options(**{_OF_A_TENANT: is_limited})
    event.listen(engine, "do_execute", _execute_in_one_trip)

    @event.listens_for(single, "before_cursor_execute")
    def begin(connection: Connection, *_: Any) -> None:
        link = link_of(connection)
        if link.is_shared:
            link.rollback()  # of a statement before that failed
            link.execute(_begins(link, is_limited))

    @event.listens_for(single, "after_cursor_execute")
    def commit(connection: Connection, *_: Any) -> None:
        link = link_of(connection)
        link.commit()
        then = connection.get_execution_options().get(_THEN)
        if then and link.is_shared:
            try:
                link.execute(_begins(link, is_limited))
                link.execute(*then)
                link.commit()
            except psycopg.Error:
                link.close()  # so that it is told as `Unavailable`
                raise

    return single


def _execute_in_one_trip(
    cursor: Any, statement: str, given: Any, context: ExecutionContext
) -> bool:
    """Send together the tenant's name and the statement, which are one transaction, and `then`.
    https://www.postgresql.org/docs/current/libpq-pipeline-mode.html"""
    link, options = cursor.connection, context.execution_options
    is_limited, then = options.get(_OF_A_TENANT), options.get(_THEN)
    if link.is_shared or not (is_limited or then):
        return False  # it is within a transaction that has been told, or is alone
    try:
        with link.pipeline() as pipeline:
            if is_limited:
                link.execute(_NAME, [tenancy.tenant_now()], prepare=True)
            cursor.execute(statement, given)
            if then:
                pipeline._enqueue_sync()  # commits; the public `sync` would wait for the answers
                link.execute(*then)
    except psycopg.Error:
        if cursor.pgresult:
            link.close()  # a commit failed, which no pipeline gets over, or what was to follow it
        raise
    except IndexError:  # the driver, of one that failed and whose error came by itself
        link.close()
        raise psycopg.OperationalError("A commit failed.") from None
    return True


def _plan(connection: Connection, once: bool | None) -> None:
    """Have what follows planned once, or each time, unless it already is. To be said before a
    transaction begins, for one that is rolled back would undo it. A pooler keeps no plans."""
    link = link_of(connection)
    if once is None or link.is_shared or link.plans_once is once:
        return
    connection.exec_driver_sql(_PLAN, _PLANNED_ONCE if once else _PLANNED_EACH_TIME)
    link.plans_once = once


def link_of(connection: Connection) -> Link:
    """The driver's connection under one of a `Database`."""
    link = connection.connection.driver_connection
    assert isinstance(link, Link)
    return link


def _try_what_was_idle(engine: Engine) -> None:
    """Try a connection that was idle for a while before it is used; others were alive just now."""

    @event.listens_for(engine, "checkin")
    def note(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since_s"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping(link: Link, record: ConnectionPoolEntry, _: Any) -> None:
        if time.monotonic() - record.info.get("idle_since_s", math.inf) < PING_AFTER_S:
            return
        try:
            link.execute("")
        except psycopg.Error as error:
            raise DisconnectionError from error  # the pool connects anew
        if link.is_read_only:
            raise DisconnectionError("The server only reads.")  # another may take writes
