"""Prices, for good: what a price was is not changed, so that every bill can be read again.

The table only grows; a trigger refuses all else. Whoever reads `prices.toml` at start writes what
is new in it, and hears of what was edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Final

from sqlalchemy import Connection, text

from app.config.settings import PriceSettings
from app.errors import ConfigError
from app.store.database import Database
from app.store.encoding import encode


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrice:
    """An entry of prices.toml. Field names are columns of `prices`."""

    id: str
    per_device_hour: Decimal
    per_million_input_tokens: Decimal
    per_million_cached_input_tokens: Decimal
    per_million_output_tokens: Decimal
    batch_discount: Decimal
    currency: str
    device: str | None
    valid_from: datetime | None
    valid_until: datetime | None
    note: str


_NEVER_CHANGES: Final = (
    "per_device_hour",
    "per_million_input_tokens",
    "per_million_cached_input_tokens",
    "per_million_output_tokens",
    "batch_discount",
    "currency",
)
"""What a bill depends on. Notes and periods may be mended in the file; the table has the first."""

# Write prices that are not there.
_ADD: Final = text(f"""
    INSERT INTO prices (id, {", ".join(_NEVER_CHANGES)}, device, valid_from, valid_until, note)
    SELECT
        id, {", ".join(_NEVER_CHANGES)}, device, coalesce(valid_from, now()), valid_until, note
    FROM jsonb_populate_recordset(NULL::prices, CAST(:prices AS jsonb))
    ON CONFLICT (id) DO NOTHING
""")

# What prices were when they were first written.
_WERE: Final = text(f"SELECT id, {', '.join(_NEVER_CHANGES)} FROM prices WHERE id = ANY(:ids)")


def keep(connection: Connection, prices: Mapping[str, PriceSettings]) -> None:
    """Write the prices that are new; raises `ConfigError` for those that are not what they were."""
    given = {id_: _new(id_, price) for id_, price in prices.items()}
    connection.execute(_ADD, {"prices": encode(given.values())})
    problems = [
        f"{prices[row.id].where}: prices.{row.id}.{name} is {getattr(given[row.id], name)}, and "
        f"was {getattr(row, name)} when it was first used. A price in use is never edited: add "
        "one with a new id."
        for row in connection.execute(_WERE, {"ids": sorted(given)})
        for name in _NEVER_CHANGES
        if getattr(row, name) != getattr(given[row.id], name)
    ]
    if problems:
        raise ConfigError("\n".join(problems))


def _new(id_: str, price: PriceSettings) -> NewPrice:
    cached = price.per_million_cached_input_tokens
    return NewPrice(
        id=id_,
        per_device_hour=price.per_device_hour,
        per_million_input_tokens=price.per_million_input_tokens,
        per_million_cached_input_tokens=price.per_million_input_tokens
        if cached is None
        else cached,
        per_million_output_tokens=price.per_million_output_tokens,
        batch_discount=price.batch_discount,
        currency=price.currency,
        device=price.device,
        valid_from=_midnight(price.valid_from),
        valid_until=_midnight(price.valid_until),
        note=price.note,
    )


def _midnight(day: date | None) -> datetime | None:
    return None if day is None else datetime.combine(day, time(), UTC)


def keep_at(url: str, prices: Mapping[str, PriceSettings]) -> None:
    """`keep`, in a database that nobody is connected to yet."""
    with closing(Database(url)) as database, database.begin() as connection:
        keep(connection, prices)
