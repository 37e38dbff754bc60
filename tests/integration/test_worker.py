"""A real worker on real Redis and Postgres, with the stub engine in its engine process."""

from __future__ import annotations

import json
import signal
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
from celery import Celery

from app.broker.message import Message
from app.broker.publisher import Publisher
from app.broker.queues import Layout, queue_name
from app.config.settings import Settings
from app.engines.hardware import processor
from app.rescue import Rescue
from app.store.cancellation import cancel
from app.store.database import Database
from app.store.submissions import NewJob
from tests.rows import insert_sent, new_job
from tests.waiting import eventually
from tests.workers import Worker, results, rows, running_worker

BATCH = 8


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    """Small batches, short leases, a stub that takes 2 ms for each step."""
    stub = {
        "source": "stub",
        "engine": "stub",
        "default": True,
        "max_batch_size": BATCH,
        "max_wait_ms": 50,
        "default_max_tokens": 64,
        "options": {"step_ms": 2},
    }
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 3, "heartbeat_s": 0.5, "grace_s": 5, "step_timeout_s": 3},
        models={"stub": stub | {"kind": "generate"}, "stub-embed": stub | {"kind": "embed"}},
    )


@pytest.fixture
def worker(config: Settings, tmp_path: Path) -> Iterator[Worker]:
    with running_worker(config, tmp_path / "worker") as worker:
        yield worker


def send(producer: Celery, prompt: str, **options: Any) -> str:
    sent = producer.send_task("inference.generate", kwargs={"prompt": prompt}, **options)
    return str(sent.id)


def ended(config: Settings, ids: list[str], timeout_s: float = 20) -> dict[str, dict[str, Any]]:
    """The result rows of these jobs, once they all have one."""
    found = eventually(lambda: (all_ := results(config)).keys() >= set(ids) and all_, timeout_s)
    return {id_: found[id_] for id_ in ids}


def asked(producer: Celery, what: str, *arguments: str) -> dict[str, Any]:
    """What the one worker answers to `celery inspect`, once it listens."""

    def answer() -> dict[str, Any] | None:
        told: dict[str, Any] | None
        told = getattr(producer.control.inspect(timeout=5, limit=1), what)(*arguments)
        return told

    return eventually(answer, 60) or {}


MAY_BE_NULL = {
    "error_code", "error_message", "deadline", "time_limit_s", "purged_at", "cancel_requested_at",
    "upstream_cost", "charge", "quoted_ms", "quoted_p90_ms", "energy_nj", "wasted_nj", "carbon_ug",
    "energy_boundary", "webhook_url",
}  # fmt: skip


