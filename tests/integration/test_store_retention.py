"""Requests, responses and jobs are kept for their time, and what they cost for longer."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from uuid import UUID

import pytest
from sqlalchemy import Connection, text

from app.store import retention
from app.store.database import Database
from tests.rows import Worker, accept_earlier, column, completed, insert, new_job, view, where_it_is

SECRET = "the miller has a secret"
DAY_S = 86_400.0


def ended(database: Database, number: int = 1) -> list[UUID]:
    """Jobs with a secret in their request and another in their response, which ended just now."""
    ids = insert(database, *(new_job(request={"prompt": SECRET}) for _ in range(number)))
    worker = Worker.registered(database)
    response = {"choices": [{"text": SECRET}]}
    worker.finish(*(completed(each, response=response) for each in worker.claim(ids)))
    return ids


def age(database: Database, ids: list[UUID], days: float = 2.0) -> None:
    """Let days pass since these jobs ended."""
    accept_earlier(database, ids, timedelta(days=days))
    with database.begin() as connection:
        for statement in (
            "UPDATE results SET finished_at = finished_at - :days * interval '1 day' "
            "WHERE job_id = ANY(:ids)",
            "UPDATE batches SET claimed_at = claimed_at - :days * interval '1 day', "
            "finished_at = finished_at - :days * interval '1 day' "
            "WHERE id IN (SELECT batch_id FROM results WHERE job_id = ANY(:ids))",
        ):
            connection.execute(text(statement), {"ids": ids, "days": days})


def run(database: Database, step: Callable[..., int], page: int = 100) -> int:
    with database.begin() as connection:
        return step(connection, DAY_S, page)


def count(database: Database, table: str) -> int:
    with database.begin() as connection:
        return connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0


def test_a_request_is_removed_after_its_time_and_is_nowhere_else(database: Database) -> None:
    [old] = ended(database)
    [young] = ended(database)
    age(database, [old])
    assert where_it_is(database, SECRET) == {"requests", "results"}

    assert run(database, retention.remove_requests) == 1
    assert run(database, retention.remove_requests) == 0

    assert column(database, old, "request") is None
    assert column(database, young, "request") == {"prompt": SECRET}
    age(database, [young])
    run(database, retention.remove_requests)
    run(database, retention.redact_responses)
    assert where_it_is(database, SECRET) == set()


def test_a_response_is_removed_and_the_record_of_its_cost_stays(database: Database) -> None:
    [job_id] = ended(database)
    before = view(database, job_id)
    age(database, [job_id])

    assert run(database, retention.redact_responses) == 1
    assert run(database, retention.redact_responses) == 0

    after = view(database, job_id)
    assert before.result is not None and after.result is not None
    assert after.result.response is None
    assert after.state is before.state
    for name in ("cost", "device_ns", "input_tokens", "output_tokens", "total_ms", "batch_id"):
        assert getattr(after.result, name) == getattr(before.result, name)


@pytest.mark.parametrize(
    "step", [retention.remove_requests, retention.redact_responses, retention.delete_jobs]
)
def test_jobs_that_have_not_ended_are_left_alone(
    database: Database, step: Callable[..., int]
) -> None:
    queued, running = insert(database, new_job(), new_job())
    Worker.registered(database).claim([running])
    accept_earlier(database, [queued, running], timedelta(days=3_000))

    assert run(database, step) == 0

    assert column(database, queued, "request") is not None
    assert column(database, running, "request") is not None


def test_a_job_is_deleted_with_its_attempts_and_its_result_and_its_batch_after_it(
    database: Database,
) -> None:
    [old] = ended(database)
    [young] = ended(database)
    age(database, [old])

    assert run(database, retention.delete_jobs) == 1
    assert run(database, retention.delete_batches) == 1

    for table in ("jobs", "attempts", "results", "batches"):
        assert count(database, table) == 1
    assert view(database, young).batch is not None


def test_two_processes_share_the_pages(database: Database) -> None:
    age(database, ended(database, 10))

    def page(connection: Connection) -> int:
        return retention.delete_jobs(connection, DAY_S, 5)

    with database.begin() as one, database.begin() as other:
        assert (page(one), page(other)) == (5, 5)
        assert page(other) == 0
    assert count(database, "jobs") == 0


def test_every_tenants_jobs_have_their_time(database: Database) -> None:
    ids = insert(database, new_job(tenant="mill"), new_job(tenant="bakery"), new_job())
    worker = Worker.registered(database)
    worker.complete(worker.claim(ids))
    age(database, ids)

    assert run(database, retention.remove_requests) == 3
    assert run(database, retention.redact_responses) == 3
    assert run(database, retention.delete_jobs) == 3
