"""How values go into the database and come back.

In: records as one JSON array, so a statement takes any number of rows in a single parameter.
`jsonb_populate_recordset(NULL::jobs, …)` turns it back into typed rows, so column types are written
once, in `tables`.

Back: whatever a column's type allows, loading it is no error. The driver would fail for a time that
Python has no word for, or JSON that it cannot hold, and so fail all rows of the answer for one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from psycopg import Connection, Error, adapters, pq
from psycopg.abc import AdaptContext, Buffer
from psycopg.adapt import Loader
from psycopg.types.json import set_json_loads

from app.errors import JobUnreadable, NotStorable
from app.jobs import EARLIEST, LATEST, JobState

_ESCAPE = re.compile(r"\\(?:u0000|.)")


def encode(records: Iterable[Any]) -> str:
    """Dataclasses with slots as a JSON array of objects; fields that are None are left out.

    jsonb can hold neither NUL nor half of a surrogate pair, and one such character would fail the
    commit of everybody in the group. They are replaced by U+FFFD and "?". What JSON has no word
    for, such as NaN, raises `NotStorable`: it is a bug of whoever made the record.
    """
    rows = [
        {name: value for name in record.__slots__ if (value := getattr(record, name)) is not None}
        for record in records
    ]
    try:
        text = json.dumps(
            rows, ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_plain
        )
    except (TypeError, ValueError, RecursionError) as error:
        raise NotStorable(f"A record cannot be stored as JSON: {type(error).__name__}") from None
    if r"\u0000" in text:
        # Whole escapes are matched, so that an escaped backslash before "u0000" is left alone.
        text = _ESCAPE.sub(lambda e: "\ufffd" if e[0] == r"\u0000" else e[0], text)
    return text.encode("utf-8", "replace").decode()


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    raise TypeError


def state_of(word: str) -> JobState | JobUnreadable:
    """A job's state as its row has it; the error if the word is not known here."""
    try:
        return JobState(word)
    except ValueError:
        return JobUnreadable("The job's row cannot be read: its state is not known here.")


class Unreadable:
    """Stands for JSON that cannot be loaded: numbers without end, or nested too deep."""


UNREADABLE: Final = Unreadable()


def load_all(connection: Connection[Any]) -> None:
    """Let this connection load every value that its columns can hold."""
    connection.adapters.register_loader(_STAMP, _StampLoader)
    set_json_loads(_loads, connection)


_STAMP: Final = adapters.types["timestamptz"].oid
_Stamps: Final = adapters.get_loader(_STAMP, pq.Format.TEXT)


class _StampLoader(Loader):
    """Times beyond `LATEST` or before `EARLIEST` in Python's eyes, infinity too, become these."""

    def __init__(self, oid: int, context: AdaptContext | None = None) -> None:
        super().__init__(oid, context)
        assert _Stamps is not None
        self._stamps: Any = _Stamps(oid, context)

    def load(self, data: Buffer) -> datetime:
        try:
            stamp: datetime = self._stamps.load(data)
        except (Error, ValueError, OverflowError):
            text = bytes(data)
            return EARLIEST if text.startswith(b"-") or text.endswith(b"BC") else LATEST
        return stamp


def _loads(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return UNREADABLE
