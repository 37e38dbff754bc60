"""Rescue on a real Postgres and a real Redis: nothing that was accepted is left behind."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID, uuid4

import psycopg
import pytest
import redis
from sqlalchemy import text

from app import rescue
from app.alive import ALIVE_S
from app.broker import publisher
from app.broker.message import MORE_HEADER, Message
from app.broker.publisher import Publisher
from app.broker.queues import Layout, queue_name, queues_of
from app.config.settings import Settings
from app.errors import Unavailable
from app.jobs import ALONE_AFTER, CloseReason, JobState, Kind
from app.local.ports import free_port
from app.rescue import MONTHS_EVERY_S, REMOVE_EVERY_S, Rescue, SweepReport
from app.store import claims, months, submissions, workers
from app.store.claims import Member, NewBatch
from app.store.database import Database
from app.store.months import Month
from app.store.pages import LEFT_OUT_S
from app.store.submissions import Incoming
from app.store.workers import NewWorker
from tests.rescues import running_rescue
from tests.rows import accept_earlier, insert, new_job
from tests.waiting import eventually

MODEL = "stub"
LONG_AGO = timedelta(minutes=5)


@pytest.fixture
def settings(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    """No two jobs share a message."""
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        rescue={"page_size": 7, "lost_after_s": 10, "sweep_ms": 500},
    )
    return in_batches_of(1, settings)


def in_batches_of(size: int, settings: Settings) -> Settings:
    model = settings.models[MODEL].model_copy(update={"max_batch_size": size})
    return settings.model_copy(update={"models": settings.models | {MODEL: model}})


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def job_ids_in(headers: dict[str, Any]) -> list[str]:
    return [headers["id"], *headers.get(MORE_HEADER, [])]


class World:
    """Jobs, workers and messages, and the rescue that looks after them."""

    def __init__(self, settings: Settings, client: redis.Redis) -> None:
        self.database = Database(settings.database.url)
        self.publisher = Publisher(settings)
        self.database_url = settings.database.url
        self._settings = settings
        self._client = client
        self.passed_s = 0.0  #: by rescue's clock, whatever the machine takes
        self.rescue = self.another_rescue()

    def now_s(self) -> float:
        return self.passed_s

    def sweep(self) -> SweepReport:
        """After a time in which whatever waits for a look at Redis has waited enough."""
        self.passed_s += self._settings.rescue.lost_after_s
        return self.rescue.sweep()

    def another_rescue(self, publisher: Publisher | None = None) -> Rescue:
        """One that has been in contact with Postgres for long."""
        rescue = Rescue(self._settings, self.database, publisher or self.publisher, self.now_s)
        for _ in range(4):
            self.passed_s += self._settings.worker.lease_s / 2 - 1
            rescue._contact.answered()
        return rescue

    def close(self) -> None:
        self.publisher.close()
        self.database.close()

    def submit(self, number: int = 1, **fields: Any) -> list[UUID]:
        """Rows without messages, as a crash between commit and send leaves them."""
        ids = insert(self.database, *(new_job(model=MODEL, **fields) for _ in range(number)))
        self.change(ids, "not_before = not_before - %s", LONG_AGO)
        accept_earlier(self.database, ids, LONG_AGO)
        return ids

    def submit_and_send(self, number: int = 1, **fields: Any) -> list[UUID]:
        """Jobs whose messages have been waiting in Redis for long."""
        ids = self.submit(number, **fields)
        priority = fields.get("priority", 0)
        self.publisher.send_many(Message(id, Kind.GENERATE, MODEL, priority=priority) for id in ids)
        self.change(ids, "enqueued_at = now() - %s", LONG_AGO)
        return ids

    def change(self, ids: list[UUID], assignments: str, *values: Any) -> None:
        values = values * assignments.count("%s") if len(values) == 1 else values
        with psycopg.connect(self._settings.database.url) as connection:
            connection.execute(
                f"UPDATE open_jobs SET {assignments} WHERE id = ANY(%s)", (*values, ids)
            )

    def start_worker(self) -> UUID:
        worker = NewWorker(
            id=uuid4(), name="w", host="h", pid=1, models=[MODEL], device="cpu",
            price_id="cpu", currency="USD", price_per_device_hour=Decimal(1),
        )  # fmt: skip
        with self.database.begin() as connection:
            workers.register_worker(connection, worker, lease_s=60)
        return worker.id

    def kill(self, worker_id: UUID) -> None:
        """As if its last heartbeat had been long ago."""
        with psycopg.connect(self._settings.database.url) as connection:
            connection.execute(
                "UPDATE workers SET lease_expires_at = now() - interval '1 s' WHERE id = %s",
                [worker_id],
            )

    def receive(self, worker_id: UUID, ids: list[UUID]) -> None:
        """The worker takes these messages from Redis and registers them."""
        for key in [Layout().key(queue_name(MODEL), priority) for priority in range(0, 10, 3)]:
            for item in self._client.lrange(key, 0, -1):
                if UUID(json.loads(item)["headers"]["id"]) in ids:
                    self._client.lrem(key, 1, item)
        with self.database.begin() as connection:
            submissions.receive(connection, worker_id, [Incoming(id) for id in ids])

    def claim(self, worker_id: UUID, ids: list[UUID]) -> None:
        batch = NewBatch(
            id=uuid4(), worker_id=worker_id, model=MODEL, engine="stub",
            close_reason=CloseReason.SIZE, wait_ms=1,
        )  # fmt: skip
        with self.database.begin() as connection:
            claimed = claims.claim(connection, batch, [Member(id, uuid4()) for id in ids])
        assert len(claimed) == len(ids)

    def finish(self, worker_id: UUID, job_id: UUID) -> None:
        with psycopg.connect(self.database_url) as connection:
            row = connection.execute(
                "SELECT attempt_id, created_at FROM jobs WHERE id = %s", [job_id]
            )
            [attempt_id, created_at] = row.fetchone() or [None, None]
        finished = claims.Finished(
            job_id=job_id, attempt_id=attempt_id, created_at=created_at, state=JobState.COMPLETED,
            response={"choices": []}, device_ns=3_600_000_000_000,
            cost=Decimal("0.5"), currency="USD", price_id="cpu", price=Decimal("0.5"),
        )  # fmt: skip
        with self.database.begin() as connection:
            assert claims.finish(connection, [finished])

    def messages(self) -> list[UUID]:
        """Ids of the jobs that have messages in Redis, in any order."""
        keys = [Layout().key(queue_name(MODEL), priority) for priority in (0, 3, 6, 9)]
        items = [item for key in keys for item in self._client.lrange(key, 0, -1)]
        return [UUID(id) for item in items for id in job_ids_in(json.loads(item)["headers"])]

    def lose_messages(self) -> None:
        self._client.flushdb()

    def states(self, ids: list[UUID]) -> set[str]:
        with psycopg.connect(self._settings.database.url) as connection:
            rows = connection.execute("SELECT state FROM jobs WHERE id = ANY(%s)", [ids])
            return {state for (state,) in rows}


@pytest.fixture
def world(settings: Settings, client: redis.Redis) -> Iterator[World]:
    world = World(settings, client)
    yield world
    world.close()


# ── messages that were never sent ───────────────────────────────────────────────────────────────


def test_a_job_whose_message_was_never_sent_is_sent_once(world: World) -> None:
    ids = world.submit(20)  # several pages

    reports = [world.sweep() for _ in range(3)]

    assert sorted(world.messages()) == sorted(ids)
    assert [report.sent for report in reports] == [20, 0, 0]


def test_its_message_carries_no_request(world: World, client: redis.Redis) -> None:
    world.submit(request={"prompt": "the miller's secret"})

    world.sweep()

    [item] = client.lrange(queue_name(MODEL), 0, -1)
    assert json.loads(base64.b64decode(json.loads(item)["body"]))[:2] == [[], {}]


def test_it_keeps_its_priority(world: World, client: redis.Redis) -> None:
    world.submit(priority=7)

    world.sweep()

    assert client.llen(Layout().key(queue_name(MODEL), 7)) == 1


def test_a_job_is_not_sent_before_it_is_due(world: World) -> None:
    [later] = world.submit(not_before=datetime.now(UTC) + timedelta(hours=1))
    world.sweep()
    assert world.messages() == []

    world.change([later], "not_before = now()")

    eventually(lambda: world.sweep().sent)
    assert world.messages() == [later]


@pytest.fixture
def small_queue(settings: Settings, client: redis.Redis) -> Iterator[World]:
    """A world whose queues take 100 messages."""
    broker = settings.broker.model_copy(update={"max_messages": 100})
    world = World(settings.model_copy(update={"broker": broker}), client)
    yield world
    world.close()


def test_redis_stays_small_whatever_waits_and_is_fed_as_the_queue_drains(
    small_queue: World, client: redis.Redis
) -> None:
    ids = small_queue.submit(250)
    small_queue.change(ids[:50], "not_before = not_before - %s", LONG_AGO)  # the oldest

    assert small_queue.sweep().sent == 100
    assert small_queue.sweep().sent == 0
    assert len(small_queue.messages()) == 100
    assert set(ids[:50]) <= set(small_queue.messages())

    worker = small_queue.start_worker()
    small_queue.receive(worker, small_queue.messages()[:30])
    assert small_queue.sweep().sent == 30
    assert len(small_queue.messages()) == 100


def test_an_urgent_job_is_sent_although_the_queue_is_full_of_patient_ones(
    small_queue: World,
) -> None:
    small_queue.submit(150, priority=9)
    assert small_queue.sweep().sent == 100
    [urgent] = small_queue.submit(1, priority=0)

    assert small_queue.sweep().sent == 1

    assert urgent in small_queue.messages()


def test_a_patient_job_is_sent_although_urgent_ones_fill_the_queue_all_the_time(
    small_queue: World,
) -> None:
    small_queue.submit(150, priority=0)
    [patient] = small_queue.submit(1, priority=9)

    assert small_queue.sweep().sent == 101

    assert patient in small_queue.messages()


def test_two_rescues_at_once_send_a_job_once(world: World) -> None:
    ids = world.submit(60)
    rescues = [world.rescue, world.another_rescue()]

    with ThreadPoolExecutor(2) as threads:
        reports = list(threads.map(Rescue.sweep, rescues))

    assert sorted(world.messages()) == sorted(ids)
    assert sum(report.sent for report in reports) == 60


def test_jobs_that_are_sent_together_share_messages_and_the_queue_takes_as_many_of_these(
    settings: Settings, client: redis.Redis
) -> None:
    broker = settings.broker.model_copy(update={"max_messages": 100})
    sharing = in_batches_of(3, settings.model_copy(update={"broker": broker}))
    with closing(World(sharing, client)) as world:
        ids = world.submit(400)

        sent = [world.sweep().sent for _ in range(5)]

        # A page of 7 jobs is three messages.
        assert client.llen(queue_name(MODEL)) == 100
        assert sum(sent) == len(world.messages()) == len(set(world.messages())) > 200
        assert set(world.messages()) <= set(ids)


def test_a_lost_message_of_several_jobs_is_found_and_the_others_left_alone(
    settings: Settings, client: redis.Redis
) -> None:
    with closing(World(in_batches_of(10, settings), client)) as world:
        ids = world.submit_and_send(50)
        lost = json.loads(client.rpop(queue_name(MODEL)))["headers"]

        reports = [world.sweep() for _ in range(4)]

        assert [report.sent_again for report in reports] == [0, 10, 0, 0]
        assert sorted(world.messages()) == sorted(ids)
        assert client.llen(queue_name(MODEL)) == 4 + 1
        assert len(job_ids_in(lost)) == 10


# ── messages that were lost in Redis ────────────────────────────────────────────────────────────


def test_after_flushall_every_queued_job_is_sent_again_once(world: World) -> None:
    ids = world.submit_and_send(100)
    world.lose_messages()

    reports = [world.sweep() for _ in range(5)]

    assert sorted(world.messages()) == sorted(ids)
    assert sum(report.sent_again for report in reports) == 100


def test_a_look_that_was_slow_for_once_delays_no_rescue_for_long(
    settings: Settings, world: World, client: redis.Redis
) -> None:
    # given a look that takes a minute, while a lock is held say
    now_s, step_s = 0.0, 60.0

    def clock() -> float:
        nonlocal now_s
        now_s += step_s
        return now_s

    rescue = Rescue(settings, world.database, world.publisher, clock)
    world.submit_and_send(3)
    client.flushall()
    rescue.sweep()

    # when the next ones take no time
    step_s = 0.0
    sent = [rescue.sweep().sent_again for _ in range(2)]

    assert sum(sent) == 3


def test_a_long_healthy_queue_is_not_doubled(world: World) -> None:
    ids = world.submit_and_send(100)

    reports = [world.sweep() for _ in range(5)]

    assert len(world.messages()) == len(ids)
    assert not any(report.sent_again for report in reports)


def test_a_queue_with_messages_of_other_producers_is_left_alone(
    world: World, client: redis.Redis
) -> None:
    ids = world.submit_and_send(10)
    world.publisher.send_many(Message(uuid4(), Kind.GENERATE, MODEL) for _ in range(5))

    for _ in range(3):
        world.sweep()

    assert len(world.messages()) == len(ids) + 5


def test_one_lost_message_of_a_long_queue_is_found_and_the_rest_left_alone(
    world: World,
) -> None:
    [lost] = world.submit_and_send(1)
    world.lose_messages()
    ids = world.submit_and_send(50)

    for _ in range(5):
        world.sweep()

    assert sorted(world.messages()) == sorted([lost, *ids])


def test_a_message_that_a_worker_is_just_taking_is_not_sent_again(
    world: World, client: redis.Redis
) -> None:
    # given a message that was taken from Redis and whose row does not say so yet
    ids = world.submit_and_send(10)
    client.rpop(queue_name(MODEL))
    world.sweep()
    assert sorted(world.messages()) == sorted(ids[1:])

    # when the worker registers it before the next sweep
    world.receive(world.start_worker(), ids[:1])
    world.sweep()

    assert sorted(world.messages()) == sorted(ids[1:])


def test_a_message_that_is_lost_again_and_again_is_sent_less_and_less_often(
    world: World,
) -> None:
    [id] = world.submit_and_send(1)
    world.change([id], "wake_count = 3")  # 10 s × 2³ = 80 s
    world.lose_messages()

    world.change([id], "enqueued_at = now() - interval '70 s'")
    assert [world.sweep().sent_again for _ in range(3)] == [0, 0, 0]

    world.change([id], "enqueued_at = now() - interval '90 s'")
    assert [world.sweep().sent_again for _ in range(3)] == [0, 1, 0]


def test_lost_urgent_messages_are_sent_again_though_more_patient_ones_wait(world: World) -> None:
    # given three urgent messages that were lost, and twenty patient ones that wait longer
    urgent = world.submit_and_send(3)
    world.lose_messages()
    patient = world.submit_and_send(20, priority=9)
    world.change(patient, "enqueued_at = enqueued_at - %s", LONG_AGO)

    reports = [world.sweep() for _ in range(3)]

    assert [report.sent_again for report in reports] == [0, 3, 0]
    assert sorted(world.messages()) == sorted([*urgent, *patient])


def test_a_long_queue_hides_no_lost_message_behind_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given more waiting messages than are looked for at once, and lost ones that are younger
    monkeypatch.setattr(rescue, "MAX_LOOKED_FOR", 10)
    lost = world.submit_and_send(2)
    world.lose_messages()
    waiting = world.submit_and_send(20, priority=9)
    world.change(waiting, "enqueued_at = enqueued_at - %s", LONG_AGO)

    reports = [world.sweep() for _ in range(3)]

    assert [report.sent_again for report in reports] == [0, 2, 0]
    assert sorted(world.messages()) == sorted([*lost, *waiting])


def test_messages_of_others_hide_no_lost_one(world: World, client: redis.Redis) -> None:
    # given fifty lost messages and more of other producers in the same list, garbage among them
    lost = world.submit_and_send(50)
    world.lose_messages()
    strangers = [uuid4() for _ in range(60)]
    world.publisher.send_many(Message(id, Kind.GENERATE, MODEL) for id in strangers)

    for _ in range(2):
        world.sweep()

    assert sorted(world.messages()) == sorted([*lost, *strangers])


def test_a_look_at_redis_reads_past_whatever_lies_there(world: World, client: redis.Redis) -> None:
    # given two lists full of what is not ours, with one of our messages at each end
    first, last = world.submit_and_send(2)
    [lost] = world.submit(1)
    world.change([lost], "enqueued_at = now() - %s", LONG_AGO)
    key = queue_name(MODEL)
    garbage = ["", "[", "null", "7", '"id"', "[" * 5_000, '{"headers": 7}', "\xff\x00", "{}"]
    for item in [*garbage, '{"headers": {"id": 7}}', '{"headers": {"id": "\\u0000"}}'] * 300:
        client.linsert(key, "before", client.lindex(key, -1), item)

    found = world.publisher.without_message(dict.fromkeys([first, last, lost], MODEL))

    assert found == {lost}


def test_a_message_in_another_model_s_queue_is_lost(world: World, client: redis.Redis) -> None:
    [job] = world.submit_and_send(1)
    client.rename(queue_name(MODEL), queue_name("another"))

    assert world.publisher.without_message({job: MODEL, uuid4(): "another"}) >= {job}
    assert [world.sweep().sent_again for _ in range(3)] == [0, 1, 0]
    assert world.messages() == [job]


def test_a_message_in_the_default_queue_is_not_lost(world: World, client: redis.Redis) -> None:
    world.submit_and_send(1)
    client.rename(queue_name(MODEL), "celery")

    assert [world.sweep().sent_again for _ in range(3)] == [0, 0, 0]


def test_a_message_in_a_queue_of_an_older_format_is_not_lost(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given messages that were sent before this process came with a new format of requests
    world.submit_and_send(3)
    monkeypatch.setattr(publisher, "queue_name", partial(queue_name, format=2))
    monkeypatch.setattr(publisher, "queues_of", partial(queues_of, format=2))

    assert [world.sweep().sent_again for _ in range(3)] == [0, 0, 0]


def test_keys_with_a_prefix_and_steps_of_ones_own_are_looked_into(
    settings: Settings, world: World, client: redis.Redis
) -> None:
    # given producers with a layout of their own, and one lost message of each priority
    broker = settings.broker.model_copy(update={"key_prefix": "mill:", "priority_steps": (0, 5)})
    own = Publisher(settings.model_copy(update={"broker": broker}))
    rescue = world.another_rescue(own)
    waiting = [*world.submit(2), *world.submit(2, priority=7)]
    assert rescue.sweep().sent == 4
    world.change(waiting, "enqueued_at = now() - %s", LONG_AGO)
    for key in client.keys("mill:gristmill.*"):
        client.rpop(key)

    sent = []
    for _ in range(3):
        world.passed_s += settings.rescue.lost_after_s
        sent.append(rescue.sweep().sent_again)

    own.close()
    assert sent == [0, 2, 0]


def test_no_row_is_locked_while_rescue_talks_to_redis(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a job to send and one to send again, and somebody who looks at the rows meanwhile
    world.submit(1)
    world.submit_and_send(1)
    world.lose_messages()
    locked = []

    def look(self: Publisher, messages: Any) -> None:
        with psycopg.connect(world.database_url) as connection:
            free = connection.execute("SELECT id FROM open_jobs FOR UPDATE SKIP LOCKED").fetchall()
        locked.append(2 - len(free))

    monkeypatch.setattr(Publisher, "send_many", look)
    reports = [world.sweep() for _ in range(2)]

    assert [report.sent + report.sent_again for report in reports] == [1, 1]
    assert set(locked) == {0}


def test_what_redis_refuses_is_unsent_again(
    world: World, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = world.submit(3)
    with monkeypatch.context() as patch:
        patch.setattr(Publisher, "send_many", Mock(side_effect=Unavailable("Redis is full.")))
        with pytest.raises(Unavailable):
            world.sweep()

    assert world.sweep().sent == 3
    assert sorted(world.messages()) == sorted(ids)


# ── workers that are gone ───────────────────────────────────────────────────────────────────────


def test_the_jobs_of_a_dead_worker_are_queued_and_sent_again(world: World) -> None:
    # given a worker that runs some jobs and holds the messages of others
    ids = world.submit_and_send(20)
    worker_id = world.start_worker()
    world.receive(worker_id, ids)
    world.claim(worker_id, ids[:15])

    # when it dies
    world.sweep()
    assert world.messages() == []
    world.kill(worker_id)
    report = world.sweep()

    # then both are somebody else's to take
    assert (report.worker_lost, report.message_lost) == (15, 5)
    eventually(lambda: world.sweep() and len(world.messages()) == 20)
    assert sorted(world.messages()) == sorted(ids)
    assert world.states(ids) == {"queued"}


def test_a_job_that_lost_its_last_worker_fails(world: World) -> None:
    [id] = world.submit_and_send(max_attempts=1)
    worker_id = world.start_worker()
    world.receive(worker_id, [id])
    world.claim(worker_id, [id])
    world.change([id], f"losses = {ALONE_AFTER}")

    world.kill(worker_id)
    world.sweep()

    assert world.states([id]) == {"failed"}


def test_a_job_past_its_deadline_expires_and_is_not_sent(world: World) -> None:
    ids = world.submit(3, deadline=datetime.now(UTC) + timedelta(hours=1))
    world.change(ids, "deadline = now()")

    report = world.sweep()

    assert (report.expired, report.sent) == (3, 0)
    assert world.states(ids) == {"expired"}


def test_nobody_is_lost_before_rescue_has_been_connected_for_a_lease(
    world: World, settings: Settings
) -> None:
    # given a worker whose lease ran out while Postgres was away for all
    ids = world.submit(2)
    worker_id = world.start_worker()
    world.receive(worker_id, ids)
    world.claim(worker_id, ids[:1])
    world.kill(worker_id)
    lease_s = settings.worker.lease_s
    world.passed_s += lease_s  # rescue heard nothing for so long

    # when Postgres is back
    reports = [world.rescue.sweep()]
    for _ in range(3):
        world.passed_s += lease_s / 2 - 2
        reports.append(world.rescue.sweep())

    # then the worker has all of a lease to renew its own
    assert [report.worker_lost for report in reports] == [0, 0, 0, 1]
    assert [report.message_lost for report in reports] == [0, 0, 0, 1]


def test_a_row_that_cannot_be_moved_keeps_no_other_waiting(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    # given jobs of a dead worker, and late ones; one of each cannot be moved
    lost, late = world.submit(20), world.submit(20, deadline=datetime.now(UTC) + timedelta(hours=1))
    worker_id = world.start_worker()
    world.claim(worker_id, lost)
    world.kill(worker_id)
    world.change(late, "deadline = now()")
    world.change(lost[:1], "losses = 32767")
    with psycopg.connect(world.database_url) as connection:
        connection.execute(
            "INSERT INTO results (job_id, model, kind, state, created_at, queued_at, finished_at, "
            "total_ms, source, not_before) SELECT id, model, kind, 'failed', created_at, now(), "
            "now(), 0, source, now() FROM open_jobs "
            "WHERE id = %s",
            late[:1],
        )

    report = world.sweep()

    assert (report.worker_lost, report.expired) == (19, 19)
    assert str(lost[0]) in str([record.__dict__ for record in caplog.records])
    assert world.states(late[1:]) == {"expired"}
    assert world.sweep().expired == 0

    # and it is tried again later: what kept it may have passed
    with psycopg.connect(world.database_url) as connection:
        connection.execute("DELETE FROM results WHERE job_id = %s", late[:1])
    assert world.sweep().expired == 0
    world.passed_s += LEFT_OUT_S
    assert world.sweep().expired == 1


def test_what_has_to_wait_for_a_lock_keeps_no_other_work_from_being_done(
    settings: Settings, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    # given somebody who makes an index on batches, and work of all kinds
    [unsent] = world.submit(1)
    [late] = world.submit(1, deadline=datetime.now(UTC) + timedelta(hours=1))
    world.change([late], "deadline = now()")
    with (
        psycopg.connect(world.database_url) as other,
        closing(Database(world.database_url, lock_timeout_ms=50)) as impatient,
    ):
        other.execute("LOCK TABLE batches IN EXCLUSIVE MODE")
        rescue = Rescue(settings, impatient, world.publisher)

        reports = [rescue.sweep() for _ in range(2)]

    assert [(report.expired, report.sent) for report in reports] == [(1, 1), (0, 0)]
    assert world.messages() == [unsent]
    assert sum("cannot be done now" in record.message for record in caplog.records) == 1


def test_a_page_that_takes_too_long_is_halved_and_not_repeated(
    settings: Settings, world: World
) -> None:
    # given a Postgres that takes a tenth of a second for each row, and 0.4 s at most
    ids = world.submit(7, deadline=datetime.now(UTC) + timedelta(hours=1))
    world.change(ids, "deadline = now()")
    with psycopg.connect(world.database_url) as connection:
        connection.execute(
            "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
            "'BEGIN PERFORM pg_sleep(0.1); RETURN NEW; END'"
        )
        connection.execute(
            "CREATE TRIGGER slow BEFORE INSERT ON results FOR EACH ROW EXECUTE FUNCTION slow()"
        )
    with closing(Database(world.database_url, statement_timeout_ms=400)) as hurried:
        report = Rescue(settings, hurried, world.publisher).sweep()

    assert report.expired == 7


# ── Postgres or Redis away ──────────────────────────────────────────────────────────────────────


def test_what_was_kept_for_its_time_is_removed_and_then_deleted(
    world: World, client: redis.Redis
) -> None:
    month, year = world.submit(2)
    for job_id in (month, year):
        world.claim(worker := world.start_worker(), [job_id])
        world.finish(worker, job_id)
    for job_id, age in ((month, timedelta(days=31)), (year, timedelta(days=366))):
        with psycopg.connect(world.database_url) as connection:
            connection.execute(
                "UPDATE results SET finished_at = finished_at - %s WHERE job_id = %s",
                (age, job_id),
            )
        accept_earlier(world.database, [job_id], age)

    # two requests and two responses, then the older job
    assert world.sweep().removed == 5
    assert world.sweep().removed == 0

    with psycopg.connect(world.database_url) as connection:
        left = connection.execute(
            "SELECT id, request, response, cost FROM jobs JOIN results ON job_id = id"
        ).fetchall()
    assert left == [(month, None, None, Decimal("0.5"))]


def test_what_is_too_old_is_looked_for_now_and_then_as_long_as_nothing_is(world: World) -> None:
    [job_id] = world.submit(1)
    world.claim(worker := world.start_worker(), [job_id])
    world.finish(worker, job_id)
    assert world.sweep().removed == 0

    with psycopg.connect(world.database_url) as connection:
        connection.execute("UPDATE results SET finished_at = finished_at - interval '31 days'")
    accept_earlier(world.database, [job_id], timedelta(days=31))

    assert world.rescue.sweep().removed == 0
    world.passed_s += REMOVE_EVERY_S
    assert [world.rescue.sweep().removed for _ in range(2)] == [2, 0]


def a_month_of_old_jobs(world: World, ids: list[UUID]) -> Month:
    """Jobs that ended two years ago, in partitions of their own."""
    world.claim(worker := world.start_worker(), ids)
    for job_id in ids:
        world.finish(worker, job_id)
    age = timedelta(days=2 * 365)
    with world.database.begin() as connection:
        now = connection.execute(text("SELECT now()")).scalar_one()
        month = Month.of(now - age)
        for table in months.TABLES:
            months.make(connection, table, month)
        connection.execute(text("UPDATE results SET finished_at = finished_at - :by"), {"by": age})
    accept_earlier(world.database, ids, age)
    return month


def kept(world: World, table: str = "results") -> list[Month]:
    with world.database.begin() as connection:
        return months.kept(connection, table)


def test_a_month_of_old_jobs_is_dropped_as_a_whole_and_the_months_to_come_are_made(
    world: World,
) -> None:
    # given a month of old jobs, a young job, and no tables for next month
    ids = world.submit(3)
    now, later, last = kept(world)
    a_month_of_old_jobs(world, ids[:2])
    with world.database.begin() as connection:
        months.drop(connection, later)

    world.sweep()

    assert [kept(world, table) for table in months.TABLES] == [[now, later, last]] * 3
    with world.database.begin() as connection:
        assert list(connection.scalars(text("SELECT id FROM job_keys"))) == ids[2:]


def test_a_month_that_somebody_reads_is_dropped_another_time(world: World) -> None:
    # given a month of old jobs, and somebody who reads results for long
    old = a_month_of_old_jobs(world, world.submit(2))
    with psycopg.connect(world.database_url) as reader:
        reader.execute("SELECT count(*) FROM results")

        # when rescue sweeps, then it does all else, and does not stand in the way at every sweep
        [unsent] = world.submit(1)
        world.sweep()
        assert world.messages() == [unsent]
        assert old in kept(world)
    world.rescue.sweep()
    assert old in kept(world)

    # and drops it after a while
    world.passed_s += MONTHS_EVERY_S
    world.sweep()
    assert old not in kept(world)


def test_while_redis_is_away_leases_and_deadlines_are_kept_and_nothing_counts_as_sent(
    world: World, settings: Settings, make_settings: Callable[..., Settings]
) -> None:
    # given a dead worker's job, an expired one and one to send, and no Redis
    lost, late, unsent = world.submit(3)
    worker_id = world.start_worker()
    world.claim(worker_id, [lost])
    world.kill(worker_id)
    world.change([late], "deadline = now()")
    nowhere = make_settings(broker={"url": f"redis://127.0.0.1:{free_port()}/0"})
    cut_off = world.another_rescue(Publisher(nowhere))

    with pytest.raises(Unavailable):
        cut_off.sweep()

    assert world.states([late]) == {"expired"}
    assert world.states([lost]) == {"queued"}
    eventually(lambda: world.sweep() and len(world.messages()) == 2)
    assert sorted(world.messages()) == sorted([lost, unsent])


# ── the process ─────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def serving(settings: Settings, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    with running_rescue(settings, tmp_path / "rescue") as process:
        yield process


def test_the_process_sweeps_says_that_it_is_alive_and_stops_on_sigterm(
    serving: subprocess.Popen[bytes], world: World, settings: Settings
) -> None:
    assert not rescue.alive(settings).is_alive
    ids = world.submit(3)

    eventually(lambda: sorted(world.messages()) == sorted(ids), timeout_s=30)
    eventually(lambda: rescue.alive(settings).is_alive)

    serving.send_signal(signal.SIGTERM)
    assert serving.wait(10) == 0


def test_the_process_outlives_a_postgres_that_goes_away_and_comes_back(
    serving: subprocess.Popen[bytes], world: World, settings: Settings
) -> None:
    eventually(lambda: rescue.alive(settings).is_alive, timeout_s=30)

    with psycopg.connect(settings.database.url, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE application_name = 'gristmill rescue' AND datname = current_database()"
        )
    ids = world.submit(3)

    eventually(lambda: sorted(world.messages()) == sorted(ids), timeout_s=30)
    assert serving.poll() is None


@pytest.mark.parametrize(
    "given",
    [
        pytest.param({"rescue": {"sweep_ms": 5_000}}, id="seldom"),
        pytest.param({"broker": {"url": "redis://127.0.0.1:1/0"}}, id="Redis is away"),
    ],
)
def test_what_a_dead_worker_ran_is_taken_however_long_rescue_pauses(
    make_settings: Callable[..., Settings], world: World, tmp_path: Path, given: dict[str, Any]
) -> None:
    lease = {"worker": {"lease_s": 4, "heartbeat_s": 1}}
    settings = make_settings(**{"database": {"url": world.database_url}} | lease | given)
    ids = world.submit(2)
    worker_id = world.start_worker()
    world.claim(worker_id, ids)
    world.kill(worker_id)

    with running_rescue(settings, tmp_path / "rescue"):
        eventually(lambda: world.states(ids) == {"queued"}, timeout_s=60)


def test_the_process_goes_on_when_its_folder_cannot_be_written_and_says_so_once(
    serving: subprocess.Popen[bytes],
    world: World,
    settings: Settings,
    tmp_path: Path,
) -> None:
    eventually(lambda: rescue.alive(settings).is_alive, timeout_s=60)
    shutil.rmtree(settings.cache_dir)
    Path(settings.cache_dir).touch()  # keeps root out, too

    for number in (1, 2, 3):
        world.submit(1)
        eventually(lambda so_far=number: len(world.messages()) == so_far, timeout_s=30)

    assert serving.poll() is None
    assert (tmp_path / "rescue" / "rescue.log").read_text().count("cannot be noted") == 1


def test_a_process_that_has_not_swept_for_long_is_not_alive(settings: Settings) -> None:
    rescue.alive(settings).note(has_worked=True)
    assert rescue.alive(settings).is_alive

    for far_s in (-2 * ALIVE_S, 2 * ALIVE_S):  # or the clock was set back since
        then = time.time() + far_s
        os.utime(Path(settings.cache_dir) / "rescue.alive", (then, then))

        assert not rescue.alive(settings).is_alive


def test_what_was_lost_of_tenants_is_sent_again_into_their_own_lists(
    world: World, client: redis.Redis
) -> None:
    noisy, lone = world.submit(5, tenant="noisy"), world.submit(1, tenant="lone")
    assert world.sweep().sent == 6
    client.flushdb()
    world.change([*noisy, *lone], "enqueued_at = now() - %s", LONG_AGO)

    assert world.sweep().sent_again == 0  # it may be on its way
    assert world.sweep().sent_again == 6

    for tenant, jobs in (("noisy", 5), ("lone", 1)):
        first = world.publisher.list_lengths([MODEL], tenant)[MODEL][0]
        assert (first.all, first.own, first.tenants) == (6, jobs, 2)


def test_a_full_queue_has_room_for_each_tenants_share(
    settings: Settings, client: redis.Redis
) -> None:
    most = 100
    broker = settings.broker.model_copy(update={"max_messages": most})
    with closing(World(settings.model_copy(update={"broker": broker}), client)) as world:
        world.submit(most + 50, tenant="noisy")
        while world.sweep().sent:
            pass
        world.submit(3, tenant="lone")

        assert world.sweep().sent >= 1

        lone = world.publisher.list_lengths([MODEL], "lone")[MODEL][0]
        assert 1 <= lone.own <= 3
        assert lone.all <= most + 50
