"""News from the database: a job ended, a running job is to be cancelled."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from app.store.database import KEEPALIVE, psycopg_url

DONE: Final = "gristmill_done"
"""A job reached its final state."""

CANCEL: Final = "gristmill_cancel"
"""A running job was cancelled by its caller."""

STOP_CHECK_S: Final = 0.25
RECONNECT_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Notice:
    """`job_id` is None after a (re)connect: anything may have been missed, so look again."""

    channel: str
    job_id: UUID | None


def listen(url: str, channels: Sequence[str], stop: threading.Event) -> Iterator[Notice]:
    """Notices as they are committed, till `stop` is set, over one connection of its own.

    Reconnects by itself. The first notice of each channel after every connect has no job id;
    whoever waits on rows reads them again then. Ends within about `STOP_CHECK_S` of `stop`.
    """
    conninfo = make_conninfo(
        psycopg_url(url).set(drivername="postgresql").render_as_string(hide_password=False),
        application_name="gristmill-listen",
        connect_timeout=3,
        **KEEPALIVE,
    )
    while not stop.is_set():
        try:
            with psycopg.connect(conninfo, autocommit=True) as connection:
                for channel in channels:
                    connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(channel)))
                for channel in channels:
                    yield Notice(channel, None)
                while not stop.is_set():
                    for notify in connection.notifies(timeout=STOP_CHECK_S):
                        with suppress(ValueError):  # anybody may notify, with any text
                            yield Notice(notify.channel, UUID(notify.payload))
        except psycopg.OperationalError:
            stop.wait(RECONNECT_S)
