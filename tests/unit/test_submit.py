"""What is checked of a submission, and what happens to messages while Redis is away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest

from app import submit
from app.broker import Message
from app.engines.base import Kind
from app.errors import QueueFull, RequestError, Unavailable
from app.store.intake import NewJob
from app.submit import Admission, Sender, parse_submission

BODY = {"prompt": "A grist mill is"}


# ── checking ────────────────────────────────────────────────────────────────────────────────────


def test_a_body_alone_is_enough() -> None:
    submission = parse_submission({"body": BODY})

    assert submission.body == BODY
    assert (submission.priority, submission.deadline, submission.metadata) == (0, None, {})


def test_times_are_read_in_any_zone_and_kept_in_utc() -> None:
    submission = parse_submission({"body": BODY, "deadline": "2030-01-01T01:00:00+01:00"})

    assert submission.deadline == datetime(2030, 1, 1, tzinfo=UTC)
    assert submission.deadline.tzinfo is UTC


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"body": None}, "body"),
        ({"body": [1]}, "body"),
        ({"priority": -1}, "priority"),
        ({"priority": 10}, "priority"),
        ({"priority": "1"}, "priority"),
        ({"priority": True}, "priority"),
        ({"url": 3}, "url"),
        ({"deadline": "tomorrow"}, "deadline"),
        ({"deadline": 1_900_000_000}, "deadline"),
        ({"deadline": "1900000000"}, "deadline"),
        ({"deadline": "2030-01-01"}, "deadline"),
        ({"deadline": "2030-01-01T00:00:00"}, "deadline"),  # no zone
        ({"not_before": "0001-01-01T00:00:00+01:00"}, "not_before"),
        ({"not_before": "9999-12-31T23:59:59-01:00"}, "not_before"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
        ({"metadata": {"a": "\0"}}, "metadata.a"),
        ({"idempotency_key": ""}, "idempotency_key"),
        ({"idempotency_key": "k" * 256}, "idempotency_key"),
        ({"idempotency_key": "a\0b"}, "idempotency_key"),
        ({"prompt": "hello"}, "prompt"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse_submission({"body": BODY} | fields)

    assert refused.value.param == param


@pytest.mark.parametrize("value", [None, 3, "text", [], [BODY]])
def test_what_is_no_object_is_no_job(value: object) -> None:
    with pytest.raises(RequestError):
        parse_submission(value)


# ── sending ─────────────────────────────────────────────────────────────────────────────────────


class Redis:
    """In place of a publisher: up or away, and counting."""

    def __init__(self) -> None:
        self.is_away = False
        self.num_calls = 0
        self.sent: list[Message] = []

    def send_many(self, messages: Iterable[Message]) -> None:
        self.num_calls += 1
        if self.is_away:
            raise Unavailable("Redis does not answer.")
        self.sent += messages


class Postgres:
    """In place of a database: its connections keep what was marked, or it is away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = False
        self.marked: list[Any] = []
        self.num_queued = 0
        monkeypatch.setattr(submit.intake, "mark_enqueued", lambda _, ids: self.marked.extend(ids))
        monkeypatch.setattr(submit.intake, "count_queued", lambda _: self.num_queued)

    @contextmanager
    def begin(self) -> Iterator[None]:
        if self.is_away:
            raise Unavailable("Postgres cannot be reached.")
        yield

    autocommit = begin


@pytest.fixture
def redis() -> Redis:
    return Redis()


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Postgres:
    return Postgres(monkeypatch)


@pytest.fixture
def sender(redis: Redis, postgres: Postgres) -> Sender:
    return Sender(postgres, redis)  # type: ignore[arg-type]


def new_job(**given: Any) -> NewJob:
    fields = {
        "id": uuid4(),
        "model": "stub",
        "kind": Kind.GENERATE,
        "url": "/v1/completions",
        "request": BODY,
        "fingerprint": "f",
        "source": "api",
    }
    return NewJob(**(fields | given))


def test_a_message_is_sent_and_marked(sender: Sender, redis: Redis, postgres: Postgres) -> None:
    job = new_job(priority=3)

    sender.send([job])

    [message] = redis.sent
    assert (message.job_id, message.model, message.priority) == (job.id, "stub", 3)
    assert message.request == BODY
    assert postgres.marked == [job.id]
    assert (sender.num_sent, sender.num_left_to_rescue) == (1, 0)


def test_a_large_request_stays_in_its_row(sender: Sender, redis: Redis) -> None:
    sender.send([new_job(request={"prompt": "x" * submit.MAX_INLINE_BYTES})])

    assert redis.sent[0].request is None


def test_a_job_that_is_not_due_is_left_to_rescue(
    sender: Sender, redis: Redis, postgres: Postgres
) -> None:
    later = new_job(not_before=datetime.now(UTC) + timedelta(hours=1))
    due = new_job(not_before=datetime.now(UTC) - timedelta(hours=1))

    sender.send([later, due])

    assert [message.job_id for message in redis.sent] == [due.id]
    assert postgres.marked == [due.id]


def test_while_redis_is_away_nobody_waits_for_it_again(
    sender: Sender, redis: Redis, postgres: Postgres
) -> None:
    redis.is_away = True

    for _ in range(5):
        sender.send([new_job()])

    assert redis.num_calls == 1
    assert postgres.marked == []
    assert (sender.num_sent, sender.num_left_to_rescue) == (0, 5)


def test_after_the_pause_one_try_brings_sending_back(
    sender: Sender, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(submit.time, "monotonic", lambda: now)
    redis.is_away = True
    sender.send([new_job()])
    redis.is_away = False

    now += submit.BREAK_S - 0.1
    sender.send([new_job()])
    assert redis.num_calls == 1

    now += 0.2
    sender.send([new_job()])
    sender.send([new_job()])
    assert (redis.num_calls, len(redis.sent)) == (3, 2)


def test_a_sent_message_that_cannot_be_marked_is_sent_all_the_same(
    sender: Sender, redis: Redis, postgres: Postgres
) -> None:
    postgres.is_away = True

    sender.send([new_job()])
    sender.send([new_job()])

    assert len(redis.sent) == 2


# ── admission ───────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_takes_no_more(postgres: Postgres) -> None:
    postgres.num_queued = 95
    admission = Admission(postgres, max_queued_jobs=100)  # type: ignore[arg-type]

    admission.admit(3)
    admission.admit(2)  # what was let in counts, before it is counted in Postgres

    with pytest.raises(QueueFull):
        admission.admit(1)


def test_room_is_seen_again_when_the_queue_has_shrunk(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(submit.time, "monotonic", lambda: now)
    postgres.num_queued = 100
    admission = Admission(postgres, max_queued_jobs=100)  # type: ignore[arg-type]
    with pytest.raises(QueueFull):
        admission.admit(1)

    postgres.num_queued = 10
    now += submit.COUNT_EVERY_S

    admission.admit(1)
