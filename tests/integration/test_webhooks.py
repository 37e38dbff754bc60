"""The outbox of webhooks and its deliverer on a real Postgres: nothing is lost, whatever ends a job
and whatever the receiver does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
from collections.abc import Callable, Sequence
from datetime import timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import openai
import psycopg
import pytest
from psycopg.rows import dict_row
from sqlalchemy import text
from standardwebhooks import Webhook

from app import cli
from app.config.settings import Settings
from app.hooks import Deliverer
from app.jobs import JobState
from app.store import (
    cancellation,
    claims,
    purging,
    submissions,
    sweeps,
    webhook_endpoints,
    webhooks,
)
from app.store.claims import Finished
from app.store.database import Database
from app.store.submissions import RejectedJob
from app.store.webhooks import Tried
from app.webhooks.addresses import Address, Reach
from app.webhooks.post import Postman
from app.webhooks.schedule import TRIP
from app.webhooks.signing import hint_of, new_secret
from app.webhooks.vault import Secret, Vault
from tests.receivers import receiving, running_hooks
from tests.rows import Worker, completed, end_lease, insert, new_job, rewrite
from tests.waiting import eventually

LOCAL: dict[str, Any] = {"allow_networks": ["127.0.0.0/8"]}


def rows(settings: Settings, query: str, *given: object) -> list[dict[str, Any]]:
    with psycopg.connect(settings.database.url, row_factory=dict_row) as connection:
        return connection.execute(query, given).fetchall()


def deliveries(settings: Settings) -> list[dict[str, Any]]:
    return rows(settings, "SELECT * FROM webhook_deliveries ORDER BY created_at, type")


def attempts(settings: Settings) -> list[dict[str, Any]]:
    return rows(settings, "SELECT * FROM webhook_attempts ORDER BY delivery_id, number")


@pytest.fixture(scope="module")
def one_url(empty_databases: Callable[[str], str], migrated_template: str) -> str:
    return empty_databases(migrated_template)


@pytest.fixture
def database_url(one_url: str) -> str:
    """One for all tests of this file, and empty for each: making one takes longer than most."""
    tables = "job_keys, requests, open_jobs, results, attempts, webhook_deliveries"
    with psycopg.connect(one_url, autocommit=True) as connection:
        connection.execute(
            f"TRUNCATE {tables}, webhook_attempts, webhook_endpoints, webhook_receivers"
        )
    return one_url


@pytest.fixture
def config(make_settings: Callable[..., Settings], settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "webhooks": settings.webhooks.model_copy(update={"allow_networks": ("127.0.0.0/8",)})
        }
    )


def deliver(
    settings: Settings, database: Database, *, looks: int = 1, names: Sequence[str] = ("127.0.0.1",)
) -> None:
    """Send what is due, as a deliverer does, and wait until it is recorded."""

    async def resolve(_: str, __: int) -> list[Address]:
        return [ip_address(each) for each in names]

    async def run() -> None:
        reach = Reach.of(settings.webhooks)
        deliverer = Deliverer(settings, database, Postman(reach, 60.0, resolve))
        for _ in range(looks):
            await deliverer.look()
            await deliverer.finish()
        deliverer.close()

    asyncio.run(run())


def let_pass(database: Database, time: timedelta) -> None:
    """Move all that is noted of webhooks into the past."""
    with database.begin() as connection:
        for table, stamps in (
            ("webhook_deliveries", ("since", "next_at", "ended_at")),
            ("webhook_receivers", ("retry_at",)),
            ("webhook_endpoints", ("old_secret_until",)),
        ):
            moved = ", ".join(f"{stamp} = {stamp} - :time" for stamp in stamps)
            connection.execute(text(f"UPDATE {table} SET {moved}"), {"time": time})


def until_next(settings: Settings) -> timedelta | None:
    """From now to the next attempt, its receiver's rest included."""
    [row] = rows(
        settings,
        "SELECT min(greatest(next_at, retry_at)) - now() AS wait FROM webhook_deliveries"
        " JOIN webhook_receivers USING (tenant, origin) WHERE state = 'pending'",
    )
    wait: timedelta | None = row["wait"]
    return wait


def end_one(database: Database, url: str | None, **given: Any) -> UUID:
    """A job that is completed."""
    [id] = insert(database, new_job(webhook_url=url, **given))
    worker = Worker.registered(database)
    worker.complete(worker.claim([id]))
    return id


