"""API keys: `gristmill keys create`, `list`, `rotate`, `revoke` and `log`.

They go to Postgres, past the API: whoever may use them holds its password already.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import re
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from app.cli.options import Time
from app.cli.terminal import as_json_option, load_settings, print_json, print_table, say, tell
from app.errors import RequestError
from app.keys import Scope, is_tenant, new_key
from app.requests.storable import refuse_unstorable

if TYPE_CHECKING:
    from app.config.settings import Settings
    from app.store.database import Database
    from app.store.keys import KeyView

_MAX_NAME: Final = 100
_UNITS: Final = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}


class Tenant(click.ParamType[str]):
    name = "TENANT"

    def convert(self, value: Any, *_: object) -> str:
        if not is_tenant(value):
            raise click.BadParameter(
                "a tenant's name has up to 100 letters, digits, dots, hyphens and underscores, and "
                "begins with a letter or digit."
            )
        return str(value)


class Overlap(click.ParamType[float]):
    """`24h` in seconds."""

    name = "DURATION"

    def convert(self, value: Any, *_: object) -> float:
        if isinstance(value, float):
            return value
        if match := re.fullmatch(r"(\d{1,6})([smhd])", value):
            return float(int(match[1]) * _UNITS[match[2]])
        raise click.BadParameter(f"{value} is not how long, as in 30m, 24h or 7d.")


def _named(_: object, __: object, value: str) -> str:
    try:
        refuse_unstorable(value, "name")
    except RequestError as error:
        raise click.BadParameter(str(error)) from None
    if not 0 < len(value) <= _MAX_NAME:
        raise click.BadParameter(f"it has 1 to {_MAX_NAME} characters.")
    return value


_of_tenant = click.option("--tenant", type=Tenant(), help="Of this tenant.")


@click.group()
def keys() -> None:
    """Make, list, rotate and revoke API keys."""


@keys.command()
@click.option("--name", required=True, callback=_named, help="What it is for, as in billing-cron.")
@click.option(
    "--tenant", type=Tenant(), default="default", show_default=True, help="Whose jobs it is for."
)
@click.option(
    "--scope",
    "scopes",
    multiple=True,
    type=click.Choice([scope.value for scope in Scope]),
    default=(Scope.SUBMIT.value, Scope.READ.value),
    show_default=True,
    help="What it allows; may be repeated.",
)
@click.option("--expires", type=Time(is_ahead=True), help="Of no use then; or in 90m, 12h, 90d.")
@as_json_option
def create(
    name: str, tenant: str, scopes: Sequence[str], expires: datetime | None, as_json: bool
) -> None:
    """Make a key and print it, for the only time: it is not kept anywhere.

    From the first key on, every call needs one.
    """
    from app.store import keys as store

    if expires and expires <= datetime.now(UTC):
        raise click.UsageError("--expires lies in the past.")
    made = new_key()
    with open_database() as database, database.begin() as connection:
        view = store.create(
            connection,
            made,
            actor=actor(),
            name=name,
            scopes=[Scope(scope) for scope in scopes],
            tenant=tenant,
            expires_at=expires,
        )
    _show(made.text, view, as_json)


@keys.command("list")
@_of_tenant
@as_json_option
def list_(tenant: str | None, as_json: bool) -> None:
    """List keys, valid or not; never their secrets."""
    from app.store import keys as store

    with open_database() as database, database.begin() as connection:
        found = store.listed(connection, tenant=tenant)
    if as_json:
        print_json([_told(view) for view in found])
        return
    columns = ("id", "tenant", "name", "scopes", "state", "expires", "last used", "created")
    print_table(columns, [_row(view) for view in found])


@keys.command()
@click.argument("key_id", metavar="ID")
@click.option(
    "--overlap",
    type=Overlap(),
    default=86_400.0,
    metavar="DURATION",
    help="How long the old one is good for, as in 30m, 24h, 7d.  [default: 24h]",
)
@as_json_option
def rotate(key_id: str, overlap: float, as_json: bool) -> None:
    """Make a key like another and print it; the other one ends after an overlap."""
    from app.store import keys as store

    made = new_key()
    with open_database() as database, database.begin() as connection:
        view, old = store.rotate(connection, key_id, made, actor=actor(), overlap_s=overlap)
    _show(made.text, view, as_json)
    tell(f"The key {old.id} ends at {_time(old.expires_at)}.")


@keys.command()
@click.argument("key_ids", metavar="ID...", nargs=-1, required=True)
def revoke(key_ids: Sequence[str]) -> None:
    """Make keys useless, within five seconds."""
    from app.store import keys as store

    with open_database() as database, database.begin() as connection:
        for key_id in key_ids:
            is_new = store.revoke(connection, key_id, actor=actor())
            tell(f"The key {key_id} is revoked{'' if is_new else ' already'}.")


@keys.command()
@_of_tenant
@click.option(
    "--limit", type=click.IntRange(1), default=50, show_default=True, help="How many, newest first."
)
@as_json_option
def log(tenant: str | None, limit: int, as_json: bool) -> None:
    """Show what was done about keys, tenants and content, and by whom."""
    from app.store import admin_log

    with open_database() as database, database.begin() as connection:
        entries = admin_log.last(connection, limit, tenant=tenant)
    if as_json:
        print_json([asdict(entry) | {"at": entry.at.isoformat()} for entry in entries])
        return
    print_table(
        ("at", "actor", "action", "tenant", "subject", "details"),
        [
            (
                _time(each.at),
                each.actor,
                each.action,
                each.tenant,
                each.subject,
                _json(each.details),
            )
            for each in entries
        ],
    )


@contextlib.contextmanager
def open_database() -> Iterator[Database]:
    """The database of the settings; the embedded one is started for as long, if nothing runs."""
    from app.store.database import Database

    settings = load_settings().settings
    with contextlib.ExitStack() as held:
        url = settings.database.url or held.enter_context(_embedded(settings))
        database = held.enter_context(contextlib.closing(Database(url, pool_size=1)))
        database.check_schema()
        yield database


@contextlib.contextmanager
def _embedded(settings: Settings) -> Iterator[str]:
    from app.config import run_file
    from app.local.servers import EmbeddedPostgres
    from app.store.migration import migrate

    folder = Path(settings.cache_dir)
    with run_file.only_one(folder), EmbeddedPostgres(folder / "postgres") as server:
        migrate(server.url)
        yield server.url


def actor() -> str:
    """Who is at the terminal, as the log of admin actions knows them."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = "unknown"
    return f"cli:{user}@{socket.gethostname()}"


