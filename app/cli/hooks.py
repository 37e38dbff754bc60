"""Webhooks: the process that delivers them, and what became of them.

All but the process goes to Postgres, past the API, as API keys do.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from app.cli.keys import Overlap, Tenant, actor, open_database
from app.cli.parts import check_option, tell_whether_well
from app.cli.terminal import (
    FAILED,
    as_json_option,
    load_settings,
    print_json,
    print_row,
    print_table,
    say,
    tell,
)
from app.errors import WebhookConflict, WebhookNotFound
from app.ids import id_in, name_of
from app.webhooks.ids import DELIVERY, ENDPOINT, EVENT

if TYPE_CHECKING:
    from app.store.webhook_deliveries import Attempt, Delivery


@click.group(invoke_without_command=True)
@check_option
@click.pass_context
def hooks(context: click.Context, check: bool) -> None:
    """Deliver webhooks; several may run at once. With a command: what became of them."""
    if context.invoked_subcommand is not None:
        return
    if check:
        from app.local import checks

        tell_whether_well(checks.hooks(load_settings().settings))
    from app.hooks import serve
    from app.telemetry import setup_logging

    settings = load_settings().connected()
    setup_logging(settings.log_level)
    serve(settings)


@hooks.command()
@click.option("--tenant", type=Tenant(), default="default", show_default=True, help="Whose it is.")
@click.option(
    "--overlap",
    type=Overlap(),
    default=86_400.0,
    metavar="DURATION",
    help="How long the one before signs as well, as in 30m, 24h, 7d.  [default: 24h]",
)
def secret(tenant: str, overlap: float) -> None:
    """Make the secret that signs for webhook_url, and print it, for the only time."""
    from app.store import admin_log, webhook_endpoints
    from app.webhooks.vault import Vault

    text, kept = Vault(load_settings().settings.webhooks.encryption_key).make()
    with open_database() as database, database.begin() as connection:
        webhook_endpoints.rotate_own(connection, kept, overlap, tenant=tenant)
        admin_log.note(connection, actor(), "webhook_secret.rotated", "webhook_url", tenant=tenant)
    say(text)
    tell("It signs from now on, and is not shown again.")


@hooks.command("list")
@click.option("--tenant", type=Tenant(), help="Only of this tenant.")
@click.option(
    "--state", type=click.Choice(["pending", "delivered", "failed"]), help="Only in this state."
)
@click.option("--object", "object_id", help="Only about this job, response or batch.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most.")
@as_json_option
def list_(
    tenant: str | None, state: str | None, object_id: str | None, limit: int, as_json: bool
) -> None:
    """List deliveries, newest first; with --json one a line."""
    from app.store import webhook_deliveries

    with open_database() as database, database.begin() as connection:
        found = webhook_deliveries.listed(
            connection, state=state, object_id=object_id, limit=limit, tenant=tenant
        )
    if as_json:
        for each in found:
            print_json(_told(each))
        return
    columns = ("id", "tenant", "type", "object", "state", "attempts", "status", "error", "url")
    print_table(columns, map(_row, found))


@hooks.command()
@click.argument("delivery_id", metavar="ID")
@as_json_option
def show(delivery_id: str, as_json: bool) -> None:
    """Show a delivery and its attempts."""
    from app.store import webhook_deliveries

    with open_database() as database, database.begin() as connection:
        found, attempts = webhook_deliveries.find(
            connection, id_in(DELIVERY, delivery_id), tenant=None
        )
    if as_json:
        print_json(_told(found) | {"history": [_attempt(each) for each in attempts]})
        return
    for name, value in _told(found).items():
        print_row(name, "" if value is None else value)
    columns = ("attempt", "began", "took ms", "status", "error")
    print_table(columns, [tuple(_attempt(each).values()) for each in attempts])


@hooks.command()
@click.argument("delivery_ids", nargs=-1, required=True, metavar="ID...")
def replay(delivery_ids: Sequence[str]) -> None:
    """Deliver webhooks again, at once, under the same ids of their events."""
    from app.store import webhook_deliveries

    refused = 0
    with open_database() as database:
        for name in delivery_ids:
            try:
                with database.begin() as connection:
                    webhook_deliveries.replay(connection, id_in(DELIVERY, name), tenant=None)
            except (WebhookNotFound, WebhookConflict) as error:
                refused += 1
                tell(f"{name}: {error}")
            else:
                print_row(name, "pending")
    sys.exit(FAILED if refused else 0)


def _row(each: Delivery) -> tuple[object, ...]:
    told = _told(each)
    names = ("id", "tenant", "type", "object_id", "state", "attempts", "status_code", "error")
    return (*("" if told[name] is None else told[name] for name in names), each.url)


def _told(each: Delivery) -> dict[str, Any]:
    return {
        "id": name_of(DELIVERY, each.id),
        "tenant": each.tenant,
        "event_id": name_of(EVENT, each.event_id),
        "type": each.type,
        "object_id": each.object_id,
        "endpoint_id": name_of(ENDPOINT, each.endpoint_id) if each.endpoint_id else None,
        "url": each.url,
        "state": each.state,
        "attempts": each.attempts,
        "status_code": each.status_code,
        "error": each.error,
        "created_at": each.created_at.isoformat(),
        "next_at": each.next_at and each.next_at.isoformat(),
        "ended_at": each.ended_at and each.ended_at.isoformat(),
    }


def _attempt(each: Attempt) -> dict[str, Any]:
    return {
        "number": each.number,
        "started_at": each.started_at.isoformat(),
        "took_ms": round(each.took_ms, 3),
        "status_code": each.status_code,
        "error": each.error,
    }
