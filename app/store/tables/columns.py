"""What tables have in common: types, columns and checks."""

from __future__ import annotations

import enum
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Index,
    Integer,
    MetaData,
    Numeric,
    SmallInteger,
    Text,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.books.cost import HOUR_NS
from app.books.energy import EnergyMethod
from app.jobs import DEFAULT_TENANT, EARLIEST, LATEST, JobState

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

Stamp = DateTime(timezone=True)
Money = Numeric(20, 9)
Sum = Numeric()
"""A sum that cannot overflow, whatever its parts are."""


BUSY = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.02",
    "autovacuum_vacuum_cost_limit": "2000",
}
"""A queue turns its rows over many times its size: vacuum long before a fifth is dead or new, and
ten times as fast as by default. Counting reads only the index where vacuum has been."""
AGEING = {"autovacuum_vacuum_scale_factor": "0.05", "autovacuum_vacuum_cost_limit": "2000"}
"""For tables whose rows are written once or twice, and deleted by the page when they are old."""


# Postgres reads a table's CHECKs anew, as text, for each statement that writes to it: for one job
# that was a third of what its statements took. So these say in few words what holds for many.


def one_of(column: str, values: type[enum.StrEnum] | frozenset[JobState]) -> CheckConstraint:
    """The column holds a word of this vocabulary."""
    return CheckConstraint(f"{column} = ANY ('{{{','.join(sorted(values))}}}')", name=column)


def in_range(*stamps: str) -> CheckConstraint:
    """Times that every client can read, see `app.jobs.bounded`; infinity is none of them."""
    each = ", ".join(stamps)
    first, last = f"{EARLIEST.date()}Z", f"{LATEST.date()}Z"
    return CheckConstraint(
        f"least({each}) >= '{first}' AND greatest({each}) <= '{last}'", name="stamps"
    )


def not_negative(*counts: str) -> CheckConstraint:
    """Each is the name of a column, or several of one type as the arguments of a function."""
    return CheckConstraint(" AND ".join(f"least({each}) >= 0" for each in counts), name="counts")


def device_cost(ns: str, per_hour: str) -> str:
    """SQL of the rule in `app.books.cost`: money for device time, of terms that are not negative.

    In whole nano-units, so that no digit is lost: (2 · ns · P + H) div 2H.
    """
    twice = f"2 * CAST({ns} AS numeric) * ({per_hour} * 1000000000)"
    return f"div({twice} + {HOUR_NS}, {2 * HOUR_NS}) * 0.000000001"


def bill(**of_cost: Any) -> list[Column[Any]]:
    """What an attempt and its result are billed, and what that can be computed again from."""
    return [
        Column(
            "cost",
            Money,
            comment="What its device time costs at `price`, by the rule of app.books.cost, and "
            "`upstream_cost`; null if the device has no price.",
            **of_cost,
        ),
        Column("upstream_cost", Money, comment="Of `cost`: what servers elsewhere asked for it."),
        Column("currency", Text, comment="ISO 4217 code; null if the job never ran."),
        Column("price_id", Text, comment="Row of `prices` that was charged."),
        Column("price", Money, comment="Money per device and hour, by that row."),
    ]


def recomputable() -> list[CheckConstraint]:
    billed = f"{device_cost('device_ns', 'price')} + coalesce(upstream_cost, 0)"
    return [
        CheckConstraint(
            f"CASE WHEN price IS NULL THEN coalesce(cost, 0) = 0 ELSE cost = {billed} END",
            name="cost",
        ),
        CheckConstraint("num_nulls(price, price_id, currency) IN (0, 3)", name="price"),
    ]


def energy_columns() -> list[Column[Any]]:
    return [
        Column(
            "energy_nj",
            BigInteger,
            comment="Energy of its answer, in nanojoules, by the rule of app.books.energy; null if "
            "nothing is known of it.",
        ),
        Column(
            "wasted_nj",
            BigInteger,
            comment="Energy without an answer in time, in nanojoules; null likewise.",
        ),
    ]


