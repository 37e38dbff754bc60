"""Alembic's entry: `app.store.migration` runs it on an open transaction, by `gristmill migrate`."""

from alembic import context

from app.store.tables import metadata

connection = context.config.attributes.get("connection")
if connection is None:
    raise SystemExit("Run migrations by: gristmill migrate")
context.configure(connection=connection, target_metadata=metadata)
context.run_migrations()
