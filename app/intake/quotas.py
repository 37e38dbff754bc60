"""Quotas: how much of the system a tenant takes at most.

Jobs are held against them in the transaction that writes them, one submission of a tenant at a
time: a limit is never passed, however many API processes there are, and what was submitted before
and is only named again counts for nothing. Limits are read anew every few seconds, so that they may
be changed while all runs. A tenant without any costs nothing.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from app.books.work import Size
from app.errors import BudgetSpent, QuotaExceeded
from app.store import quotas as store
from app.store.database import Database
from app.store.isolation import Connection
from app.store.quotas import Holding, Quotas
from app.store.tenancy import acting_for

FRESH_S: Final = 5.0
"""How long limits that were read count."""
MOST_KNOWN: Final = 10_000

COME_BACK_S: Final = 10
"""When jobs that wait or run may have made room."""
MAX_RETRY_AFTER_S: Final = 60


class Tenants:
    """Knows the quotas of tenants. Threads may share it."""

    def __init__(self, database: Database, price: Callable[[str, Size, str], Decimal]) -> None:
        """`price` is what jobs of a model, of this size, are likely to cost in a currency."""
        self._database = database
        self._price = price
        self._lock = threading.Lock()
        self._known: dict[str, tuple[float, Quotas]] = {}

    def known(self, tenant: str) -> Quotas | None:
        """As they were read a moment ago; None if they were not."""
        with self._lock:
            read_s, known = self._known.get(tenant, (-math.inf, store.NO_QUOTAS))
        return known if time.monotonic() < read_s + FRESH_S else None

    def of(self, tenant: str) -> Quotas:
        """As of a moment ago. Raises `Unavailable`."""
        if (known := self.known(tenant)) is not None:
            return known
        now_s = time.monotonic()
        with acting_for(tenant), self._database.begin() as connection:
            known = store.find(connection, tenant)
        with self._lock:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[tenant] = now_s, known
        return known

    def bounded(self, tenants: Iterable[str]) -> dict[str, Quotas]:
        """Those of these tenants whose jobs are held against something, in an order that all keep
        to."""
        found = {tenant: self.of(tenant) for tenant in sorted(set(tenants))}
        return {tenant: quotas for tenant, quotas in found.items() if quotas.bounds_jobs}

    def enforce(self, connection: Connection, bounded: Mapping[str, Quotas], now: datetime) -> None:
        """Once jobs of these tenants are written, and right before the commit: whoever waits for a
        turn then sees what was committed before, and nobody waits for the writing of others.
        Raises `QuotaExceeded`."""
        for tenant, quotas in bounded.items():
            store.take_turn(connection, tenant)
            held = store.holding(connection, tenant)
            refuse_excess(quotas, held)
            self._refuse_unpaid(connection, tenant, quotas, held, now)

    def _refuse_unpaid(
        self, connection: Connection, tenant: str, quotas: Quotas, held: Holding, now: datetime
    ) -> None:
        if quotas.currency is None:
            return
        currency = quotas.currency
        likely = sum(
            (self._price(model, size, currency) for model, size in held.sizes.items()), Decimal(0)
        )
        for limit, most, since, until in spans(quotas, now):
            spent = store.spent(connection, tenant, currency, since)
            refuse_overspending(limit, most, spent, likely, currency, (until - now).total_seconds())


def refuse_excess(quotas: Quotas, held: Holding) -> None:
    """Raises `QuotaExceeded` if a tenant has more open than it may. Pure."""
    if quotas.max_open_jobs is not None and held.jobs > quotas.max_open_jobs:
        raise QuotaExceeded(
            f"Your limit is {quotas.max_open_jobs} jobs that wait or run at once "
            "(max_open_jobs), and these would be more.",
            limit="max_open_jobs",
            retry_after=COME_BACK_S,
        )
    if quotas.max_queued_tokens is not None and held.queued_tokens > quotas.max_queued_tokens:
        raise QuotaExceeded(
            f"Your limit is {quotas.max_queued_tokens} tokens of jobs that wait, with those that "
            "they may generate (max_queued_tokens), and these would be more.",
            limit="max_queued_tokens",
            retry_after=COME_BACK_S,
        )


def refuse_overspending(
    limit: str, most: Decimal, spent: Decimal, likely: Decimal, currency: str, left_s: float
) -> None:
    """Raises `BudgetSpent` if what was spent, and what is likely to be for open jobs, is more than
    `most`, which counts anew in `left_s`. Pure."""
    if spent < most and spent + likely <= most:
        return
    retry_after = max(1, math.ceil(left_s)) if left_s <= MAX_RETRY_AFTER_S else None
    raise BudgetSpent(
        f"Your limit is {_told(most)} {currency} ({limit}): {_told(spent)} are spent, and your "
        f"open jobs, these included, are likely to cost {_told(likely)} more.",
        limit=limit,
        retry_after=retry_after,
    )


def spans(quotas: Quotas, now: datetime) -> list[tuple[str, Decimal, datetime, datetime]]:
    """The caps of a tenant: each one's name and most, and from when to when it counts, in UTC."""
    day = now.replace(hour=0, minute=0, second=0, microsecond=0)
    month = day.replace(day=1)
    next_month = (month + timedelta(days=32)).replace(day=1)
    caps = [
        ("max_cost_per_day", quotas.max_cost_per_day, day, day + timedelta(days=1)),
        ("max_cost_per_month", quotas.max_cost_per_month, month, next_month),
    ]
    return [(name, most, since, until) for name, most, since, until in caps if most is not None]


def _told(money: Decimal) -> str:
    return f"{round(money, 9).normalize():f}"