# ── the outbox ──────────────────────────────────────────────────────────────────────────────────


def _complete(database: Database, id: UUID) -> str:
    worker = Worker.registered(database)
    worker.complete(worker.claim([id]))
    return "job.completed"


def _fail(database: Database, id: UUID) -> str:
    worker = Worker.registered(database)
    [claimed] = worker.claim([id])
    worker.finish(
        Finished(
            job_id=id, attempt_id=claimed.attempt_id, created_at=claimed.created_at,
            state=JobState.FAILED, error_code="engine_error",
        )
    )  # fmt: skip
    return "job.failed"


def _cancel_queued(database: Database, id: UUID) -> str:
    with database.begin() as connection:
        cancellation.cancel(connection, id)
    return "job.cancelled"


def _cancel_running(database: Database, id: UUID) -> str:
    worker = Worker.registered(database)
    [claimed] = worker.claim([id])
    with database.begin() as connection:
        cancellation.cancel(connection, id)
    worker.release(claimed)
    return "job.cancelled"


def _purge(database: Database, id: UUID) -> str:
    with database.begin() as connection:
        purging.purge(connection, id)
    return "job.cancelled"


def _expire_queued(database: Database, id: UUID) -> str:
    rewrite(database, "deadline = now() - interval '1 s'", id)
    with database.begin() as connection:
        sweeps.expire_deadlines(connection, sweeps.find_late(connection, 10))
    return "job.expired"


def _lose_for_good(database: Database, id: UUID) -> str:
    worker = Worker.registered(database)
    worker.claim([id])
    rewrite(database, "losses = 3, attempts_charged = max_attempts - 1", id)
    end_lease(database, worker.id)
    with database.begin() as connection:
        sweeps.expire_leases(connection, sweeps.find_lost(connection, 10))
    return "job.failed"


@pytest.mark.parametrize(
    "end",
    [_complete, _fail, _cancel_queued, _cancel_running, _purge, _expire_queued, _lose_for_good],
)
def test_whatever_ends_a_job_writes_its_webhook_in_the_same_transaction(
    database: Database, config: Settings, end: Callable[[Database, UUID], str]
) -> None:
    [id, other] = insert(
        database, new_job(webhook_url="https://mill.example:8443/hook?a=b"), new_job()
    )

    type_ = end(database, id)
    with database.begin() as connection:
        cancellation.cancel(connection, other)  # it has no webhook

    [written] = deliveries(config)
    assert (written["type"], written["object_id"], written["event_id"]) == (type_, str(id), id)
    assert (written["url"], written["origin"], written["state"]) == (
        "https://mill.example:8443/hook?a=b", "https://mill.example:8443", "pending",
    )  # fmt: skip


class _Undone(Exception):
    pass


def test_an_end_that_is_rolled_back_tells_nobody_and_one_that_is_repeated_tells_once(
    database: Database, config: Settings
) -> None:
    [id] = insert(database, new_job(webhook_url="https://mill.example/"))
    worker = Worker.registered(database)
    [claimed] = worker.claim([id])

    with contextlib.suppress(_Undone), database.begin() as connection:
        claims.finish(connection, [completed(claimed)])
        assert connection.scalar(text("SELECT count(*) FROM webhook_deliveries")) == 1
        raise _Undone
    assert not deliveries(config)

    worker.finish(completed(claimed))
    worker.finish(completed(claimed))

    assert len(deliveries(config)) == 1


def test_a_job_asked_for_as_a_response_is_told_of_as_one(
    database: Database, config: Settings
) -> None:
    worker = Worker.registered(database)
    ids = insert(
        database,
        *(new_job(url="/v1/responses", webhook_url="https://a.example/") for _ in range(3)),
    )
    claimed = {each.job_id: each for each in worker.claim(ids[:2])}
    for id, status in zip(ids, ("completed", "incomplete"), strict=False):
        each = claimed[id]
        worker.finish(
            Finished(
                job_id=id, attempt_id=each.attempt_id, created_at=each.created_at,
                state=JobState.COMPLETED, response={"status": status},
            )
        )  # fmt: skip
    _expire_queued(database, ids[2])

    told = {each["object_id"]: each["type"] for each in deliveries(config)}
    assert told == {
        f"resp_{ids[0].hex}": "response.completed",
        f"resp_{ids[1].hex}": "response.incomplete",
        f"resp_{ids[2].hex}": "response.failed",
    }


