"""Whether the books balance: each rule, and the rows that break it."""

from __future__ import annotations

import contextlib
import sys
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import click

from app.cli.options import Time
from app.cli.terminal import FAILED, as_json_option, load_settings, print_json, print_table, say

if TYPE_CHECKING:
    from app.store.audit import Audit, Sums

NS: Final = 10**9


@click.command()
@click.option("--since", type=Time(is_ahead=False), help="Booked since then; or 90m, 12h, 7d ago.")
@click.option("--until", type=Time(is_ahead=False), help="Booked before then.")
@as_json_option
def audit(since: datetime | None, until: datetime | None, as_json: bool) -> None:
    """Check that the books balance, to the nanosecond, nano-unit and nanojoule.

    It reads the tables alone. Exits with 1 if they do not, and names the rows.
    """
    from app.store import audit as audits
    from app.store.database import Database

    if since and until and since >= until:
        raise click.UsageError("--since must be before --until.")
    url = load_settings().connected().database.url
    with contextlib.closing(Database(url)) as database:
        database.check_schema()
        with database.begin() as connection:
            found = audits.audit(connection, since, until)
    if as_json:
        print_json(told(found, since, until))
    else:
        _show(found)
    sys.exit(FAILED if found.differences else 0)


def told(found: Audit, since: datetime | None, until: datetime | None) -> dict[str, Any]:
    """All of it, for programs."""
    return {
        "since": since and since.isoformat(),
        "until": until and until.isoformat(),
        "balances": not found.differences,
        "difference_nano": found.difference_nano,
        "sums": [
            {
                "currency": each.currency,
                "windows": each.num_windows,
                "attempts": each.num_attempts,
                "ns": each.ns,
                "nano": each.nano,
                "nj": each.nj,
            }
            for each in found.sums
        ],
        "outside": [
            {
                "worker_id": each.worker,
                "is_lost": each.is_lost,
                "attempts": each.num_attempts,
                "ns": each.ns,
            }
            for each in found.outside
        ],
        "differences": [
            {
                "rule": each.rule.name,
                "says": each.rule.sentence,
                "unit": each.rule.unit,
                "rows": each.num_rows,
                "sum": each.sum_of_differences,
                "first": [{"row": row, "difference": by} for row, by in each.rows],
            }
            for each in found.differences
        ],
    }


def _show(found: Audit) -> None:
    for each in found.sums:
        _show_sums(each)
    for outside in found.outside:
        jobs = f"{outside.num_attempts} attempts of worker {outside.worker}"
        why = "are after its last window: it was lost" if outside.is_lost else "wait for its next"
        say(f"{jobs} {why} ({outside.ns} ns); no difference.")
    for difference in found.differences:
        rule = difference.rule
        say(f"{rule.sentence} Not so in {difference.num_rows} rows ({rule.name}):")
        for row, by in difference.rows:
            say(f"  {row}: {by:+} {rule.unit}")
    if not found.sums:
        say("No window was closed in this period.")
    if not found.differences:
        say("The books balance.")


def _show_sums(sums: Sums) -> None:
    nano = sums.nano or {}
    rows = [
        (name, str(ns), _amount(nano.get(name), sums.currency), str(sums.nj.get(name, "")))
        for name, ns in sums.ns.items()
    ]
    if "rounding" in nano:
        rows.append(("rounding", "", _amount(nano["rounding"], sums.currency), ""))
    say(f"{sums.num_windows} windows, {sums.num_attempts} attempts settled in them:")
    print_table(("", "nanoseconds", "cost", "nanojoules"), rows)


def _amount(nano: int | None, currency: str | None) -> str:
    return "" if nano is None else f"{Decimal(nano).scaleb(-9):f} {currency}"
