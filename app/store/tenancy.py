"""Whose rows a connection sees: row-level security, below every query.

    process            role in Postgres       sees
    API                `gristmill_api`        rows of the tenant that its transaction names; none if
                                              it names none; all if it says `EVERYBODY`
    all others         the owner's            all

Every transaction of the API names the tenant with `SET LOCAL`, so that neither a rollback nor the
next user of the connection finds it still set. Queries name their tenant as well: this is what
holds when one of them forgets to, or when somebody makes a query say what it should not.

https://www.postgresql.org/docs/current/ddl-rowsecurity.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from contextvars import ContextVar
from typing import Final

from sqlalchemy import Connection, text

from app.errors import ConfigError

API_ROLE: Final = "gristmill_api"
SETTING: Final = "gristmill.tenant"
EVERYBODY: Final = "*"
"""No tenant is called so. For what belongs to the whole system: how full its queue is, its metrics,
its keys."""

NOBODY: Final = ""

_tenant: ContextVar[str] = ContextVar("tenant", default=NOBODY)


@contextmanager
def acting_for(tenant: str) -> Iterator[None]:
    """Inside, here and in what is begun from here, transactions are this tenant's."""
    token = _tenant.set(tenant)
    try:
        yield
    finally:
        _tenant.reset(token)


def tenant_now() -> str:
    """Whose the next transaction is."""
    return _tenant.get()


_MAKE_ROLE: Final = text(f"""
    DO $$ BEGIN
        IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{API_ROLE}') THEN
            CREATE ROLE {API_ROLE} NOLOGIN NOBYPASSRLS;
        END IF;
        IF NOT (SELECT rolsuper FROM pg_roles WHERE rolname = current_user)
            AND NOT pg_has_role(current_user, '{API_ROLE}', 'MEMBER')
        THEN
            EXECUTE format('GRANT {API_ROLE} TO %I', current_user);
        END IF;
    EXCEPTION WHEN insufficient_privilege OR duplicate_object OR unique_violation THEN
        NULL;  -- another database's migration made it, or a superuser has to
    END $$
""")

_HAS_ROLE: Final = text("SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = :role)")

_MAY_TAKE_ROLE: Final = text("""
    SELECT EXISTS (
        SELECT FROM pg_roles WHERE rolname = :role AND pg_has_role(
            current_user, oid,
            CASE WHEN current_setting('server_version_num')::int < 160000 THEN 'MEMBER' ELSE 'SET'
            END
        )
    )
""")

# Tables with a tenant, which partitions are not: nobody but their owner may name these.
_TABLES: Final = text("""
    SELECT relname AS name, relrowsecurity AND relforcerowsecurity AS is_forced,
        ARRAY(SELECT polname::text FROM pg_policy WHERE polrelid = pg_class.oid) AS policies,
        CASE relname WHEN 'tenants' THEN 'name' ELSE 'tenant' END AS of_tenant
    FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p')
        AND NOT relispartition AND (relname = 'tenants' OR EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = pg_class.oid AND attname = 'tenant' AND NOT attisdropped
        ))
    ORDER BY relname
""")

# Views are read with the rights of who asks, or they would show all that their owner sees.
_VIEWS: Final = text("""
    SELECT relname FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'v'
        AND NOT coalesce('security_invoker=true' = ANY(reloptions), false)
""")

_ALL: Final = text("""
    SELECT relname AS name, relkind IN ('r', 'p') AND NOT EXISTS (
            SELECT FROM pg_attribute
            WHERE attrelid = pg_class.oid AND attname = 'tenant' AND NOT attisdropped
        ) AS is_nobodys
    FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind IN ('r', 'p', 'v')
        AND NOT relispartition
""")

_DEFINERS: Final = ("labelled(text, jsonb, int)",)
"""Functions that see what their owner sees. Anybody may call them until that is taken away."""

_RIGHTS: Final = {
    "admin_log": "INSERT",
    "api_keys": "SELECT, UPDATE (last_used_at)",
    "tenants": "SELECT",
}
"""Of the API's role, where it is not to read and write. Of tables without a tenant it reads all."""


def prepare(connection: Connection) -> None:
    """Put every table with a tenant behind row-level security, and give the API's role its rights,
    as far as that is not done. The role is made if that is allowed; see `check`."""
    for view in connection.scalars(_VIEWS).all():
        connection.execute(text(f"ALTER VIEW {view} SET (security_invoker = true)"))
    for table in connection.execute(_TABLES).all():
        if "owner" not in table.policies:
            connection.execute(
                text(f"CREATE POLICY owner ON {table.name} TO current_user USING (true)")
            )
        if "tenant" not in table.policies:
            # In subqueries, so that the setting is read once a statement and not once a row.
            it = f"(SELECT current_setting('{SETTING}', true))"
            rule = f"{table.of_tenant} = {it} OR {it} = '{EVERYBODY}'"
            connection.execute(text(f"CREATE POLICY tenant ON {table.name} USING ({rule})"))
        if not table.is_forced:
            for what in ("ENABLE", "FORCE"):
                connection.execute(text(f"ALTER TABLE {table.name} {what} ROW LEVEL SECURITY"))
    for function in _DEFINERS:
        connection.execute(text(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC"))
    connection.execute(_MAKE_ROLE)
    if not connection.scalar(_HAS_ROLE, {"role": API_ROLE}):
        return
    schema = connection.scalar(text("SELECT quote_ident(current_schema())"))
    connection.execute(text(f"GRANT USAGE ON SCHEMA {schema} TO {API_ROLE}"))
    for table in connection.execute(_ALL).all():
        rights = "SELECT" if table.is_nobodys else "SELECT, INSERT, UPDATE, DELETE"
        rights = _RIGHTS.get(table.name, rights)
        connection.execute(text(f"GRANT {rights} ON {table.name} TO {API_ROLE}"))
    for function in _DEFINERS:
        connection.execute(text(f"GRANT EXECUTE ON FUNCTION {function} TO {API_ROLE}"))


def check(url: str) -> None:
    """Raise `ConfigError` unless whoever logs in with this URL may take the API's role, and
    `Unavailable`."""
    from app.store.database import Database

    with closing(Database(url, pool_size=1)) as database, database.begin() as connection:
        if connection.scalar(_MAY_TAKE_ROLE, {"role": API_ROLE}):
            return
        user = connection.scalar(text("SELECT current_user"))
    raise ConfigError(
        f"database.url logs in as {user}, who may not take the role {API_ROLE}, by which one "
        f"tenant's rows are closed to another. Let a superuser run `CREATE ROLE {API_ROLE}; GRANT "
        f'{API_ROLE} TO "{user}";`, then run `gristmill migrate`; or, where one role is all there '
        "is, set database.row_security = false."
    )
