"""What an error of the driver means to a caller."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from app.errors import ConfigError, GristmillError, NotStorable, SchemaError, Unavailable
from app.store.link import is_lost

# SQLSTATE classes and codes that pass: no connection, no resources, a shutdown, a standby,
# a timeout, a deadlock. All else is a bug or a wrong setting.
_PASSING: Final = ("08", "53", "57", "58", "40001", "40P01", "55P03", "25006", "25P03", "25P04")
# Classes for which the data is to blame, and nobody's else: a group without it goes through.
_DATA: Final = ("22", "23", "54")
_NO_SUCH_TABLE_OR_COLUMN: Final = ("42P01", "42703")
_NO_SUCH_SCHEMA: Final = "3F000"

# PgBouncer's words for a transaction that it does not take; its SQLSTATE says little.
_STATEMENT_MODE: Final = "in statement pooling mode"

# The words of Postgres and PgBouncer for one client too many: libpq keeps no SQLSTATE of a refusal.
_TOO_MANY: Final = re.compile(
    "too many (clients|connections)|connection slots are reserved|no more connections"
)

# libpq's words for a value that it does not know, as of sslmode.
_WRONG_VALUE: Final = re.compile(r"invalid (\w+) value: |for connection option \"(\w+)\"")


class Locked(Unavailable):
    """A lock was not to be had in time."""


class TookTooLong(Unavailable):
    """A statement met `statement_timeout_ms`: one for fewer rows may not."""


@contextmanager
def translated_errors() -> Iterator[None]:
    """The errors of SQLAlchemy and of the driver as Gristmill's."""
    try:
        yield
    except PoolTimeout:
        raise Unavailable("All database connections of this process are busy.") from None
    except DBAPIError as error:
        raise _translated(error.orig, error.connection_invalidated) from None
    except psycopg.Error as error:
        raise _translated(error, False) from None
    except (StatementError, UnicodeEncodeError) as error:
        raise NotStorable(f"A value cannot be sent to Postgres: {type(error).__name__}.") from None


def _translated(error: BaseException | None, is_gone: bool) -> GristmillError:
    """The meaning, without the statement's values.

    Postgres quotes the values of a refused row, and one may be a prompt. So only the code and the
    constraint's name are kept; in full, the text of a lost connection or of a wrong statement.
    """
    name = type(error).__name__
    diagnosis = error.diag if isinstance(error, psycopg.Error) else None
    code = (error.sqlstate if isinstance(error, psycopg.Error) else None) or ""
    if _STATEMENT_MODE in str(error):
        return ConfigError(
            "database.url leads to a pooler in statement mode, which takes no transactions: "
            "set its pool_mode to transaction or session."
        )
    if not code and isinstance(error, psycopg.OperationalError):
        return _not_connected(str(error))
    if code == "55P03":
        return Locked("Others hold a lock on this in Postgres for too long (SQLSTATE 55P03).")
    if code == "57014":
        return TookTooLong("Postgres gave up a statement that took too long (SQLSTATE 57014).")
    if is_gone or is_lost(error) or code.startswith(_PASSING):
        return Unavailable(f"Postgres cannot serve this now: {name} (SQLSTATE {code or 'none'}).")
    if code in _NO_SUCH_TABLE_OR_COLUMN:
        return SchemaError(
            f"The database schema does not fit: {name} (SQLSTATE {code}). Run: gristmill migrate"
        )
    if code == _NO_SUCH_SCHEMA:
        return SchemaError(
            "The schema that search_path names is not there (SQLSTATE 3F000). Create it: "
            "CREATE SCHEMA name"
        )
    detail = ""
    if diagnosis and diagnosis.constraint_name:
        detail = f" of {diagnosis.constraint_name}"
    elif code.startswith("42") and diagnosis:
        detail = f": {diagnosis.message_primary}"
    is_data = isinstance(error, psycopg.DataError | psycopg.IntegrityError)
    kind = NotStorable if is_data or code.startswith(_DATA) else GristmillError
    return kind(f"Postgres refused a statement, {name}{detail} (SQLSTATE {code or 'none'}).")


def _not_connected(message: str) -> GristmillError:
    if wrong := _WRONG_VALUE.search(message):
        parameter = wrong[1] or wrong[2]
        return ConfigError(f"database.url has a value for {parameter} that is none of its values.")
    if _TOO_MANY.search(message):
        return Unavailable(
            "Postgres has no connection left for this process: raise max_connections there, or "
            "lower database.pool_size; docs/sizing.md tells how many each part takes."
        )
    first_line = message.strip().partition("\n")[0]
    return Unavailable(f"Postgres cannot be reached: {first_line}")
