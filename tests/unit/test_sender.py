"""Which new jobs get a message: Redis may be away, a queue long enough."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import Mock
from uuid import UUID, uuid4

import pytest

from app.broker.lanes import Length
from app.broker.message import Message
from app.broker.queues import Layout
from app.config.settings import BrokerSettings
from app.errors import Unavailable
from app.intake import sender as sending
from app.intake.sender import Sender
from app.jobs import DEFAULT_TENANT, Kind
from app.store.submissions import NewJob

BODY = {"prompt": "A grist mill is"}


def lanes(lengths: list[int]) -> list[Length]:
    return [Length(each, each, 0) for each in lengths]


class Redis:
    """In place of a publisher: up or away, and counting. Messages stay until a test takes them."""

    def __init__(self) -> None:
        self.layout = Layout()
        self.is_away = False
        self.num_failures = 0
        self.num_looks = 0
        self.sent: list[Message] = []
        self.told: list[UUID] = []
        self.waiting = [0, 0, 0, 0]
        self.most_together = 1

    def send_many(self, messages: Iterable[Message]) -> None:
        self._answer()
        for message in messages:
            self.sent.append(message)
            self.waiting[self.layout.step(message.priority)] += 1

    def bundle_size(self, model: str) -> int:
        return self.most_together

    def tell_cancelled(self, worker_id: UUID, job_ids: Iterable[UUID]) -> None:
        self._answer()
        self.told += job_ids

    def try_to_send(self) -> None:
        self._answer()

    def list_lengths(
        self, models: Collection[str], tenant: str = DEFAULT_TENANT
    ) -> dict[str, list[Length]]:
        self._answer()
        self.num_looks += 1
        return {model: lanes(self.waiting) for model in models}

    def _answer(self) -> None:
        if self.is_away:
            self.num_failures += 1
            raise Unavailable("Redis does not answer.")


class Postgres:
    """In place of a database: its connections keep what was not sent, or it is away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_away = False
        self.not_sent: list[Any] = []
        monkeypatch.setattr(sending.delivery, "not_sent", lambda _, ids: self.not_sent.extend(ids))

    @contextmanager
    def autocommit(self) -> Iterator[None]:
        if self.is_away:
            raise Unavailable("Postgres cannot be reached.")
        yield


@pytest.fixture
def redis() -> Redis:
    return Redis()


@pytest.fixture
def postgres(monkeypatch: pytest.MonkeyPatch) -> Postgres:
    return Postgres(monkeypatch)


@pytest.fixture
def sender(redis: Redis, postgres: Postgres) -> Sender:
    return Sender(postgres, redis, BrokerSettings(max_messages=100))  # type: ignore[arg-type]


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


def submit(sender: Sender, jobs: list[NewJob]) -> None:
    """Ask, write all the rows as sent that may be, and send."""
    wanted = sender.wanted(jobs)
    sent = [job for job in jobs if job.id in wanted]
    sender.send(sent, num_left=len(jobs) - len(sent))


def test_a_message_is_sent(sender: Sender, redis: Redis, postgres: Postgres) -> None:
    job = new_job(priority=3)

    submit(sender, [job])

    [message] = redis.sent
    assert (message.job_id, message.model, message.priority) == (job.id, "stub", 3)
    assert message.request == BODY
    assert postgres.not_sent == []
    assert (sender.num_sent, sender.num_left_to_rescue) == (1, 0)


def test_while_redis_is_away_nobody_waits_for_it_again(
    sender: Sender, redis: Redis, postgres: Postgres
) -> None:
    redis.is_away = True

    for _ in range(5):
        submit(sender, [new_job()])

    assert redis.num_failures == 1
    assert (sender.num_sent, sender.num_left_to_rescue) == (0, 5)


def test_what_redis_refuses_after_the_commit_is_unsent_again(
    sender: Sender, redis: Redis, postgres: Postgres
) -> None:
    # given jobs that were written as sent
    jobs = [new_job(), new_job()]
    assert sender.wanted(jobs) == {job.id for job in jobs}

    # when Redis goes away before they are sent
    redis.is_away = True
    sender.send(jobs)

    # then their rows say so, and nobody tries for a while
    assert postgres.not_sent == [job.id for job in jobs]
    assert (sender.num_sent, sender.num_left_to_rescue) == (0, 2)
    assert sender.wanted([new_job()]) == set()


