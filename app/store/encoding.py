"""Records as one JSON array: a statement takes any number of rows in a single parameter.

`jsonb_populate_recordset(NULL::jobs, …)` turns it back into typed rows, so column types are written
once, in `tables`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from datetime import datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from app.errors import NotStorable

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
