"""Following jobs over a real socket: status, ETag, long poll, list, cancel."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.config.settings import Settings
from app.jobs import JobState
from app.local.servers import EmbeddedRedis
from tests.apis import Hands, running_api
from tests.conftest import STUB_MODELS
from tests.waiting import eventually
from tests.workers import rows

BODY = {"prompt": "A grist mill is"}


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


@pytest.fixture(scope="module")
def refusing(
    empty_databases: Callable[[str], str], migrated_template: str, redis_server: EmbeddedRedis
) -> Iterator[httpx.Client]:
    """One API for all requests that find nothing."""
    settings = Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url},
        models=STUB_MODELS,
    )
    with running_api(settings) as client:
        yield client


@pytest.fixture
def hands(database_url: str) -> Iterator[Hands]:
    hands = Hands(database_url)
    yield hands
    hands.close()


def submit(api: httpx.Client, prompt: str = "A grist mill is", **fields: Any) -> str:
    answer = api.post("/v1/jobs", json={"body": {"prompt": prompt}} | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


# ── status ──────────────────────────────────────────────────────────────────────────────────────


def test_a_queued_job_says_when_to_look_again(api: httpx.Client) -> None:
    job_id = submit(api)

    answer = api.get(f"/v1/jobs/{job_id}")

    job = answer.json()
    assert (answer.status_code, job["state"]) == (200, "queued")
    assert int(answer.headers["retry-after"]) >= 1
    assert job["links"]["cancel"] == f"/v1/jobs/{job_id}/cancel"
    assert job["attempts"] == [] and job["response"] is None and job["error"] is None


def test_a_running_job_shows_its_attempt_and_its_batch(api: httpx.Client, hands: Hands) -> None:
    job_id = submit(api)
    claimed = hands.claim(job_id)

    job = api.get(f"/v1/jobs/{job_id}").json()

    [attempt] = job["attempts"]
    assert job["state"] == "running"
    assert (attempt["number"], attempt["outcome"], attempt["ended_at"]) == (1, None, None)
    assert attempt["batch_id"] == job["batch"]["id"]
    assert job["batch"]["close_reason"] == "wait"
    assert job["claimed_at"] == claimed.claimed_at.isoformat().replace("+00:00", "Z")


def test_a_completed_job_tells_everything(api: httpx.Client, hands: Hands) -> None:
    job_id = submit(api, metadata={"customer": "42"})
    hands.finish(hands.claim(job_id))

    answer = api.get(f"/v1/jobs/{job_id}")

    job = answer.json()
    assert job["state"] == "completed"
    assert "retry-after" not in answer.headers
    assert job["response"] == {"choices": [{"text": "done"}]}
    assert job["usage"] == {
        "input_tokens": 5,
        "cached_tokens": 2,
        "output_tokens": 7,
        "total_tokens": 12,
    }
    assert job["cost"] == {
        "amount": "0.000000120",
        "currency": "USD",
        "price_id": "cpu",
        "per_device_hour": "0.036000000",
        "upstream": None,
        "charge": None,
        "device_seconds": 0.012,
        "wasted_seconds": 0.0,
    }
    assert job["energy"] == {
        "energy_j": 31.5,
        "wasted_j": 0.0,
        "energy_method": "measured",
        "energy_boundary": "gpu",
        "carbon_g": 0.003325,
    }
    assert job["attempts"][0]["energy_j"] == 31.5
    assert (job["timing"]["batch_wait_ms"], job["timing"]["inference_ms"]) == (100.0, 12.5)
    assert all(job["timing"][name] >= 0 for name in ("queue_ms", "ttft_ms", "total_ms"))
    assert job["batch"]["size"] == 1
    assert job["attempts"][0]["outcome"] == "succeeded" and job["attempts"][0]["charged"]
    for stamp in ("created_at", "claimed_at", "started_at", "first_token_at", "finished_at"):
        assert job[stamp], stamp
    assert job["links"]["cancel"] is None
    assert "A grist mill" not in answer.text


def test_a_failed_job_says_why(api: httpx.Client, hands: Hands) -> None:
    job_id = submit(api)
    hands.finish(
        hands.claim(job_id),
        state=JobState.FAILED,
        response=None,
        error_code="engine_crash",
        error_message="The engine process died.",
    )

    job = api.get(f"/v1/jobs/{job_id}").json()

    assert job["error"] == {"code": "engine_crash", "message": "The engine process died."}
    assert job["response"] is None


@pytest.mark.parametrize(
    "job_id",
    ["00000000-0000-4000-8000-000000000000", "not-an-id", "0", "%00", "a" * 300, "..%2f..", "☕"],
)
def test_an_id_that_is_no_jobs_is_not_found(refusing: httpx.Client, job_id: str) -> None:
    for answer in (refusing.get(f"/v1/jobs/{job_id}"), refusing.post(f"/v1/jobs/{job_id}/cancel")):
        assert answer.status_code == 404
        assert answer.headers["content-type"] == "application/problem+json"


# ── ETag ────────────────────────────────────────────────────────────────────────────────────────


def test_an_etag_saves_sending_what_the_caller_has(api: httpx.Client, hands: Hands) -> None:
    path = f"/v1/jobs/{submit(api)}"
    etag = api.get(path).headers["etag"]
    assert etag.startswith('W/"')  # place and time of a job that waits are left out of it

    for known in (etag, etag.removeprefix("W/"), f'"other", {etag}', "*"):
        unchanged = api.get(path, headers={"If-None-Match": known})
        assert (unchanged.status_code, unchanged.content) == (304, b"")
        assert unchanged.headers["etag"] == etag

    hands.claim(path.rpartition("/")[2])
    changed = api.get(path, headers={"If-None-Match": etag})
    assert (changed.status_code, changed.json()["state"]) == (200, "running")
    assert changed.headers["etag"] != etag


def test_the_metrics_tell_how_many_prompt_tokens_a_cache_had(
    api: httpx.Client, hands: Hands
) -> None:
    hands.finish(hands.claim(submit(api)))

    told = {
        came_from: float(value)
        for came_from, value in re.findall(
            r'^gristmill_prompt_tokens_last_minute\{came_from="(\w+)".*\} (\S+)$',
            api.get("/metrics").text,
            re.MULTILINE,
        )
    }

    assert told["cache"] >= 2
    assert told["compute"] >= 3


def test_the_metrics_count_what_ended_jobs_used_cached_tokens_among_the_input(
    api: httpx.Client, hands: Hands
) -> None:
    def counted(name: str) -> float:
        pattern = rf"^gristmill_{name}_total\{{.*\}} (\S+)$"
        return sum(map(float, re.findall(pattern, api.get("/metrics").text, re.MULTILINE)))

    for _ in range(2):
        hands.finish(hands.claim(submit(api)))

    eventually(lambda: counted("ended_jobs") == 2)  # one look at Postgres serves who asks meanwhile
    told = [counted(f"{kind}_tokens") for kind in ("input", "cached", "output")]
    assert told == [10, 4, 14]
    assert counted("device_seconds") == 0.024
    assert counted("cost") == pytest.approx(0.00000024)
    assert counted("energy_joules") == 0  # of no window


# ── long poll ───────────────────────────────────────────────────────────────────────────────────


def waiting(api: httpx.Client) -> float:
    """How many long polls the API holds, by its own count."""
    for line in api.get("/metrics").text.splitlines():
        if line.startswith("gristmill_long_polls "):
            return float(line.split()[1])
    raise AssertionError("no such metric")


def connections(settings: Settings) -> int:
    """Connections of the API's pool that are in use: in a statement or a transaction."""
    [counted] = rows(
        settings,
        "SELECT count(*) FROM pg_stat_activity"
        " WHERE application_name = 'gristmill-api' AND state <> 'idle'",
    )
    return int(counted["count"])


