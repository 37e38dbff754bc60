"""Row-level security: what the API's role sees of the tables, whatever a query forgets to say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import ProgrammingError

from app.errors import GristmillError
from app.store import lists, tenancy, usage
from app.store.database import Database, link_of
from app.store.lists import Filter
from app.store.migration import migrate
from app.store.tenancy import EVERYBODY, NOBODY, acting_for
from tests.apis import made_key
from tests.rows import Worker, insert, new_job

# Tables of their own, not partitions, that say whose their rows are.
_TENANTS_TABLES = text("""
    SELECT relname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid
    WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
        AND attname = 'tenant' AND NOT attisdropped
    ORDER BY relname
""")


@pytest.fixture
def limited(database_url: str) -> Iterator[Database]:
    """What the API has, with one connection for all."""
    limited = Database(database_url, pool_size=1, is_limited=True)
    yield limited
    limited.close()


@contextmanager
def of(limited: Database, tenant: str) -> Iterator[Connection]:
    with acting_for(tenant), limited.begin() as connection:
        yield connection


def tables(database: Database) -> list[str]:
    with database.begin() as connection:
        return list(connection.scalars(_TENANTS_TABLES))


def counts(connection: Connection, tables: list[str], where: str = "true") -> dict[str, int]:
    return {
        table: connection.scalar(text(f"SELECT count(*) FROM {table} WHERE {where}")) or 0
        for table in tables
    }


TWO = ("mill", "bakery")

# What no job writes.
_OTHER_ROWS = """
    INSERT INTO files (id, tenant, purpose, filename, created_at, state)
        VALUES (gen_random_uuid(), :tenant, 'batch', 'in.jsonl', now(), 'uploading');
    INSERT INTO job_batches (
        id, tenant, door, url, input_name, input_bytes, fingerprint, created_at, expires_at,
        output_expires_s, state
    ) VALUES (
        gen_random_uuid(), :tenant, 'openai', '/v1/completions', 'in.jsonl', 0, '', now(), now(),
        0, 'validating'
    );
    INSERT INTO job_batch_lines (batch_id, number, tenant, custom_id, outcome, file, place)
        SELECT id, 1, tenant, '', 'errored', 'errors', 1 FROM job_batches WHERE tenant = :tenant;
    INSERT INTO webhook_endpoints (
        id, tenant, name, event_types, secret, secret_hint, created_at, updated_at
    ) VALUES (gen_random_uuid(), :tenant, 'own', '{}', '', '', now(), now());
    INSERT INTO webhook_attempts (delivery_id, number, tenant, started_at, took_ms)
        SELECT id, 1, tenant, now(), 1 FROM webhook_deliveries WHERE tenant = :tenant
