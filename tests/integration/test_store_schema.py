"""Migrations on a real Postgres, and the refusal of a schema that does not fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import NullPool, create_engine, inspect, text
from sqlalchemy.dialects import postgresql

from app.errors import SchemaError
from app.jobs import JobState
from app.store.database import Database
from app.store.migration import downgrade, migrate
from app.store.schema import MIGRATIONS
from app.store.submissions import Incoming
from app.store.tables import jobs, metadata
from tests.rows import Worker, at_once, insert, new_job, view
from tests.waiting import eventually

_NEXT_REVISION = """
from alembic import op
from sqlalchemy import Column, Integer, text

revision = "9999"
down_revision = "{newest}"
branch_labels = depends_on = None


def upgrade() -> None:
    op.add_column("open_jobs", Column("later", Integer, server_default=text("1"), nullable=False))


def downgrade() -> None:
    op.drop_column("open_jobs", "later")
"""


def driver_url(url: str) -> str:
    """The URL for an engine of SQLAlchemy's own."""
    return url.replace("postgresql://", "postgresql+psycopg://")


NEWEST = max(file.name[:4] for file in MIGRATIONS.glob("versions/0*.py"))

# All that autogenerate does not compare: predicates of indexes, constraints, defaults, comments.
# Partitions have what their table has.
_TABLE = """
    {} IN (
        SELECT relname FROM pg_class
        WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'p') AND NOT relispartition
    )
"""
_CATALOG = {
    "indexes": f"SELECT indexdef FROM pg_indexes WHERE {_TABLE.format('tablename')}",
    "constraints": f"""
        SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
        WHERE contype <> 'n' AND {_TABLE.format("conrelid::regclass::text")}
    """,
    "columns": f"""
        SELECT c.table_name, c.column_name, c.data_type, c.numeric_precision, c.numeric_scale,
            c.is_nullable, c.column_default,
            col_description(c.table_name::regclass, c.ordinal_position::int)
        FROM information_schema.columns c
        WHERE table_schema = 'public' AND {_TABLE.format("table_name")}
    """,
    "tables": f"""
        SELECT relname, reloptions::text, obj_description(oid), pg_get_partkeydef(oid) FROM pg_class
        WHERE {_TABLE.format("relname")}
    """,
}


def catalog(url: str) -> dict[str, set[tuple[Any, ...]]]:
    engine = create_engine(driver_url(url), poolclass=NullPool)
    with engine.connect() as connection:
        return {
            name: {
                tuple(row) for row in connection.execute(text(query)) if "alembic" not in str(row)
            }
            for name, query in _CATALOG.items()
        }


@pytest.fixture
def newer_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """`with newer_code():` runs code that has one more migration."""
    migrations = shutil.copytree(MIGRATIONS, tmp_path / "migrations")
    (migrations / "versions" / "9999_next.py").write_text(_NEXT_REVISION.format(newest=NEWEST))

    @contextmanager
    def newer() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr("app.store.schema.MIGRATIONS", migrations)
            yield

    return newer


def test_migrations_make_exactly_the_tables_of_the_code(
    empty_database_url: str, database_url: str
) -> None:
    from_tables = create_engine(driver_url(empty_database_url), poolclass=NullPool)
    metadata.create_all(from_tables)

    assert catalog(database_url) == catalog(empty_database_url)
    migrated = create_engine(driver_url(database_url), poolclass=NullPool)
    with migrated.connect() as connection:
        options = {"compare_server_default": True, "include_name": _is_of_the_code}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []


def _is_of_the_code(name: str | None, type_: str, _: Any) -> bool:
    return type_ != "table" or name in metadata.tables


def test_the_view_of_all_jobs_has_the_columns_that_the_code_reads(database_url: str) -> None:
    with create_engine(driver_url(database_url), poolclass=NullPool).connect() as connection:
        found = inspect(connection).get_columns("jobs")

    assert [(each["name"], each["type"].compile(postgresql.dialect())) for each in found] == [
        (each.name, each.type.compile(postgresql.dialect())) for each in jobs.columns
    ]


def test_a_job_that_is_deleted_by_hand_takes_all_with_it_that_is_its_own(
    database: Database,
) -> None:
    # given an ended job, a running one and a queued one
    ids = insert(database, new_job(), new_job(), new_job())
    worker = Worker.registered(database)
    worker.complete(worker.claim(ids[:1]))
    worker.claim(ids[1:2])

    # when the first two are deleted
    with database.begin() as connection:
        connection.execute(text("DELETE FROM jobs WHERE id = ANY(:ids)"), {"ids": ids[:2]})

    # then nothing of them is left, and the third is whole
    with database.begin() as connection:
        for table, number in (("jobs", 1), ("job_keys", 1), ("requests", 1), ("open_jobs", 1)):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == number, table
        for table in ("attempts", "results"):
            assert connection.scalar(text(f"SELECT count(*) FROM {table}")) == 0, table