@pytest.mark.parametrize("odd", ["", "x", "ftp://a/", "https://", "https://" + "a" * 3_000, "\x01"])
def test_an_odd_url_in_a_row_keeps_no_job_from_its_end(
    database: Database, config: Settings, odd: str
) -> None:
    [id, mate] = insert(database, new_job(), new_job(webhook_url="https://a.example/"))
    with database.begin() as connection:
        connection.execute(
            text("UPDATE open_jobs SET webhook_url = :odd WHERE id = :id"), {"odd": odd, "id": id}
        )
    worker = Worker.registered(database)

    assert len(worker.complete(worker.claim([id, mate]))) == 2

    assert [each["event_id"] for each in deliveries(config)] == [mate]


def test_a_message_that_cannot_run_ends_without_a_webhook_and_all_the_same(
    database: Database, config: Settings
) -> None:
    with database.begin() as connection:
        rejected = RejectedJob(
            id=uuid4(), kind=new_job().kind, error_code="bad", error_message="Bad."
        )
        assert submissions.reject(connection, [rejected])

    assert not deliveries(config)


# ── delivering ──────────────────────────────────────────────────────────────────────────────────


def test_an_end_is_delivered_signed_and_once(database: Database, config: Settings) -> None:
    secret = new_secret()
    with database.begin() as connection:
        webhook_endpoints.rotate_own(connection, Secret(secret, hint_of(secret)))
    with receiving() as receiver:
        id = end_one(database, receiver.url("/hook?a=b"))
        deliver(config, database, looks=3)

    [hook] = receiver.hooks
    assert hook.path == "/hook?a=b"
    assert hook.event["type"] == "job.completed"
    assert hook.event["data"] == {"id": str(id)}
    assert hook.event["id"] == hook.id == f"evt_{id.hex}"
    Webhook(secret).verify(hook.body, hook.headers)
    event = openai.OpenAI(api_key="x").webhooks.unwrap(hook.body, hook.headers, secret=secret)
    assert event.type == "job.completed"
    [row], [tried] = deliveries(config), attempts(config)
    assert (row["state"], row["attempts"], row["status_code"]) == ("delivered", 1, 204)
    assert (tried["number"], tried["status_code"], tried["error"]) == (1, 204, None)


def test_a_tenant_without_a_secret_gets_one_that_nobody_has_seen_and_may_replace_it(
    database: Database, config: Settings
) -> None:
    with receiving() as receiver:
        end_one(database, receiver.url())
        deliver(config, database)
        assert receiver.hooks[0].headers["webhook-signature"].startswith("v1,")

        # when its secret is made known by making a new one, and the old one signs as well
        secret = new_secret()
        with database.begin() as connection:
            webhook_endpoints.rotate_own(connection, Secret(secret, hint_of(secret)), 3600)
        end_one(database, receiver.url())
        deliver(config, database)
        let_pass(database, timedelta(hours=2))
        end_one(database, receiver.url())
        deliver(config, database)

    signatures = [hook.headers["webhook-signature"].count("v1,") for hook in receiver.hooks]
    assert signatures == [1, 2, 1]
    for hook in receiver.hooks[1:]:
        Webhook(secret).verify(hook.body, hook.headers)


def test_secrets_are_sealed_where_a_key_is_set(database: Database, config: Settings) -> None:
    key = "Zm9vYmFyYmF6Zm9vYmFyYmF6Zm9vYmFyYmF6Zm9vYmE="
    sealing = config.model_copy(
        update={"webhooks": config.webhooks.model_copy(update={"encryption_key": key})}
    )
    with receiving() as receiver:
        end_one(database, receiver.url())
        deliver(sealing, database)
        [endpoint] = rows(config, "SELECT secret FROM webhook_endpoints")
        secret = Vault(key).open(endpoint["secret"])
        Webhook(secret).verify(receiver.hooks[0].body, receiver.hooks[0].headers)
        assert secret not in endpoint["secret"]

        # without the key nothing is sent unsigned, and nothing is lost
        end_one(database, receiver.url())
        deliver(config, database)
        assert len(receiver.hooks) == 1
        let_pass(database, timedelta(minutes=5))
        deliver(sealing, database)
        assert len(receiver.hooks) == 2


