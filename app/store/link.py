"""One connection to Postgres: opened, and asked what is behind it and in force on it.

A pooler such as PgBouncer may refuse or drop what a client says at the start, and may give each
transaction to another server process. So what was asked for is compared with what is in force, and
where the two differ, or a pooler is there at all, settings go with every transaction and nothing is
prepared. A pooler is known by its process ids: it cannot give out those of the servers.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

import psycopg

from app.store.address import Address
from app.store.encoding import load_all

OURS: Final = (
    "statement_timeout",
    "lock_timeout",
    "idle_in_transaction_session_timeout",
    "timezone",
    "role",
)
"""Settings without which Gristmill would not be bounded, or would read times wrongly. Others are
the URL's own, and the server shows them in its own units."""

# What poolers say of `options` at the start. They are told in each transaction instead.
_REFUSED_AT_START: Final = re.compile("startup parameter|command-line option", re.IGNORECASE)

# The view leaves out who one is.
_IN_FORCE: Final = """
    SELECT
        pg_backend_pid(), clock_timestamp(), pg_is_in_recovery(),
        (SELECT jsonb_object_agg(lower(name), setting) FROM pg_settings WHERE lower(name) = ANY(%s))
            || jsonb_build_object('role', current_setting('role'))
"""

# SQLSTATEs after which a connection is of no use: gone, or to a server that only reads now, or to
# one that has forgotten what was prepared.
_LOST: Final = ("08", "57P", "25006", "25P03", "26000", "42P05")


@dataclass(frozen=True, slots=True)
class Found:
    """What a new connection found."""

    is_pooled: bool  #: somebody stands between us and the server
    is_standby: bool
    in_force: Mapping[str, str]  #: of the settings that were asked for, as the server shows them
    missing: tuple[str, ...]  #: names of settings that were not taken at the start
    server_time: datetime
    asked_s: float  #: monotonic time at which `server_time` was about right


class Link(psycopg.Connection[tuple[Any, ...]]):
    """A connection without a transaction of the driver's own: `begin` is the SQL that opens one."""

    found: Found
    begin: str = "BEGIN"
    plans_once: bool = False  #: statements, as its last user wanted it

    @property
    def is_shared(self) -> bool:
        """Whether settings have to come with each transaction, since others use the server's
        process between two of ours, or it did not take them."""
        return self.found.is_pooled or bool(self.found.missing)

    @property
    def is_read_only(self) -> bool:
        """Whether the server has said so, which it does unasked (PostgreSQL 14)."""
        told = (b"in_hot_standby", b"default_transaction_read_only")
        return any(self.pgconn.parameter_status(name) == b"on" for name in told)


def connect(address: Address) -> Link:
    """Raises `psycopg.Error`."""
    try:
        link = _open(address, address.options)
    except psycopg.OperationalError as error:
        if not _REFUSED_AT_START.search(str(error)):
            raise
        link = _open(address, " ".join(address.other_options))
    try:
        link.found = _look(link, address)
    except BaseException:
        link.close()
        raise
    if link.is_shared:
        link.prepare_threshold = None
        link.begin = address.begin
    return link


def _open(address: Address, options: str) -> Link:
    link = Link.connect(**address.libpq, options=options, autocommit=True)  # type: ignore[arg-type]
    load_all(link)
    return link


def _look(link: Link, address: Address) -> Found:
    cursor = link.execute(_IN_FORCE, [list(address.settings)], prepare=False)
    asked_s = time.monotonic()
    [(pid, now, is_standby, shown)] = cursor.fetchall()
    in_force = shown or {}
    missing = [
        name for name, it in address.settings.items() if name in OURS and in_force.get(name) != it
    ]
    return Found(
        is_pooled=pid != link.info.backend_pid,
        is_standby=is_standby,
        in_force=in_force,
        missing=tuple(missing),
        server_time=now,
        asked_s=asked_s,
    )


def is_lost(error: BaseException | None) -> bool:
    """Whether the connection on which this happened is of no use any more, though it is open."""
    if not isinstance(error, psycopg.Error) or error.sqlstate is None:
        return False
    is_stale_plan = error.sqlstate == "0A000" and "cached plan" in str(error)
    return is_stale_plan or error.sqlstate.startswith(_LOST)
