"""What becomes of a transaction when Postgres does not do as it should."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from typing import Any, LiteralString
from uuid import uuid4

import psycopg
import pytest
from sqlalchemy import Connection, text

from app.errors import ConfigError, GristmillError, NotStorable, SchemaError, Unavailable
from app.local.ports import free_port
from app.store import counts, submissions
from app.store.database import Database, link_of
from app.store.migration import migrate
from tests.rows import insert, new_job
from tests.waiting import eventually

CANARY = "the canary sings"
TWICE = "INSERT INTO numbers VALUES (1), (1)"
"""It fails at the commit."""


def create_numbers(database: Database, *, is_pooled: bool) -> None:
    unique = "UNIQUE DEFERRABLE INITIALLY DEFERRED"
    with database.autocommit() as connection:
        connection.execute(text(f"CREATE TABLE numbers (number integer {unique})"))
        link = link_of(connection)
        link.found = replace(link.found, is_pooled=is_pooled)


def numbers(database: Database) -> list[int]:
    with database.autocommit() as connection:
        return list(connection.scalars(text("SELECT number FROM numbers")))


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


@pytest.mark.parametrize("is_pooled", [False, True])
@pytest.mark.parametrize("fails", ["SELECT 1 / 0", TWICE])
def test_what_follows_a_commit_and_fails_leaves_it_and_is_said_as_unavailable(
    database_url: str, fails: LiteralString, is_pooled: bool
) -> None:
    """Whoever asked for both repeats both, and takes none of it for data that is refused."""
    with closing(Database(database_url, pool_size=1)) as database:
        create_numbers(database, is_pooled=is_pooled)

        with pytest.raises(Unavailable), database.autocommit(then=(fails, {})) as connection:
            connection.execute(text("INSERT INTO numbers VALUES (7)"))

        assert numbers(database) == [7]


def test_a_driver_that_loses_count_of_its_answers_is_a_connection_that_is_lost(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As psycopg does if the error of a commit comes apart from the answer before it."""
    leave = psycopg.Pipeline.__exit__

    def leave_badly(pipeline: psycopg.Pipeline, *error: Any) -> None:
        leave(pipeline, *error)
        raise IndexError("pop from an empty deque")

    with closing(Database(database_url, pool_size=1)) as database:
        create_numbers(database, is_pooled=False)
        monkeypatch.setattr(psycopg.Pipeline, "__exit__", leave_badly)

        then = ("SELECT 1", dict[str, object]())
        with pytest.raises(Unavailable), database.autocommit(then=then) as connection:
            connection.execute(text("INSERT INTO numbers VALUES (7)"))

        monkeypatch.undo()
        assert numbers(database) == [7]


@pytest.mark.parametrize("is_pooled", [False, True])
@pytest.mark.parametrize("fails", ["SELECT 1 / 0", TWICE])
def test_what_does_not_commit_is_an_error_whatever_follows_it(
    database_url: str, fails: str, is_pooled: bool
) -> None:
    with closing(Database(database_url, pool_size=1)) as database:
        create_numbers(database, is_pooled=is_pooled)

        then = ("INSERT INTO numbers VALUES (7)", dict[str, object]())
        with pytest.raises(GristmillError) as error, database.autocommit(then=then) as connection:
            connection.execute(text(fails))

        assert fails == TWICE or isinstance(error.value, NotStorable)
        assert 1 not in numbers(database)


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


def test_look_ups_are_planned_once_and_other_statements_of_the_same_connection_each_time(
    database_url: str,
) -> None:
    each_time, once = ("force_custom_plan", "on"), ("force_generic_plan", "off")

    def how(connection: Connection) -> tuple[str, ...]:
        names = ("plan_cache_mode", "enable_seqscan")
        return tuple(connection.scalar(text(f"SHOW {name}")) or "" for name in names)

    def fail(database: Database) -> None:
        with database.begin(looks_up=True):
            raise ZeroDivisionError

    with closing(Database(database_url, pool_size=1)) as database:
        for _ in range(2):
            with database.autocommit(looks_up=True) as connection:
                assert how(connection) == once
            with database.begin() as connection:
                assert how(connection) == each_time
            with pytest.raises(ZeroDivisionError):
                fail(database)
            with database.begin(looks_up=True) as connection:
                assert how(connection) == once
            with database.autocommit() as connection:
                assert how(connection) == each_time


def test_who_looks_up_only_has_a_statement_planned_when_it_comes_first(database_url: str) -> None:
    prepared = text("SELECT count(*) FROM pg_prepared_statements WHERE statement LIKE 'SELECT 7%'")
    with (
        closing(Database(database_url, pool_size=1, looks_up_only=True)) as database,
        database.autocommit() as connection,
    ):
        connection.execute(text("SELECT 7"))
        assert connection.scalar(prepared) == 1


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


def test_a_spare_connection_is_opened_while_the_kept_one_is_in_use_and_closed_after_it(
    database_url: str,
) -> None:
    with closing(Database(database_url, pool_size=1, spare=1)) as database:

        def number() -> int:
            with database.begin() as connection:
                return connection.scalar(
                    text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :name"),
                    {"name": "gristmill"},
                )

        with database.begin():
            assert number() == 2
        eventually(lambda: number() == 1)