def test_a_long_poll_is_answered_when_the_result_is_committed(
    api: httpx.Client, hands: Hands
) -> None:
    job_id = submit(api)
    claimed = hands.claim(job_id)
    with ThreadPoolExecutor() as pool:
        following = pool.submit(api.get, f"/v1/jobs/{job_id}", params={"wait": 30})
        eventually(lambda: waiting(api) == 1)

        hands.finish(claimed)
        committed_at = time.monotonic()

        job = following.result(timeout=20).json()
        assert job["state"] == "completed"
        # Far below the 30 s that it was willing to wait: the notice woke it.
        assert time.monotonic() - committed_at < 10
    eventually(lambda: waiting(api) == 0)


def test_a_hundred_long_polls_hold_no_database_connection(settings: Settings, hands: Hands) -> None:
    with running_api(settings) as api, ThreadPoolExecutor(100) as pool:
        job_id = submit(api)
        claimed = hands.claim(job_id)
        limits = httpx.Limits(max_connections=None)
        with httpx.Client(base_url=api.base_url, timeout=60, limits=limits) as crowd:
            path = f"/v1/jobs/{job_id}?wait=50"
            polls = [pool.submit(crowd.get, path) for _ in range(100)]
            eventually(lambda: waiting(api) == 100, timeout_s=20)
            eventually(lambda: connections(settings) == 0)

            assert submit(api)  # more than the pool wait, and there is room for others
            hands.finish(claimed)

            assert {poll.result(timeout=30).json()["state"] for poll in polls} == {"completed"}


