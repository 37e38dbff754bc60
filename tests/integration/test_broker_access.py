"""Redis by TLS, by a socket, with the least rights, and with keys of another shape."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import redis
from celery import Celery

from app.broker.client import check_kind, connected
from app.broker.commands import ready_workers
from app.broker.events import Whole
from app.broker.message import Message, raw_message
from app.broker.publisher import Publisher
from app.broker.queues import Layout
from app.broker.rights import Role, missing, rules
from app.broker.unread import unread
from app.config.settings import Settings
from app.errors import ConfigError, Unavailable
from app.jobs import Kind
from app.local.ports import free_port
from app.store.database import Database
from tests.own_redis import OwnRedis, running_redis
from tests.rows import insert_sent, new_job
from tests.waiting import eventually
from tests.workers import results, running_worker

TLS_SERVER = shutil.which("redis-server")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    with running_redis(tmp_path, ("--unixsocket", str(tmp_path / "s"))) as server:
        yield server


@pytest.fixture
def client(server: OwnRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        yield client


@pytest.fixture
def make(make_settings: Callable[..., Settings], database_url: str) -> Callable[..., Settings]:
    def make(url: str, **broker: Any) -> Settings:
        return make_settings(database={"url": database_url}, broker={"url": url, **broker})

    return make


def send_and_wait(settings: Settings) -> None:
    publisher = Publisher(settings)
    message = Message(uuid4(), Kind.GENERATE, "stub", {"prompt": "x"}, "/v1/completions")
    publisher.try_to_send()
    publisher.send(message)
    eventually(lambda: str(message.job_id) in results(settings), 30)
    publisher.close()


def stream_and_read(settings: Settings) -> None:
    """What a worker tells of a job reaches who reads with these settings."""
    job = new_job(model="stub", stream_events=True)
    with closing(Database(settings.database.url)) as database:
        insert_sent(database, job)
    with closing(Publisher(settings)) as publisher:
        following = publisher.streams().follow()
        following.follow(job.id, None)
        following.wake()
        publisher.send(Message(job.id, job.kind, job.model))
        assert job.id in next(following.heard(threading.Event()))
        eventually(lambda: any(it.told == Whole() for it in publisher.streams().read(job.id, None)))
        publisher.streams().forget([job.id])
        assert publisher.streams().read(job.id, None) == []


def is_ready(settings: Settings) -> bool:
    try:
        return bool(ready_workers(settings))
    except Unavailable:  # its connection was killed, too
        return False


# ── rights ──────────────────────────────────────────────────────────────────────────────────────


def give_rights(client: redis.Redis, settings: Settings, role: Role) -> None:
    words = rules(settings, role)
    client.execute_command("ACL", "SETUSER", role.value, "reset", "on", ">flour", *words)


def as_role(server: OwnRedis, role: Role) -> str:
    return server.url.replace("://", f"://{role.value}:flour@")


@pytest.mark.parametrize("prefix", ["", "mill:"])
def test_with_the_rights_that_are_written_down_all_parts_work_and_nothing_is_denied(
    prefix: str,
    server: OwnRedis,
    client: redis.Redis,
    make: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    worker_settings = make(as_role(server, Role.WORKER), key_prefix=prefix)
    sender_settings = make(as_role(server, Role.SENDER), key_prefix=prefix)
    for role in Role:
        give_rights(client, worker_settings, role)

    with running_worker(worker_settings, tmp_path / "worker") as worker:
        send_and_wait(sender_settings)
        eventually(lambda: is_ready(worker_settings), 30)
        client.execute_command("CLIENT", "KILL", "USER", "worker")
        eventually(lambda: "Connection to broker lost" in worker.log)
        send_and_wait(sender_settings)
        eventually(lambda: is_ready(worker_settings), 30)
        stream_and_read(sender_settings)
        with connected(worker_settings) as looking:
            assert missing(worker_settings, looking, Role.WORKER) == []
            assert unread(worker_settings, looking) == {}
        with connected(sender_settings) as looking:
            assert missing(sender_settings, looking, Role.SENDER) == []
        with closing(Publisher(sender_settings)) as publisher:
            lost = uuid4()
            assert publisher.without_message({lost: "stub"}) == {lost}

        denied = {entry["object"] for entry in client.acl_log()}
        assert denied <= {"client"}  # redis-py asks for news that a server of this version has not
        assert "NOPERM" not in worker.log


@pytest.mark.parametrize(
    ("taken", "named"),
    [
        (["-brpop"], "BRPOP on gristmill.stub"),
        (["-llen"], "LLEN on gristmill.stub"),
        (["resetchannels", "&/0.celeryev/*"], "PSUBSCRIBE on /0.celery.pidbox"),
        (["resetkeys", "~gristmill.*", "~celery*", "~_kombu*", "~*pidbox*"], "HSET on unacked"),
    ],
)
def test_a_right_that_a_worker_lacks_is_named_and_given_is_enough(
    taken: list[str],
    named: str,
    server: OwnRedis,
    client: redis.Redis,
    make: Callable[..., Settings],
    tmp_path: Path,
) -> None:
    settings = make(as_role(server, Role.WORKER))
    give_rights(client, settings, Role.WORKER)
    client.execute_command("ACL", "SETUSER", "worker", *taken)

    with connected(settings) as looking:
        assert named in missing(settings, looking, Role.WORKER)
    with running_worker(settings, tmp_path / "worker") as worker:
        item = raw_message(uuid4(), Kind.GENERATE, {"prompt": "x"}, queue="celery")
        client.lpush("celery", item)
        eventually(lambda: "The user lacks" in worker.log and named in worker.log, 30)
        give_rights(client, settings, Role.WORKER)

        eventually(lambda: is_ready(settings), 60)
        assert not worker.has_ended


# ── ways to reach it ────────────────────────────────────────────────────────────────────────────


def test_a_worker_takes_messages_over_a_socket(
    server: OwnRedis, make: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make(f"unix://{tmp_path}/s?db=3")

    with running_worker(settings, tmp_path / "worker"):
        send_and_wait(settings)
    with connected(settings) as client:
        assert client.connection_pool.connection_kwargs["db"] == 3


@pytest.mark.skipif(
    TLS_SERVER is None or shutil.which("openssl") is None, reason="no redis-server with TLS here"
)
def test_a_worker_takes_messages_by_tls_and_refuses_a_certificate_that_it_does_not_know(
    make: Callable[..., Settings], tmp_path: Path
) -> None:
    certificate, key = tmp_path / "server.pem", tmp_path / "server.key"
    request = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = ["openssl", *request.split(), *names, *files]
    subprocess.run(command, check=True, capture_output=True)
    port = free_port()
    options = ["--port", "0", "--tls-port", str(port), "--bind", "127.0.0.1", "--save", ""]
    options += ["--tls-cert-file", str(certificate), "--tls-key-file", str(key)]
    options += ["--tls-ca-cert-file", str(certificate), "--tls-auth-clients", "no"]
    assert TLS_SERVER is not None
    with (tmp_path / "redis.log").open("wb") as log:
        process = subprocess.Popen([TLS_SERVER, *options], cwd=tmp_path, stdout=log, stderr=log)
    try:
        settings = make(f"rediss://localhost:{port}/0?ssl_ca_certs={certificate}")
        eventually(lambda: answers(settings))

        with running_worker(settings, tmp_path / "worker"):
            send_and_wait(settings)

        with pytest.raises(Unavailable), connected(make(f"rediss://localhost:{port}/0")) as client:
            client.ping()
    finally:
        process.kill()
        process.wait()


def answers(settings: Settings) -> bool:
    try:
        with connected(settings) as client:
            return bool(client.ping())
    except Unavailable:
        return False


# ── producers with other settings ───────────────────────────────────────────────────────────────

SHAPE = {"priority_steps": (0, 5), "sep": ":", "key_prefix": "mill:"}


def test_a_worker_reads_the_lists_of_a_producer_that_has_the_same_settings(
    server: OwnRedis, make: Callable[..., Settings], tmp_path: Path
) -> None:
    settings = make(server.url, **SHAPE)
    producer = Celery("service", broker=server.url, set_as_current=False)
    producer.conf.broker_transport_options = {
        "priority_steps": [0, 5],
        "sep": ":",
        "global_keyprefix": "mill:",
    }
    with running_worker(settings, tmp_path / "worker"):
        ids = [
            producer.send_task("inference.generate", kwargs={"prompt": "x"}, priority=priority).id
            for priority in (0, 4, 5, 9)
        ]
        eventually(lambda: set(ids) <= results(settings).keys(), 30)
        send_and_wait(settings)
        eventually(lambda: is_ready(settings), 30)
    producer.close()


def test_messages_that_nobody_reads_are_named_by_doctor_and_metric(
    server: OwnRedis, client: redis.Redis, make: Callable[..., Settings]
) -> None:
    settings = make(server.url)
    for options in ({"priority_steps": [0, 5]}, {"sep": ":"}, {"global_keyprefix": "mill:"}):
        with Celery("service", broker=server.url, set_as_current=False) as producer:
            producer.conf.broker_transport_options = options
            producer.send_task("inference.generate", kwargs={"prompt": "secret"}, priority=9)
    with Celery("service", broker=server.url, set_as_current=False) as producer:
        producer.send_task("inference.embed", kwargs={"input": "secret"}, queue="inference")
        producer.send_task("somebody.elses", queue="theirs")
        producer.conf.task_protocol = 1
        producer.send_task("inference.generate", kwargs={"prompt": "secret"}, queue="first")
    read = raw_message(uuid4(), Kind.GENERATE, {"prompt": "secret"}, queue="celery", priority=9)
    client.lpush(Layout().key("celery", 9), read)

    publisher = Publisher(settings)
    found = publisher.unread()
    publisher.close()

    assert found == {
        r"celery\x06\x165": 1,
        "celery:9": 1,
        r"mill:celery\x06\x169": 1,
        "inference": 1,
        "first": 1,
    }


def test_looking_for_messages_that_nobody_reads_is_bounded(
    server: OwnRedis, client: redis.Redis, make: Callable[..., Settings]
) -> None:
    pipe = client.pipeline(transaction=False)
    for number in range(30_000):
        pipe.lpush(f"other-{number}", "x")
    pipe.execute()
    client.config_resetstat()

    assert unread(make(server.url), client) == {}
    assert client.info("commandstats")["cmdstat_scan"]["calls"] <= 20


def test_a_redis_cluster_is_refused_as_a_setting_by_the_worker(
    make: Callable[..., Settings], tmp_path: Path
) -> None:
    with running_redis(tmp_path, ("--cluster-enabled", "yes")) as server:
        with redis.Redis.from_url(server.url) as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16_384))
            eventually(lambda: client.cluster("INFO")["cluster_state"] == "ok")
        settings = make(server.url)

        with pytest.raises(ConfigError, match=r"broker\.url: it is a Redis Cluster"):
            check_kind(settings)
        with pytest.raises(AssertionError, match=r"broker\.url: it is a Redis Cluster"):
            running_worker(settings, tmp_path / "worker").__enter__()