def _show(text: str, view: KeyView, as_json: bool) -> None:
    """The key alone where a program reads, the rest beside it."""
    if as_json:
        print_json(_told(view) | {"key": text})
        return
    say(text)
    scopes = ", ".join(sorted(view.scopes))
    until = f"until {_time(view.expires_at)}" if view.expires_at else "until it is revoked"
    tell(
        f"Key {view.id} of the tenant {view.tenant}, for {scopes}, {until}. It is not shown again."
    )


def _told(view: KeyView) -> dict[str, Any]:
    stamps = ("created_at", "expires_at", "revoked_at", "last_used_at")
    told = asdict(view) | {"scopes": sorted(view.scopes)}
    return told | {name: told[name] and told[name].isoformat() for name in stamps}


def _row(view: KeyView) -> tuple[str, ...]:
    state = "valid" if view.is_valid else "revoked" if view.revoked_at else "expired"
    return (
        view.id,
        view.tenant,
        view.name,
        ",".join(sorted(view.scopes)),
        state,
        _time(view.expires_at),
        _time(view.last_used_at),
        _time(view.created_at),
    )


def _time(stamp: datetime | None) -> str:
    return stamp.strftime("%Y-%m-%d %H:%M:%SZ") if stamp else ""


def _json(details: object) -> str:
    return json.dumps(details, ensure_ascii=False) if details else ""