def energy_source() -> list[Column[Any]]:
    """How an energy is known, beside it."""
    return [
        Column(
            "energy_method",
            Text,
            nullable=False,
            server_default=EnergyMethod.ABSENT,
            comment="How that is known: measured, estimated or absent.",
        ),
        Column(
            "energy_boundary",
            Text,
            comment="Whose energy it is a part of: gpu, cpu packages or device; null if absent.",
        ),
    ]


def known_energy() -> CheckConstraint:
    return CheckConstraint(
        "num_nulls(energy_nj, wasted_nj)"
        " = CASE WHEN coalesce(energy_method, 'absent') = 'absent' THEN 2 ELSE 0 END",
        name="energy",
    )


def tenant_column(comment: str) -> Column[Any]:
    return Column("tenant", Text, nullable=False, server_default=DEFAULT_TENANT, comment=comment)


def labels_column() -> Column[Any]:
    return Column(
        "metadata",
        JSONB,
        nullable=False,
        server_default=text("'{}'::jsonb"),
        comment="The caller's own labels, returned as they came.",
    )


def terms() -> list[Column[Any]]:
    """How a job is to be run, and what its caller notes of it: in its row as long as it is open,
    then in its result."""
    return [
        Column(
            "url", Text, comment="OpenAI-style path of the request; null if it was never readable."
        ),
        Column(
            "format",
            SmallInteger,
            nullable=False,
            server_default=text("1"),
            comment="Version of the request's format; only workers that know it take the job.",
        ),
        Column("source", Text, nullable=False, comment="Where it came from: api or message."),
        labels_column(),
        Column(
            "priority",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="0 (served first) to 9.",
        ),
        Column("max_output_tokens", Integer, comment="Most output tokens allowed, if counted."),
        Column("not_before", Stamp, nullable=False, comment="May be claimed from this time on."),
        Column("deadline", Stamp, comment="Expires if not finished by this time; null is never."),
        Column(
            "time_limit_s", Double, comment="Longest time an attempt may take; null is any time."
        ),
        Column(
            "stream_events",
            Boolean,
            nullable=False,
            server_default=text("false"),
            comment="Its tokens are put into a stream in Redis as they come.",
        ),
        Column(
            "stored",
            Boolean,
            nullable=False,
            server_default=text("false"),
            comment="A chat that was sent with `store`: a stored chat completion, once completed.",
        ),
        Column(
            "max_attempts",
            SmallInteger,
            nullable=False,
            server_default=text("3"),
            comment="Charged attempts after which the job fails.",
        ),
        Column(
            "quoted_ms",
            Double,
            comment="Time to its end as it was estimated when it was accepted, in ms, from then or "
            "from not_before; null if nothing was known.",
        ),
        Column(
            "quoted_p90_ms",
            Double,
            comment="The same, within which nine of ten jobs were to end: its p90, in ms.",
        ),
        Column("webhook_url", Text, comment="Who is told of its end; null if it names nobody."),
    ]


def tries() -> list[Column[Any]]:
    return [
        Column(
            "attempt",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts opened so far; the number of the last one.",
        ),
        Column(
            "attempts_charged",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts that count towards max_attempts.",
        ),
        Column(
            "losses",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="Times its worker was lost while it ran; a suspect from "
            "app.jobs.SUSPECT_AFTER on.",
        ),
    ]


def delivery_columns() -> list[Column[Any]]:
    return [
        Column("enqueued_at", Stamp, comment="Message last sent; null if none is under way."),
        Column("received_at", Stamp, comment="A worker received it; null if none has it."),
        Column(
            "wake_count",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="Times the message was sent again because it seemed lost.",
        ),
        Column("cancel_requested_at", Stamp, comment="Cancelled by the caller while running."),
        Column(
            "purged_at",
            Stamp,
            comment="What it says was removed by the caller; null if it was not.",
        ),
    ]


def by_metadata(table: str) -> Index:
    """Jobs without labels are left out: they would all be one entry of it."""
    return Index(
        f"{table}_by_metadata",
        "metadata",
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata <> '{}'"),
    )