def test_a_receiver_that_is_down_for_a_day_gets_everything_when_it_is_back(
    database: Database, config: Settings
) -> None:
    # given a receiver that answers 503 for a day by the database's clock
    day = timedelta(days=1)
    passed = timedelta()
    with receiving(lambda _: (503, {})) as receiver:
        ids = [end_one(database, receiver.url()) for _ in range(3)]
        deliver(config, database)
        while passed < day:
            wait = until_next(config)
            assert wait is not None
            let_pass(database, wait + timedelta(seconds=1))
            passed += wait + timedelta(seconds=1)
            if passed < day:
                deliver(config, database)
        failed = len(receiver.hooks)

        # when it is back
        receiver.answer = lambda _: (200, {})
        while (wait := until_next(config)) is not None:
            let_pass(database, wait + timedelta(seconds=1))
            deliver(config, database)

    # then each has arrived once, under the id that it had at every attempt
    arrived = [hook.id for hook in receiver.hooks[failed:]]
    assert sorted(arrived) == sorted(f"evt_{id.hex}" for id in ids)
    assert {hook.id for hook in receiver.hooks} == set(arrived)
    assert {each["state"] for each in deliveries(config)} == {"delivered"}
    assert 6 <= deliveries(config)[0]["attempts"] <= 9
    bodies = {hook.id: set() for hook in receiver.hooks}
    for hook in receiver.hooks:
        bodies[hook.id].add(hook.body)
    assert all(len(each) == 1 for each in bodies.values())
    # and the jobs' results were there all the time
    assert rows(config, "SELECT count(*) AS n FROM results WHERE state = 'completed'")[0]["n"] == 3


def test_a_receiver_that_never_answers_is_given_up_after_three_days_and_can_be_replayed(
    database: Database, config: Settings
) -> None:
    with receiving(lambda _: (500, {})) as receiver:
        end_one(database, receiver.url())
        deliver(config, database)
        passed = timedelta()
        while (wait := until_next(config)) is not None:
            let_pass(database, wait + timedelta(seconds=1))
            passed += wait + timedelta(seconds=1)
            deliver(config, database)

    [row] = deliveries(config)
    assert (row["state"], row["error"], row["attempts"]) == ("failed", "refused_by_receiver", 10)
    assert timedelta(hours=70) < passed < timedelta(hours=73)
    assert [each["number"] for each in attempts(config)] == list(range(1, 11))


def test_a_deliverer_that_dies_between_sending_and_recording_has_it_sent_again_with_the_same_id(
    database: Database, config: Settings, tmp_path: Path
) -> None:
    # given a deliverer that is killed while its receiver has the event and has not answered
    with receiving() as receiver:
        started: list[subprocess.Popen[bytes]] = []

        def kill(_: object) -> tuple[int, dict[str, str]]:
            eventually(lambda: started)
            started[0].kill()
            started[0].wait()
            return 200, {}

        receiver.answer = kill
        id = end_one(database, receiver.url())
        with running_hooks(config, tmp_path / "hooks") as process:
            started.append(process)
            eventually(lambda: process.poll() is not None, timeout_s=30)
        assert len(receiver.hooks) == 1 and not attempts(config)
        receiver.answer = lambda _: (200, {})

        # when nobody looks after its lease, another one does nothing
        deliver(config, database)
        assert len(receiver.hooks) == 1

        # and when its lease is over
        let_pass(database, timedelta(seconds=config.webhooks.timeout_s + 31))
        deliver(config, database)

    first, second = receiver.hooks
    assert first.id == second.id == f"evt_{id.hex}"
    assert first.body == second.body
    [row] = deliveries(config)
    assert (row["state"], row["attempts"]) == ("delivered", 2)


def test_the_process_delivers_says_that_it_is_alive_and_stops_on_sigterm(
    database: Database, config: Settings, tmp_path: Path
) -> None:
    from app import hooks

    with receiving() as receiver, running_hooks(config, tmp_path / "hooks") as process:
        eventually(lambda: hooks.alive(config).is_alive, timeout_s=30)
        end_one(database, receiver.url())
        eventually(lambda: receiver.hooks, timeout_s=30)
        eventually(lambda: deliveries(config)[0]["state"] == "delivered")
        process.terminate()

        assert process.wait(20) == 0
    assert not hooks.alive(config).is_alive


