"""One process's connections to Postgres, and the schema's version."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, NullPool, create_engine, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    DataError,
    DBAPIError,
    DisconnectionError,
    IntegrityError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import ConnectionPoolEntry

from app.errors import ConfigError, GristmillError, NotStorable, SchemaError, Unavailable

MIGRATIONS: Final = Path(__file__).parents[2] / "migrations"
"""Beside the package, in a checkout and in site-packages alike."""

PING_AFTER_S: Final = 0.5
"""A connection that was idle for longer is tried before it is used."""

_FITS_FROM: Final = "0001"
"""Code of this revision and of all later ones runs on the newest schema. Migrations only add, so
that old and new versions run side by side; one that takes something away raises this."""

_MIGRATION_LOCK: Final = 0x6772697374  # any constant will do, as long as it stays the same
_MIGRATION_LOCK_TIMEOUT_MS: Final = 2_000
"""Shorter than any `database.lock_timeout_ms` in use: whoever waits behind a migration that waits
for its own lock goes on, and it tries again."""
_MIGRATION_TRIES: Final = 30
_MIGRATION_PAUSE_S: Final = 1.0

# SQLSTATE classes and codes that pass: no connection, no resources, a shutdown, a standby,
# a timeout, a deadlock. All else is a bug or a wrong setting.
_PASSING: Final = ("08", "53", "57", "58", "40001", "40P01", "55P03", "25006", "25P03", "25P04")
# Classes for which the data is to blame, and nobody's else: a group without it goes through.
_DATA: Final = ("22", "23", "54")
_NO_SUCH_TABLE_OR_COLUMN: Final = ("42P01", "42703")


class _Locked(Unavailable):
    """A lock was not to be had in time."""


class Database:
    """The connection pool of this process.

    Timeouts hold for every statement: `statement_timeout_ms` for its whole time, `lock_timeout_ms`
    for a wait on a row. A client that stands still inside a transaction is cut off after
    `statement_timeout_ms` as well, so that its row locks end with it. Stamps come back in UTC.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = 10,
        application_name: str = "gristmill",
        connect_timeout_s: int = 3,
        statement_timeout_ms: int = 15_000,
        lock_timeout_ms: int = 3_000,
    ) -> None:
        self.url: Final = psycopg_url(url)
        session = {
            "statement_timeout": statement_timeout_ms,
            "idle_in_transaction_session_timeout": statement_timeout_ms,
            "lock_timeout": lock_timeout_ms,
            "timezone": "UTC",
        }
        self._engine: Final = create_engine(
            self.url,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=connect_timeout_s,
            hide_parameters=True,
            connect_args={
                "application_name": application_name,
                "connect_timeout": connect_timeout_s,
                "options": " ".join(f"-c {name}={value}" for name, value in session.items()),
                **KEEPALIVE,
            },
        )
        _ping_what_was_idle(self._engine)
        self._autocommit: Final = self._engine.execution_options(isolation_level="AUTOCOMMIT")

    @contextmanager
    def begin(self) -> Iterator[Connection]:
        """A connection in a transaction: committed at the end, rolled back on an error.

        Raises `Unavailable` when Postgres cannot be reached or cannot serve now. If that happens
        at the commit, it is unknown whether it took place; `claim`, `finish`, `insert_jobs` and
        `receive` may simply be repeated.
        """
        with _translating(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def autocommit(self) -> Iterator[Connection]:
        """A connection on which every statement is a transaction of its own.

        For moves that are one statement: one round trip to Postgres where `begin` takes three.
        Raises as `begin` does, and leaves the same unknown.
        """
        with _translating(), self._autocommit.connect() as connection:
            yield connection

    def check_schema(self) -> None:
        """Raise `SchemaError`, with the command to run, unless this code runs on the schema.

        That is its own, or a later one that has only added to it.
        """
        with self.begin() as connection:
            _check_schema(_revision(connection), _fits_from(connection))

    def close(self) -> None:
        self._engine.dispose()


def _ping_what_was_idle(engine: Engine) -> None:
    """Try a connection that was idle for a while before it is used; others were alive just now."""

    @event.listens_for(engine, "checkin")
    def note(_: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since_s"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def ping(connection: Any, record: ConnectionPoolEntry, _: Any) -> None:
        if time.monotonic() - record.info.get("idle_since_s", math.inf) < PING_AFTER_S:
            return
        try:
            engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            raise DisconnectionError from error  # the pool connects anew


KEEPALIVE: Final = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
"""libpq settings that notice a silent server within about ten seconds."""


def psycopg_url(url: str) -> URL:
    """The URL with the psycopg driver, whichever driver it names. Raises `ConfigError`."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the port may be no number
        raise ConfigError("database.url is not a URL, as in postgresql://host/database.") from None
    if parsed.get_backend_name() not in ("postgres", "postgresql"):
        raise ConfigError("database.url does not begin with postgresql://.")
    return parsed.set(drivername="postgresql+psycopg")


def migrate(url: str) -> str:
    """Bring the schema up to date and return its revision. Several may run at once.

    Safe on a live system: it never waits long for a lock, gives way, and tries again. Raises
    `SchemaError` if the schema is newer than this code, and `Unavailable`.
    """
    for _ in range(_MIGRATION_TRIES - 1):
        try:
            return _run_alembic(url, _upgrade, "head")
        except _Locked:
            time.sleep(_MIGRATION_PAUSE_S)
    return _run_alembic(url, _upgrade, "head")


def _upgrade(config: Config, revision: str) -> None:
    """Move up, and note for older code whether it still fits."""
    command.upgrade(config, revision)
    connection: Connection = config.attributes["connection"]
    connection.execute(text("ALTER TABLE alembic_version ADD COLUMN IF NOT EXISTS fits_from text"))
    connection.execute(text("UPDATE alembic_version SET fits_from = :it"), {"it": _FITS_FROM})


def downgrade(url: str, revision: str) -> str:
    """Take the schema back to `revision`; "base" drops every table and all that is in them."""
    return _run_alembic(url, command.downgrade, revision)


def _run_alembic(url: str, move: Callable[[Config, str], None], revision: str) -> str:
    engine = create_engine(
        psycopg_url(url),
        poolclass=NullPool,
        hide_parameters=True,
        connect_args={"connect_timeout": 5, **KEEPALIVE},
    )
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    try:
        with _translating(), engine.begin() as connection:
            # The lock ends with the transaction, and so does everything a failed migration did.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION_LOCK})
            connection.execute(text(f"SET LOCAL lock_timeout = {_MIGRATION_LOCK_TIMEOUT_MS}"))
            present = _revision(connection)
            if present is not None and present not in _known_revisions():
                raise SchemaError(_newer(present))
            config.attributes["connection"] = connection
            move(config, revision)
            return _revision(connection) or "base"
    finally:
        engine.dispose()


def _check_schema(present: str | None, fits_from: str | None) -> None:
    known = _known_revisions()
    if present == known[0] or (present not in known and fits_from in known):
        return
    if present is None:
        raise SchemaError("The database has no Gristmill schema. Run: gristmill migrate")
    if present not in known:
        raise SchemaError(_newer(present))
    raise SchemaError(
        f"The database schema is at {present}, older than this Gristmill's {known[0]}. "
        "Run: gristmill migrate"
    )


def _newer(present: str) -> str:
    return (
        f"The database schema is at {present}, which this Gristmill does not know: it is newer. "
        "Install the newer Gristmill; it brings its own: gristmill migrate"
    )


def _known_revisions() -> list[str]:
    """Revisions of this code, newest first."""
    return [script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()]


def _revision(connection: Connection) -> str | None:
    """The database's revision; None if it has no schema."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def _fits_from(connection: Connection) -> str | None:
    """The oldest revision whose code runs on the schema; None if there is none, or it is old."""
    if _revision(connection) is None:
        return None
    noted: str | None = connection.scalar(
        text("SELECT to_jsonb(noted) ->> 'fits_from' FROM alembic_version AS noted")
    )
    return noted


@contextmanager
def _translating() -> Iterator[None]:
    """The driver's errors as Gristmill's."""
    try:
        yield
    except PoolTimeout:
        raise Unavailable("All database connections of this process are busy.") from None
    except DBAPIError as error:
        raise _translated(error) from None


def _translated(error: DBAPIError) -> GristmillError:
    """What an error of the driver means to a caller, without the statement's values.

    Postgres quotes the values of a refused row, and one may be a prompt. So only the code and the
    constraint's name are kept; in full, the text of a lost connection or of a wrong statement.
    """
    name = type(error.orig).__name__
    diagnosis = error.orig.diag if isinstance(error.orig, psycopg.Error) else None
    code = diagnosis.sqlstate if diagnosis else None
    if code is None and isinstance(error, OperationalError):
        first_line = str(error.orig).strip().partition("\n")[0]
        return Unavailable(f"Postgres cannot be reached: {first_line}")
    if code == "55P03":
        return _Locked("Others hold a lock on this in Postgres for too long (SQLSTATE 55P03).")
    if code is not None and code.startswith(_PASSING):
        return Unavailable(f"Postgres cannot serve this now: {name} (SQLSTATE {code}).")
    if code in _NO_SUCH_TABLE_OR_COLUMN:
        return SchemaError(
            f"The database schema does not fit: {name} (SQLSTATE {code}). Run: gristmill migrate"
        )
    detail = ""
    if diagnosis and diagnosis.constraint_name:
        detail = f" of {diagnosis.constraint_name}"
    elif code is not None and code.startswith("42"):
        detail = f": {diagnosis.message_primary}" if diagnosis else ""
    is_data = isinstance(error, DataError | IntegrityError) or (code or "").startswith(_DATA)
    kind = NotStorable if is_data else GristmillError
    return kind(f"Postgres refused a statement, {name}{detail} (SQLSTATE {code}).")
