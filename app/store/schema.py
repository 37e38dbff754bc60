"""Whether this code runs on the schema of the database."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Final

from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from app.errors import SchemaError

MIGRATIONS: Final = Path(__file__).parents[2] / "migrations"
"""Beside the package, in a checkout and in site-packages alike."""


def check(connection: Connection) -> None:
    """Raise `SchemaError`, with the command to run, unless this code runs on the schema.

    That is its own, or a later one that has only added to it.
    """
    present, known = revision(connection), _known(MIGRATIONS)
    if present is None:
        raise SchemaError("The database has no Gristmill schema. Run: gristmill migrate")
    if present == known[0] or (present not in known and _fits_from(connection) in known):
        return
    if present not in known:
        raise _newer(present)
    raise SchemaError(
        f"The database schema is at {present}, older than this Gristmill's {known[0]}. "
        "Run: gristmill migrate"
    )


def expect_known(connection: Connection) -> None:
    """Raise `SchemaError` if the schema is newer than this code."""
    present = revision(connection)
    if present is not None and present not in _known(MIGRATIONS):
        raise _newer(present)


def _newer(present: str) -> SchemaError:
    return SchemaError(
        f"The database schema is at {present}, which this Gristmill does not know: it is newer, or "
        "of before the first release. Install the newer Gristmill, which brings its own "
        "(gristmill migrate), or begin with an empty database."
    )


@functools.cache
def _known(migrations: Path) -> tuple[str, ...]:
    """Revisions of this code, newest first. Looked up once: all their files are run for it."""
    scripts = ScriptDirectory(str(migrations)).walk_revisions()
    return tuple(script.revision for script in scripts)


def revision(connection: Connection) -> str | None:
    """The database's revision; None if it has no schema."""
    if connection.scalar(text("SELECT to_regclass('alembic_version')")) is None:
        return None
    present: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return present


def _fits_from(connection: Connection) -> str | None:
    """The oldest revision whose code runs on the schema; None if it is too old to say so."""
    noted: str | None = connection.scalar(
        text("SELECT to_jsonb(noted) ->> 'fits_from' FROM alembic_version AS noted")
    )
    return noted
