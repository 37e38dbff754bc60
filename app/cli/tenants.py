"""Tenants: `gristmill tenants list` and `set`: their weights and limits.

They go to Postgres, past the API: whoever may use them holds its password already.
"""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import click

from app.cli.keys import Tenant, actor, open_database
from app.cli.terminal import as_json_option, print_json, print_table, tell

NONE: Final = "none"
_MOST_MONEY: Final = Decimal("99999999999")
_LIMITS: Final = {
    "max_requests_per_minute": 2**31 - 1,
    "max_open_jobs": 2**31 - 1,
    "max_queued_tokens": 2**63 - 1,
}


class Limit(click.ParamType[Any]):
    """A whole number of 1 or more, or `none`."""

    name = "NUMBER"

    def __init__(self, most: int) -> None:
        self._most = most

    def convert(self, value: Any, *_: object) -> Any:
        if value == NONE:
            return NONE
        if not re.fullmatch(r"[0-9]{1,19}", str(value)) or not 1 <= int(value) <= self._most:
            raise click.BadParameter(f"{value} is neither 1 to {self._most} nor `{NONE}`.")
        return int(value)


class Money(click.ParamType[Any]):
    """An amount, or `none`."""

    name = "AMOUNT"

    def convert(self, value: Any, *_: object) -> Any:
        if value == NONE:
            return NONE
        try:
            amount = Decimal(str(value))
        except InvalidOperation:
            amount = Decimal("NaN")
        if not amount.is_finite() or not 0 <= amount <= _MOST_MONEY:
            raise click.BadParameter(f"{value} is neither an amount of money nor `{NONE}`.")
        return amount


def _currency(_: object, __: object, value: str | None) -> str | None:
    if value is not None and not re.fullmatch(r"[A-Z]{3}", value):
        raise click.BadParameter("a currency has three capital letters, as in USD.")
    return value


@click.group()
def tenants() -> None:
    """List tenants, and set their weights and limits."""


@tenants.command("list")
@as_json_option
def list_(as_json: bool) -> None:
    """List tenants with their weights and limits."""
    from app.store import quotas

    with open_database() as db, db.begin() as connection:
        found = quotas.listed(connection)
    if as_json:
        print_json([_told(name, each) for name, each in found.items()])
        return
    rows = [_told(name, each) for name, each in found.items()]
    columns = list(rows[0]) if rows else ["tenant"]
    print_table(
        [column.replace("_", " ") for column in columns],
        [tuple("" if value is None else str(value) for value in row.values()) for row in rows],
    )


@tenants.command("set")
@click.argument("name", type=Tenant())
@click.option("--weight", type=click.IntRange(1, 1000), help="Its share beside that of others.")
@click.option(
    "--max-requests-per-minute",
    type=Limit(_LIMITS["max_requests_per_minute"]),
    help="Calls that submit.",
)
@click.option(
    "--max-open-jobs", type=Limit(_LIMITS["max_open_jobs"]), help="Queued and running at once."
)
@click.option(
    "--max-queued-tokens",
    type=Limit(_LIMITS["max_queued_tokens"]),
    help="Of queued jobs, with those that they may generate.",
)
@click.option("--max-cost-per-day", type=Money(), help="In `--currency`; a day is UTC's.")
@click.option("--max-cost-per-month", type=Money(), help="The same of a month.")
@click.option("--currency", callback=_currency, help="Of both, as in USD.")
@as_json_option
def set_(name: str, as_json: bool, **given: Any) -> None:
    """Set a tenant's weight and limits, those that are named; `none` removes one.

    Running parts follow within a few seconds.
    """
    from app.store import quotas

    changes = {key: value for key, value in given.items() if value is not None}
    if not changes:
        raise click.UsageError("Say what to set: see --help.")
    wanted: dict[str, Any] = {
        key: None if value == NONE else value for key, value in changes.items()
    }
    with open_database() as db, db.begin() as connection:
        made = replace(quotas.find(connection, name), **wanted)
        caps = (made.max_cost_per_day, made.max_cost_per_month)
        if made.currency is None and caps != (None, None):
            raise click.UsageError("A cap needs its --currency.")
        quotas.keep(connection, name, made, actor=actor())
    if as_json:
        print_json(_told(name, made))
        return
    tell(f"The tenant {name} is set.")


def _told(name: str, quotas: Any) -> dict[str, Any]:
    told = {
        key: f"{value.normalize():f}" if isinstance(value, Decimal) else value
        for key, value in asdict(quotas).items()
    }
    return {"tenant": name} | told