def test_migrations_go_up_and_down_and_up_again(empty_database_url: str) -> None:
    assert migrate(empty_database_url) == NEWEST
    first = catalog(empty_database_url)

    assert downgrade(empty_database_url, "base") == "base"
    assert catalog(empty_database_url)["tables"] == set()

    migrate(empty_database_url)
    assert catalog(empty_database_url) == first


def test_migrations_started_at_once_wait_for_each_other(empty_database_url: str) -> None:
    assert at_once(*[partial(migrate, empty_database_url)] * 3) == [NEWEST] * 3


def test_every_table_and_column_says_what_it_holds() -> None:
    for table in metadata.sorted_tables:
        assert table.comment, table.name
        for column in table.columns:
            assert column.comment, f"{table.name}.{column.name}"
            if column.name.endswith("_ms"):
                assert "in ms" in column.comment, f"{table.name}.{column.name}"
            if column.name.endswith("_ns"):
                assert "in nanoseconds" in column.comment, f"{table.name}.{column.name}"


def test_a_database_without_a_schema_is_refused_with_the_command(empty_database_url: str) -> None:
    with closing(Database(empty_database_url)) as db, pytest.raises(SchemaError) as refusal:
        db.check_schema()
    assert "has no Gristmill schema. Run: gristmill migrate" in str(refusal.value)


def test_a_fitting_schema_is_accepted(database: Database) -> None:
    database.check_schema()


def test_readiness_does_not_run_the_migrations_files_each_time(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    database.check_schema()
    monkeypatch.setattr("app.store.schema.ScriptDirectory", None)

    database.check_schema()


def test_an_older_schema_is_refused_until_it_is_migrated(
    database: Database, database_url: str, newer_code: Callable[[], Any]
) -> None:
    with newer_code():
        with pytest.raises(SchemaError, match=r"older .* Run: gristmill migrate"):
            database.check_schema()

        assert migrate(database_url) == "9999"
        database.check_schema()


def test_a_newer_schema_that_has_only_added_is_accepted_and_left_as_it_is(
    database: Database, database_url: str, newer_code: Callable[[], Any]
) -> None:
    with newer_code():
        migrate(database_url)

    database.check_schema()
    with pytest.raises(SchemaError, match="is newer"):
        migrate(database_url)


def test_old_code_works_on_a_later_schema(
    database: Database, database_url: str, newer_code: Callable[[], Any]
) -> None:
    # given a schema that has one more column
    with newer_code():
        migrate(database_url)
    worker, job = Worker.registered(database), new_job(time_limit_s=7.5)

    # when a job goes through the hands of code that does not know it
    insert(database, job)
    received = worker.receive(Incoming(job.id))
    worker.complete(worker.claim([job.id]))

    # then it reads what it wrote
    assert (received[job.id].format, received[job.id].time_limit_s) == (1, 7.5)
    assert view(database, job.id).state is JobState.COMPLETED


def test_a_newer_schema_that_has_taken_something_away_is_refused(
    database: Database,
    database_url: str,
    newer_code: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with newer_code():
        monkeypatch.setattr("app.store.migration._FITS_FROM", "9999")
        migrate(database_url)

    with pytest.raises(SchemaError, match="is newer"):
        database.check_schema()


def test_a_database_of_before_the_first_release_is_refused_with_what_to_do(
    database: Database, database_url: str
) -> None:
    with database.begin() as connection:
        before = "UPDATE alembic_version SET version_num = '0001', fits_from = '0001'"
        connection.execute(text(before))

    for refused in (database.check_schema, lambda: migrate(database_url)):
        with pytest.raises(SchemaError, match=r"before the first release.*an empty database"):
            refused()


def test_a_migration_waits_for_a_lock_without_keeping_others_waiting(
    database_url: str, newer_code: Callable[[], Any]
) -> None:
    # given a transaction that has read the table and stays open
    reader = create_engine(driver_url(database_url), poolclass=NullPool).connect()
    reader.execute(text("SELECT count(*) FROM open_jobs"))

    # when a migration wants to change it
    with newer_code(), ThreadPoolExecutor() as pool:
        migration = pool.submit(migrate, database_url)
        eventually(partial(_somebody_waits_for_a_lock, database_url))

        # then others still write, within the lock timeout that they always have
        with closing(Database(database_url)) as others:
            for _ in range(5):
                with others.begin() as connection:
                    connection.execute(text("UPDATE open_jobs SET priority = 1 WHERE priority = 0"))
        assert not migration.done()

        # and it goes through once the lock is free
        reader.close()
        assert migration.result(60) == "9999"


def _somebody_waits_for_a_lock(url: str) -> bool:
    with create_engine(driver_url(url), poolclass=NullPool).connect() as connection:
        found = connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted"))
    return bool(found)