def test_a_plain_send_task_is_answered_with_every_field_filled(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    ids = [send(producer, f"prompt number {n}") for n in range(50)]
    embedded = producer.send_task("inference.embed", kwargs={"input": ["one", "two"]}).id

    found = ended(config, [*ids, embedded])

    for row in found.values():
        assert row["state"] == "completed"
        assert {name for name, value in row.items() if value is None} <= MAY_BE_NULL
        assert row["queue_ms"] >= row["batch_wait_ms"] - 1
        assert row["total_ms"] >= row["queue_ms"]
    batches = rows(config, "SELECT * FROM batches")
    assert sum(batch["num_jobs"] for batch in batches) == 51
    assert max(batch["num_sequences"] for batch in batches) <= BATCH
    assert len(found[embedded]["response"]["data"]) == 2
    [load] = rows(config, "SELECT * FROM loads")
    assert load["ended_at"] > load["began_at"]


def test_the_shares_of_a_batch_add_up_to_its_device_time_of_which_redis_is_told(
    config: Settings, worker: Worker, producer: Celery, redis_url: str
) -> None:
    ended(config, [send(producer, f"p {n}") for n in range(20)])

    for row in rows(
        config,
        "SELECT b.device_ns, sum(r.device_ns) AS shared FROM batches b"
        " JOIN results r ON r.batch_id = b.id GROUP BY b.id",
    ):
        assert row["shared"] == row["device_ns"] > 0
    layout = Layout.of(config)
    with redis.Redis.from_url(redis_url) as client:
        eventually(lambda: not client.hlen("unacked"))
        key = f"{layout.lane(queue_name('stub'), 0)}{layout.sep}fair"
        assert client.hexists(key, "of "), "it is told with the first acknowledgement"


def test_one_prompt_alone_waits_and_many_at_once_fill_batches(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    ended(config, [send(producer, "alone")])
    ended(config, [send(producer, f"crowd {n}") for n in range(64)])

    alone, *crowd = rows(config, "SELECT * FROM batches ORDER BY claimed_at")
    assert (alone["num_jobs"], alone["close_reason"]) == (1, "wait")
    assert alone["wait_ms"] >= 50
    assert sum(batch["num_jobs"] == BATCH for batch in crowd) >= 6
    assert "size" in {batch["close_reason"] for batch in crowd}


def test_a_repeated_message_changes_nothing(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = str(uuid.uuid4())
    for _ in range(5):
        send(producer, "again", task_id=id_)
    ended(config, [id_])
    send(producer, "again", task_id=id_)
    ended(config, [send(producer, "after")])

    assert len(rows(config, "SELECT * FROM attempts WHERE job_id = %s", id_)) == 1


def test_a_countdown_is_kept_in_the_row_and_not_in_memory(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = send(producer, "later", countdown=3600)

    [job] = eventually(lambda: rows(config, "SELECT * FROM jobs WHERE id = %s", id_))
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND received_by IS NULL", id_))

    assert job["state"] == "queued"
    assert (job["not_before"] - job["created_at"]).total_seconds() > 3500


def test_a_revoked_running_job_ends_as_cancelled_and_frees_its_place(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = send(producer, "sleep 60000")
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", id_))

    producer.control.revoke(id_, terminate=True)

    assert ended(config, [id_])[id_]["state"] == "cancelled"
    assert ended(config, [send(producer, "next")])


def test_a_revoked_job_that_waits_for_its_batch_never_runs_and_is_acknowledged(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    running = send(producer, "sleep 3000")
    eventually(
        lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", running)
    )
    waiting = send(producer, "never")
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s", waiting))

    producer.control.revoke(waiting, terminate=True)

    row = ended(config, [waiting])[waiting]
    assert (row["state"], row["attempt_id"]) == ("cancelled", None)
    ended(config, [running])
    with redis.Redis.from_url(config.broker.url) as client:
        eventually(lambda: client.hlen("unacked") == 0)


@pytest.mark.parametrize("kind", ["generate", "embed"])
def test_a_message_that_was_revoked_before_it_came_is_a_cancelled_job_of_its_kind(
    config: Settings, worker: Worker, producer: Celery, kind: str
) -> None:
    id_ = str(uuid.uuid4())
    eventually(lambda: producer.control.revoke(id_, reply=True, limit=1, timeout=5), timeout_s=60)

    body = {"prompt": "never"} if kind == "generate" else {"input": "never"}
    producer.send_task(f"inference.{kind}", kwargs=body, task_id=id_)

    row = ended(config, [id_])[id_]
    assert (row["state"], row["kind"], row["attempt_id"]) == ("cancelled", kind, None)


def test_a_cancel_that_nobody_tells_of_reaches_the_running_job_with_a_heartbeat(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = send(producer, "sleep 60000")
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", id_))

    database = Database(config.database.url)
    with database.begin() as connection:
        cancel(connection, uuid.UUID(id_))
    database.close()

    assert ended(config, [id_])[id_]["error_code"] == "cancelled"


def test_a_time_limit_of_the_message_ends_the_job_as_failed(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = send(producer, "sleep 60000", time_limit=1)

    row = ended(config, [id_])[id_]

    assert (row["state"], row["error_code"]) == ("failed", "time_limit")


def test_a_prompt_over_the_context_fails_alone_and_says_why(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    long, short = send(producer, "word " * 100_000), send(producer, "short")

    found = ended(config, [long, short])

    assert found[long]["error_code"] == "context_length_exceeded"
    assert found[short]["state"] == "completed"


def test_only_the_poison_fails_when_the_engine_crashes(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    prompts = [f"good {n}" for n in range(7)]
    prompts.insert(3, "crash")
    ids = [send(producer, prompt) for prompt in prompts]

    found = ended(config, ids, timeout_s=60)

    failed = [prompt for prompt, id_ in zip(prompts, ids, strict=True) if found[id_]["error_code"]]
    assert failed == ["crash"]
    assert found[ids[3]]["error_code"] == "engine_crash"
    charged = rows(config, "SELECT max(attempts_charged) AS most FROM jobs WHERE state='completed'")
    assert charged[0]["most"] == 1


def test_an_engine_without_progress_is_killed_and_only_the_cause_fails(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    hung, good = send(producer, "hang"), send(producer, "good")

    found = ended(config, [hung, good], timeout_s=60)

    assert found[hung]["error_code"] == "engine_crash"
    assert found[good]["state"] == "completed"


def test_running_out_of_memory_halves_the_batch_and_charges_nobody(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    ids = [send(producer, "oom above 2 rows") for _ in range(BATCH)]

    found = ended(config, ids)

    assert {row["state"] for row in found.values()} == {"completed"}


def test_sigterm_finishes_what_runs_acks_it_and_gives_back_the_rest(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    running = send(producer, "sleep 1500")
    eventually(
        lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", running)
    )
    waiting = send(producer, "not yet")
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s", waiting))

    worker.send_signal(signal.SIGTERM)
    worker.wait(20)

    assert results(config)[running]["state"] == "completed"
    [job] = rows(config, "SELECT * FROM jobs WHERE id = %s", waiting)
    assert (job["state"], job["received_by"]) == ("queued", None)
    with redis.Redis.from_url(config.broker.url) as client:
        assert client.hlen("unacked") == 0
        assert client.llen("celery") == 1  # the message of the job that never started
    [gone] = rows(config, "SELECT * FROM workers")
    assert gone["stopped_at"] is not None
    assert set(gone["engine"]["kernels"].values()) == {"none"}  # of stub engines
    assert set(gone["engine"]["engines"].values()) == {"stub"}
    assert (gone["device"], gone["device_index"]) == (processor(), None)


def test_sigterm_gives_back_uncharged_what_outlasts_the_grace_period(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    id_ = send(producer, "sleep 60000")
    eventually(lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", id_))

    worker.send_signal(signal.SIGTERM)
    worker.wait(30)

    [job] = rows(config, "SELECT * FROM jobs WHERE id = %s", id_)
    assert (job["state"], job["attempts_charged"]) == ("queued", 0)
    [attempt] = rows(config, "SELECT * FROM attempts WHERE job_id = %s", id_)
    assert attempt["outcome"] == "released"


def test_a_killed_workers_engine_process_does_not_outlive_it(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    ended(config, [send(producer, "hello")])
    [stats] = asked(producer, "stats").values()
    engine_pid = stats["pool"]["engine"]["pid"]

    worker.kill()

    eventually(lambda: not Path(f"/proc/{engine_pid}").exists() or _is_zombie(engine_pid))


def _is_zombie(pid: int) -> bool:
    return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()


@contextmanager
def events_of(producer: Celery) -> Iterator[list[dict[str, Any]]]:
    """Every event that workers send meanwhile, as Flower would get them."""
    seen: list[dict[str, Any]] = []
    with producer.connection() as connection:
        receiver = producer.events.Receiver(connection, handlers={"*": seen.append})

        def listen() -> None:
            while not receiver.should_stop:
                with suppress(TimeoutError):
                    receiver.capture(limit=None, timeout=0.5, wakeup=False)

        thread = threading.Thread(target=listen)
        thread.start()
        eventually(lambda: any(event["type"] == "worker-heartbeat" for event in seen))
        yield seen
        receiver.should_stop = True
        thread.join()


def test_a_prompt_shows_neither_in_the_log_nor_in_inspect_nor_in_events(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    canary = "canary-7f3a"
    asked(producer, "ping")  # it has begun to listen
    with events_of(producer) as seen:
        slow = send(producer, f"{canary}\nsleep 3000")
        eventually(
            lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND state = 'running'", slow)
        )
        shown = str([asked(producer, what) for what in ("active", "reserved")])
        shown += str(asked(producer, "query_task", slow))
        producer.send_task("inference.unknown", kwargs={"prompt": canary})
        producer.send_task("inference.generate", kwargs={"prompt": [canary, 7]})
        ended(config, [slow])
        eventually(lambda: any(e["type"] == "task-succeeded" and e["uuid"] == slow for e in seen))

    assert slow in shown
    assert canary in str(results(config)[slow]["response"])
    for place in (shown, str(seen), worker.log):
        assert canary not in place


def jobs_of(prompts: list[str]) -> list[NewJob]:
    return [
        new_job(model="stub", request={"prompt": prompt}, fingerprint=f"{number:064x}")
        for number, prompt in enumerate(prompts)
    ]


def test_jobs_of_one_message_have_ends_of_their_own_and_are_acknowledged_together(
    config: Settings, worker: Worker, producer: Celery
) -> None:
    # given six jobs in one message, two of which run for long
    jobs = jobs_of(["quick"] * 4 + ["sleep 60000", "sleep 3000"])
    ids = [str(job.id) for job in jobs]
    with (
        closing(Database(config.database.url)) as database,
        closing(Publisher(config)) as publisher,
        redis.Redis.from_url(config.broker.url) as client,
        events_of(producer) as seen,
    ):
        # when a worker takes it
        insert_sent(database, *jobs)
        publisher.send_many(Message(job.id, job.kind, job.model) for job in jobs)
        ended(config, ids[:4])
        # then Celery knows each job that is left, and the message is kept for them
        active = str(asked(producer, "active"))
        assert [each in active for each in ids] == [False] * 4 + [True] * 2
        assert client.hlen("unacked") == 1
        # and one of them can be revoked
        producer.control.revoke(ids[4], terminate=True)
        states = {each: row["state"] for each, row in ended(config, ids).items()}
        assert list(states.values()) == ["completed"] * 4 + ["cancelled", "completed"]
        eventually(lambda: client.hlen("unacked") == 0)
        done = {"task-received", "task-started", "task-succeeded"}
        quick = set(ids) - {ids[4]}
        eventually(
            lambda: all(
                {event["type"] for event in seen if event.get("uuid") == each} >= done
                for each in quick
            )
        )


def test_a_killed_worker_loses_and_doubles_no_job_of_a_message(
    config: Settings, worker: Worker, producer: Celery, tmp_path: Path
) -> None:
    # given a message of twelve jobs, some of which have ended when their worker is killed
    jobs = jobs_of(["quick", "sleep 500"] * 6)
    ids = [str(job.id) for job in jobs]
    with (
        closing(Database(config.database.url)) as database,
        closing(Publisher(config)) as publisher,
        redis.Redis.from_url(config.broker.url) as client,
    ):
        insert_sent(database, *jobs)
        publisher.send_many(Message(job.id, job.kind, job.model) for job in jobs)
        eventually(lambda: results(config))
        worker.kill()
        # when what it held comes again, whole
        for note in client.hvals("unacked"):
            client.lpush("gristmill.stub", json.dumps(json.loads(note)[0]))
        rescue = Rescue(config, database, publisher)
        with running_worker(config, tmp_path / "next"):
            # then each job ends once, whoever ran it
            eventually(lambda: rescue.sweep() and results(config).keys() >= set(ids), timeout_s=60)
    assert {row["state"] for row in results(config).values()} == {"completed"}
