"""DELETE of a job: what it says is gone at once, what it took stays."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.config.settings import Settings
from app.jobs import JobState
from app.local.servers import EmbeddedRedis
from app.store.database import Database
from tests.apis import Hands, running_api
from tests.conftest import STUB_MODELS
from tests.rows import where_it_is

SECRET = "the miller has a secret"
KEY = "order-of-the-miller"


@pytest.fixture(scope="module")
def settings(
    empty_databases: Callable[[str], str], migrated_template: str, redis_server: EmbeddedRedis
) -> Settings:
    return Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url},
        models=STUB_MODELS,
    )


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


@pytest.fixture(scope="module")
def hands(settings: Settings) -> Iterator[Hands]:
    with closing(Hands(settings.database.url)) as hands:
        yield hands


@pytest.fixture(scope="module")
def database(settings: Settings) -> Iterator[Database]:
    with closing(Database(settings.database.url)) as database:
        yield database


def submit(api: httpx.Client, key: str | None = None) -> str:
    job = {"body": {"prompt": SECRET}, "metadata": {"of": SECRET}, "idempotency_key": key}
    answer = api.post("/v1/jobs", json=job)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def end(hands: Hands, job_id: str, **given: Any) -> None:
    hands.finish(hands.claim(job_id), response={"choices": [{"text": SECRET}]}, **given)


def test_what_a_job_says_is_gone_and_what_it_took_stays(
    api: httpx.Client, hands: Hands, database: Database
) -> None:
    job_id = submit(api, KEY)
    end(hands, job_id, state=JobState.FAILED, error_code="oops", error_message=SECRET)
    before = api.get(f"/v1/jobs/{job_id}").json()
    assert where_it_is(database, SECRET) == {"requests", "results"}

    answers = [api.delete(f"/v1/jobs/{job_id}") for _ in range(2)]

    assert [(answer.status_code, answer.content) for answer in answers] == [(204, b"")] * 2
    assert where_it_is(database, SECRET) == where_it_is(database, KEY) == set()
    after = api.get(f"/v1/jobs/{job_id}").json()
    kept = ("state", "timing", "usage", "cost", "batch", "attempts", "created_at", "finished_at")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert (after["response"], after["metadata"]) == (None, {})
    assert after["error"] == {"code": "oops", "message": ""}
    assert after["purged_at"] and not before["purged_at"]
    [replay] = [api.post(f"/v1/jobs/{job_id}/replay")]
    assert (replay.status_code, replay.json()["code"]) == (410, "request_removed")


def test_a_queued_job_is_cancelled_with_it(api: httpx.Client, database: Database) -> None:
    job_id = submit(api)

    assert api.delete(f"/v1/jobs/{job_id}").status_code == 204

    job = api.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["error"]["code"]) == ("cancelled", "cancelled")
    assert where_it_is(database, SECRET) == set()


@pytest.mark.parametrize("state", [JobState.CANCELLED, JobState.COMPLETED])
def test_a_running_job_is_stopped_and_never_gets_a_response(
    api: httpx.Client, hands: Hands, database: Database, state: JobState
) -> None:
    job_id = submit(api)
    claimed = hands.claim(job_id)

    answer = api.delete(f"/v1/jobs/{job_id}")

    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert answer.json()["cancel_requested_at"] and answer.headers["retry-after"]
    assert where_it_is(database, SECRET) == set()
    hands.finish(
        claimed, state=state, response={"choices": [{"text": SECRET}]}, error_message=SECRET
    )
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["response"]) == (state, None)
    assert job["cost"]["amount"] == "0.000000120"
    assert where_it_is(database, SECRET) == set()
    assert api.delete(f"/v1/jobs/{job_id}").status_code == 204


def test_its_key_makes_a_new_job_afterwards(api: httpx.Client) -> None:
    first = submit(api, KEY)
    api.delete(f"/v1/jobs/{first}")

    second = submit(api, KEY)

    assert second != first
    api.delete(f"/v1/jobs/{second}")


def test_a_job_that_is_not_there_cannot_be_purged(api: httpx.Client) -> None:
    answer = api.delete(f"/v1/jobs/{uuid4()}")

    assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found")
