"""Many jobs with one call: their status, and cancelling them by ids and by filter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import Connection, text

from app.api.jobs import many
from app.config.settings import Settings
from app.jobs import JobState
from app.local.servers import EmbeddedRedis
from app.store.database import Database
from tests.apis import Hands, running_api
from tests.conftest import STUB_MODELS
from tests.waiting import eventually

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def settings(
    empty_databases: Callable[[str], str], migrated_template: str, redis_server: EmbeddedRedis
) -> Settings:
    """One database for all: each test looks at its own jobs alone."""
    return Settings(
        database={"url": empty_databases(migrated_template), "lock_timeout_ms": 1_000},
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


def submit(api: httpx.Client, number: int = 1, **fields: Any) -> list[str]:
    """Ids of new jobs."""
    jobs = [{"body": {"prompt": f"A grist mill {n}"}} | fields for n in range(number)]
    answer = api.post("/v1/jobs/bulk", json={"jobs": jobs})
    assert answer.status_code == 202 and answer.headers["retry-after"], answer.text
    return [item["id"] for item in answer.json()["items"]]


def ask(api: httpx.Client, ids: list[str], wait: int = 0, **fields: Any) -> httpx.Response:
    query = {"wait": wait} if wait else {}
    return api.post("/v1/jobs/status", params=query, json={"ids": ids} | fields)


def held(api: httpx.Client) -> int:
    return int(api.get("/v1/limits").json()["long_polls"])


# ── status ──────────────────────────────────────────────────────────────────────────────────────


def test_many_jobs_are_told_of_in_the_order_of_their_ids(api: httpx.Client, hands: Hands) -> None:
    done, queued = submit(api, 2)
    hands.finish(hands.claim(done))

    answer = ask(api, [queued, "no-such-task", done, queued])

    told = answer.json()
    assert (answer.status_code, told["object"], told["is_final"]) == (200, "bulk_status", False)
    assert int(answer.headers["retry-after"]) >= 1
    first, unknown, second, again = told["items"]
    assert (first["id"], first["state"], first["status"]) == (queued, "queued", 200)
    assert (second["id"], second["job"]["state"]) == (done, "completed")
    assert second["job"]["usage"]["output_tokens"] == 7 and "response" not in second["job"]
    assert again == first
    assert (unknown["status"], unknown["error"]["code"]) == (404, "job_not_found")
    assert unknown["error"]["instance"] == "/v1/jobs/status#/ids/1" and "state" not in unknown


def test_the_view_says_how_much_is_told(api: httpx.Client, hands: Hands) -> None:
    [done] = submit(api)
    hands.finish(hands.claim(done))

    [bare] = ask(api, [done], view="state").json()["items"]
    [whole] = ask(api, [done], view="full").json()["items"]

    assert bare == {"status": 200, "id": done, "state": "completed"}
    assert whole["job"] == api.get(f"/v1/jobs/{done}").json()
    assert "retry-after" not in ask(api, [done]).headers


def test_the_view_of_what_has_ended_has_the_answers_of_that_alone(
    api: httpx.Client, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MAX_IDS_FULL", 2)
    first, queued, second, third = submit(api, 4)
    for job_id in (first, second, third):
        hands.finish(hands.claim(job_id))

    told = ask(api, [first, queued, second, "unknown", third], view="ended").json()

    whole = [api.get(f"/v1/jobs/{each}").json() for each in (first, second)]
    shown, waits, another, unknown, beyond = told["items"]
    assert [shown["job"], another["job"]] == whole
    assert waits == {"status": 200, "id": queued, "state": "queued"}
    assert beyond == {"status": 200, "id": third, "state": "completed"}
    assert unknown["status"] == 404 and told["is_final"] is False


def test_answers_without_end_are_left_to_the_next_call(
    api: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "MAX_ANSWERS_BYTES", 1)
    monkeypatch.setattr(many, "WHOLE_PAGE", 2)
    ids = submit(api, 5)

    items = ask(api, ids, view="full").json()["items"]

    assert ["job" in item for item in items] == [True, True, False, False, False]
    assert {item["state"] for item in items} == {"queued"}


@pytest.mark.parametrize(("wait_for", "ends"), [("any", 1), ("all", 3)])
def test_a_status_is_held_until_any_or_all_of_the_jobs_are_final(
    api: httpx.Client, hands: Hands, wait_for: str, ends: int
) -> None:
    ids = submit(api, 3)
    with ThreadPoolExecutor() as pool:
        following = pool.submit(ask, api, [*ids, NOBODY], 40, wait_for=wait_for, view="state")
        eventually(lambda: held(api) == 1)

        for job_id in ids[:ends]:
            assert not following.done()
            hands.finish(hands.claim(job_id))

        told = following.result(timeout=20).json()
    states = [item.get("state") for item in told["items"]]
    assert states == ["completed"] * ends + ["queued"] * (3 - ends) + [None]
    assert told["is_final"] is (ends == 3)
    assert held(api) == 0


def test_a_status_that_gathers_is_held_until_all_are_final(api: httpx.Client, hands: Hands) -> None:
    ids = submit(api, 3)
    with ThreadPoolExecutor() as pool:
        asked = {"wait_for": "any", "gather_s": 10, "view": "ended"}
        following = pool.submit(ask, api, ids, 40, **asked)
        eventually(lambda: held(api) == 1)

        for job_id in ids:
            assert not following.done()
            hands.finish(hands.claim(job_id))

        told = following.result(timeout=20).json()
    assert told["is_final"] is True
    assert all("job" in item for item in told["items"])


def test_a_row_that_cannot_be_read_is_told_in_its_place(
    api: httpx.Client, database: Database
) -> None:
    good, odd = submit(api, 2)
    with database.begin() as connection:
        for name in ("open_jobs_state_check", "open_jobs_holder_check"):
            connection.execute(text(f"ALTER TABLE open_jobs DROP CONSTRAINT {name}"))
        odd_state = text("UPDATE open_jobs SET state = 'dreaming' WHERE id = :id")
        connection.execute(odd_state, {"id": UUID(odd)})

    for path in ("status", "cancel"):
        answer = api.post(f"/v1/jobs/{path}", json={"ids": [good, odd]})

        first, second = answer.json()["items"]
        assert first["status"] == 200
        assert (second["status"], second["error"]["code"]) == (500, "job_unreadable")
        assert "dreaming" not in answer.text


# ── cancel ──────────────────────────────────────────────────────────────────────────────────────


def cancel(api: httpx.Client, **asked: Any) -> dict[str, Any]:
    answer = api.post("/v1/jobs/cancel", json=asked)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_many_jobs_are_cancelled_by_their_ids_and_may_be_again(
    api: httpx.Client, hands: Hands
) -> None:
    queued, running, done = submit(api, 3)
    hands.claim(running)
    hands.finish(hands.claim(done))

    for _ in range(2):
        told = cancel(api, ids=[queued, running, done, NOBODY])

        assert (told["cancelled"], told["stopping"], told["refused"]) == (1, 1, 2)
        assert [item["status"] for item in told["items"]] == [200, 202, 409, 404]
        assert [item.get("state") for item in told["items"]] == [
            "cancelled",
            "running",
            "completed",
            None,
        ]
        assert told["items"][2]["error"]["code"] == "job_state_conflict"
    job = api.get(f"/v1/jobs/{queued}").json()
    assert (job["state"], job["error"]["code"]) == ("cancelled", "cancelled")
    assert api.get(f"/v1/jobs/{running}").json()["cancel_requested_at"]


def test_jobs_are_cancelled_by_filter_page_by_page_until_none_is_left(
    api: httpx.Client, hands: Hands
) -> None:
    wanted = submit(api, 5, metadata={"customer": "42", "file": "a"})
    others = submit(api, 2, metadata={"customer": "43"})
    hands.claim(wanted[0])
    hands.finish(hands.claim(wanted[1]))
    filter = {"metadata": {"customer": "42"}}

    pages = []
    while not pages or pages[-1]["has_more"]:
        pages.append(cancel(api, filter=filter, limit=2))

    assert [len(page["items"]) for page in pages] == [2, 2]
    assert sum(page["cancelled"] for page in pages) == 3
    assert sum(page["stopping"] for page in pages) == 1
    assert cancel(api, filter=filter)["items"] == []  # what stops is not asked again
    states = {item["state"] for item in ask(api, others, view="state").json()["items"]}
    assert states == {"queued"}


def test_a_filter_is_of_state_model_and_time_too(api: httpx.Client, hands: Hands) -> None:
    [before] = submit(api)
    [running, queued] = submit(api, 2)
    hands.claim(running)
    [embedding] = submit(api, body={"input": "wheel"})
    since = api.get(f"/v1/jobs/{running}").json()["created_at"]

    told = cancel(
        api,
        filter={
            "state": "queued",
            "model": "stub",
            "since": since,
            "until": "2999-01-01T00:00:00Z",
        },
    )

    assert [item["id"] for item in told["items"]] == [queued]
    states = ask(api, [before, running, embedding], view="state").json()["items"]
    assert [item["state"] for item in states] == ["queued", "running", "queued"]


def hold(connection: Connection, job_id: str) -> None:
    connection.execute(
        text("SELECT id FROM open_jobs WHERE id = :id FOR UPDATE"), {"id": UUID(job_id)}
    )


def test_a_row_that_somebody_holds_keeps_no_other_waiting(
    api: httpx.Client, database: Database
) -> None:
    busy, *free = submit(api, 3)

    def are_cancelled() -> bool:
        items = ask(api, free, view="state").json()["items"]
        return {item["state"] for item in items} == {"cancelled"}

    with ThreadPoolExecutor() as pool:
        with database.begin() as connection:
            hold(connection, busy)
            cancelling = pool.submit(cancel, api, ids=[busy, *free])
            eventually(are_cancelled)
        told = cancelling.result(timeout=20)
    assert told["cancelled"] + told["refused"] == 3
    assert [item["status"] for item in told["items"][1:]] == [200, 200]


def test_a_row_that_is_held_for_long_is_refused_alone(
    api: httpx.Client, database: Database
) -> None:
    busy, free, other = submit(api, 3)

    with database.begin() as connection:
        hold(connection, busy)
        hold(connection, other)
        told = cancel(api, ids=[busy, free, other])

    assert [item["status"] for item in told["items"]] == [503, 200, 503]
    assert told["items"][0]["error"]["code"] == "unavailable"


# ── limits ──────────────────────────────────────────────────────────────────────────────────────


def test_the_limits_are_told_and_how_full_the_queue_is(
    api: httpx.Client, settings: Settings
) -> None:
    waiting = submit(api, 3)

    told = api.get("/v1/limits").json()
    stub = next(each for each in api.get("/v1/models").json()["data"] if each["id"] == "stub")

    own = ("max_body_bytes", "max_bulk_bytes", "max_bulk_items", "max_wait_s", "max_long_polls")
    assert {name: told[name] for name in own} == {name: getattr(settings.api, name) for name in own}
    assert told["queue"]["max_jobs"] == settings.api.max_queued_jobs
    assert told["queue"]["jobs"] >= len(waiting) and told["queue"]["tokens"] > 0
    assert stub["max_batch_size"] == settings.models["stub"].max_batch_size
    over = {"ids": [NOBODY] * (told["max_ids"] + 1)}
    assert api.post("/v1/jobs/status", json=over).status_code == 400
    assert api.get("/v1/jobs", params={"limit": told["max_page"] + 1}).status_code == 400


# ── what is refused ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("status", {}, "ids"),
        ("status", [], "body"),
        ("status", {"ids": []}, "ids"),
        ("status", {"ids": [NOBODY] * 1_001}, "ids"),
        ("status", {"ids": [NOBODY] * 101, "view": "full"}, "ids"),
        ("status", {"ids": [7]}, "ids.0"),
        ("status", {"ids": NOBODY}, "ids"),
        ("status", {"ids": [NOBODY], "view": "most"}, "view"),
        ("status", {"ids": [NOBODY], "until": "any"}, "until"),
        ("cancel", {}, "ids"),
        ("cancel", {"ids": [NOBODY], "filter": {"state": "queued"}}, "ids"),
        ("cancel", {"filter": {}}, "filter"),
        ("cancel", {"filter": {"metadata": {}}}, "filter"),
        ("cancel", {"filter": {"state": "completed"}}, "filter.state"),
        ("cancel", {"filter": {"state": "queued", "older": 1}}, "filter.older"),
        ("cancel", {"filter": {"since": "yesterday"}}, "filter.since"),
        ("cancel", {"filter": {"metadata": {"a": 1}}}, "metadata"),
        ("cancel", {"filter": {"state": "queued"}, "limit": 1_001}, "limit"),
    ],
)
def test_a_wrong_body_is_refused_by_the_name_of_its_field(
    api: httpx.Client, path: str, body: Any, param: str
) -> None:
    answer = api.post(f"/v1/jobs/{path}", json=body)

    assert (answer.status_code, answer.json()["param"]) == (400, param), answer.text


def test_a_text_of_any_kind_may_be_an_id(api: httpx.Client) -> None:
    ids = ["", "0", "\0", "☕", "a" * 300, "../..", str(uuid4())]

    told = ask(api, ids).json()
    cancelled = cancel(api, ids=ids)

    assert [item["status"] for item in told["items"]] == [404] * len(ids)
    assert told["is_final"] is True
    assert cancelled["refused"] == len(ids)


def test_a_thousand_ids_are_one_call(api: httpx.Client) -> None:
    ids = submit(api, 1_000)

    told = ask(api, ids)
    cancelled = cancel(api, ids=ids)

    assert [item["id"] for item in told.json()["items"]] == ids
    assert all(item["job"]["state"] == JobState.QUEUED for item in told.json()["items"])
    assert cancelled["cancelled"] == 1_000