def test_several_deliverers_share_the_work(database: Database, config: Settings) -> None:
    with receiving() as receiver:
        ids = {f"evt_{end_one(database, receiver.url()).hex}" for _ in range(20)}

        async def run() -> None:
            async def resolve(_: str, __: int) -> list[Address]:
                return []

            postman = Postman(Reach.of(config.webhooks), 60.0, resolve)
            both = [Deliverer(config, database, postman) for _ in range(2)]
            while any(await asyncio.gather(*(each.look() for each in both))):
                await asyncio.gather(*(each.finish() for each in both))
            for each in both:
                each.close()

        for _ in range(20):
            asyncio.run(run())
            if len(receiver.hooks) >= 20:
                break

    assert sorted(hook.id for hook in receiver.hooks) == sorted(ids)


# ── receivers that are unwell, unwanted or hostile ──────────────────────────────────────────────


def test_a_receiver_says_when_to_come_again(database: Database, config: Settings) -> None:
    with receiving(lambda _: (503, {"Retry-After": "3600"})) as receiver:
        end_one(database, receiver.url())
        deliver(config, database)

        wait = until_next(config)
        assert wait is not None and timedelta(minutes=59) < wait < timedelta(minutes=61)


def test_a_receiver_that_is_gone_is_not_tried_again(database: Database, config: Settings) -> None:
    with receiving(lambda _: (410, {})) as receiver:
        end_one(database, receiver.url())
        deliver(config, database, looks=2)

    [row] = deliveries(config)
    assert (row["state"], row["status_code"], row["attempts"]) == ("failed", 410, 1)


def test_a_redirect_is_a_failure_and_is_not_followed(database: Database, config: Settings) -> None:
    metadata = "http://169.254.169.254/latest/meta-data/"
    with receiving(lambda _: (302, {"Location": metadata})) as receiver:
        end_one(database, receiver.url())
        deliver(config, database)

    [row] = deliveries(config)
    assert (row["state"], row["error"], row["status_code"]) == ("pending", "redirect", 302)


def test_a_name_that_leads_inside_is_not_called_and_not_lost(
    database: Database, settings: Settings, config: Settings
) -> None:
    with receiving() as receiver:
        end_one(database, f"https://rebinding.example:{receiver.port}/")
        for names in (["127.0.0.1"], ["169.254.169.254"], ["93.184.215.14", "10.0.0.1"], []):
            deliver(settings, database, names=names)
            let_pass(database, timedelta(hours=20))

    assert not receiver.hooks
    assert {each["error"] for each in attempts(config)} == {"address_refused"}
    assert [each["state"] for each in deliveries(config)] == ["pending"]


def test_a_receiver_that_fails_again_and_again_rests_and_is_asked_by_one(
    database: Database, config: Settings
) -> None:
    # given many events for a receiver that is down, and one for another that is well
    with receiving(lambda _: (500, {})) as down, receiving() as well:
        for _ in range(TRIP + 10):
            end_one(database, down.url())
        deliver(config, database, looks=5)
        tripped = len(down.hooks)
        end_one(database, well.url())
        end_one(database, down.url())
        deliver(config, database, looks=2)

        # then it rests, and the other is served
        assert TRIP <= tripped < TRIP + 10
        assert len(down.hooks) == tripped and len(well.hooks) == 1

        # and after its rest one event asks, and then it rests for longer
        let_pass(database, timedelta(minutes=16))
        deliver(config, database, looks=3)
        assert len(down.hooks) == tripped + 1

        # until it is well again
        down.answer = lambda _: (200, {})
        for _ in range(12):
            let_pass(database, timedelta(minutes=20))
            deliver(config, database, looks=3)

    assert {each["state"] for each in deliveries(config)} == {"delivered"}
    assert not rows(config, "SELECT * FROM webhook_receivers")  # well, and nothing is to go there


