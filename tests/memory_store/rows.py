"""Rows as dicts: their defaults, and how they come out of what the store encodes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from sqlalchemy import DateTime, Numeric, Uuid

from app.jobs import Kind
from app.requests import bodies
from app.store.tables import jobs, metadata

Row = dict[str, Any]
Table = dict[UUID, Row]
Params = Mapping[str, Any]

KEYS: Final = {
    "jobs": "id",
    "attempts": "id",
    "results": "job_id",
    "batches": "id",
    "workers": "id",
    "windows": "worker_id",  # and the number
}
TABLES: Final = {**metadata.tables, "jobs": jobs}
"""Jobs are here as their view shows them: one row each, open or ended, request included."""

FINAL: Final = ("completed", "failed", "cancelled", "expired")


def blank(table: str) -> Row:
    """A row with nothing but the columns' defaults."""
    return dict(_BLANKS[table])


_DEFAULTS: Final = {
    "jobs": {
        "tenant": "default", "metadata": {}, "priority": 0, "attempt": 0, "attempts_charged": 0,
        "max_attempts": 3, "losses": 0, "wake_count": 0, "format": 1, "stream_events": False,
        "stored": False,
    },
    "attempts": {"tenant": "default"},
    "results": {
        "tenant": "default", "device_ns": 0, "wasted_ns": 0, "cost": Decimal(0), "metadata": {},
        "priority": 0, "attempt": 0, "attempts_charged": 0, "max_attempts": 3, "losses": 0,
        "wake_count": 0, "format": 1, "stream_events": False, "stored": False,
        "energy_method": "absent",
    },
    "batches": {"job_ids": [], "useful_tokens": 0, "padded_tokens": 0, "device_ns": 0},
    "workers": {"engine": {}},
    "windows": {},
}  # fmt: skip

_BLANKS: Final = {
    table: dict.fromkeys(TABLES[table].columns.keys()) | _DEFAULTS[table] for table in KEYS
}


def _parsers(table: str) -> dict[str, Callable[[Any], Any]]:
    parsers: dict[str, Callable[[Any], Any]] = {}
    for column in TABLES[table].columns:
        for type_, parser in _PARSERS.items():
            if isinstance(column.type, type_):
                parsers[column.name] = parser
    return parsers


_PARSERS: Final[dict[Any, Callable[[Any], Any]]] = {
    Uuid: UUID,
    DateTime: datetime.fromisoformat,
    Numeric: lambda given: Decimal(str(given)),
}
_PARSERS_OF: Final[dict[str | None, dict[str, Callable[[Any], Any]]]] = {
    None: {"job_id": UUID, "attempt_id": UUID, "created_at": datetime.fromisoformat},
    **{table: _parsers(table) for table in KEYS},
}
for _parse in _PARSERS_OF.values():  # Double is a Numeric, and stays a float
    for _name in [name for name in _parse if name.endswith("_ms")]:
        del _parse[_name]


def records(table: str | None, encoded: str) -> list[Row]:
    """What `app.store.encoding.encode` encoded, with the columns' types."""
    parsers = _PARSERS_OF[table]
    return [
        {name: parsers[name](value) if name in parsers else value for name, value in row.items()}
        for row in json.loads(encoded)
    ]


def ms(start: datetime, end: datetime | None) -> float | None:
    """`elapsed_ms`."""
    return None if end is None else max(0.0, (end - start) / timedelta(milliseconds=1))


def of_tenant(table: Table, given: Params) -> list[Row]:
    """The rows of a tenant."""
    return [row for row in table.values() if row["tenant"] == given["tenant"]]


def is_waiting(job: Row) -> bool:
    """`delivery.WAITING`: whether it waits in a queue, as far as Postgres knows."""
    return job["state"] == "queued" and job["received_by"] is None


def is_known(job: Row) -> bool:
    """`delivery.KNOWN`: whether this version reads it."""
    return job["kind"] in set(Kind) and bodies.readable(job["format"])
