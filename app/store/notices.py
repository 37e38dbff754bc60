"""News from the database: jobs ended.

A notification holds as many ids as go into it. Postgres lets one transaction with notifications
commit at a time, and wakes every connection that listens on anything. So the ends that are many,
those of workers, are told by transactions of their own, which do not wait for the disk.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator
from typing import Final
from uuid import UUID

import psycopg

from app.jobs import job_ids_in
from app.store.address import Address
from app.store.database import Sent
from app.store.link import Link, connect

log = logging.getLogger(__name__)

DONE: Final = "gristmill_done"
"""Jobs reached their final states."""

MAX_IDS: Final = 7_999 // 32
"""Most ids in one notification: Postgres takes fewer than 8,000 bytes.

https://www.postgresql.org/docs/current/sql-notify.html"""

STOP_CHECK_S: Final = 0.25
RECONNECT_S: Final = 0.5
POLL_S: Final = 1.0
"""Pause between looks where no notices come through."""

_ACTION: Final = {"action": "news_away"}


def telling(ids: str) -> str:
    """SQL that tells all ids of the query `ids`, in as few notifications as they go into; its value
    is how many. The payload is `digits_of` them."""
    return f"""
        SELECT count(pg_notify('{DONE}', payload)) FROM (
            SELECT string_agg(replace(CAST(id AS text), '-', ''), '') AS payload
            FROM (SELECT id, row_number() OVER () - 1 AS place FROM ({ids}) AS told(id)) AS numbered
            GROUP BY place / {MAX_IDS}
        ) AS part
    """


# Tell that jobs ended. The commit is not waited for: it holds up all others that tell something.
_TELL_ENDED: Final = f"""
    SELECT set_config('synchronous_commit', 'off', true),
        ({telling("SELECT unnest(CAST(%(ids)s AS uuid[]))")})
"""


def ended(job_ids: Collection[UUID]) -> Sent:
    """What tells those who wait that jobs may have ended: to be sent after the statement by which
    they do, as a transaction of its own (`Database.autocommit`). It may be repeated."""
    return _TELL_ENDED, {"ids": list(job_ids)}


def listen(url: str, stop: threading.Event) -> Iterator[frozenset[UUID] | None]:
    """Ids of ended jobs as they are told, till `stop` is set, over one connection of its own.

    Reconnects by itself, whatever becomes of the connection. None says that some may have been
    missed, so that whoever waits on rows reads them again: it comes after every connect, and every
    `POLL_S` through a pooler, which keeps notices from us. Ends within about `STOP_CHECK_S` of
    `stop`.
    """
    address = Address.of(url).with_defaults(application_name="gristmill-listen")
    is_told = False
    while not stop.is_set():
        try:
            with connect(address) as link:
                is_told = False
                yield from _heard(link, stop)
        except psycopg.Error as error:  # a standby refuses to listen; another may come in its place
            if not is_told:
                log.warning("No news from Postgres: %s.", type(error).__name__, extra=_ACTION)
            is_told = True
            stop.wait(RECONNECT_S)


def _heard(link: Link, stop: threading.Event) -> Iterator[frozenset[UUID] | None]:
    if not link.found.is_pooled:
        link.execute(f"LISTEN {DONE}")
    while not stop.is_set():
        yield None
        while not (stop.is_set() or link.found.is_pooled):
            for notify in link.notifies(timeout=STOP_CHECK_S):
                yield job_ids_in(notify.payload)  # anybody may notify, with any text
        if link.found.is_pooled:
            stop.wait(POLL_S)
            link.execute("SELECT 1")
