"""What each tenant may have: its limits, and what it has of each.

Nothing is counted beside the jobs themselves: what was cancelled, expired or failed is not open any
more, and so is given back at that moment, to the job and to the token.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from datetime import datetime
from decimal import Decimal
from typing import Any, Final

from sqlalchemy import Connection, text

from app.books.work import Size
from app.store import admin_log
from app.store.tables import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Quotas:
    """A tenant's weight and limits; None is no limit. Field names are columns of `tenants`."""

    weight: int = 1
    max_requests_per_minute: int | None = None
    max_open_jobs: int | None = None
    max_queued_tokens: int | None = None
    max_cost_per_day: Decimal | None = None
    max_cost_per_month: Decimal | None = None
    currency: str | None = None

    @property
    def bounds_jobs(self) -> bool:
        """Whether jobs are held against any of them when they are submitted."""
        caps = (self.max_cost_per_day, self.max_cost_per_month)
        return any(each is not None for each in (self.max_open_jobs, self.max_queued_tokens, *caps))


NO_QUOTAS: Final = Quotas()
_COLUMNS: Final = tuple(field.name for field in fields(Quotas))
_NAMED: Final = ", ".join(_COLUMNS)

_FIND: Final = text(f"SELECT {_NAMED} FROM tenants WHERE name = :tenant")
_ALL: Final = text(f"SELECT name, {_NAMED} FROM tenants ORDER BY name")
_KEEP: Final = text(f"""
    INSERT INTO tenants (name, {_NAMED})
    VALUES (:name, {", ".join(f":{name}" for name in _COLUMNS)})
    ON CONFLICT (name) DO UPDATE SET
        {", ".join(f"{name} = excluded.{name}" for name in _COLUMNS)}
""")


def find(connection: Connection, tenant: str) -> Quotas:
    """Those of a tenant; of one that has no row there are none."""
    row = connection.execute(_FIND, {"tenant": tenant}).first()
    return Quotas(*row) if row else NO_QUOTAS


def listed(connection: Connection) -> dict[str, Quotas]:
    """Of all tenants, by name."""
    return {name: Quotas(*row) for name, *row in connection.execute(_ALL)}


def keep(connection: Connection, tenant: str, quotas: Quotas, *, actor: str) -> None:
    """Make them a tenant's, who need not be known, and note who did so."""
    given = asdict(quotas)
    connection.execute(_KEEP, {"name": tenant} | given)
    told = {name: value if isinstance(value, int) else str(value) for name, value in given.items()}
    details = {name: value for name, value in told.items() if given[name] is not None}
    admin_log.note(connection, actor, "tenant.set", tenant, tenant=tenant, details=details)


# One submission of a tenant at a time, across all processes: none is held against what another is
# about to write.
_TAKE_TURN: Final = text("SELECT pg_advisory_xact_lock(hashtextextended('quota ' || :tenant, 0))")


def take_turn(connection: Connection, tenant: str) -> None:
    """Wait until no other transaction has this tenant's turn; until the end of this one."""
    connection.execute(_TAKE_TURN, {"tenant": tenant})


@dataclass(frozen=True, slots=True)
class Holding:
    """What a tenant has open."""

    jobs: int  #: queued and running
    queued_tokens: int
    sizes: dict[str, Size]  #: by model, with all the output that is allowed


# The open jobs of a tenant. Where it is named the planner sees that a partial index has them all.
_OPEN: Final = """
    SELECT model, count(*) AS jobs,
        coalesce(sum(input_tokens), 0) AS input_tokens,
        coalesce(sum(max_output_tokens), 0) AS output_tokens,
        coalesce(sum(coalesce(input_tokens, 0) + coalesce(max_output_tokens, 0))
            FILTER (WHERE state = 'queued'), 0) AS queued_tokens
    FROM open_jobs WHERE tenant = :tenant {} GROUP BY model
"""
_OPEN_OF_NAMED: Final = text(_OPEN.format(f"AND tenant <> '{DEFAULT_TENANT}'"))
_OPEN_OF_DEFAULT: Final = text(_OPEN.format(""))


def holding(connection: Connection, tenant: str) -> Holding:
    """What is open of a tenant, what this transaction wrote included. Reads its open rows."""
    statement = _OPEN_OF_DEFAULT if tenant == DEFAULT_TENANT else _OPEN_OF_NAMED
    rows: list[Any] = list(connection.execute(statement, {"tenant": tenant}))
    return Holding(
        sum(row.jobs for row in rows),
        int(sum(row.queued_tokens for row in rows)),
        {
            row.model: Size(row.jobs, float(row.input_tokens), float(row.output_tokens))
            for row in rows
        },
    )


_SPENT: Final = text("""
    SELECT coalesce(sum(cost), 0) FROM usage
    WHERE hour >= :since AND tenant = :tenant AND currency = :currency
""")


def spent(connection: Connection, tenant: str, currency: str, since: datetime) -> Decimal:
    """What the tenant's jobs that ended in that hour or later cost, as `usage` sums it."""
    given = {"tenant": tenant, "currency": currency, "since": since}
    return Decimal(connection.scalar(_SPENT, given) or 0)
