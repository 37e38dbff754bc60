"""Every error leaves in one shape, and none leaks."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from http import HTTPStatus

import httpx
import pytest
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from hypothesis import given
from hypothesis import strategies as st
from starlette.exceptions import HTTPException

from app import errors
from app.api import envelopes, problems
from app.api.envelopes import Door, door_of
from app.api.metrics import Metrics
from app.api.wire import raw_bodies
from app.api.wire.middleware import MAX_FIELDS, RequestScope
from app.api.wire.room import Room

SECRET = "the miller's secret"


def subclasses(kind: type[errors.GristmillError]) -> Iterator[type[errors.GristmillError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from subclasses(child)


def answer_to(error: Exception, headers: dict[str, str] | None = None) -> httpx.Response:
    """The answer of an app whose only handler raises `error`."""
    app = FastAPI()
    app.add_middleware(RequestScope, metrics=Metrics())
    problems.install(app)

    @app.get("/fails")
    async def fails() -> None:
        raise error

    return asyncio.run(send(app, httpx.Request("GET", "http://test/fails", headers=headers)))


async def send(app: FastAPI, request: httpx.Request) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as client:
        return await client.send(request)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.RequestError("Wrong.", param="body.prompt"), 400),
        (errors.ModelNotFound(), 404),
        (errors.UrlNotFound(), 404),
        (errors.JobNotFound(), 404),
        (errors.JobStateConflict(), 409),
        (errors.RequestTooLarge(), 413),
        (errors.ContextLengthExceeded(), 422),
        (errors.DeadlinePassed(), 422),
        (errors.IdempotencyConflict(), 422),
        (errors.QueueFull(retry_after=7), 429),
        (errors.GristmillError(), 500),
        (errors.Unavailable(), 503),
        (errors.Busy(), 503),
        (errors.SchemaError(), 503),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else str(value),
)
def test_each_error_has_its_status_and_the_same_shape(
    error: errors.GristmillError, status: int
) -> None:
    answer = answer_to(error)

    problem = answer.json()
    assert answer.status_code == problem["status"] == status
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["code"] == error.code
    assert problem["type"] == f"urn:gristmill:problem:{error.code}"
    assert problem["instance"] == "/fails"
    assert problem["title"] and problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_no_error_class_is_without_a_status() -> None:
    for kind in subclasses(errors.GristmillError):
        if "app.errors" in kind.__module__:
            assert problems.describe(kind(), instance="/").status >= 400


def test_the_wrong_field_is_named() -> None:
    answer = answer_to(errors.RequestError("Too hot.", param="body.temperature"))

    assert answer.json()["param"] == "body.temperature"


def test_what_may_pass_says_when_to_come_back_and_nothing_else_does() -> None:
    assert answer_to(errors.QueueFull(retry_after=7)).headers["retry-after"] == "7"
    kinds = [kind for kind in subclasses(errors.GristmillError) if "app.errors" in kind.__module__]
    for error in (
        *(kind() for kind in kinds),
        *(HTTPException(status) for status in HTTPStatus if status >= 400),
    ):
        answer = answer_to(error)
        if answer.headers.get("x-should-retry") == "false":
            assert "retry-after" not in answer.headers, error
        elif answer.status_code in (429, 503):
            assert 1 <= int(answer.headers["retry-after"]) <= 60, error
        else:
            assert "retry-after" not in answer.headers, error


def test_a_limit_that_a_minute_does_not_lift_tells_clients_not_to_try_again() -> None:
    soon = answer_to(errors.QuotaExceeded(limit="max_open_jobs", retry_after=9))
    late = answer_to(errors.BudgetSpent(limit="max_cost_per_day"))

    assert (soon.headers["retry-after"], soon.json()["violated-policies"]) == (
        "9",
        ["max_open_jobs"],
    )
    assert (late.status_code, late.headers["x-should-retry"]) == (429, "false")


def test_a_conflict_tells_clients_not_to_try_again() -> None:
    assert answer_to(errors.JobStateConflict()).headers["x-should-retry"] == "false"


def test_a_bug_is_answered_without_its_text_and_logged_without_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR):
        answer = answer_to(ValueError(SECRET))

    assert answer.status_code == 500
    assert answer.json()["code"] == "internal_error"
    assert SECRET not in answer.text
    [record] = caplog.records
    logged = record.getMessage()
    assert "ValueError" in logged and "in fails" in logged and SECRET not in logged
    assert record.exc_info is None


def test_the_text_of_what_is_no_fault_of_the_caller_is_told_nowhere() -> None:
    for error in (errors.Unavailable(SECRET), errors.JobUnreadable(SECRET)):
        assert SECRET not in problems.describe(error, instance="/").model_dump_json()


def test_the_text_of_an_outage_goes_to_the_log_and_not_to_the_caller(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        answer = answer_to(errors.Unavailable("Postgres cannot be reached: host db-7.internal"))

    assert "db-7" not in answer.text
    assert "db-7" in caplog.text


def test_a_plain_request_id_is_kept_and_a_strange_one_replaced() -> None:
    kept = answer_to(errors.JobNotFound(), {"x-request-id": "checkout-42"})
    replaced = answer_to(errors.JobNotFound(), {"x-request-id": "a b{}"})

    assert kept.headers["x-request-id"] == "checkout-42"
    assert replaced.headers["x-request-id"] not in ("a b{}", "")


def test_a_path_that_is_not_there_is_a_problem_too() -> None:
    app = FastAPI(openapi_url=None)
    problems.install(app)

    answer = asyncio.run(send(app, httpx.Request("GET", "http://test/nowhere")))

    assert (answer.status_code, answer.json()["code"]) == (404, "not_found")


def test_a_head_of_too_many_fields_is_refused_for_what_it_is() -> None:
    kept = answer_to(errors.JobNotFound(), {f"x-{number}": "" for number in range(MAX_FIELDS - 10)})
    refused = answer_to(errors.JobNotFound(), {f"x-{number}": "" for number in range(MAX_FIELDS)})

    assert kept.status_code == 404
    assert (refused.status_code, refused.json()["code"]) == (431, "request_header_fields_too_large")
    assert refused.headers["connection"] == "close"


# ── bodies ──────────────────────────────────────────────────────────────────────────────────────


def post(content: object, **headers: str) -> httpx.Response:
    """The answer of an app that reads a body of at most 1,000 bytes and tells its length."""
    app = FastAPI()
    problems.install(app)

    @app.post("/read")
    async def read(request: HttpRequest) -> int:
        async with raw_bodies.body_of(request, 1_000, Room(1_000_000, 1_000)) as body:
            return len(body)

    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx.Request(
        "POST",
        "http://test/read",
        content=content,  # type: ignore[arg-type]
        headers={"content-type": "application/json"} | named,
    )
    return asyncio.run(send(app, request))


async def in_chunks(size: int) -> object:
    for _ in range(size // 100):
        yield b"x" * 100


def test_a_body_within_the_limit_is_read_whole() -> None:
    assert post(b"x" * 1_000).json() == 1_000
    assert post(in_chunks(1_000)).json() == 1_000


def test_a_body_beyond_the_limit_is_refused_whether_or_not_it_tells_its_length() -> None:
    for content in (b"x" * 1_001, in_chunks(1_100)):
        answer = post(content)
        assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


def test_a_compressed_body_is_refused_unread() -> None:
    answer = post(b"\x1f\x8b", content_encoding="gzip")

    assert answer.status_code == 415
    assert answer.headers["accept-encoding"] == "identity"


def test_a_body_that_a_foreign_web_page_could_post_is_refused() -> None:
    for media_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert post(b"{}", content_type=media_type).status_code == 415


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b'{"prompt": "' + SECRET.encode(),
        b'{"prompt": "' + SECRET.encode() + b'"} and more',
        b"{'prompt': 1}",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"seed": ' + b"9" * 5_000 + b"}",
        b"[" * 10_000,
    ],
)
def test_a_body_that_is_not_json_is_refused_without_quoting_it(raw: bytes) -> None:
    with pytest.raises(errors.RequestError) as refused:
        raw_bodies.parse_json(raw)

    assert "not valid JSON" in str(refused.value)
    assert SECRET not in str(refused.value)


def test_json_that_is_read_is_what_was_sent() -> None:
    value = {"prompt": "grüße ☕", "n": [1, 2.5, None, True]}

    assert raw_bodies.parse_json(json.dumps(value).encode()) == value


# ── the shapes of other doors ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "headers", "door"),
    [
        ("/v1/jobs", {}, Door.OWN),
        ("/v1/jobs/17/cancel", {}, Door.OWN),
        ("/v1/jobs", {"anthropic-version": "2023-06-01"}, Door.OWN),
        ("/v1/usage", {}, Door.OWN),
        ("/healthz", {}, Door.OWN),
        ("/v10/jobs", {}, Door.OWN),
        ("/v1/chat/completions", {}, Door.OPENAI),
        ("/v1/audio/speech", {}, Door.OPENAI),
        ("/v1/jobsandmore", {}, Door.OPENAI),
        ("/v1/models", {}, Door.OPENAI),
        ("/v1/models/stub", {"anthropic-version": "2026-10-21"}, Door.ANTHROPIC),
        ("/v1/messages", {}, Door.ANTHROPIC),
        ("/v1/messages/batches/17", {}, Door.ANTHROPIC),
    ],
)
def test_each_path_is_of_one_door(path: str, headers: dict[str, str], door: Door) -> None:
    assert door_of(path, headers) is door


KINDS = [kind for kind in subclasses(errors.GristmillError) if "app.errors" in kind.__module__]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_has_its_shape_at_every_door(kind: type[errors.GristmillError]) -> None:
    problem = problems.describe(kind(), instance="/v1/chat/completions")

    told = envelopes.openai(problem)["error"]
    assert set(told) == {"message", "type", "param", "code"}
    is_callers = told["type"] != "server_error"
    assert is_callers == (problem.status < 500)
    told = envelopes.anthropic(problem)
    assert told["type"] == "error" and told["error"]["message"]
    is_callers = told["error"]["type"] not in ("api_error", "overloaded_error", "timeout_error")
    assert is_callers == (problem.status < 500)


@pytest.mark.parametrize(
    ("error", "door", "status"),
    [
        (errors.ContextLengthExceeded(), Door.OPENAI, 400),
        (errors.ContextLengthExceeded(), Door.ANTHROPIC, 400),
        (errors.ContextLengthExceeded(), Door.OWN, 422),
        (errors.Busy(), Door.OPENAI, 503),
        (errors.Busy(), Door.ANTHROPIC, 529),
    ],
)
def test_other_doors_have_statuses_of_their_own(
    error: errors.GristmillError, door: Door, status: int
) -> None:
    assert envelopes.status_at(door, problems.describe(error, instance="/")) == status


def test_a_field_is_named_as_it_is_in_the_call_and_not_in_the_job() -> None:
    wrong = errors.RequestError("Too hot.", param="body.temperature")
    problem = problems.describe(wrong, instance="/")

    assert envelopes.openai(problem)["error"]["param"] == "temperature"
    assert envelopes.anthropic(problem)["error"]["message"] == "temperature: Too hot."


def test_what_workers_have_tried_again_is_not_to_be_tried_again_by_clients() -> None:
    for error in (errors.EngineCrashed(), errors.OutOfMemory(), errors.AttemptsExhausted()):
        answer = answer_to(error)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")


@given(st.integers())
def test_nobody_is_told_to_wait_for_longer_than_clients_do(retry_after: int) -> None:
    answer = answer_to(errors.QueueFull(retry_after=retry_after))

    assert 1 <= int(answer.headers["retry-after"]) <= 60


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_error_of_a_job_is_found_again_by_its_code(kind: type[errors.GristmillError]) -> None:
    again = errors.of_code(kind.code, "Why.")

    assert (again.code, again.message) == (kind.code, "Why.")


def test_the_code_of_a_job_is_told_if_it_is_no_errors_of_ours() -> None:
    error = errors.of_code("not_finite", "Not a number.")

    answer = answer_to(error)

    assert (answer.status_code, answer.json()["code"]) == (500, "not_finite")
    assert answer.headers["x-should-retry"] == "false"
