"""Whatever arrives can be written by the statement for a whole group, and read again by anybody."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import UUID, uuid4

import pytest
import redis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from app.api.views import job_of, told
from app.broker.message import raw_message
from app.config.settings import PriceSettings, Settings
from app.jobs import JobState, Kind
from app.local.servers import EmbeddedRedis
from app.requests import bodies
from app.store import counts, reads, submissions
from app.store.database import Database
from app.store.submissions import NewJob
from app.worker.pool.arrivals import Arrival
from tests.any_messages import items
from tests.conftest import STUB_MODELS
from tests.unit.test_any_message import arrival_of
from tests.waiting import eventually
from tests.workers import results, rows, running_worker


def row_of(arrival: Arrival) -> submissions.Incoming:
    """What the registrar writes of an arrival."""
    request = arrival.request
    if request is None or arrival.model is None:
        return submissions.Incoming(arrival.job_id)
    return submissions.Incoming(
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


@pytest.fixture(scope="module")
def system(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Settings, redis.Redis]]:
    """One worker for all that is pushed."""
    config = Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url.removesuffix("/0") + "/127"},
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        models=STUB_MODELS,
        prices={"cpu": PriceSettings(per_device_hour="0.036", currency="USD")},
    )
    with (
        redis.Redis.from_url(config.broker.url) as client,
        running_worker(config, tmp_path_factory.mktemp("worker")),
    ):
        client.flushdb()
        yield config, client


@pytest.mark.timeout(300)
@settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.generate],
)
@given(st.lists(items(), min_size=20, max_size=60))
def test_whatever_is_pushed_the_worker_lives_and_its_mates_complete(
    system: tuple[Settings, redis.Redis], group: list[bytes]
) -> None:
    # given anything at all, with a good message after each
    config, client = system
    good = [str(uuid4()) for _ in group]
    for item, id_ in zip(group, good, strict=True):
        mate = raw_message(id_, Kind.GENERATE, {"prompt": "flour"}, queue="celery")
        client.lpush("celery", item, mate)

    # then the good ones are answered, all by the first worker, and nothing is left over
    found = eventually(lambda: (all_ := results(config)).keys() >= set(good) and all_, 60)
    assert {found[id_]["state"] for id_ in good} == {"completed"}
    assert len(rows(config, "SELECT id FROM workers")) == 1
    eventually(lambda: client.hlen("unacked") == 0, 30)


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
        counts.queue_depths(connection)
        counts.queued(connection)
        stored = {id_: reads.replayable(connection, id_) for id_ in ids}
    for view in (*views, *listed):
        assert told(job_of, view).state is JobState.QUEUED
    for id_, row in stored.items():
        assert bodies.parse(row.request, row.url).raw == row.request, id_
