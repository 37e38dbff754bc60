"""A Redis that answers with an error is one that is away: nothing ends, and all goes on after."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from app.broker.message import Message, raw_message
from app.broker.publisher import Publisher
from app.config.settings import Settings
from app.errors import Unavailable
from app.jobs import Kind
from tests.own_redis import OwnRedis, running_redis
from tests.waiting import eventually
from tests.workers import results, rows, running_worker

SECRET = "the miller's secret"


def demote(client: redis.Redis, _: Path) -> None:
    client.replicaof("127.0.0.1", 1)  # nobody is there, so it stays a replica without a master


def promote(client: redis.Redis) -> None:
    client.replicaof("NO", "ONE")


def demote_without_stale_reads(client: redis.Redis, _: Path) -> None:
    client.config_set("replica-serve-stale-data", "no")
    client.replicaof("127.0.0.1", 1)


def ask_for_replicas(client: redis.Redis, _: Path) -> None:
    client.config_set("min-replicas-to-write", 1)


def ask_for_none(client: redis.Redis) -> None:
    client.config_set("min-replicas-to-write", 0)


def fail_to_save(client: redis.Redis, folder: Path) -> None:
    (folder / "taken").mkdir(exist_ok=True)
    client.config_set("dbfilename", "taken")
    client.config_set("save", "3600 1")
    client.bgsave()
    eventually(lambda: client.info("persistence")["rdb_last_bgsave_status"] == "err")


def save_no_more(client: redis.Redis) -> None:
    client.config_set("save", "")


def take_a_command(client: redis.Redis, _: Path) -> None:
    client.acl_setuser("miller", enabled=True, commands=["-brpop"])
    client.execute_command("CLIENT", "KILL", "USER", "miller")


def give_the_command(client: redis.Redis) -> None:
    client.acl_setuser("miller", enabled=True, commands=["+brpop"])


def take_the_keys(client: redis.Redis, _: Path) -> None:
    client.execute_command("ACL", "SETUSER", "miller", "resetkeys", "~_kombu*")


def give_the_keys(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "miller", "~*")


def change_the_password(client: redis.Redis, _: Path) -> None:
    client.execute_command("ACL", "SETUSER", "miller", "<flour", ">bran")
    client.execute_command("CLIENT", "KILL", "USER", "miller")


def change_it_back(client: redis.Redis) -> None:
    client.execute_command("ACL", "SETUSER", "miller", ">flour")


FAULTS = {
    "READONLY": (demote, promote),
    "READONLY without stale reads": (demote_without_stale_reads, promote),
    "NOREPLICAS": (ask_for_replicas, ask_for_none),
    "MISCONF": (fail_to_save, save_no_more),
    "WRONGPASS": (change_the_password, change_it_back),
    "NOPERM of a command": (take_a_command, give_the_command),
    "NOPERM of keys": (take_the_keys, give_the_keys),
}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[OwnRedis]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def client(server: OwnRedis) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "miller", "on", ">flour", "~*", "&*", "+@all")
        yield client


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, server: OwnRedis) -> Settings:
    url = server.url.replace("://", "://miller:flour@")
    return make_settings(
        database={"url": database_url},
        broker={"url": url},
        worker={"stall_timeout_s": 3},
    )


def push(client: redis.Redis, prompt: str) -> str:
    job_id = str(uuid4())
    item = raw_message(job_id, Kind.GENERATE, {"prompt": prompt}, queue="gristmill.stub")
    client.lpush("gristmill.stub", item)
    return job_id


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_outlives_a_redis_that_refuses_finishes_what_it_has_and_goes_on(
    fault: str, client: redis.Redis, config: Settings, tmp_path: Path
) -> None:
    begin, heal = FAULTS[fault]
    with running_worker(config, tmp_path / "worker") as worker:
        running = push(client, f"{SECRET}\nsleep 2500")
        eventually(lambda: rows(config, "SELECT 1 FROM jobs WHERE state = 'running'"))

        begin(client, tmp_path)
        finished = eventually(lambda: results(config).get(running))
        eventually(lambda: fault.split()[0] in worker.log)

        # Longer than the watchdog waits for a worker that receives nothing.
        said = f"Redis refuses: {fault.split()[0]}"
        until = time.monotonic() + config.worker.stall_timeout_s + 2
        eventually(lambda: worker.has_ended or time.monotonic() > until)
        assert not worker.has_ended, worker.log
        heal(client)
        after = push(client, SECRET)
        eventually(lambda: results(config).get(after), 20)

        assert finished["state"] == "completed"
        assert not worker.has_ended
        # Once by each that meets it: who acknowledges, waits, connects, and hears of cancels.
        assert worker.log.count(said) <= 4, worker.log
        assert "Unrecoverable" not in worker.log
        assert "Frequent restarts" not in worker.log
        assert SECRET not in worker.log


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_starts_on_a_redis_that_refuses_waits_for_it(
    fault: str, client: redis.Redis, config: Settings, tmp_path: Path
) -> None:
    begin, heal = FAULTS[fault]
    waiting = push(client, SECRET)
    begin(client, tmp_path)
    with running_worker(config, tmp_path / "worker") as worker:
        eventually(lambda: fault.split()[0] in worker.log)

        heal(client)

        eventually(lambda: results(config).get(waiting), 20)
        assert not worker.has_ended


@pytest.mark.parametrize("fault", [name for name in FAULTS if name != "NOPERM of a command"])
def test_a_publisher_says_what_redis_said_and_sends_again_after_it_healed(
    fault: str, client: redis.Redis, config: Settings, tmp_path: Path
) -> None:
    begin, heal = FAULTS[fault]
    publisher = Publisher(config)
    message = Message(uuid4(), Kind.GENERATE, "stub", {"prompt": SECRET}, "/v1/completions")
    publisher.send(message)
    begin(client, tmp_path)

    with pytest.raises(Unavailable) as refused:
        publisher.send(message)
    heal(client)
    publisher.send(message)

    assert str(refused.value).startswith(f"Redis refuses: {fault.split()[0]}")
    assert SECRET not in str(refused.value)
    assert client.llen("gristmill.stub") == 2
    publisher.close()


def test_a_publisher_leaves_a_server_that_was_demoted_for_the_one_that_answers_now(
    config: Settings, client: redis.Redis, tmp_path: Path
) -> None:
    publisher = Publisher(config)
    message = Message(uuid4(), Kind.GENERATE, "stub", {"prompt": SECRET}, "/v1/completions")
    publisher.send(message)
    before = {each["id"] for each in client.client_list() if each["user"] == "miller"}
    demote(client, tmp_path)

    with pytest.raises(Unavailable):
        publisher.send(message)
    promote(client)
    publisher.send(message)

    after = {each["id"] for each in client.client_list() if each["user"] == "miller"}
    assert before
    assert not before & after
    publisher.close()
