"""News from the database: a job ended, a running job is to be cancelled."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg
from psycopg import sql

from app.store.address import Address
from app.store.link import Link, connect

log = logging.getLogger(__name__)

DONE: Final = "gristmill_done"
"""A job reached its final state."""

CANCEL: Final = "gristmill_cancel"
"""A running job was cancelled by its caller."""

STOP_CHECK_S: Final = 0.25
RECONNECT_S: Final = 0.5
POLL_S: Final = 1.0
"""Pause between looks where no notices come through."""

_ACTION: Final = {"action": "news_away"}


@dataclass(frozen=True, slots=True)
class Notice:
    """`job_id` is None after a (re)connect: anything may have been missed, so look again."""

    channel: str
    job_id: UUID | None


def listen(url: str, channels: Sequence[str], stop: threading.Event) -> Iterator[Notice]:
    """Notices as they are committed, till `stop` is set, over one connection of its own.

    Reconnects by itself, whatever becomes of the connection. The first notice of each channel after
    every connect has no job id; whoever waits on rows reads them again then. Through a pooler,
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
                with suppress(ValueError):  # anybody may notify, with any text
                    yield Notice(notify.channel, UUID(notify.payload))
        if link.found.is_pooled:
            stop.wait(POLL_S)
            link.execute("SELECT 1")
