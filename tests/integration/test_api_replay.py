"""Jobs that ended badly are found, and run once more as new jobs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from app.config.settings import Settings
from app.jobs import JobState
from app.store.database import Database
from gristmill_client import Client
from gristmill_client.errors import JobStateConflict, RequestRemoved
from tests.apis import Hands, running_api
from tests.rows import accept_earlier, at_once
from tests.workers import rows

JOB: dict[str, Any] = {
    "body": {"prompt": "A grist mill is", "n": 2},
    "priority": 4,
    "metadata": {"customer": "42"},
    "idempotency_key": "order-42",
}


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as api:
        yield api


@pytest.fixture
def hands(settings: Settings) -> Iterator[Hands]:
    hands = Hands(settings.database.url)
    yield hands
    hands.close()


def failed(api: httpx.Client, hands: Hands, code: str = "engine_crash", **more: Any) -> str:
    """A job that ended with this error."""
    job_id = str(api.post("/v1/jobs", json=JOB | {"idempotency_key": code} | more).json()["id"])
    ending = {"response": None, "error_code": code, "error_message": "It did."}
    hands.finish(hands.claim(job_id), state=JobState.FAILED, **ending)
    return job_id


def test_a_failed_job_is_replayed_as_a_new_job_with_the_same_request(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    old = failed(api, hands)

    answer = api.post(f"/v1/jobs/{old}/replay")

    assert answer.status_code == 202
    new = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{new['id']}"
    assert (new["state"], new["replay_of"]) == ("queued", old)
    assert (new["priority"], new["metadata"]) == (4, {"customer": "42"})
    first, second = rows(settings, "SELECT * FROM jobs ORDER BY created_at")
    for name in ("request", "url", "model", "fingerprint", "input_tokens", "max_output_tokens"):
        assert first[name] == second[name]
    assert second["enqueued_at"] is not None
    assert api.get(f"/v1/jobs/{old}").json()["state"] == "failed"


def test_a_job_is_replayed_once_however_often_it_is_asked(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    old = failed(api, hands)

    answers = at_once(*[partial(api.post, f"/v1/jobs/{old}/replay")] * 5)

    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 200, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(rows(settings, "SELECT id FROM jobs")) == 2


def test_a_replay_that_failed_is_replayed_itself(api: httpx.Client, hands: Hands) -> None:
    old = failed(api, hands)
    new = api.post(f"/v1/jobs/{old}/replay").json()["id"]
    hands.finish(hands.claim(new), state=JobState.FAILED, error_code="engine_crash")

    third = api.post(f"/v1/jobs/{new}/replay")

    assert third.status_code == 202
    assert third.json()["replay_of"] == new
    assert api.post(f"/v1/jobs/{old}/replay").json()["id"] == new


@pytest.mark.parametrize("state", ["queued", "running", "completed"])
def test_only_what_ended_badly_is_replayed(api: httpx.Client, hands: Hands, state: str) -> None:
    job = api.post("/v1/jobs", json=JOB).json()
    assert job["links"].get("replay") is None
    if state != "queued":
        claimed = hands.claim(job["id"])
        if state == "completed":
            hands.finish(claimed)

    answer = api.post(f"/v1/jobs/{job['id']}/replay")

    assert (answer.status_code, answer.json()["code"]) == (409, "job_state_conflict")
    assert state in answer.json()["detail"]


def test_a_cancelled_job_is_replayed_and_a_deadline_that_passed_is_left_behind(
    api: httpx.Client, settings: Settings
) -> None:
    soon = datetime.now(UTC) + timedelta(hours=1)
    old = api.post("/v1/jobs", json=JOB | {"deadline": soon.isoformat()}).json()["id"]
    api.post(f"/v1/jobs/{old}/cancel")
    with psycopg.connect(settings.database.url) as connection:
        connection.execute("UPDATE results SET deadline = now() - interval '1 s'")

    new = api.post(f"/v1/jobs/{old}/replay").json()

    assert (new["state"], new["deadline"]) == ("queued", None)


def test_a_job_whose_request_was_removed_is_refused_with_the_reason(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    old = failed(api, hands)
    with psycopg.connect(settings.database.url) as connection:
        connection.execute("DELETE FROM requests")

    answer = api.post(f"/v1/jobs/{old}/replay")

    assert (answer.status_code, answer.json()["code"]) == (410, "request_removed")
    assert "time was over" in answer.json()["detail"]


def test_a_job_that_is_not_there_cannot_be_replayed(api: httpx.Client) -> None:
    assert api.post(f"/v1/jobs/{UUID(int=1)}/replay").status_code == 404


def test_a_full_queue_refuses_replays_as_well(settings: Settings, hands: Hands) -> None:
    small = settings.api.model_copy(update={"max_queued_jobs": 1})
    with running_api(settings.model_copy(update={"api": small})) as api:
        old = failed(api, hands)
        api.post("/v1/jobs", json={"body": {"prompt": "one more"}})

        answer = api.post(f"/v1/jobs/{old}/replay")

    assert answer.status_code == 429
    assert 1 <= int(answer.headers["retry-after"]) <= 60


def test_jobs_are_listed_by_what_went_wrong_and_since_when(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    crashed = failed(api, hands, "engine_crash")
    old = failed(api, hands, "out_of_memory")
    other = failed(api, hands, "engine_error")
    with closing(Database(settings.database.url)) as database:
        accept_earlier(database, [UUID(old)], timedelta(days=2))

    def listed(**query: object) -> list[str]:
        return [job["id"] for job in api.get("/v1/jobs", params=query).json()["data"]]

    yesterday = (datetime.now(UTC) - timedelta(days=1)).isoformat()
    assert listed(error_code="engine_crash") == [crashed]
    assert listed(error_code="engine_crash", state="cancelled") == []
    assert listed(since=yesterday) == [other, crashed]
    assert listed(error_code="out_of_memory", since=yesterday) == []
    assert listed(error_code="out_of_memory", model="stub", after=other) == [old]
    assert api.get("/v1/jobs", params={"since": "2027-01-31T12:00:00"}).status_code == 400


def test_the_client_lists_and_replays(api: httpx.Client, hands: Hands, settings: Settings) -> None:
    old = failed(api, hands)
    with Client(str(api.base_url)) as client:
        assert [job.id for job in client.jobs(error_code="engine_crash")] == [old]
        new = client.replay(old)
        assert new.raw["replay_of"] == old
        assert client.replay(old).id == new.id
        with pytest.raises(JobStateConflict):
            client.replay(new.id)
        assert [job.id for job in client.jobs(limit=1)] == [new.id]
        client.cancel(new.id)
        with psycopg.connect(settings.database.url) as connection:
            connection.execute("DELETE FROM requests")
        with pytest.raises(RequestRemoved):
            client.replay(new.id)