"""


@pytest.fixture
def two(database: Database, database_url: str) -> None:
    """Two tenants with rows in every table: jobs that wait, run and have ended, with labels and
    webhooks, and keys, files and batches."""
    worker = Worker.registered(database)
    for tenant in TWO:
        made_key(database_url, tenant)
        given = {"tenant": tenant, "metadata": {"a": "b"}, "webhook_url": "https://a.example/"}
        ids = insert(database, *(new_job(**given) for _ in range(3)))
        worker.complete(worker.claim(ids[:1]))
        worker.claim(ids[1:2])
        with database.begin() as connection:
            for statement in _OTHER_ROWS.split(";"):
                connection.execute(text(statement), {"tenant": tenant})
    with database.begin() as connection:
        usage.fold(connection, 100)
    for tenant in TWO:
        worker.complete(worker.claim(insert(database, new_job(tenant=tenant))))


def test_a_role_in_force_from_the_start_is_not_taken_for_a_pooler_that_dropped_it(
    limited: Database,
) -> None:
    found = limited.found()
    assert found.in_force["role"] == tenancy.API_ROLE
    assert not found.missing


def test_every_table_with_a_tenant_is_closed_also_to_its_owner_and_by_the_same_rules(
    database: Database,
) -> None:
    names = [*tables(database), "tenants"]
    with database.begin() as connection:
        open_ = connection.scalars(
            text("""
                SELECT relname FROM pg_class
                WHERE relname = ANY(:names) AND NOT (relrowsecurity AND relforcerowsecurity)
            """),
            {"names": names},
        ).all()
        rules = connection.execute(
            text("""
                SELECT tablename, policyname, permissive, cmd, with_check,
                    CASE WHEN roles = ARRAY[current_user] THEN '{owner}' ELSE roles::text END,
                    replace(qual, '(name = ', '(tenant = ')
                FROM pg_policies WHERE schemaname = 'public'
            """)
        ).all()

    it = f"( SELECT current_setting('{tenancy.SETTING}'::text, true) AS current_setting)"
    wanted = {
        ("owner", "PERMISSIVE", "ALL", None, "{owner}", "true"),
        ("tenant", "PERMISSIVE", "ALL", None, "{public}",
         f"((tenant = {it}) OR ({it} = '{EVERYBODY}'::text))"),
    }  # fmt: skip
    assert len(names) > 15
    assert open_ == []
    assert {tuple(row) for row in rules} == {(name, *each) for name in names for each in wanted}


NOBODYS = {
    "alembic_version": "what the schema is",
    "batch_usage_deltas": "sums over all",
    "batch_usage_hours": "sums over all",
    "batches": "of workers; ids of jobs at most",
    "comparisons": "of models",
    "device_time_deltas": "of devices",
    "device_time_hours": "of devices",
    "loads": "of workers",
    "prices": "of devices",
    "windows": "of workers",
    "workers": "hosts, devices, models",
}
"""Tables without a tenant, and what is in them. Whoever adds one says so here."""


def test_tables_that_are_nobodys_hold_nothing_of_a_tenant_and_the_api_writes_none_of_them(
    database: Database,
) -> None:
    with database.begin() as connection:
        found = connection.scalars(
            text("""
                SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace
                    AND relkind NOT IN ('i', 'I', 'S', 'v') AND NOT relispartition
                    AND relname <> ALL(:names)
            """),
            {"names": [*tables(database), "tenants"]},
        ).all()
        written = connection.scalars(
            text("""
                SELECT name FROM unnest(CAST(:names AS text[])) AS name
                WHERE has_any_column_privilege('gristmill_api', name, 'INSERT, UPDATE')
                    OR has_table_privilege('gristmill_api', name, 'DELETE, TRUNCATE, TRIGGER')
            """),
            {"names": list(NOBODYS)},
        ).all()

    assert set(found) == set(NOBODYS)
    assert written == []


def test_no_view_and_no_partition_is_a_way_around(database: Database, limited: Database) -> None:
    with database.begin() as connection:
        around = connection.scalars(
            text("""
            SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace AND (
                (relkind = 'v' AND NOT coalesce('security_invoker=true' = ANY(reloptions), false))
                OR (relispartition AND has_table_privilege('gristmill_api', oid, 'SELECT'))
            )
        """)
        ).all()

    assert around == []
    with pytest.raises(GristmillError), of(limited, EVERYBODY) as connection:
        connection.execute(text("SELECT FROM results_default"))


@pytest.mark.usefixtures("two")
def test_no_function_that_runs_as_the_owner_is_a_way_around(
    database: Database, limited: Database
) -> None:
    """`labelled` is all there is of these. Whoever adds one tries here what it shows to whom."""
    asked = text("""SELECT tenant FROM labelled(:of, '{"a": "b"}', 100)""")

    def seen(connection: Connection, of: str = "mill") -> list[str]:
        return list(connection.scalars(asked, {"of": of}))

    with database.begin() as connection:
        assert connection.scalars(
            text("""
                SELECT proname FROM pg_proc
                WHERE pronamespace = 'public'::regnamespace AND prosecdef AND prosqlbody IS NOT NULL
            """)
        ).all() == ["labelled"]
        assert seen(connection) == ["mill"] * 3
    with of(limited, "mill") as connection:
        assert seen(connection) == ["mill"] * 3
    with of(limited, EVERYBODY) as connection:
        assert seen(connection) == ["mill"] * 3
    for tenant in ("bakery", NOBODY):
        with of(limited, tenant) as connection:
            assert seen(connection) == []
    with limited.begin() as connection:
        assert seen(connection) == []
    # nor where its caller has tables of the same names, or no rights at all
    with of(limited, "bakery") as connection:
        connection.execute(text("CREATE TEMP TABLE jobs AS SELECT * FROM public.jobs"))
        connection.execute(text("CREATE TEMP TABLE results AS SELECT * FROM public.results"))
        assert seen(connection) == []
        assert seen(connection, "bakery") == ["bakery"] * 3
        connection.rollback()
    with database.begin() as connection:
        connection.execute(text("CREATE ROLE somebody"))
        connection.execute(text("SET LOCAL ROLE somebody"))
        with pytest.raises(ProgrammingError, match="permission denied for function"):
            seen(connection)
        connection.rollback()


@pytest.mark.usefixtures("two")
def test_the_apis_role_sees_one_tenant_none_or_all_of_every_table(
    database: Database, limited: Database
) -> None:
    names = [name for name in tables(database) if name != "admin_log"]
    with database.begin() as connection:
        of_mill, of_all = counts(connection, names, "tenant = 'mill'"), counts(connection, names)
    assert [name for name in names if not 0 < of_mill[name] < of_all[name]] == [], "see `two`"

    with of(limited, "mill") as connection:
        assert connection.scalar(text("SELECT current_user")) == tenancy.API_ROLE
        assert counts(connection, names) == of_mill
        assert counts(connection, ["jobs"], "tenant <> 'mill'") == {"jobs": 0}
        assert counts(connection, ["usage"], "tenant <> 'mill'") == {"usage": 0}
    with of(limited, EVERYBODY) as connection:
        assert counts(connection, names) == of_all
    for nobody in (NOBODY, "' OR true --", "MILL", "*' "):
        with of(limited, nobody) as connection:
            assert set(counts(connection, [*names, "jobs", "tenants"]).values()) == {0}
    with limited.begin() as connection:  # whoever forgot to say it
        assert set(counts(connection, names).values()) == {0}
    with limited.autocommit() as connection:
        assert set(counts(connection, names).values()) == {0}


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("is_pooled", "awaited"), [(False, ["Sync"]), (True, ["Query"] * 3)])
def test_a_lone_statement_is_of_its_tenant_in_one_round_trip_and_leaves_nothing_behind(
    limited: Database, tmp_path: Path, is_pooled: bool, awaited: list[str]
) -> None:
    def seen(what: str = "count(*)") -> int | None:
        with limited.autocommit() as connection:
            return connection.scalar(text(f"SELECT {what} FROM open_jobs"))

    with limited.autocommit() as connection:
        link = link_of(connection)
        link.found = replace(link.found, is_pooled=is_pooled)

    with acting_for("mill"):
        assert seen() == 2
        with pytest.raises(GristmillError):
            seen("1 / (count(*) - 2)")
        assert seen() == 2
    assert seen() == 0
    with acting_for("bakery"), (tmp_path / "wire").open("w+") as wire:
        link.pgconn.trace(wire.fileno())
        assert seen() == 2
        link.pgconn.untrace()
        wire.seek(0)
        assert re.findall(r"\tF\t.*\t(Query|Sync)\b", wire.read()) == awaited
    with limited.begin() as connection:
        assert connection.scalar(text("SELECT current_setting('gristmill.tenant', true)")) == ""


@pytest.mark.usefixtures("two")
def test_a_tenant_is_forgotten_with_its_transaction_however_that_ends(limited: Database) -> None:
    with pytest.raises(GristmillError), of(limited, "mill") as connection:
        connection.execute(text("SELECT 1 / 0"))
    with limited.begin() as connection:
        assert counts(connection, ["open_jobs"]) == {"open_jobs": 0}

    with of(limited, "mill") as connection:
        assert counts(connection, ["open_jobs"]) == {"open_jobs": 2}
        connection.rollback()
    with limited.begin() as connection:
        assert connection.scalar(text("SELECT current_setting('gristmill.tenant', true)")) == ""
        assert counts(connection, ["open_jobs"]) == {"open_jobs": 0}
    with of(limited, "bakery") as connection:
        assert counts(connection, ["open_jobs"], "tenant <> 'bakery'") == {"open_jobs": 0}


@pytest.mark.usefixtures("two")
def test_no_row_is_written_for_or_taken_from_another_tenant(limited: Database) -> None:
    with pytest.raises(GristmillError), of(limited, "mill") as connection:
        connection.execute(text("INSERT INTO job_keys (id, tenant, created_at)"
                                " VALUES (gen_random_uuid(), 'bakery', now())"))  # fmt: skip
    with pytest.raises(GristmillError), of(limited, "mill") as connection:
        connection.execute(text("UPDATE open_jobs SET tenant = 'bakery'"))
    with of(limited, "mill") as connection:
        taken = "UPDATE open_jobs SET priority = 9 WHERE tenant = 'bakery'"
        assert connection.execute(text(taken)).rowcount == 0
        assert connection.execute(text("DELETE FROM job_keys WHERE tenant <> 'mill'")).rowcount == 0


def test_the_apis_role_may_neither_read_the_log_nor_make_keys_nor_change_tables(
    limited: Database,
) -> None:
    for forbidden in (
        "SELECT * FROM admin_log",
        "UPDATE api_keys SET scopes = ARRAY['admin']",
        "INSERT INTO api_keys (id, name, scopes, digest) VALUES ('a', 'a', '{read}', sha256(''))",
        "INSERT INTO tenants (name) VALUES ('mine')",
        "DROP POLICY tenant ON results",
        "ALTER TABLE results DISABLE ROW LEVEL SECURITY",
        "TRUNCATE results",
        "UPDATE prices SET note = ''",
    ):
        with pytest.raises(GristmillError), of(limited, EVERYBODY) as connection:
            connection.execute(text(forbidden))


@pytest.mark.usefixtures("two")
def test_labels_are_found_by_their_index_and_are_one_tenants(
    database: Database, limited: Database
) -> None:
    given = Filter(metadata={"a": "b"})
    with of(limited, "mill") as connection:
        found = lists.newest(connection, given, limit=10, tenant="mill")
        assert lists.newest(connection, given, limit=10, tenant="nobody") == []
    with database.begin() as connection:
        assert found == lists.newest(connection, given, limit=10, tenant="mill")
        assert len(found) == 3


def test_a_schema_that_is_brought_up_again_is_as_it_was(database_url: str) -> None:
    assert migrate(database_url) == migrate(database_url)
