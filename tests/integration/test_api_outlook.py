"""Quotes, places and promises over a real socket, with hands for a worker."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import httpx
import pytest

from app.config.settings import Settings
from app.store import loads, workers
from app.store.database import Database
from tests.apis import Hands, running_api
from tests.waiting import eventually
from tests.workers import rows

BODY = {"prompt": "A grist mill is", "max_tokens": 9}
PRICES = {
    "cpu": {
        "per_device_hour": "0.036",
        "per_million_output_tokens": "1000",
        "currency": "USD",
    }
}


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


@pytest.fixture
def priced(settings: Settings) -> Iterator[httpx.Client]:
    told = settings.model_dump() | {"prices": PRICES}
    with running_api(Settings.model_validate(told)) as client:
        yield client


@pytest.fixture
def hands(database_url: str) -> Iterator[Hands]:
    hands = Hands(database_url)
    yield hands
    hands.close()


def submit(api: httpx.Client, **fields: Any) -> str:
    answer = api.post("/v1/jobs", json={"body": BODY} | fields)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def quote(api: httpx.Client, **fields: Any) -> dict[str, Any]:
    answer = api.post("/v1/jobs?dry_run=true", json={"body": BODY} | fields)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def run_some(api: httpx.Client, hands: Hands, number: int = 3) -> None:
    """Jobs that end, so that there is something to estimate from."""
    for _ in range(number):
        hands.finish(hands.claim(submit(api)))
    assert eventually(lambda: quote(api)["finish"], timeout_s=20)


def test_a_dry_run_checks_counts_and_tells_and_leaves_nothing_behind(
    priced: httpx.Client, hands: Hands, settings: Settings
) -> None:
    run_some(priced, hands)
    before = rows(settings, "SELECT count(*) AS num FROM job_keys")

    told = quote(priced, priority=2, deadline="2999-01-01T00:00:00Z")

    assert (told["object"], told["model"], told["priority"]) == ("quote", "stub", 2)
    assert told["tokens"] == {"input_tokens": len(BODY["prompt"]), "max_output_tokens": 9}
    assert (told["position"], told["reason"], told["deadline_outlook"]) == (1, None, "met")
    assert told["start"]["p50"] <= told["start"]["p90"] <= told["finish"]["p90"]
    assert told["finish"]["p50"] <= told["finish"]["p90"]
    cost = told["cost"]
    assert (cost["currency"], cost["price_id"]) == ("USD", "cpu")
    assert 0 < float(cost["amount"]["low"]) <= float(cost["amount"]["high"])
    assert float(cost["charge"]["low"]) <= float(cost["charge"]["high"]) <= 0.009
    assert rows(settings, "SELECT count(*) AS num FROM job_keys") == before


def test_a_dry_run_of_many_tells_of_each_as_if_those_before_it_were_there(
    api: httpx.Client, hands: Hands
) -> None:
    run_some(api, hands)
    jobs = [{"body": BODY}, {"body": {"prompt": ""}}, {"body": BODY}]

    told = api.post("/v1/jobs/bulk?dry_run=true", json={"jobs": jobs}).json()

    first, refused, last = told["items"]
    assert (told["accepted"], told["refused"]) == (2, 1)
    assert [item["status"] for item in told["items"]] == [202, 400, 202]
    assert refused["error"]["param"] == "body.prompt"
    assert [first["quote"]["position"], last["quote"]["position"]] == [1, 2]
    assert told["finish"]["p90"] == last["quote"]["finish"]["p90"]


@pytest.mark.parametrize(
    ("query", "job", "status", "param"),
    [
        ("dry_run=maybe", {"body": BODY}, 400, "dry_run"),
        ("dry_run=true&dry_run=true", {"body": BODY}, 400, "dry_run"),
        ("dry_run=", {"body": BODY}, 400, "dry_run"),
        ("dry_run=true", {"body": {"prompt": ""}}, 400, "body.prompt"),
        ("dry_run=true", {"body": BODY | {"model": "none"}}, 404, "body.model"),
        ("dry_run=true", {"body": BODY, "deadline": "2001-01-01T00:00:00Z"}, 422, "deadline"),
    ],
)
def test_what_a_submission_is_refused_for_a_dry_run_is_too(
    api: httpx.Client, query: str, job: dict[str, Any], status: int, param: str
) -> None:
    answer = api.post(f"/v1/jobs?{query}", json=job)

    assert (answer.status_code, answer.json()["param"]) == (status, param)
    assert answer.headers["content-type"] == "application/problem+json"


def test_a_dry_run_knows_the_job_that_has_the_key(api: httpx.Client) -> None:
    job_id = submit(api, idempotency_key="k")

    assert quote(api, idempotency_key="k")["known_as"] == job_id
    other = {"body": BODY | {"max_tokens": 8}, "idempotency_key": "k"}
    answer = api.post("/v1/jobs?dry_run=true", json=other)
    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")


def test_a_deadline_that_cannot_be_met_is_said_to_be_missed(
    api: httpx.Client, hands: Hands
) -> None:
    started = {"started_at": datetime.now(UTC) - timedelta(hours=2)}  # two hours in the engine
    hands.finish(hands.claim(submit(api)), **started)
    soon = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()

    def outlook() -> bool:
        return quote(api, deadline=soon)["deadline_outlook"] == "missed"

    assert eventually(outlook, timeout_s=20)


def test_a_job_that_waits_has_a_place_and_a_time_until_it_runs(
    api: httpx.Client, hands: Hands
) -> None:
    run_some(api, hands)
    patient, first, second = submit(api, priority=9), submit(api), submit(api)
    later = submit(api, not_before="9999-12-30T00:00:00Z")  # and nothing comes after that

    def places() -> list[int | None]:
        jobs = [api.get(f"/v1/jobs/{id}").json() for id in (first, second, patient, later)]
        return [job["position"] for job in jobs]

    assert eventually(lambda: places() == [1, 2, 3, None], timeout_s=20)
    listed = {job["id"]: job for job in api.get("/v1/jobs?state=queued").json()["data"]}
    assert listed[second]["position"] == 2
    assert listed[second]["eta"]["p50"] <= listed[second]["eta"]["p90"]
    assert listed[later]["eta"]["p50"] == listed[later]["eta"]["p90"] == "9999-12-30T00:00:00Z"

    hands.claim(first)
    running = api.get(f"/v1/jobs/{first}").json()
    assert (running["state"], running["position"], running["eta"]) == ("running", None, None)
    assert eventually(lambda: places()[1:3] == [1, 2], timeout_s=20)


def test_who_knows_nothing_says_why(api: httpx.Client, database_url: str) -> None:
    def reason() -> Any:
        return quote(api)["reason"]

    assert eventually(lambda: reason() == "no_worker", timeout_s=20)
    job = api.get(f"/v1/jobs/{submit(api)}").json()
    assert job["eta"] == {"p50": None, "p90": None, "reason": "no_worker", "load_s": None}
    assert job["position"] == 1

    hands = Hands(database_url)
    assert eventually(lambda: reason() == "no_history", timeout_s=20)
    hands.close()


def test_what_was_promised_is_kept_with_the_job_and_measured(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    run_some(api, hands)
    job_id = submit(api)
    hands.finish(hands.claim(job_id))

    [row] = rows(settings, "SELECT * FROM results WHERE quoted_ms IS NOT NULL")
    assert str(row["job_id"]) == job_id
    assert row["quoted_ms"] > 0
    assert row["quoted_p90_ms"] > 0

    def told() -> dict[str, float]:
        text = api.get("/metrics").text
        return {
            n: float(v) for n, v in re.findall(r"^(gristmill_eta_\w+)\{.*\} (\S+)$", text, re.M)
        }

    assert eventually(lambda: told().get("gristmill_eta_jobs") == 1, timeout_s=20)
    assert told()["gristmill_eta_kept_share"] in (0.0, 1.0)
    assert "gristmill_eta_start_seconds" in told()


def test_a_worker_that_loads_is_waited_for_as_long_as_others_took(
    api: httpx.Client, hands: Hands, settings: Settings
) -> None:
    run_some(api, hands)
    database = Database(settings.database.url, pool_size=1)
    with database.begin() as connection:
        workers.stop_worker(connection, hands.worker_id)

    def told() -> tuple[str | None, float | None]:
        seen = quote(api)
        return seen["reason"], seen["load_s"]

    assert eventually(lambda: told() == ("no_worker", None), timeout_s=20)
    with database.begin() as connection:
        loads.begin(connection, uuid4(), ["stub"])
    assert eventually(lambda: told() == ("loading", None), timeout_s=20)
    with database.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO loads (worker_id, models, began_at, ended_at) VALUES (gen_random_uuid(), "
            "'{stub}', now() - interval '2 hours', now() - interval '1 hour')"
        )
    assert eventually(lambda: told() == (None, 3600.0), timeout_s=20)
    later = datetime.now(UTC) + timedelta(minutes=30)
    assert datetime.fromisoformat(quote(api)["start"]["p50"]) > later
    database.close()
