"""Messages on a real Redis: ours, a foreign Celery app's, and raw ones."""

from __future__ import annotations

import base64
import json
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import redis
from celery import Celery
from kombu import Message as KombuMessage

from app.broker.app import make_app
from app.broker.message import Message, raw_message
from app.broker.publisher import MAX_BUNDLE, Publisher
from app.broker.queues import Layout, most_bytes
from app.config.settings import Settings
from app.errors import RequestError, RequestTooLarge, Unavailable
from app.jobs import LIVE_PRIORITY, Kind
from app.local.ports import free_port
from app.worker.pool import envelope
from tests.own_redis import OwnRedis, running_redis


@pytest.fixture
def settings(make_settings: Callable[..., Settings], redis_url: str) -> Settings:
    return make_settings(broker={"url": redis_url, "publish_timeout_s": 0.5})


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def publisher(settings: Settings) -> Iterator[Publisher]:
    publisher = Publisher(settings)
    yield publisher
    publisher.close()


class Reader:
    """Takes messages from Redis as a worker of these settings does."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        self._received: list[KombuMessage] = []
        self.refused: list[tuple[str | None, RequestError]] = []

    def __enter__(self) -> Reader:
        self._connection = self._app.connection_for_read().__enter__()
        channel = self._connection.default_channel
        channel.read = envelope.reader(10_000, lambda *refused: self.refused.append(refused))
        consumer = self._app.amqp.TaskConsumer(channel, on_message=self._received.append)
        self._consumer = consumer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._consumer.__exit__(*error)
        self._connection.__exit__(*error)

    def ids(self, number: int) -> list[str]:
        """Ids of the next messages, acknowledged, in the order they came."""
        while len(self._received) < number:
            self._connection.drain_events(timeout=10)
        taken, self._received[:] = self._received[:number], self._received[number:]
        for message in taken:
            message.ack()
        return [message.headers["id"] for message in taken]


@pytest.fixture
def reader(settings: Settings) -> Iterator[Reader]:
    with Reader(settings) as reader:
        yield reader


def wake_up(priority: int = 0, model: str = "stub") -> Message:
    return Message(uuid4(), Kind.GENERATE, model, {"prompt": "x"}, "/v1/completions", priority)


# ── sending ─────────────────────────────────────────────────────────────────────────────────────


def test_a_message_waits_in_its_models_list_with_the_job_id_as_task_id(
    publisher: Publisher, client: redis.Redis
) -> None:
    message = wake_up()

    publisher.send(message)

    [item] = client.lrange("gristmill.stub", 0, -1)
    envelope.checked(item, "q", 10_000)
    assert json.loads(item)["headers"]["id"] == str(message.job_id)


def test_messages_of_one_priority_arrive_in_order_and_priorities_by_their_steps(
    publisher: Publisher, reader: Reader
) -> None:
    sent = [wake_up(priority) for priority in (9, 0, 5, 3, 0, 7)]

    for each in sent:
        publisher.send(each)

    expected = [sent[1], sent[4], sent[2], sent[3], sent[5], sent[0]]
    assert reader.ids(6) == [str(message.job_id) for message in expected]


def test_queue_lengths_count_every_priority(publisher: Publisher) -> None:
    publisher.send_many(wake_up(priority) for priority in range(10))
    publisher.send(wake_up(model="stub-embed"))

    assert publisher.queue_lengths(["stub", "stub-embed"]) == {"stub": 10, "stub-embed": 1}


def test_a_model_that_only_other_processes_know_has_its_queue_all_the_same(
    publisher: Publisher, client: redis.Redis
) -> None:
    publisher.send(wake_up(model="new-here"))

    assert publisher.queue_lengths(["new-here"]) == {"new-here": 1}
    assert client.keys("_kombu.binding.*") == []


@pytest.mark.parametrize("size", [0, 700, 4_000, 9_000])
def test_a_queue_takes_no_more_of_redis_than_its_settings_say(
    client: redis.Redis, settings: Settings, size: int
) -> None:
    num = 200
    broker = settings.broker.model_copy(update={"max_inline_bytes": size})
    request = {"prompt": "x" * (size - len(json.dumps({"prompt": ""})))} if size else None
    url = "/v1/completions" if size else None

    with closing(Publisher(settings.model_copy(update={"broker": broker}))) as publisher:
        for _ in range(num):  # alone, or they would share messages
            publisher.send(Message(uuid4(), Kind.GENERATE, "stub", request, url))

    used = client.memory_usage(Layout().key("gristmill.stub"), samples=0)
    of_one = most_bytes(broker) / broker.max_messages / len(broker.priority_steps)
    assert used <= num * of_one


def test_flushall_leaves_nothing_to_repair(publisher: Publisher, client: redis.Redis) -> None:
    publisher.send(wake_up())
    client.flushdb()

    publisher.send(wake_up())

    assert publisher.queue_lengths(["stub"]) == {"stub": 1}
    assert client.keys("_kombu.binding.*") == []


def test_threads_share_a_publisher(publisher: Publisher) -> None:
    with ThreadPoolExecutor(8) as threads:
        for _ in threads.map(lambda _: publisher.send_many([wake_up(), wake_up(3)]), range(100)):
            pass

    assert publisher.queue_lengths(["stub"]) == {"stub": 200}


def test_what_is_waited_for_is_taken_before_all_that_waits(
    publisher: Publisher, settings: Settings
) -> None:
    background = [wake_up() for _ in range(3)]
    publisher.send_many(background)

    live, with_others = wake_up(LIVE_PRIORITY), [wake_up(LIVE_PRIORITY), wake_up()]
    publisher.send(live)
    publisher.send_many(with_others)

    assert publisher.queue_lengths(["stub"]) == {"stub": 4}
    with Reader(settings) as reader:
        taken = reader.ids(4)
    assert taken[:2] == [str(live.job_id), str(with_others[0].job_id)]


# ── many jobs in one message ────────────────────────────────────────────────────────────────────


def read_all(client: redis.Redis, priority: int = 0, model: str = "stub") -> list[dict[str, Any]]:
    items = client.lrange(Layout().key(f"gristmill.{model}", priority), 0, -1)
    return [json.loads(item) for item in reversed(items)]


def ids_in(message: dict[str, Any]) -> list[str]:
    return [message["headers"]["id"], *message["headers"].get("more", [])]


def test_jobs_of_one_model_and_priority_travel_together_each_once_and_in_order(
    publisher: Publisher, client: redis.Redis, settings: Settings
) -> None:
    size = min(settings.models["stub"].max_batch_size, MAX_BUNDLE)
    urgent = [wake_up() for _ in range(2 * size + 1)]
    patient = [wake_up(9) for _ in range(2)]
    others = [wake_up(model="stub-embed")]

    publisher.send_many([*urgent[:3], *patient, *others, *urgent[3:]])

    messages = read_all(client)
    ids = [each for message in messages for each in ids_in(message)]
    assert ids == [str(each.job_id) for each in urgent]
    assert [len(ids_in(message)) for message in messages] == [size, size, 1]
    assert [message["headers"].get("num_jobs") for message in messages] == [size, size, None]
    [together] = read_all(client, 9)
    assert ids_in(together) == [str(each.job_id) for each in patient]
    assert together["properties"]["priority"] == 9
    assert len(read_all(client, model="stub-embed")) == 1


def test_the_requests_of_jobs_that_travel_together_are_in_their_rows_alone(
    publisher: Publisher, client: redis.Redis
) -> None:
    publisher.send_many([wake_up(), wake_up()])
    publisher.send(wake_up())

    bodies = [json.loads(base64.b64decode(each["body"]))[1] for each in read_all(client)]
    assert bodies == [{}, {"prompt": "x", "url": "/v1/completions"}]


def test_every_job_of_a_message_is_seen_by_who_looks_for_lost_ones(publisher: Publisher) -> None:
    sent = [wake_up() for _ in range(700)]
    lost = uuid4()

    publisher.send_many(sent)

    ids = {message.job_id for message in sent}
    assert publisher.without_message(dict.fromkeys([*ids, lost], "stub")) == {lost}


# ── Redis away ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def own_publisher(
    own_redis: OwnRedis, make_settings: Callable[..., Settings]
) -> Iterator[Publisher]:
    settings = make_settings(broker={"url": own_redis.url, "publish_timeout_s": 0.5})
    publisher = Publisher(settings)
    yield publisher
    publisher.close()


def test_a_publisher_says_that_redis_is_down_and_sends_again_when_it_is_back(
    own_redis: OwnRedis, own_publisher: Publisher
) -> None:
    own_publisher.send(wake_up())

    own_redis.stop()
    with pytest.raises(Unavailable):
        own_publisher.send(wake_up())
    with pytest.raises(Unavailable):
        own_publisher.queue_lengths(["stub"])

    own_redis.start()
    own_publisher.send(wake_up())
    assert own_publisher.queue_lengths(["stub"]) == {"stub": 1}


def test_a_publisher_does_not_wait_for_a_redis_that_hangs(
    own_redis: OwnRedis, own_publisher: Publisher
) -> None:
    own_publisher.send(wake_up())

    own_redis.process.send_signal(signal.SIGSTOP)
    try:
        with ThreadPoolExecutor(1) as thread:
            sending = thread.submit(own_publisher.send_many, [wake_up() for _ in range(1000)])
            assert isinstance(sending.exception(timeout=10), Unavailable)
    finally:
        own_redis.process.send_signal(signal.SIGCONT)

    own_publisher.send(wake_up())


def test_an_error_names_no_password(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(broker={"url": f"redis://:secret@127.0.0.1:{free_port()}/0"})

    with pytest.raises(Unavailable) as error:
        Publisher(settings).send(wake_up())

    assert "secret" not in str(error.value)


# ── messages of others ──────────────────────────────────────────────────────────────────────────


def test_a_services_own_celery_app_reaches_the_worker_with_a_plain_send_task(
    redis_url: str, reader: Reader
) -> None:
    with Celery("their-service", broker=redis_url, set_as_current=False) as service:
        sent = service.send_task("inference.generate", kwargs={"prompt": "x"}, priority=3)

        assert reader.ids(1) == [sent.id]


def test_a_services_own_celery_app_may_name_the_models_queue(
    redis_url: str, reader: Reader
) -> None:
    with Celery("their-service", broker=redis_url, set_as_current=False) as service:
        sent = service.send_task(
            "inference.embed", kwargs={"input": "x"}, queue="gristmill.stub-embed"
        )

        assert reader.ids(1) == [sent.id]


@pytest.mark.parametrize("priority", [0, 4, 9])
def test_a_raw_message_needs_a_redis_client_and_nothing_else(
    client: redis.Redis, reader: Reader, priority: int
) -> None:
    job_id = uuid4()
    item = raw_message(
        job_id, Kind.GENERATE, {"prompt": "x"}, queue="gristmill.stub", priority=priority
    )

    client.lpush(Layout().key("gristmill.stub", priority), item)

    assert [UUID(id) for id in reader.ids(1)] == [job_id]


def test_what_kombu_cannot_parse_is_held_back_and_the_next_message_arrives(
    client: redis.Redis, reader: Reader
) -> None:
    good, broken, huge = (
        raw_message(task_id, Kind.GENERATE, {"prompt": text}, queue="celery")
        for task_id, text in [("good", "x"), ("broken", "x"), ("huge", "x" * 200_000)]
    )
    broken = broken.replace(b'"base64"', b'"rot13"')

    client.lpush("celery", b"not JSON", broken, huge, good)

    assert reader.ids(1) == ["good"]
    assert [task_id for task_id, _ in reader.refused] == [None, "broken", "huge"]
    assert isinstance(reader.refused[2][1], RequestTooLarge)
    assert client.hlen("unacked") == 0
