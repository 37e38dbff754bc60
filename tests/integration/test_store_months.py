"""Months of requests, attempts and results: made ahead, dropped when nothing is to be kept."""

from __future__ import annotations

from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

from app.store import months
from app.store.database import Database
from app.store.months import Month
from tests.rows import Worker, accept_earlier, insert, new_job, view

DAY_S = 86_400.0
LONG_AGO = timedelta(days=100)
FIRST = UUID(int=0)


@pytest.fixture
def old(database: Database) -> Month:
    """A month of long ago, which has partitions."""
    with database.begin() as connection:
        month = Month.of(connection.execute(text("SELECT now()")).scalar_one() - LONG_AGO)
        for table in months.TABLES:
            months.make(connection, table, month)
    return month


def ended(database: Database, number: int = 1) -> list[UUID]:
    """Jobs that were accepted and ended in the old month."""
    ids = insert(database, *(new_job() for _ in range(number)))
    worker = Worker.registered(database)
    worker.complete(worker.claim(ids))
    accept_earlier(database, ids, LONG_AGO)
    end_earlier(database, ids, LONG_AGO)
    return ids


def end_earlier(database: Database, ids: list[UUID], earlier: timedelta) -> None:
    with database.begin() as connection:
        connection.execute(
            text("UPDATE results SET finished_at = finished_at - :by WHERE job_id = ANY(:ids)"),
            {"by": earlier, "ids": ids},
        )


def count(connection: Connection, table: str) -> int:
    return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


def over(database: Database, days: float, table: str = "results") -> list[Month]:
    with database.begin() as connection:
        return months.over(connection, table, days * DAY_S)


def forget(database: Database, month: Month, page: int) -> list[UUID]:
    """Delete the keys of a month in pages; the last job of each."""
    last: list[UUID] = []
    with database.begin() as connection:
        while id := months.forget(connection, month, last[-1] if last else FIRST, page):
            last.append(id)
    return last


def test_this_month_and_the_next_ones_have_partitions_and_hold_what_is_written_now(
    database: Database,
) -> None:
    [job_id] = insert(database, new_job())
    worker = Worker.registered(database)
    worker.complete(worker.claim([job_id]))

    with database.begin() as connection:
        now = connection.execute(text("SELECT now()")).scalar_one()
        for table in months.TABLES:
            assert months.kept(connection, table) == list(months.upcoming(now))
            assert count(connection, Month.of(now).partition(table)) == 1
        assert months.prepare(connection) == 0


def test_a_month_that_was_not_made_in_time_stays_in_the_default_partition(
    database: Database,
) -> None:
    # given a month that begins before its partitions are made
    with database.begin() as connection:
        now = connection.execute(text("SELECT now()")).scalar_one()
        this, later, _ = months.upcoming(now)
        months.drop(connection, this)
        months.drop(connection, later, ["requests"])
    [job_id] = insert(database, new_job())

    # when they are made
    with database.begin() as connection:
        made = months.prepare(connection)

    # then those are that hold no rows yet, and the job is whole
    assert made == 3
    with database.begin() as connection:
        assert months.kept(connection, "requests")[0] == later
        assert count(connection, "requests_default") == 1
    worker = Worker.registered(database)
    worker.complete(worker.claim([job_id]))
    assert view(database, job_id).result is not None


def test_a_month_whose_jobs_have_all_been_final_for_long_is_dropped_and_its_keys_with_it(
    database: Database, old: Month
) -> None:
    # given a month of old jobs, and a young one
    ended(database, 7)
    [young] = insert(database, new_job(idempotency_key="young"))

    # when it goes
    assert over(database, 40) == [old]
    pages = forget(database, old, 3)
    with database.begin() as connection:
        assert months.drop(connection, old) == 3

    # then nothing of it is left, and all of the young one
    assert len(pages) == 3
    assert pages == sorted(pages)
    assert over(database, 40) == []
    with database.begin() as connection:
        left = {table: count(connection, table) for table in ("job_keys", *months.TABLES)}
    assert left == {"job_keys": 1, "requests": 1, "attempts": 0, "results": 0}
    assert view(database, young).id == young


def test_requests_of_a_month_are_dropped_alone_when_only_they_are_too_old(
    database: Database, old: Month
) -> None:
    [job_id, *_] = ended(database, 2)

    assert over(database, 40, "requests") == [old]
    with database.begin() as connection:
        months.drop(connection, old, ["requests"])

    assert over(database, 40, "requests") == []
    job = view(database, job_id)
    assert job.result is not None
    assert len(job.attempts) == 1


@pytest.mark.parametrize("what", ["young", "open", "young, of another tenant", "not over yet"])
def test_a_month_with_a_job_that_is_to_be_kept_is_not_over(
    database: Database, old: Month, what: str
) -> None:
    ended(database, 3)
    days = 40.0
    if what == "young":
        end_earlier(database, ended(database), -LONG_AGO)
    elif what == "open":
        accept_earlier(database, insert(database, new_job()), LONG_AGO)
    elif what == "young, of another tenant":
        ids = ended(database)
        end_earlier(database, ids, -LONG_AGO)
        with database.begin() as connection:
            connection.execute(
                text("UPDATE results SET tenant = 'other' WHERE job_id = ANY(:ids)"), {"ids": ids}
            )
    else:
        days = 200.0

    assert over(database, days) == []
