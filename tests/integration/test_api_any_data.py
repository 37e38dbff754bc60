"""Whatever is submitted over HTTP is a job or a clean error; whatever a row holds, others are
served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import hypothesis
import psycopg
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

from app.config.settings import Settings
from tests.any_messages import ANYTHING, TEXTS, TIMES, requests
from tests.apis import running_api
from tests.workers import rows


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


def post(api: httpx.Client, path: str, value: Any) -> httpx.Response:
    """As a client would that writes NaN, and half of a surrogate pair, into its JSON."""
    return api.post(
        path, content=json.dumps(value).encode(), headers={"Content-Type": "application/json"}
    )


SUBMISSIONS = ANYTHING | st.fixed_dictionaries(
    {"body": requests()},
    optional={
        "priority": st.integers(0, 9) | ANYTHING,
        "not_before": TIMES,
        "deadline": TIMES,
        "idempotency_key": TEXTS,
        "metadata": st.none() | st.dictionaries(TEXTS, TEXTS, max_size=2),
        "url": TEXTS,
    },
)


@pytest.mark.timeout(300)
@hypothesis.settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(SUBMISSIONS, min_size=1, max_size=6))
def test_any_body_is_a_job_or_an_error_of_the_callers(
    api: httpx.Client, submissions: list[Any]
) -> None:
    # when anything is submitted, together and one by one
    bulk = post(api, "/v1/jobs/bulk", {"jobs": submissions})
    singles = [post(api, "/v1/jobs", each) for each in submissions]

    # then each is accepted, or the error is the caller's and says why
    statuses = [each["status"] for each in bulk.json().get("items", ())]
    for status in (bulk.status_code, *statuses, *(each.status_code for each in singles)):
        assert status in (200, 202, 400, 404, 413, 422)
    for answer in singles:
        assert answer.json()["id" if answer.is_success else "detail"]

    # and what was accepted can be followed and listed
    ids = [each.json()["id"] for each in singles if each.is_success]
    assert all(api.get(f"/v1/jobs/{id_}").status_code == 200 for id_ in ids)
    assert api.get("/v1/jobs").status_code == 200


def test_a_row_that_cannot_be_read_is_an_error_of_its_own_and_others_are_served(
    api: httpx.Client, settings: Settings
) -> None:
    # given rows that somebody wrote by hand, past the constraints, among good ones
    ids = [post(api, "/v1/jobs", {"body": {"prompt": "flour"}}).json()["id"] for _ in range(5)]
    odd = {
        ids[0]: "deadline = 'infinity'",
        ids[1]: "state = 'thinking'",
        ids[2]: """metadata = '{"mill": 7}'""",
        ids[3]: f"metadata = '{{\"mill\": {'1' * 5_000}}}'",
    }
    with psycopg.connect(settings.database.url, autocommit=True) as connection:
        for row in rows(
            settings,
            "SELECT conname FROM pg_constraint"
            " WHERE conrelid = 'open_jobs'::regclass AND contype = 'c'",
        ):
            connection.execute(f"ALTER TABLE open_jobs DROP CONSTRAINT {row['conname']}")
        for id_, assignment in odd.items():
            connection.execute(f"UPDATE open_jobs SET {assignment} WHERE id = '{id_}'")

    # when all of them are polled at once, long and short, and listed
    with ThreadPoolExecutor(20) as pool:
        polls = list(
            pool.map(lambda id_: (id_, api.get(f"/v1/jobs/{id_}?wait=1")), [*ids, *ids, *ids])
        )
    page = api.get("/v1/jobs?limit=2")

    # then those that can be told are told, and the others say why not
    for id_, answer in polls:
        if id_ in (ids[0], ids[4]):
            assert answer.status_code == 200
        else:
            assert answer.status_code == 500
            assert answer.json()["code"] == "job_unreadable"
    assert polls[0][1].json()["deadline"] == "9999-12-30T00:00:00Z"

    # and so are their timelines
    for id_ in ids:
        told = api.get(f"/v1/jobs/{id_}/timeline")
        readable = id_ in (ids[0], ids[2], ids[4])  # it tells no metadata
        assert (told.status_code, told.json().get("code")) == (
            (200, None) if readable else (500, "job_unreadable")
        )

    # and the pages of the list go on past them
    listed: list[str] = []
    while True:
        assert page.status_code == 200
        listed += [each["id"] for each in page.json()["data"]]
        if not page.json()["has_more"]:
            break
        page = api.get(f"/v1/jobs?limit=2&after={page.json()['last_id']}")
    assert set(listed) == {ids[0], ids[4]}