def test_a_preferred_wait_is_told_to_be_applied(api: httpx.Client, hands: Hands) -> None:
    job_id = submit(api)
    hands.finish(hands.claim(job_id))

    answer = api.get(f"/v1/jobs/{job_id}", headers={"Prefer": "respond-async, wait=20"})

    assert answer.headers["preference-applied"] == "wait=20"
    assert answer.json()["state"] == "completed"


def test_a_wait_is_no_longer_than_the_server_allows(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> None:
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        api={"port": 0, "max_wait_s": 0.2},
    )
    with running_api(settings) as api:
        path = f"/v1/jobs/{submit(api)}"

        assert api.get(path, params={"wait": 1_000_000}).json()["state"] == "queued"
        preferred = api.get(path, headers={"Prefer": "wait=1000000"})
        assert preferred.headers["preference-applied"] == "wait=0.2"


@pytest.mark.parametrize("wait", ["-1", "soon", "nan", "inf"])
def test_a_wait_that_is_no_time_is_refused(refusing: httpx.Client, wait: str) -> None:
    answer = refusing.get(f"/v1/jobs/{uuid4()}", params={"wait": wait})

    assert (answer.status_code, answer.json()["param"]) == (400, "wait")


def test_a_submission_may_wait_for_its_result(api: httpx.Client, hands: Hands) -> None:
    with ThreadPoolExecutor() as pool:
        submitting = pool.submit(api.post, "/v1/jobs?wait=30", json={"body": BODY})
        eventually(lambda: waiting(api) == 1)
        [listed] = api.get("/v1/jobs").json()["data"]

        hands.finish(hands.claim(listed["id"]))

        answer = submitting.result(timeout=20)
    assert (answer.status_code, answer.json()["state"]) == (200, "completed")
    assert answer.headers["location"] == f"/v1/jobs/{listed['id']}"


def test_a_result_whose_notice_was_lost_is_seen_when_the_listener_is_back(
    api: httpx.Client, settings: Settings, hands: Hands
) -> None:
    """The listener's connection is cut, the job ends before it is back."""
    cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = %s"
    job_id = submit(api)
    claimed = hands.claim(job_id)
    with ThreadPoolExecutor() as pool:
        following = pool.submit(api.get, f"/v1/jobs/{job_id}", params={"wait": 30})
        eventually(lambda: waiting(api) == 1)

        assert rows(settings, cut, "gristmill-listen")
        hands.finish(claimed)

        assert following.result(timeout=20).json()["state"] == "completed"


