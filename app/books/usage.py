"""What is asked of usage, and what follows from its sums. Pure.

Usage is kept by the hour of UTC in which jobs ended. Days and months may be those of any zone that
is whole hours away.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import Context, Decimal
from difflib import get_close_matches
from itertools import groupby
from typing import Final
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from app.books.cost import MILLION, NANO, device_cost
from app.books.energy import EnergyMethod
from app.errors import RequestError
from app.jobs import FINAL_STATES, JobState, bounded

SPANS: Final = ("hour", "day", "month")
COLUMNS: Final = ("model", "tenant", "priority", "price")
LABEL: Final = "metadata."
"""`metadata.customer` is the customer among a job's metadata."""

DEFAULT_DAYS: Final = 30
MAX_TOP: Final = 1_000
MAX_KEYS: Final = 6
"""Keys of one question."""

_EXACT: Final = Context(prec=80)
"""Sums have no most."""

HOUR: Final = timedelta(hours=1)
HALF_YEAR: Final = timedelta(days=182)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """Which usage is asked for, and summed by what. Times are whole hours of UTC."""

    since: datetime
    until: datetime  #: that hour is not in it
    by: tuple[str, ...] = ()  #: a span at most, columns, labels
    zone: str = "UTC"  #: whose days and months
    top: int = 50  #: groups that are told apart, those with the most device time; others are summed
    tenant: str | None = None
    model: str | None = None
    priority: int | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)  #: among others

    @property
    def span(self) -> str | None:
        return next((key for key in self.by if key in SPANS), None)

    @property
    def keys(self) -> tuple[str, ...]:
        """What is grouped by beside the time."""
        return tuple(key for key in self.by if key not in SPANS)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names among the metadata that it is grouped by."""
        return tuple(key.removeprefix(LABEL) for key in self.keys if key.startswith(LABEL))

    @property
    def tells_batches(self) -> bool:
        """Whether its groups are such as batches belong to."""
        is_of_some = self.tenant is not None or self.priority is not None or self.metadata
        return set(self.keys) <= {"model"} and not is_of_some

    @property
    def reads_labels(self) -> bool:
        """Whether it can only be answered from the jobs themselves."""
        return bool(self.labels or self.metadata)


@dataclass(frozen=True, slots=True)
class Filling:
    """How batches were filled. A batch may mix tenants and priorities, and so is told of models."""

    batches: int
    sequences: int
    useful_tokens: int
    padded_tokens: int  #: positions that were computed, padding included

    @property
    def mean_sequences(self) -> float | None:
        return self.sequences / self.batches if self.batches else None

    @property
    def padding_share(self) -> float | None:
        """Of what was computed, the part that nobody asked for."""
        if not self.padded_tokens:
            return None
        return max(0.0, 1 - self.useful_tokens / self.padded_tokens)

    def __add__(self, other: Filling) -> Filling:
        return Filling(
            self.batches + other.batches,
            self.sequences + other.sequences,
            self.useful_tokens + other.useful_tokens,
            self.padded_tokens + other.padded_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the jobs of one group and currency used. Those that never ran have no currency."""

    group: Mapping[str, str | int | datetime | None]  #: by the keys of the question
    is_rest: bool = False  #: all groups beyond `top`; its keys but the time are None
    currency: str | None = None
    jobs: Mapping[JobState, int]
    jobs_ran: int = 0
    batch_jobs: int = 0
    input_tokens: int = 0  #: cached ones too, as OpenAI counts
    cached_tokens: int = 0
    output_tokens: int = 0
    device_ns: int = 0
    wasted_ns: int = 0
    cost: Decimal = Decimal(0)
    price: Decimal | None = None  #: per device and hour, if the question is by price
    upstream_cost: Decimal = Decimal(0)  #: of it, what servers elsewhere asked for
    charge: Decimal = Decimal(0)  #: by the tariff of tokens, where the price has one
    jobs_measured: int = 0  #: whose energy was measured
    jobs_estimated: int = 0  #: whose energy was estimated
    energy_nj: int = 0  #: of these
    wasted_nj: int = 0
    carbon_ug: int = 0
    real_cost: Decimal | None = None  #: with its part of what devices did beside; see `at_real_use`
    filling: Filling | None = None  #: of the batches claimed then, if the group has such

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens

    @property
    def cost_per_million_tokens(self) -> Decimal | None:
        """Of input and output alike, of device time that was billed: at full use."""
        return per_million(self.cost, self.tokens)

    @property
    def real_cost_per_million_tokens(self) -> Decimal | None:
        """The same with idle, load, waste and overhead: at real use."""
        return None if self.real_cost is None else per_million(self.real_cost, self.tokens)

    @property
    def jobs_with_energy(self) -> int:
        """Jobs whose energy is known."""
        return self.jobs_measured + self.jobs_estimated

    @property
    def energy_method(self) -> EnergyMethod:
        """How the energy of those is known: as well as that of the worst of them."""
        if not self.jobs_with_energy:
            return EnergyMethod.ABSENT
        return EnergyMethod.ESTIMATED if self.jobs_estimated else EnergyMethod.MEASURED

    @property
    def mean_batch_size(self) -> float | None:
        """Jobs of the batch that a job was in, itself included."""
        return self.batch_jobs / self.jobs_ran if self.jobs_ran else None


