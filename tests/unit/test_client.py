"""The client against scripted answers; both clients run every flow."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from app import client as client_module
from app.client import AsyncClient, Client, JobFailed
from app.errors import (
    ContextLengthExceeded,
    GristmillError,
    IdempotencyConflict,
    JobStateConflict,
    Unavailable,
)

BODY = {"prompt": "A grist mill is"}
Call = Callable[..., Any]
Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Api:
    """Answers each request with the next of the scripted answers, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.pauses: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            return answer(request)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    def body(self, index: int = 0) -> Any:
        return json.loads(self.requests[index].content)


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(api, "submit", …)` calls a method of a client that talks to `api`; pauses are noted
    and not made."""
    apis: list[Api] = []

    def note(seconds: float) -> None:
        apis[-1].pauses.append(seconds)

    async def note_too(seconds: float) -> None:
        note(seconds)

    clock = SimpleNamespace(sleep=note, monotonic=time.monotonic)
    monkeypatch.setattr(client_module, "time", clock)
    monkeypatch.setattr(client_module, "asyncio", SimpleNamespace(sleep=note_too))

    def make(api: Api, method: str, *args: Any, **kwargs: Any) -> Any:
        apis.append(api)
        transport = httpx.MockTransport(api)
        if request.param == "sync":
            with Client("http://test/", transport=transport) as client:
                return getattr(client, method)(*args, **kwargs)

        async def go() -> Any:
            async with AsyncClient("http://test/", transport=transport) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(go())

    return make


def job(state: str = "completed", **given: Any) -> httpx.Response:
    told = {"id": "j1", "state": state, "response": None, "error": None} | given
    return httpx.Response(200, json=told)


def problem(status: int, code: str, headers: dict[str, str] | None = None) -> httpx.Response:
    told = {"code": code, "detail": f"Because of {code}.", "param": "body.prompt"}
    return httpx.Response(status, json=told, headers=headers)


def test_a_submission_carries_its_options_and_a_key_of_its_own(call: Call) -> None:
    api = Api(job("queued"))

    job_id = call(
        api, "submit", BODY, priority=2, deadline=datetime(2030, 1, 1, tzinfo=UTC), url=None
    )

    assert job_id == "j1"
    sent = api.body()
    assert sent.pop("idempotency_key")
    assert sent == {"body": BODY, "priority": 2, "deadline": "2030-01-01T00:00:00+00:00"}


def test_a_key_that_is_given_is_used(call: Call) -> None:
    api = Api(job("queued"))

    call(api, "submit", BODY, idempotency_key="order-42")

    assert api.body()["idempotency_key"] == "order-42"


@pytest.mark.parametrize(
    "trouble",
    [
        httpx.ConnectError("refused"),
        httpx.ReadError("reset"),
        httpx.ReadTimeout("late"),
        problem(429, "queue_full"),
        problem(503, "unavailable"),
        httpx.Response(502, text="<html>bad gateway</html>"),
    ],
    ids=lambda trouble: getattr(trouble, "status_code", type(trouble).__name__),
)
def test_what_may_pass_is_tried_again_as_the_same_job(call: Call, trouble: Answer) -> None:
    api = Api(trouble, trouble, job("queued"))

    assert call(api, "submit", BODY) == "j1"

    keys = {api.body(index)["idempotency_key"] for index in range(3)}
    assert len(keys) == 1
    assert len(api.pauses) == 2 and api.pauses[0] < api.pauses[1]


def test_the_server_says_how_long_to_pause(call: Call) -> None:
    api = Api(problem(503, "unavailable", {"Retry-After": "7"}), job("queued"))

    call(api, "submit", BODY)

    assert api.pauses == [7.0]


def test_tries_are_bounded_and_the_last_error_tells_why(call: Call) -> None:
    for trouble in (problem(503, "unavailable"), httpx.ConnectError("refused")):
        api = Api(trouble)

        with pytest.raises(Unavailable):
            call(api, "submit", BODY)

        assert len(api.requests) == 6


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (problem(422, "context_length_exceeded"), ContextLengthExceeded),
        (problem(422, "idempotency_conflict"), IdempotencyConflict),
        (problem(409, "job_state_conflict", {"x-should-retry": "false"}), JobStateConflict),
        (problem(418, "brand_new_code"), GristmillError),
        (httpx.Response(404, text="<html>not ours</html>"), GristmillError),
        (httpx.Response(404, json=["not ours"]), GristmillError),
    ],
)
def test_a_refusal_is_raised_at_once_as_its_own_error(
    call: Call, answer: httpx.Response, error: type[GristmillError]
) -> None:
    api = Api(answer)

    with pytest.raises(GristmillError) as raised:
        call(api, "submit", BODY)

    assert type(raised.value) is error
    assert len(api.requests) == 1


def test_the_wrong_field_comes_with_the_error(call: Call) -> None:
    with pytest.raises(ContextLengthExceeded) as raised:
        call(Api(problem(422, "context_length_exceeded")), "submit", BODY)

    assert raised.value.param == "body.prompt"
    assert str(raised.value) == "Because of context_length_exceeded."


def test_many_submissions_are_answered_each_in_its_place(call: Call) -> None:
    refused = {"code": "model_not_found", "detail": "No such model.", "status": 404}
    items = [{"status": 202, "id": "j1"}, {"status": 404, "error": refused}]
    api = Api(httpx.Response(202, json={"items": items}))

    first, second = call(api, "submit_many", [{"body": BODY}, {"body": BODY, "priority": 1}])

    assert first == "j1"
    assert isinstance(second, GristmillError) and second.code == "model_not_found"
    sent = api.body()["jobs"]
    assert sent[1]["priority"] == 1
    assert sent[0]["idempotency_key"] != sent[1]["idempotency_key"]


def test_very_many_submissions_go_in_pages(call: Call) -> None:
    def bulk(request: httpx.Request) -> httpx.Response:
        jobs = json.loads(request.content)["jobs"]
        return httpx.Response(
            202, json={"items": [{"id": each["body"]["prompt"]} for each in jobs]}
        )

    api = Api(bulk)

    ids = call(api, "submit_many", [{"body": {"prompt": str(n)}} for n in range(2_500)])

    assert ids == [str(n) for n in range(2_500)]
    assert len(api.requests) == 3


def test_a_result_is_the_response_of_a_job_that_completed(call: Call) -> None:
    api = Api(job("running"), job("completed", response={"choices": []}))

    assert call(api, "result", "j1") == {"choices": []}
    assert api.requests[0].url.params["wait"] == "30"


@pytest.mark.parametrize("state", ["failed", "cancelled", "expired"])
def test_a_job_without_a_result_raises_what_became_of_it(call: Call, state: str) -> None:
    api = Api(job(state, error={"code": "engine_crash", "message": "It died."}))

    with pytest.raises(JobFailed, match=f"Job j1 {state}: It died.") as raised:
        call(api, "result", "j1")

    assert raised.value.error_code == "engine_crash"
    assert raised.value.job.state == state


def test_a_wait_that_runs_out_says_so(call: Call) -> None:
    with pytest.raises(TimeoutError, match="still running"):
        call(Api(job("running")), "wait", "j1", timeout_s=0)


def test_cancelling_answers_with_the_job(call: Call) -> None:
    api = Api(job("cancelled"))

    assert call(api, "cancel", "j1").state == "cancelled"
    assert (api.requests[0].method, api.requests[0].url.path) == ("POST", "/v1/jobs/j1/cancel")


def test_the_client_needs_httpx_and_nothing_else() -> None:
    heavy = ["celery", "kombu", "redis", "sqlalchemy", "psycopg", "torch", "pydantic", "fastapi"]
    code = f"""
import sys
for name in {heavy!r}:
    sys.modules[name] = None
import app.client
"""
    subprocess.run([sys.executable, "-c", code], check=True)
