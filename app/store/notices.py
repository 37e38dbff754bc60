"""News from the database: jobs ended, running jobs are to be cancelled.

A notification holds as many ids as go into it. Postgres lets one transaction with notifications
commit at a time, and wakes every connection that listens on anything. So the ends that are many,
those of workers, are told by transactions of their own, which do not wait for the disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg
from psycopg import sql
from sqlalchemy import text

from app.store.address import Address
from app.store.database import Database
from app.store.link import Link, connect

log = logging.getLogger(__name__)

DONE: Final = "gristmill_done"
"""Jobs reached their final states."""

CANCEL: Final = "gristmill_cancel"
"""Running jobs were cancelled by their callers."""

_DIGITS: Final = 32  #: of an id, without hyphens
MAX_IDS: Final = 7_999 // _DIGITS
"""Most ids in one notification: Postgres takes fewer than 8,000 bytes.

https://www.postgresql.org/docs/current/sql-notify.html"""

STOP_CHECK_S: Final = 0.25
RECONNECT_S: Final = 0.5
POLL_S: Final = 1.0
"""Pause between looks where no notices come through."""

_ACTION: Final = {"action": "news_away"}


@dataclass(frozen=True, slots=True)
class Notice:
    """`job_ids` is None after a (re)connect: anything may have been missed, so look again."""

    channel: str
    job_ids: frozenset[UUID] | None


def packed(channel: str, ids: str) -> str:
    """SQL that tells all ids of the query `ids`, in as few notifications as they go into; its value
    is how many."""
    return f"""
        SELECT count(pg_notify('{channel}', payload)) FROM (
            SELECT string_agg(replace(CAST(id AS text), '-', ''), '') AS payload
            FROM (SELECT id, row_number() OVER () - 1 AS place FROM ({ids}) AS told(id)) AS numbered
            GROUP BY place / {MAX_IDS}
        ) AS part
    """


def unpacked(payload: str) -> frozenset[UUID]:
    """The ids in a notification; none in one that is not ours: anybody may notify, with any text."""
    try:
        digits = range(0, len(payload), _DIGITS)
        return frozenset(UUID(hex=payload[at : at + _DIGITS]) for at in digits)
    except ValueError:
        return frozenset()


# Tell that jobs ended. The commit is not waited for: it holds up all others that tell something.
_TELL_ENDED: Final = text(f"""
    SELECT set_config('synchronous_commit', 'off', true),
        ({packed(DONE, "SELECT unnest(CAST(:ids AS uuid[]))")})
""")


def tell_ended(database: Database, job_ids: Collection[UUID]) -> None:
    """Tell those who wait that jobs may have ended, once their ends are committed.

    Raises `Unavailable`, and may be repeated.
    """
    with database.autocommit() as connection:
        connection.execute(_TELL_ENDED, {"ids": list(job_ids)})


def listen(url: str, channels: Sequence[str], stop: threading.Event) -> Iterator[Notice]:
    """Notices as they are committed, till `stop` is set, over one connection of its own.

    Reconnects by itself, whatever becomes of the connection. The first notice of each channel after
    every connect has no ids; whoever waits on rows reads them again then. Through a pooler,
    which keeps notices from us, such a notice comes every `POLL_S`. Ends within about
    `STOP_CHECK_S` of `stop`.
    """
    address = Address.of(url).with_defaults(application_name="gristmill-listen")
    is_told = False
    while not stop.is_set():
        try:
            with connect(address) as link:
                is_told = False
                yield from _heard(link, channels, stop)
        except psycopg.Error as error:  # a standby refuses to listen; another may come in its place
            if not is_told:
                log.warning("No news from Postgres: %s.", type(error).__name__, extra=_ACTION)
            is_told = True
            stop.wait(RECONNECT_S)


def _heard(link: Link, channels: Sequence[str], stop: threading.Event) -> Iterator[Notice]:
    if not link.found.is_pooled:
        for channel in channels:
            link.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
    while not stop.is_set():
        for channel in channels:
            yield Notice(channel, None)
        while not (stop.is_set() or link.found.is_pooled):
            for notify in link.notifies(timeout=STOP_CHECK_S):
                yield Notice(notify.channel, unpacked(notify.payload))
        if link.found.is_pooled:
            stop.wait(POLL_S)
            link.execute("SELECT 1")
