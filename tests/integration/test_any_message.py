"""Whatever arrives can be written by the statement for a whole group, and read again by anybody."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from app.api.views import job_of, told
from app.jobs import JobState
from app.requests import bodies
from app.store import reads, submissions
from app.store.database import Database
from app.store.submissions import NewJob
from app.worker.pool.arrivals import Arrival
from tests.any_messages import items
from tests.unit.test_any_message import arrival_of


def row_of(arrival: Arrival) -> submissions.Arrival:
    """What the registrar writes of an arrival."""
    request = arrival.request
    if request is None or arrival.model is None:
        return submissions.Arrival(arrival.job_id)
    return submissions.Arrival(
        arrival.job_id,
        NewJob(
            id=arrival.job_id,
            model=arrival.model,
            kind=request.kind,
            url=request.url,
            request=request.raw,
            fingerprint=request.fingerprint,
            source="message",
            priority=arrival.priority,
            not_before=arrival.not_before,
            deadline=arrival.deadline,
            time_limit_s=arrival.time_limit_s,
            metadata=arrival.metadata,
        ),
    )


@pytest.mark.timeout(300)
@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(items(), min_size=2, max_size=6))
def test_any_group_of_messages_is_written_and_every_row_is_readable(
    database: Database, group: list[bytes]
) -> None:
    # given the arrivals among some messages
    arrivals = {a.job_id: a for item in group if (a := arrival_of(item)) is not None}
    expected = {id_ for id_, arrival in arrivals.items() if arrival.request is not None}

    # when they are received in one statement
    with database.begin() as connection:
        received = submissions.receive(connection, uuid4(), map(row_of, arrivals.values()))

    # then each that brought a request has a row, and all can be read, told and run
    assert received.keys() >= expected
    ids: list[UUID] = list(received)
    with database.begin() as connection:
        views = reads.find(connection, ids)
        listed = reads.list_jobs(connection, limit=100)
        reads.queue_depths(connection)
        submissions.queued(connection)
        stored = {id_: reads.replayable(connection, id_) for id_ in ids}
    for view in (*views, *listed):
        assert told(job_of, view).state is JobState.QUEUED
    for id_, row in stored.items():
        assert bodies.parse_stored(row.request, row.url, bodies.FORMAT).raw == row.request, id_