def test_what_waits_for_a_receiver_that_rests_is_given_up_in_the_end(
    database: Database, config: Settings
) -> None:
    with receiving(lambda _: (500, {})) as down:
        for _ in range(TRIP + 5):
            end_one(database, down.url())
        deliver(config, database, looks=3)
        end_one(database, down.url())  # never tried
    with database.begin() as connection:
        connection.execute(text("UPDATE webhook_receivers SET retry_at = now() + interval '5 d'"))
    let_pass(database, timedelta(hours=73))

    deliver(config, database)

    assert {each["state"] for each in deliveries(config)} == {"failed"}
    assert {each["error"] for each in deliveries(config)} == {
        "receiver_away", "refused_by_receiver",
    }  # fmt: skip


def test_receivers_are_known_as_long_as_something_is_to_go_to_them(
    database: Database, config: Settings
) -> None:
    with receiving() as receiver:
        end_one(database, receiver.url())
        deliver(config, database)
        deliver(config, database)  # another one, which tidies first
        assert not rows(config, "SELECT * FROM webhook_receivers")

        # one that was forgotten just as something was written for it
        end_one(database, receiver.url())
        with database.begin() as connection:
            connection.execute(text("DELETE FROM webhook_receivers"))
        deliver(config, database)

    assert len(receiver.hooks) == 2


def test_an_attempt_whose_lease_is_over_changes_nothing(
    database: Database, config: Settings
) -> None:
    # given two that took the same delivery, the second after the first one's lease
    end_one(database, "https://a.example/")

    def take() -> webhooks.Due:
        with database.begin() as connection:
            [due] = webhooks.claim(connection, room=1, each=1, lease_s=10)
        return due

    first = take()
    let_pass(database, timedelta(seconds=11))
    second = take()

    # when both record
    with database.begin() as connection:
        failed = Tried(id=first.id, lease=first.lease, took_ms=1, error="timeout", is_well=False)
        assert not webhooks.record(connection, failed)
        done = Tried(id=second.id, lease=second.lease, took_ms=1, status_code=200)
        assert webhooks.record(connection, done)
        assert not webhooks.record(connection, done)  # repeated

    assert [each["state"] for each in deliveries(config)] == ["delivered"]
    assert [each["number"] for each in attempts(config)] == [2]


def test_the_command_shows_what_became_of_webhooks_and_sends_them_again(
    database: Database,
    config: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def gristmill(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        captured = capsys.readouterr()
        return int(end.value.code or 0), captured.out, captured.err

    monkeypatch.setenv("GRISTMILL_DATABASE__URL", config.database.url)
    monkeypatch.setenv("GRISTMILL_BROKER__URL", config.broker.url)
    code, out, told = gristmill("hooks", "secret")
    secret = out.strip()
    assert (code, secret[:6]) == (0, "whsec_") and secret not in told
    with receiving(lambda _: (410, {})) as receiver:
        id = end_one(database, receiver.url())
        deliver(config, database)
        _, out, _ = gristmill("hooks", "list", "--state", "failed", "--json")
        failed = json.loads(out)
        assert (failed["object_id"], failed["status_code"]) == (str(id), 410)
        assert gristmill("hooks", "list", "--object", str(uuid4()))[1] == ""
        shown = json.loads(gristmill("hooks", "show", failed["id"], "--json")[1])
        assert [each["error"] for each in shown["history"]] == ["refused_by_receiver"]
        assert failed["id"] in gristmill("hooks", "show", failed["id"])[1]

        receiver.answer = lambda _: (200, {})
        assert gristmill("hooks", "replay", failed["id"]) == (0, f"{failed['id']}\tpending\n", "")
        deliver(config, database)

    code, _, told = gristmill("hooks", "replay", "wd_1")
    assert code == 1 and "No such delivery" in told
    Webhook(secret).verify(receiver.hooks[1].body, receiver.hooks[1].headers)
    assert len({hook.id for hook in receiver.hooks}) == 1
    assert deliveries(config)[0]["state"] == "delivered"


def test_old_deliveries_are_deleted_with_their_attempts_and_pending_ones_are_not(
    database: Database, config: Settings
) -> None:
    with receiving() as receiver:
        end_one(database, receiver.url())
        deliver(config, database)
    end_one(database, "https://later.example/")
    let_pass(database, timedelta(days=31))

    with database.begin() as connection:
        assert webhooks.delete_deliveries(connection, 30 * 86_400, 100) == 1

    [left] = deliveries(config)
    assert left["state"] == "pending" and not attempts(config)