def test_a_short_statement_is_waited_for_and_no_connection_opened(database_url: str) -> None:
    name = "patient"
    with closing(
        Database(database_url, pool_size=1, spare=3, patience_s=60, application_name=name)
    ) as database:

        def pid() -> int:
            with database.autocommit() as connection:
                pid: int = connection.scalar(text("SELECT pg_backend_pid() FROM pg_sleep(0.01)"))
                return pid

        with ThreadPoolExecutor(4) as pool:
            pids = set(pool.map(lambda _: pid(), range(20)))

    assert len(pids) == 1


def test_a_server_that_has_no_connection_left_is_named_as_such(
    database: Database, database_url: str
) -> None:
    with database.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS crowded"))
        connection.execute(text("CREATE ROLE crowded LOGIN PASSWORD 'x' CONNECTION LIMIT 0"))
    user = database_url.partition("://")[2].partition("@")[0]
    url = database_url.replace(user, "crowded:x")

    with (
        closing(Database(url, pool_size=1)) as crowded,
        pytest.raises(Unavailable, match=r"no connection left .*max_connections.*sizing\.md"),
        crowded.begin(),
    ):
        pass
    with database.begin() as connection:
        connection.execute(text("DROP ROLE crowded"))


@pytest.mark.parametrize(
    ("setting", "statement"),
    [
        ("lock_timeout_ms", "SELECT id FROM open_jobs FOR UPDATE"),
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
        holder.execute(text("SELECT id FROM open_jobs FOR UPDATE"))
        with pytest.raises(Unavailable, match="SQLSTATE"), impatient.begin() as connection:
            connection.execute(text(statement))


def test_a_client_that_stands_still_in_a_transaction_loses_its_locks(
    database: Database, database_url: str
) -> None:
    insert(database, new_job())
    locking = text("SELECT id FROM open_jobs FOR UPDATE")

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
        counts.queued(connection)


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


@pytest.mark.parametrize(
    "sqlstate", ["25006", "57P01", "57P02", "57P03", "57P05", "08006", "08P01", "26000", "42P05"]
)
def test_a_connection_that_is_of_no_use_any_more_is_not_kept(
    database_url: str, sqlstate: str
) -> None:
    pid = text("SELECT pg_backend_pid()")
    with closing(Database(database_url, pool_size=1)) as database:
        with database.begin() as connection:
            before = connection.scalar(pid)

        with pytest.raises(Unavailable), database.begin() as connection:
            connection.execute(
                text(f"DO $$ BEGIN RAISE EXCEPTION USING ERRCODE = '{sqlstate}'; END $$")
            )

        with database.begin() as connection:
            assert connection.scalar(pid) != before


def test_a_plan_that_a_migration_made_stale_passes(database_url: str) -> None:
    """Postgres refuses a prepared statement whose columns have changed, on that connection only."""
    every_column = text("SELECT * FROM workers")
    with (
        closing(Database(database_url, pool_size=1)) as database,
        closing(Database(database_url)) as migration,
    ):
        for _ in range(8):  # so often that it is prepared
            with database.begin() as connection:
                connection.execute(every_column)
        with migration.begin() as connection:
            connection.execute(text("ALTER TABLE workers ADD COLUMN later int"))

        with pytest.raises(Unavailable), database.begin() as connection:
            connection.execute(every_column)
        with database.begin() as connection:
            connection.execute(every_column)


def test_times_beyond_those_of_python_are_read_as_the_first_or_the_last(
    database: Database,
) -> None:
    times = "'infinity', '-infinity', '10000-01-01 03:59:59+00', '0044-03-15 12:00+00 BC'"
    query = text(f"SELECT unnest(CAST(ARRAY[{times}] AS timestamptz[]))")

    with database.begin() as connection:
        assert [each.year for each in connection.scalars(query)] == [9999, 1, 9999, 1]


def test_options_of_the_url_live_beside_ours(database_url: str) -> None:
    asked = "-c%20search_path%3Dmill%20-c%20work_mem%3D8MB"
    url = f"{database_url}?options={asked}&application_name=mine&sslmode=prefer"
    shown = text("SELECT current_setting(unnest(CAST(:names AS text[])))")
    names = ["search_path", "work_mem", "application_name", "statement_timeout", "timezone"]

    with closing(Database(url, statement_timeout_ms=7_000)) as database:
        with database.begin() as connection:
            in_force = list(connection.scalars(shown, {"names": names}))

        assert in_force == ["mill", "8MB", "mine", "7s", "UTC"]


def test_a_schema_of_ones_own_holds_the_tables_and_one_that_is_not_there_is_named(
    empty_database_url: str,
) -> None:
    url = empty_database_url + "?options=-c%20search_path%3Dmill"
    with pytest.raises(SchemaError, match="CREATE SCHEMA"):
        migrate(url)
    with closing(Database(empty_database_url)) as database, database.begin() as connection:
        connection.execute(text("CREATE SCHEMA mill"))

    migrate(url)

    with closing(Database(url)) as database:
        database.check_schema()
        [job_id] = insert(database, new_job())
        with database.begin() as connection:
            assert list(connection.scalars(text("SELECT id FROM mill.jobs"))) == [job_id]


def test_a_value_that_libpq_does_not_know_is_a_wrong_setting(database_url: str) -> None:
    with (
        closing(Database(database_url + "?sslmode=always")) as database,
        pytest.raises(ConfigError, match="sslmode"),
        database.begin(),
    ):
        pass


def test_the_clock_is_that_of_the_database(database: Database) -> None:
    before = database.now()
    with database.begin() as connection:
        now = connection.scalar(text("SELECT clock_timestamp()"))

    assert before <= now <= database.now() + timedelta(milliseconds=100)
