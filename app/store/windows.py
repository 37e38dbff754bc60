"""Windows: where the time of each worker's device went, from one heartbeat to the next."""

from __future__ import annotations

from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, text

from app.books.energy import EnergyMethod
from app.store.encoding import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A window that was closed. Field names are columns of `windows`; times in nanoseconds,
    energy in nanojoules."""

    worker_id: UUID
    number: int
    up_ns: int
    load_ns: int
    busy_ns: int
    idle_ns: int
    waste_ns: int
    overhead_ns: int
    open_ns: int
    stray_ns: int
    owed_ns: int
    is_last: bool
    rounding: Decimal | None  #: None if the device has no price
    energy_nj: int = 0
    load_nj: int = 0
    busy_nj: int = 0
    idle_nj: int = 0
    waste_nj: int = 0
    overhead_nj: int = 0
    open_nj: int = 0
    stray_nj: int = 0
    energy_method: EnergyMethod = EnergyMethod.ABSENT
    energy_boundary: str | None = None
    counter_resets: int = 0


_CLOSED: Final = tuple(field.name for field in fields(Window))

# Write a window that was closed some time ago, with what its worker's row says of device and price.
_WRITE: Final = text(f"""
    INSERT INTO windows (
        {", ".join(_CLOSED)}, from_at, until_at, device, device_index, price_id, currency, price
    )
    SELECT
        {", ".join(f"given.{name}" for name in _CLOSED)},
        ended_at - given.up_ns / 1000 * interval '1 us', ended_at,
        workers.device, workers.device_index, workers.price_id, workers.currency,
        workers.price_per_device_hour
    FROM jsonb_populate_record(NULL::windows, CAST(:window AS jsonb) -> 0) AS given
    CROSS JOIN (SELECT now() - :age_s * interval '1 s' AS ended_at) AS clock
    JOIN workers ON workers.id = given.worker_id
    ON CONFLICT (worker_id, number) DO NOTHING
""")


def write(connection: Connection, window: Window, age_s: float) -> None:
    """Write a window that was closed `age_s` seconds ago. May be repeated."""
    connection.execute(_WRITE, {"window": encode([window]), "age_s": age_s})