def test_after_the_commit_nothing_turns_the_answer_into_an_error(
    sender: Sender, redis: Redis, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    postgres.is_away = True
    for error in (Unavailable("Redis does not answer."), ValueError("a bug"), RecursionError()):
        monkeypatch.setattr(redis, "send_many", Mock(side_effect=error))
        sender.send([new_job()])

    assert (sender.num_sent, sender.num_left_to_rescue) == (0, 3)


def test_after_the_pause_one_try_brings_sending_back(
    sender: Sender, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1_000.0
    monkeypatch.setattr(sending.time, "monotonic", lambda: now)
    redis.is_away = True
    submit(sender, [new_job()])
    redis.is_away = False

    now += sending.BREAK_S - 0.1
    submit(sender, [new_job()])
    assert redis.sent == []

    now += 0.2
    submit(sender, [new_job()])
    submit(sender, [new_job()])
    assert (redis.num_failures, len(redis.sent)) == (1, 2)


# ── queues that are long enough ─────────────────────────────────────────────────────────────────


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(sending.time, "monotonic", lambda: self.now)

    def let_the_next_look_come(self) -> None:
        self.now += sending.LOOK_EVERY_S


def send(sender: Sender, number: int, **given: Any) -> None:
    for _ in range(number):
        submit(sender, [new_job(**given)])


def test_a_queue_takes_its_most_messages_and_the_rest_is_left_to_rescue(
    sender: Sender, redis: Redis, postgres: Postgres, clock: Clock
) -> None:
    submit(sender, [new_job() for _ in range(130)])

    assert len(redis.sent) == 100
    assert (sender.num_sent, sender.num_left_to_rescue) == (100, 30)
    assert redis.num_looks == 1


def test_jobs_that_share_messages_count_as_these(
    sender: Sender, redis: Redis, postgres: Postgres, clock: Clock
) -> None:
    redis.most_together = 10

    submit(sender, [new_job() for _ in range(1_300)])

    assert (sender.num_sent, sender.num_left_to_rescue) == (1_000, 300)


def test_who_was_held_back_is_not_overtaken_while_rescue_keeps_the_queue_filled(
    sender: Sender, redis: Redis, clock: Clock
) -> None:
    send(sender, 101)
    redis.waiting[0] = 70  # some were taken; rescue fills it up at its next sweep
    clock.let_the_next_look_come()

    send(sender, 1)

    assert len(redis.sent) == 100


def test_a_queue_that_is_half_empty_takes_new_jobs_with_or_without_rescue(
    sender: Sender, redis: Redis, clock: Clock
) -> None:
    send(sender, 101)
    redis.waiting[0] = 49
    clock.let_the_next_look_come()

    send(sender, 10)

    assert len(redis.sent) == 110


def test_an_urgent_job_passes_a_queue_that_is_full_of_patient_ones(
    sender: Sender, redis: Redis, clock: Clock
) -> None:
    send(sender, 101, priority=9)

    send(sender, 1, priority=5)
    send(sender, 1, priority=0)
    assert [message.priority for message in redis.sent[100:]] == [5, 0]

    send(sender, 99, priority=0)
    send(sender, 20, priority=5)  # a hundred are ahead of them now: they have their share
    assert len(redis.sent) == 201 + 6


def test_a_full_queue_of_one_model_does_not_hold_back_another(
    sender: Sender, redis: Redis, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        redis,
        "list_lengths",
        lambda models, _: {m: lanes([500 * (m == "long"), 0, 0, 0]) for m in models},
    )

    submit(sender, [new_job(model="long"), new_job(model="short")])

    assert [message.model for message in redis.sent] == ["short"]


def test_a_flood_of_urgent_jobs_does_not_keep_a_patient_one_out_of_the_queue(
    sender: Sender, redis: Redis
) -> None:
    redis.waiting = [1_000, 0, 0, 0]

    submit(sender, [new_job(priority=9) for _ in range(20)])

    assert len(redis.sent) == 7  # a sixteenth of what the queue holds


def test_while_redis_is_away_no_cancel_waits_for_it_either(sender: Sender, redis: Redis) -> None:
    # Given a Redis that was away when the first cancel was to be told
    redis.is_away = True
    cancelled = {uuid4(): [uuid4(), uuid4()]}
    sender.tell_cancelled(cancelled)

    # When more are cancelled, and jobs come
    for _ in range(20):
        sender.tell_cancelled(cancelled)
    submit(sender, [new_job()])

    # Then it was tried once
    assert redis.num_failures == 1


def test_while_redis_is_away_readiness_does_not_try_it_anew_each_time(
    sender: Sender, redis: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given a Redis that is away, and is asked for again and again
    now = time.monotonic()
    monkeypatch.setattr(sending.time, "monotonic", lambda: now)
    redis.is_away = True
    for _ in range(20):
        with pytest.raises(Unavailable):
            sender.try_to_send()
    assert redis.num_failures == 1

    # when it is back
    redis.is_away = False
    now += sending.BREAK_S

    # then the next one finds it, and jobs are sent
    sender.try_to_send()
    submit(sender, [new_job()])
    assert len(redis.sent) == 1


def test_a_cancel_is_told_to_each_worker(sender: Sender, redis: Redis) -> None:
    first, second, third = (uuid4() for _ in range(3))

    sender.tell_cancelled({uuid4(): [first, second], uuid4(): [third]})

    assert redis.told == [first, second, third]
