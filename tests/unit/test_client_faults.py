"""A client that meets any faults, on the way to the API and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gristmill_client import Client, GristmillError, flows, sync
from gristmill_client.pages import PageSize
from tests.fake_api import FakeApi


class Faulty(httpx.BaseTransport):
    """Does to each request what comes next in a list; in the end all goes well."""

    def __init__(self, api: FakeApi, faults: list[str]) -> None:
        self._api = api
        self._faults = faults

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        fault = self._faults.pop() if self._faults else "none"
        if fault == "lost":
            raise httpx.ConnectError("refused")
        if fault.isdecimal():
            return httpx.Response(int(fault), text="<html>not ours</html>")
        answer = self._api(request)
        if fault == "unanswered":
            raise httpx.ReadError("reset")
        if fault == "cut":
            return httpx.Response(202, json={"items": answer.json()["items"][1:]})
        return answer


FAULTS = [
    "none",
    "lost",
    "unanswered",
    "cut",
    "400",
    "401",
    "413",
    "422",
    "429",
    "500",
    "502",
    "503",
]


@given(
    faults=st.lists(st.sampled_from(FAULTS), max_size=30),
    sizes=st.lists(st.integers(0, 300), max_size=30),
    patience_s=st.sampled_from([0, 5, 100]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_job_has_one_outcome_and_none_is_doubled_whatever_happens(
    monkeypatch: pytest.MonkeyPatch, faults: list[str], sizes: list[int], patience_s: float
) -> None:
    monkeypatch.setattr(sync.time, "sleep", lambda _: None)
    monkeypatch.setattr(flows, "PageSize", lambda: PageSize(jobs=5, bytes=1_000))
    api = FakeApi()
    jobs = [
        {"body": {"prompt": f"{n} {'x' * size}"}, "idempotency_key": str(n)}
        for n, size in enumerate(sizes)
    ]
    with Client("http://test", transport=Faulty(api, faults), patience_s=patience_s) as client:
        # when all is submitted, and what was refused once more when all is well again
        outcomes = client.submit_many(jobs)
        faults.clear()
        again = client.submit_many(jobs)

    # then each job has its outcome in its place, and is there once
    assert len(outcomes) == len(jobs)
    for job, first, second in zip(jobs, outcomes, again, strict=True):
        assert isinstance(second, str) and api.jobs[second]["body"] == job["body"]
        assert first == second or not isinstance(first, str)
    assert len(api.submitted) == len(jobs)


CALLS: list[Callable[[Client], object]] = [
    lambda client: client.submit({}),
    lambda client: client.submit_many([{"body": {}}]),
    lambda client: client.quote_many([{"body": {}}]),
    lambda client: client.job("j"),
    lambda client: client.jobs_status(["j"]),
    lambda client: client.wait("j", timeout_s=0),
    lambda client: client.result("j", timeout_s=0),
    lambda client: client.as_completed(["j"], timeout_s=0),
    lambda client: client.jobs(limit=1_000),
    lambda client: client.replay("j"),
    lambda client: client.cancel_many(["j"]),
    lambda client: client.cancel_chosen(state="queued"),
    lambda client: client.limits(),
    lambda client: client.stream("j"),
]
JOB = {"id": "j", "state": "failed"}
WORDS = st.sampled_from([None, True, 0, "", "j", "queued", "failed", "completed", "tokens", JOB])
NAMES = ["id", "job", "state", "error", "code", "detail", "items", "data", "has_more", "response"]
ODD = st.recursive(
    WORDS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
        | inner.map(lambda value: JOB | {"response": value, "error": value})
    ),
    max_leaves=8,
)


@given(status=st.sampled_from([200, 202, 302, 400, 404, 429, 503]), value=ODD)
def test_whatever_answers_in_place_of_the_api_ends_in_an_error_in_words(
    status: int, value: Any
) -> None:
    answer = httpx.Response(status, json=value, headers=[(b"Retry-After", b"\xb2")])
    transport = httpx.MockTransport(lambda _: answer)
    with Client("http://test", transport=transport, patience_s=0) as client:
        for call in CALLS:
            try:
                told = call(client)
                assert told is not None
                if isinstance(told, Iterable):
                    list(told)
            except (GristmillError, TimeoutError) as error:
                assert str(error)  # noqa: PT017