PARTS: Final = ("load", "busy", "idle", "waste", "overhead", "open")
"""Of the time that devices are up; they add up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTime:
    """Where the time of devices of one name and price went."""

    time: datetime | None
    device: str
    price_id: str | None
    currency: str | None
    price: Decimal | None  #: per device and hour
    up_ns: int
    load_ns: int
    busy_ns: int
    idle_ns: int
    waste_ns: int
    overhead_ns: int
    open_ns: int  #: computed for attempts that are settled later; negative if more of before is
    energy_nj: int = 0  #: of all that, as far as it is known; and by part
    load_nj: int = 0
    busy_nj: int = 0
    idle_nj: int = 0
    waste_nj: int = 0
    overhead_nj: int = 0
    open_nj: int = 0

    def ns(self, part: str) -> int:
        """Of one of the parts, or `up`."""
        return int(getattr(self, f"{part}_ns"))

    def nj(self, part: str) -> int:
        """Energy of one of the parts, or of `up`: all of it."""
        return self.energy_nj if part == "up" else int(getattr(self, f"{part}_nj"))

    def cost(self, part: str) -> Decimal | None:
        """What it costs; None if the device has no price."""
        return None if self.price is None else device_cost(self.ns(part), self.price)


@dataclass(frozen=True, slots=True)
class Answer:
    rows: list[Usage]
    devices: list[DeviceTime]  #: all there were in the period, whichever jobs are asked for


def per_million(cost: Decimal, tokens: int) -> Decimal | None:
    """Money for a million tokens; None where there are none."""
    if not tokens:
        return None
    exact = _EXACT.divide(_EXACT.multiply(cost, MILLION), tokens)
    return exact.quantize(NANO, context=_EXACT)


# ── questions ───────────────────────────────────────────────────────────────────────────────────


def parse_by(text: str) -> tuple[str, ...]:
    """`day,model,metadata.customer` as keys; raises `RequestError` for what is none of them."""
    keys = tuple(key.strip() for key in text.split(",") if key.strip())
    for key in keys:
        if key not in (*SPANS, *COLUMNS) and not (
            key.startswith(LABEL) and len(key) > len(LABEL) and "\0" not in key
        ):
            raise RequestError(_unknown(key), param="by")
    if len(set(keys)) < len(keys) or sum(key in SPANS for key in keys) > 1:
        raise RequestError("by takes each key once, and one of hour, day and month.", param="by")
    if len(keys) > MAX_KEYS:
        raise RequestError(f"by takes up to {MAX_KEYS} keys.", param="by")
    return keys


def _unknown(key: str) -> str:
    known = [*SPANS, *COLUMNS, f"{LABEL}KEY"]
    near = get_close_matches(key[:50], known, n=1)
    hint = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(known)}."
    shown = key if re.fullmatch(r"[\w.\-]{1,50}", key) else "This key"
    return f"{shown} is nothing that usage can be told by. {hint}"


def zone_of(name: str, *times: datetime) -> ZoneInfo:
    """The time zone of this name. Raises `RequestError` if there is none, or if at one of these
    times it is not whole hours from UTC: hours are the smallest that is kept."""
    try:
        zone = ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise RequestError("zone is a name as in Europe/Berlin or UTC.", param="zone") from None
    for time in times:
        offset = time.astimezone(zone).utcoffset() or timedelta()
        if offset % HOUR:
            raise RequestError(
                f"{name} is not whole hours away from UTC, by whose hours usage is kept.",
                param="zone",
            )
    return zone


def period_of(
    since: datetime | None, until: datetime | None, now: datetime, zone: str
) -> tuple[datetime, datetime]:
    """The period that is asked for, in UTC; what is left out is all until now, and 30 days.

    Raises `RequestError` for times without a zone, between hours, or in the wrong order.
    """
    for name, time in (("since", since), ("until", until)):
        if time is not None and time.tzinfo is None:
            raise RequestError(
                f"{name} must name its zone, as in 2027-01-31T00:00:00Z.", param=name
            )
        if time is not None and bounded(time) != hour_of(time):
            raise RequestError(
                f"{name} must be a full hour of UTC, as in 2027-01-31T12:00:00Z: usage is kept by "
                "the hour.",
                param=name,
            )
    end = hour_of(until) if until else hour_of(now) + HOUR
    begin = hour_of(since) if since else _midnight(end - timedelta(days=DEFAULT_DAYS), zone)
    if begin >= end:
        raise RequestError("since must be before until.", param="since")
    return begin, end


def hour_of(time: datetime) -> datetime:
    """The begin of its hour, in UTC."""
    return bounded(time).replace(minute=0, second=0, microsecond=0)


def halves_of(since: datetime, until: datetime) -> Iterator[datetime]:
    """Times at which a zone's distance from UTC may differ: some zones are half an hour further
    away in summer."""
    yield until
    for half in range(min(3, (until - since).days // HALF_YEAR.days + 1)):
        yield since + half * HALF_YEAR


def _midnight(time: datetime, zone: str) -> datetime:
    local = time.astimezone(zone_of(zone, time))
    return local.replace(hour=0, minute=0, second=0, microsecond=0).astimezone(UTC)


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def in_one_currency(rows: Iterable[Usage]) -> Iterator[Usage]:
    """Jobs that never ran cost nothing in any currency: where others of their group have one, they
    are counted with the first of these. Those that ran on a device without a price stay apart.
    Rows of a group come one after the other."""
    for _, group in groupby(rows, key=lambda row: (row.is_rest, *row.group.values())):
        of_group = list(group)
        ran = [row for row in of_group if row.currency is not None]
        never_ran = [row for row in of_group if row.currency is None]
        if ran and never_ran and not (never_ran[0].tokens or never_ran[0].device_ns):
            ran[0] = added(ran[0], never_ran[0])
            never_ran = []
        yield from ran + never_ran


def added(one: Usage, other: Usage) -> Usage:
    """Both in the group and currency of the first."""
    return replace(
        one,
        jobs={state: one.jobs[state] + other.jobs[state] for state in FINAL_STATES},
        jobs_ran=one.jobs_ran + other.jobs_ran,
        batch_jobs=one.batch_jobs + other.batch_jobs,
        input_tokens=one.input_tokens + other.input_tokens,
        cached_tokens=one.cached_tokens + other.cached_tokens,
        output_tokens=one.output_tokens + other.output_tokens,
        device_ns=one.device_ns + other.device_ns,
        wasted_ns=one.wasted_ns + other.wasted_ns,
        cost=_EXACT.add(one.cost, other.cost),
        upstream_cost=_EXACT.add(one.upstream_cost, other.upstream_cost),
        charge=_EXACT.add(one.charge, other.charge),
        jobs_measured=one.jobs_measured + other.jobs_measured,
        jobs_estimated=one.jobs_estimated + other.jobs_estimated,
        energy_nj=one.energy_nj + other.energy_nj,
        wasted_nj=one.wasted_nj + other.wasted_nj,
        carbon_ug=one.carbon_ug + other.carbon_ug,
    )


def at_real_use(
    rows: Iterable[Usage], devices: Iterable[DeviceTime], span: str | None
) -> Iterator[Usage]:
    """Rows with what devices cost beside what was billed: idle, load, waste and overhead are spread
    over all jobs of their time and currency, by what these cost on devices."""
    up: defaultdict[tuple[object, object], Decimal] = defaultdict(Decimal)
    busy: defaultdict[tuple[object, object], Decimal] = defaultdict(Decimal)
    for device in devices:
        if device.price is not None:
            up[device.time, device.currency] += device_cost(device.up_ns, device.price)
            busy[device.time, device.currency] += device_cost(device.busy_ns, device.price)
    for row in rows:
        key = row.group[span] if span else None, row.currency
        if busy[key] <= 0:
            yield row
            continue
        on_devices = _EXACT.multiply(row.cost - row.upstream_cost, up[key])
        spread = _EXACT.divide(on_devices, busy[key]).quantize(NANO, context=_EXACT)
        yield replace(row, real_cost=spread + row.upstream_cost)


def num_jobs(rows: Iterable[Usage]) -> int:
    return sum(sum(row.jobs.values()) for row in rows)
