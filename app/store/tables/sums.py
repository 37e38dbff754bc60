"""Sums by hour, and what is still to be added to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import BigInteger, Column, SmallInteger, Table, Text, UniqueConstraint

from app.jobs import FINAL_STATES
from app.store.tables.columns import AGEING, BUSY, Money, Stamp, Sum, metadata


def _counts(**named: str) -> list[Column[Any]]:
    """Whole numbers in sums, each with its comment."""
    return [
        Column(name, BigInteger, nullable=False, comment=comment) for name, comment in named.items()
    ]


def _sums(**named: str) -> list[Column[Any]]:
    return [Column(name, Sum, nullable=False, comment=comment) for name, comment in named.items()]


def _hour(comment: str) -> Column[Any]:
    return Column("hour", Stamp, nullable=False, comment=f"Begin of the hour, in UTC, {comment}.")


@dataclass(frozen=True, slots=True)
class RollUp:
    """Sums of what happened in an hour, and what is to be added to them: the same columns.

    Whoever writes what is summed inserts deltas in the same transaction; see `app.store.usage`.
    """

    hours: Table
    deltas: Table
    by: tuple[str, ...]  #: what tells one row of the sums from another

    @property
    def sums(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.hours.columns if each.name not in self.by)


def _again(column: Column[Any]) -> Column[Any]:
    return Column(column.name, column.type, nullable=column.nullable, comment=column.comment)


def _roll_up(name: str, by: list[Column[Any]], sums: list[Column[Any]], comment: str) -> RollUp:
    keys = tuple(column.name for column in by)
    hours = Table(
        f"{name}_hours",
        metadata,
        *map(_again, (*by, *sums)),
        UniqueConstraint(*keys, name=f"{name}_hours_key", postgresql_nulls_not_distinct=True),
        # The rows of this hour are added to every few seconds; all others are only read.
        postgresql_with={"fillfactor": "85"} | AGEING,
        comment=comment,
    )
    deltas = Table(
        f"{name}_deltas",
        metadata,
        *map(_again, (*by, *sums)),
        postgresql_with=BUSY,
        comment=f"What is still to be added to {hours.name}; rescue does so every few seconds.",
    )
    return RollUp(hours, deltas, keys)


usage_sums = _roll_up(
    "usage",
    [
        _hour("they ended in"),
        Column("tenant", Text, nullable=False, comment="Owner of the jobs."),
        Column("model", Text, nullable=False, comment="Model of the jobs."),
        Column("priority", SmallInteger, nullable=False, comment="Priority of the jobs."),
        Column("price_id", Text, comment="Price that was charged; null if they never ran."),
        Column("currency", Text, comment="ISO 4217 code; null if they never ran."),
    ],
    [
        *_counts(**{f"jobs_{state}": f"Jobs that are {state}." for state in sorted(FINAL_STATES)}),
        *_counts(
            jobs_ran="Jobs that were in a batch.",
            batch_jobs="Sizes of these batches, summed: by jobs_ran the mean that a job saw.",
            input_tokens="Tokens of prompts, cached ones too.",
            cached_tokens="Of these, found in a prefix cache.",
            output_tokens="Tokens generated.",
            jobs_measured="Jobs whose energy was measured.",
            jobs_estimated="Jobs whose energy was estimated.",
        ),
        *_sums(
            device_ns="Device time billed, in nanoseconds.",
            wasted_ns="Device time of last attempts that nobody pays, in nanoseconds.",
            cost="What they were charged, in `currency`; nothing where the device has no price.",
            upstream_cost="Of `cost`: what servers elsewhere asked for them.",
            charge="What their tokens cost by the price's tariff, in `currency`.",
            energy_nj="Energy of jobs whose energy is known, in nanojoules.",
            wasted_nj="Energy of their last attempts without an answer, in nanojoules.",
            carbon_ug="CO2-equivalent of energy_nj where its intensity is set, in micrograms.",
        ),
    ],
    "What ended jobs used, by hour. Read it through the view `usage`. Never removed.",
)

batch_sums = _roll_up(
    "batch_usage",
    [
        _hour("they were claimed in"),
        Column("model", Text, nullable=False, comment="Model of the batches."),
    ],
    [
        *_counts(
            batches="Admission batches of which something has ended.",
            jobs="Jobs claimed in them.",
            sequences="Sequences of those jobs.",
        ),
        *_sums(
            useful_tokens="Prompt and output tokens that were asked for.",
            padded_tokens="Token positions computed, padding included.",
        ),
    ],
    "How batches were filled, by hour. Read it through the view `batch_usage`. Never removed.",
)


device_sums = _roll_up(
    "device_time",
    [
        _hour("their windows closed in"),
        Column("device", Text, nullable=False, comment="Device as its driver names it."),
        Column("price_id", Text, comment="Price of the device; null if it has none."),
        Column("currency", Text, comment="ISO 4217 code of the price."),
        Column("price", Money, comment="Money per device and hour."),
    ],
    _sums(
        up_ns="Time that devices were up, in nanoseconds: the sum of the next six.",
        load_ns="Loading models, in nanoseconds.",
        busy_ns="Billed by attempts, in nanoseconds.",
        idle_ns="Nothing to run, in nanoseconds.",
        waste_ns="Computed in vain, in nanoseconds.",
        overhead_ns="Between steps, and between engine processes, in nanoseconds.",
        open_ns="Computed for attempts settled later, less what was so before, in nanoseconds.",
        energy_nj="Energy of that time where it is known, in nanojoules: the sum of the next six.",
        load_nj="Of load_ns, in nanojoules.",
        busy_nj="Of answers, in nanojoules.",
        idle_nj="Of idle_ns, in nanojoules.",
        waste_nj="Spent in vain, in nanojoules.",
        overhead_nj="Of overhead_ns, in nanojoules.",
        open_nj="For attempts settled later, less what was so before, in nanojoules.",
    ),
    "Where the time of devices went, by hour. Read it through the view `device_time`. Never"
    " removed.",
)

ROLL_UPS = (usage_sums, batch_sums, device_sums)