def test_shutting_down_answers_long_polls_at_once(settings: Settings, hands: Hands) -> None:
    with ThreadPoolExecutor() as pool:
        with running_api(settings) as api:
            job_id = submit(api)
            url = api.base_url.join(f"/v1/jobs/{job_id}?wait=50")
            following = pool.submit(httpx.get, url, timeout=60)
            eventually(lambda: waiting(api) == 1)

        answer = following.result(timeout=20)
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")


# ── list ────────────────────────────────────────────────────────────────────────────────────────


def test_jobs_are_listed_newest_first_page_by_page(api: httpx.Client) -> None:
    ids = [submit(api, f"prompt {n}") for n in range(5)]
    seen: list[str] = []
    after: dict[str, str] = {}

    while True:
        page = api.get("/v1/jobs", params={"limit": 2} | after).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}

    assert seen == ids[::-1]


def test_a_list_holds_the_jobs_asked_for_without_their_answers(
    api: httpx.Client, hands: Hands
) -> None:
    done, queued = submit(api), submit(api)
    embedded = api.post("/v1/jobs", json={"body": {"input": "wheel"}}).json()["id"]
    hands.finish(hands.claim(done))

    def listed(**query: str) -> list[str]:
        return [job["id"] for job in api.get("/v1/jobs", params=query).json()["data"]]

    assert listed(state="completed") == [done]
    assert listed(state="queued", model="stub") == [queued]
    assert listed(model="stub-embed") == [embedded]
    assert listed(model="unknown") == []
    [job] = api.get("/v1/jobs", params={"state": "completed"}).json()["data"]
    assert "response" not in job and job["usage"]["output_tokens"] == 7


@pytest.mark.parametrize(
    ("query", "status", "param"),
    [
        ({"state": "sleeping"}, 400, "state"),
        ({"limit": "0"}, 400, "limit"),
        ({"limit": "101"}, 400, "limit"),
        ({"model": "\0"}, 400, "model"),
        ({"after": str(uuid4())}, 404, None),
    ],
)
def test_a_wrong_filter_is_refused(
    refusing: httpx.Client, query: dict[str, str], status: int, param: str | None
) -> None:
    answer = refusing.get("/v1/jobs", params=query)

    assert (answer.status_code, answer.json().get("param")) == (status, param)


# ── cancel ──────────────────────────────────────────────────────────────────────────────────────


def test_a_queued_job_is_cancelled_at_once_and_may_be_cancelled_again(api: httpx.Client) -> None:
    path = f"/v1/jobs/{submit(api)}"

    for _ in range(2):
        answer = api.post(f"{path}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (200, "cancelled")

    job = api.get(path).json()
    assert job["error"]["code"] == "cancelled" and job["finished_at"]


def test_cancelling_wakes_who_waits_for_the_job(api: httpx.Client) -> None:
    path = f"/v1/jobs/{submit(api)}"
    with ThreadPoolExecutor() as pool:
        following = pool.submit(api.get, path, params={"wait": 30})
        eventually(lambda: waiting(api) == 1)

        api.post(f"{path}/cancel")

        assert following.result(timeout=20).json()["state"] == "cancelled"


def test_a_running_job_is_asked_to_stop(
    api: httpx.Client, settings: Settings, hands: Hands
) -> None:
    job_id = submit(api)
    claimed = hands.claim(job_id)

    answer = api.post(f"/v1/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["state"]) == (202, "running")
    assert answer.json()["cancel_requested_at"] and answer.headers["retry-after"]
    hands.finish(claimed, state=JobState.CANCELLED, response={"choices": [{"text": "par"}]})
    job = api.get(f"/v1/jobs/{job_id}").json()
    assert (job["state"], job["response"]["choices"][0]["text"]) == ("cancelled", "par")


def test_a_job_that_has_ended_cannot_be_cancelled(api: httpx.Client, hands: Hands) -> None:
    job_id = submit(api)
    hands.finish(hands.claim(job_id))

    answer = api.post(f"/v1/jobs/{job_id}/cancel")

    assert (answer.status_code, answer.json()["code"]) == (409, "job_state_conflict")
    assert answer.headers["x-should-retry"] == "false"
