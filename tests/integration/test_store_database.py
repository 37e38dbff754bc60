"""What becomes of a transaction when Postgres does not do as it should."""

from __future__ import annotations

from contextlib import closing
from uuid import uuid4

import pytest
from sqlalchemy import text

from app.errors import ConfigError, GristmillError, SchemaError, Unavailable
from app.local.servers import free_port
from app.store import submissions
from app.store.database import Database
from tests.rows import insert, new_job

CANARY = "the canary sings"


def test_a_commit_keeps_and_an_error_drops_what_was_written(database: Database) -> None:
    [kept] = insert(database, new_job())
    dropped = new_job()

    def write_and_fail() -> None:
        with database.begin() as connection:
            submissions.insert_jobs(connection, [dropped])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with database.begin() as connection:
        assert list(connection.scalars(text("SELECT id FROM jobs"))) == [kept]


def test_each_statement_of_autocommit_is_kept_whatever_follows(database: Database) -> None:
    job = new_job()

    def write_and_fail() -> None:
        with database.autocommit() as connection:
            submissions.insert_jobs(connection, [job])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_and_fail()
    with database.begin() as connection:
        assert list(connection.scalars(text("SELECT id FROM jobs"))) == [job.id]


def test_a_transaction_after_autocommit_is_one_again(database_url: str) -> None:
    """They share one connection here."""
    job = new_job()

    def write_and_fail(database: Database) -> None:
        with database.begin() as connection:
            submissions.insert_jobs(connection, [job])
            raise ZeroDivisionError

    with closing(Database(database_url, pool_size=1)) as database:
        with database.autocommit() as connection:
            connection.execute(text("SELECT 1"))
        with pytest.raises(ZeroDivisionError):
            write_and_fail(database)
        with database.autocommit() as connection:
            assert connection.scalar(text("SELECT count(*) FROM jobs")) == 0


def test_a_connection_that_died_while_idle_is_replaced_unnoticed(
    database: Database, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Database(database_url, pool_size=1)) as idle:
        with idle.autocommit() as connection:
            pid = connection.scalar(text("SELECT pg_backend_pid()"))
        with database.begin() as connection:
            gone = text("SELECT pg_terminate_backend(:pid, 10000)")
            assert connection.scalar(gone, {"pid": pid})
        monkeypatch.setattr("app.store.database.PING_AFTER_S", 0.0)

        with idle.autocommit() as connection:
            assert connection.scalar(text("SELECT pg_backend_pid()")) != pid


def test_a_server_that_is_not_there_is_unavailable() -> None:
    url = f"postgresql://nobody@127.0.0.1:{free_port()}/nowhere"
    with (
        closing(Database(url)) as database,
        pytest.raises(Unavailable, match="cannot be reached"),
        database.begin(),
    ):
        pass


def test_a_connection_that_is_cut_is_unavailable_and_the_next_one_works(
    database: Database,
) -> None:
    def be_cut_off() -> None:
        with database.begin() as connection, database.begin() as other:
            pid = connection.scalar(text("SELECT pg_backend_pid()"))
            other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
            connection.execute(text("SELECT 1"))

    with pytest.raises(Unavailable):
        be_cut_off()
    with database.begin() as connection:
        assert connection.scalar(text("SELECT 1")) == 1


def test_a_pool_with_all_connections_busy_is_unavailable(database_url: str) -> None:
    with (
        closing(Database(database_url, pool_size=1, connect_timeout_s=1)) as database,
        database.begin(),
        pytest.raises(Unavailable, match="busy"),
        database.begin(),
    ):
        pass


@pytest.mark.parametrize(
    ("setting", "statement"),
    [
        ("lock_timeout_ms", "SELECT id FROM jobs FOR UPDATE"),
        ("statement_timeout_ms", "SELECT pg_sleep(60)"),
    ],
)
def test_a_statement_that_waits_too_long_is_unavailable(
    database: Database, database_url: str, setting: str, statement: str
) -> None:
    insert(database, new_job())
    with (
        database.begin() as holder,
        closing(Database(database_url, **{setting: 50})) as impatient,
    ):
        holder.execute(text("SELECT id FROM jobs FOR UPDATE"))
        with pytest.raises(Unavailable, match="SQLSTATE"), impatient.begin() as connection:
            connection.execute(text(statement))


def test_a_client_that_stands_still_in_a_transaction_loses_its_locks(
    database: Database, database_url: str
) -> None:
    insert(database, new_job())
    locking = text("SELECT id FROM jobs FOR UPDATE")

    def stand_still() -> None:
        with (
            closing(Database(database_url, statement_timeout_ms=100)) as frozen,
            frozen.begin() as connection,
            database.begin() as waiting,
        ):
            connection.execute(locking)
            assert waiting.scalar(locking) is not None
            connection.execute(text("SELECT 1"))

    with pytest.raises(Unavailable):
        stand_still()


def test_a_refused_row_is_named_without_its_values(database: Database) -> None:
    job = new_job(request={"prompt": CANARY}, priority=10)

    with pytest.raises(GristmillError) as refusal:
        insert(database, job)

    assert "jobs_priority_check" in str(refusal.value)
    assert CANARY not in str(refusal.value)
    assert refusal.value.__suppress_context__
    assert not isinstance(refusal.value, Unavailable)


def test_missing_tables_ask_for_a_migration(empty_database_url: str) -> None:
    with (
        closing(Database(empty_database_url)) as database,
        pytest.raises(SchemaError, match="gristmill migrate"),
        database.begin() as connection,
    ):
        submissions.queued(connection)


def test_both_spellings_of_the_url_are_taken(database_url: str) -> None:
    for scheme in ("postgres://", "postgresql://", "postgresql+psycopg://"):
        url = scheme + database_url.partition("://")[2]
        with closing(Database(url)) as database, database.begin() as connection:
            assert connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("url", ["mysql://host/db", "localhost", "postgresql://host:port/db"])
def test_a_url_that_is_none_is_refused_without_being_quoted(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Database(url)
    assert url not in str(refusal.value)


def test_a_repeated_insert_after_an_unknown_commit_makes_one_job(database: Database) -> None:
    job = new_job(id=uuid4())

    assert insert(database, job) == insert(database, job) == [job.id]
    with database.begin() as connection:
        assert connection.scalar(text("SELECT count(*) FROM jobs")) == 1
