"""Migrations: how the schema is brought up to date, and back."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, NullPool, text

from app.store import months, schema, tenancy
from app.store.address import Address
from app.store.database import in_transactions, make_engine
from app.store.translation import Locked, translated_errors

_FITS_FROM: Final = "0003"
"""Code of this revision and of all later ones runs on the newest schema. Migrations only add, so
that old and new versions run side by side; one that takes something away raises this."""

_LOCK: Final = 0x6772697374  # any constant will do, as long as it stays the same
_LOCK_TIMEOUT_MS: Final = 2_000
"""Shorter than any `database.lock_timeout_ms` in use: whoever waits behind a migration that waits
for its own lock goes on, and it tries again."""
_TRIES: Final = 30
_PAUSE_S: Final = 1.0


def migrate(url: str) -> str:
    """Bring the schema up to date and return its revision. Several may run at once.

    Safe on a live system: it never waits long for a lock, gives way, and tries again. Raises
    `SchemaError` if the schema is newer than this code, and `Unavailable`.
    """
    for _ in range(_TRIES - 1):
        try:
            return _run_alembic(url, _upgrade, "head")
        except Locked:
            time.sleep(_PAUSE_S)
    return _run_alembic(url, _upgrade, "head")


def _upgrade(config: Config, revision: str) -> None:
    """Move up, and note for older code whether it still fits."""
    command.upgrade(config, revision)
    connection: Connection = config.attributes["connection"]
    connection.execute(text("ALTER TABLE alembic_version ADD COLUMN IF NOT EXISTS fits_from text"))
    connection.execute(text("UPDATE alembic_version SET fits_from = :it"), {"it": _FITS_FROM})
    months.prepare(connection)
    tenancy.prepare(connection)


def downgrade(url: str, revision: str) -> str:
    """Take the schema back to `revision`; "base" drops every table and all that is in them."""
    return _run_alembic(url, command.downgrade, revision)


def _run_alembic(url: str, move: Callable[[Config, str], None], revision: str) -> str:
    address = Address.of(url).with_defaults(
        application_name="gristmill-migrate", connect_timeout="5"
    )
    engine = make_engine(address, poolclass=NullPool)
    config = Config()
    config.set_main_option("script_location", str(schema.MIGRATIONS).replace("%", "%%"))
    try:
        with translated_errors(), in_transactions(engine).begin() as connection:
            # The lock ends with the transaction, and so does everything a failed migration did.
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            connection.execute(text(f"SET LOCAL lock_timeout = {_LOCK_TIMEOUT_MS}"))
            schema.expect_known(connection)
            config.attributes["connection"] = connection
            move(config, revision)
            return schema.revision(connection) or "base"
    finally:
        engine.dispose()
