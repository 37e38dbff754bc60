"""The client against scripted answers; both clients run every flow."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import pickle
import ssl
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from gristmill_client import (
    AsyncClient,
    Client,
    Job,
    JobEvent,
    JobFailed,
    asynchronous,
    exchange,
    sync,
    timer,
)
from gristmill_client.errors import (
    ContextLengthExceeded,
    GristmillError,
    IdempotencyConflict,
    JobNotFound,
    JobStateConflict,
    QueueFull,
    RequestError,
    Unavailable,
)
from gristmill_client.exchange import ExchangeOptions
from gristmill_client.flows import EACH_S, MANY, ROUND_S, SLOW_ROUND_S

BODY = {"prompt": "A grist mill is"}
Call = Callable[..., Any]
Answer = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Api:
    """Answers each request with the next of the scripted answers, and keeps the requests."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.pauses: list[float] = []
        self.held_s = 0.0

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


class Clock:
    """Goes on by what is paused and by what the server holds."""

    api: Api

    def __init__(self) -> None:
        self._now = 0.0

    def monotonic(self) -> float:
        return self._now + self.api.held_s

    time = monotonic

    def sleep(self, seconds: float) -> None:
        self.api.pauses.append(seconds)
        self._now += seconds

    async def sleep_too(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Call:
    """`call(api, "submit", …)` calls a method of a client that talks to `api`, `made` with these
    options; pauses are noted and pass at once, by the client's clock."""
    clock = Clock()
    for module in (sync, exchange, timer):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(asynchronous, "asyncio", SimpleNamespace(sleep=clock.sleep_too))

    def make(
        api: Api, method: str, *args: Any, made: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        clock.api = api
        transport = httpx.MockTransport(api)
        options = {"transport": transport} | (made or {})
        if request.param == "sync":
            with Client("http://test/", **options) as client:
                answer = getattr(client, method)(*args, **kwargs)
                return list(answer) if isinstance(answer, Iterator) else answer

        async def go() -> Any:
            async with AsyncClient("http://test/", **options) as client:
                answer = getattr(client, method)(*args, **kwargs)
                if isinstance(answer, AsyncIterator):
                    return [each async for each in answer]
                return await answer

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
    date = format_datetime(datetime(1970, 1, 1, 0, 0, 9, tzinfo=UTC), usegmt=True)
    api = Api(
        problem(503, "unavailable", {"Retry-After": "7"}),
        problem(429, "queue_full", {"Retry-After": date}),  # two seconds later, by its clock
        job("queued"),
    )

    call(api, "submit", BODY)

    assert api.pauses == [7.0, 2.0]


def test_who_does_not_wait_is_told_when_there_is_room(call: Call) -> None:
    api = Api(problem(429, "queue_full", {"Retry-After": "17"}))

    with pytest.raises(QueueFull) as raised:
        call(api, "submit", BODY, made={"patience_s": 0})

    assert raised.value.retry_after == 17


def test_patience_is_a_time_and_the_last_error_tells_why(call: Call) -> None:
    for trouble in (
        problem(503, "unavailable"),
        httpx.ConnectError("refused"),
        httpx.Response(502, text="<html>bad gateway</html>"),
    ):
        api = Api(trouble)

        with pytest.raises(Unavailable):
            call(api, "submit", BODY, made={"patience_s": 90})

        assert 80 <= sum(api.pauses) <= 90


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


def bulk(request: httpx.Request) -> httpx.Response:
    """Accepts every job; its id is its prompt."""
    jobs = json.loads(request.content)["jobs"]
    return httpx.Response(202, json={"items": [{"id": each["body"]["prompt"]} for each in jobs]})


def submissions(number: int) -> list[dict[str, Any]]:
    return [{"body": {"prompt": str(n)}} for n in range(number)]


def test_very_many_submissions_go_in_pages(call: Call) -> None:
    api = Api(bulk)

    ids = call(api, "submit_many", submissions(2_500))

    assert ids == [str(n) for n in range(2_500)]
    assert len(api.requests) == 3


def test_pages_are_cut_by_bytes_too(call: Call) -> None:
    api = Api(bulk)

    ids = call(api, "submit_many", [{"body": {"prompt": "x" * 1_500_000}}] * 5)

    assert len(ids) == 5
    assert [len(api.body(n)["jobs"]) for n in range(len(api.requests))] == [2, 2, 1]


@pytest.mark.parametrize(
    ("refusal", "error"),
    [
        (problem(503, "unavailable"), Unavailable),
        (problem(429, "queue_full"), QueueFull),
        (problem(500, "internal_error"), GristmillError),
        (httpx.ReadError("reset"), Unavailable),
        (httpx.Response(200, json={"items": []}), GristmillError),
        (httpx.Response(200, text="<html>not ours</html>"), GristmillError),
    ],
    ids=lambda each: getattr(each, "status_code", getattr(each, "__name__", "broken")),
)
def test_a_page_that_is_refused_does_not_lose_the_ids_of_the_other_pages(
    call: Call, refusal: Answer, error: type[GristmillError]
) -> None:
    def second_page_fails(request: httpx.Request) -> httpx.Response:
        if json.loads(request.content)["jobs"][0]["body"]["prompt"] != "1000":
            return bulk(request)
        if isinstance(refusal, Exception):
            raise refusal
        return httpx.Response(refusal.status_code, content=refusal.content)

    outcomes = call(Api(second_page_fails), "submit_many", submissions(2_500))

    assert outcomes[:1_000] == [str(n) for n in range(1_000)]
    assert {type(outcome) for outcome in outcomes[1_000:2_000]} == {error}
    assert outcomes[2_000:] == [str(n) for n in range(2_000, 2_500)]


@pytest.mark.parametrize("status", [400, 413, 422])
def test_one_job_that_spoils_its_page_costs_only_itself(call: Call, status: int) -> None:
    def refuses_one(request: httpx.Request) -> httpx.Response:
        if b'"13"' in request.content:
            return httpx.Response(status, json={"code": "invalid_request", "detail": "Too deep."})
        return bulk(request)

    outcomes = call(Api(refuses_one), "submit_many", submissions(100))

    assert isinstance(outcomes.pop(13), RequestError)
    assert outcomes == [str(n) for n in range(100) if n != 13]


def test_a_proxy_that_takes_less_is_given_smaller_pages(call: Call) -> None:
    def proxy(request: httpx.Request) -> httpx.Response:
        if len(request.content) > 1_200_000:
            return httpx.Response(413, text="<html>413 Request Entity Too Large</html>")
        return bulk(request)

    api = Api(proxy)

    outcomes = call(api, "submit_many", [{"body": {"prompt": "x" * 100_000}}] * 100)

    assert outcomes == ["x" * 100_000] * 100
    refused = sum(len(request.content) > 1_200_000 for request in api.requests)
    assert refused <= 3


def test_an_api_that_takes_fewer_jobs_is_given_smaller_pages(call: Call) -> None:
    def strict(request: httpx.Request) -> httpx.Response:
        if len(json.loads(request.content)["jobs"]) > 300:
            wrong = {"code": "invalid_request", "detail": "jobs must be a list.", "param": "jobs"}
            return httpx.Response(400, json=wrong)
        return bulk(request)

    api = Api(strict)

    assert call(api, "submit_many", submissions(5_000)) == [str(n) for n in range(5_000)]

    refused = sum(len(api.body(n)["jobs"]) > 300 for n in range(len(api.requests)))
    assert refused == 3


def test_an_api_that_is_gone_costs_its_patience_once_and_not_once_a_page(call: Call) -> None:
    api = Api(httpx.ConnectError("refused"))

    outcomes = call(api, "submit_many", submissions(5_000), made={"patience_s": 90})

    assert {type(outcome) for outcome in outcomes} == {Unavailable}
    assert len(outcomes) == 5_000
    assert sum(api.pauses) <= 90


def test_what_cannot_be_written_as_json_is_refused_in_its_place(call: Call) -> None:
    circle: list[Any] = []
    circle.append(circle)
    api = Api(bulk)
    odd = [{"prompt": b"bytes"}, {"prompt": float("nan")}, {"prompt": circle}, 7]

    outcomes = call(api, "submit_many", [{"body": BODY}, *({"body": each} for each in odd), {}])

    assert outcomes[0] == BODY["prompt"]
    assert all(isinstance(outcome, RequestError) for outcome in outcomes[1:])
    assert len(outcomes) == 6


def test_half_a_surrogate_pair_is_left_to_the_api_to_judge(call: Call) -> None:
    api = Api(job("queued"))

    call(api, "submit", {"prompt": "half \ud83d"})

    assert api.body()["body"] == {"prompt": "half \ud83d"}


def test_submissions_are_taken_no_sooner_than_a_page_wants_them() -> None:
    taken = 0

    def endless() -> Iterator[Any]:
        nonlocal taken
        while True:
            taken += 1
            yield {"body": {"prompt": str(taken)}}

    with Client("http://test", transport=httpx.MockTransport(Api(bulk))) as client:
        outcomes = client.iter_submit(endless())

        assert next(outcomes) == "1"
        assert taken == 1_000


def test_none_among_the_submissions_sends_what_there_is() -> None:
    api = Api(bulk)
    with Client("http://test", transport=httpx.MockTransport(api)) as client:
        outcomes = client.iter_submit([None, *submissions(2), None, *submissions(1)])

        assert list(outcomes) == ["0", "1", "0"]

    assert [len(api.body(n)["jobs"]) for n in range(2)] == [2, 1]


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


def away_for(seconds: float, then: Answer) -> Api:
    """An API that is restarted, which takes so long."""

    def answer(request: httpx.Request) -> httpx.Response:
        if sum(api.pauses) < seconds:
            raise httpx.ConnectError("refused")
        return then(request) if callable(then) else then

    api = Api(answer)
    return api


@pytest.mark.parametrize("timeout_s", [None, 600])
def test_a_wait_goes_through_a_restart_of_the_api_of_a_minute(
    call: Call, timeout_s: float | None
) -> None:
    api = away_for(60, job("completed", response={"choices": []}))

    assert call(api, "result", "j1", timeout_s=timeout_s) == {"choices": []}

    [(job_id, ended)] = call(away_for(60, Jobs(1)), "as_completed", ["j1"], timeout_s=timeout_s)
    assert (job_id, ended.state) == ("j1", "completed")


@pytest.mark.parametrize("method", ["wait", "as_completed"])
def test_a_wait_does_not_give_up_before_its_timeout(call: Call, method: str) -> None:
    api = Api(httpx.ConnectError("refused"))
    ids: Any = "j1" if method == "wait" else ["j1"]

    with pytest.raises(TimeoutError, match="does not answer"):
        call(api, method, ids, timeout_s=1_000)

    assert sum(api.pauses) == pytest.approx(1_000)


def test_a_wait_without_end_has_the_patience_of_its_client(call: Call) -> None:
    with pytest.raises(Unavailable):
        call(Api(httpx.ConnectError("refused")), "wait", "j1")


class Jobs:
    """Answers bulk looks at jobs; every look finds `per_look` more of them ended, and shows `most`
    of those."""

    def __init__(self, per_look: int, most: int = MANY) -> None:
        self._per_look = per_look
        self._most = most
        self._ended: set[str] = set()
        self.most_ids = 0
        self.gathered: list[float] = []  #: what looks were to wait for

    def __call__(self, request: httpx.Request) -> httpx.Response:
        asked = json.loads(request.content)
        self.most_ids = max(self.most_ids, len(asked["ids"]))
        shown = asked["ids"]
        if asked["view"] == "ended":
            assert asked["wait_for"] == "any"
            self.gathered.append(asked["gather_s"])
            still = [job_id for job_id in asked["ids"] if job_id not in self._ended]
            self._ended |= set(still[-self._per_look :])
            shown = [job_id for job_id in asked["ids"] if job_id in self._ended][: self._most]
        items = [self._item(each, each in shown) for each in asked["ids"]]
        return httpx.Response(200, json={"items": items})

    def _item(self, job_id: str, is_shown: bool) -> dict[str, Any]:
        if job_id == "unknown":
            return {"id": job_id, "error": {"code": "job_not_found", "detail": "No such job."}}
        state = "completed" if job_id in self._ended else "running"
        told = {"id": job_id, "state": state, "response": {"text": job_id}}
        return {"id": job_id, "state": state} | ({"job": told} if is_shown else {})


def test_jobs_come_as_they_end(call: Call) -> None:
    outcomes = call(Api(Jobs(per_look=1)), "as_completed", ["a", "b", "unknown", "c", "a"])

    ids, found = zip(*outcomes, strict=True)
    assert ids[0] == "unknown" and isinstance(found[0], JobNotFound)
    assert ids[1:] == ("c", "b", "a")
    assert [each.response for each in found[1:]] == [{"text": job_id} for job_id in ids[1:]]


def test_very_many_jobs_are_followed_a_thousand_at_a_time(call: Call) -> None:
    jobs = Jobs(per_look=200)
    ids = [str(n) for n in range(2_500)]

    outcomes = call(Api(jobs), "as_completed", iter(ids))

    assert sorted(job_id for job_id, _ in outcomes) == sorted(ids)
    assert jobs.most_ids == 1_000


def test_jobs_that_end_one_by_one_are_looked_at_less_often_the_more_they_are(call: Call) -> None:
    jobs = Jobs(per_look=1)

    call(Api(jobs), "as_completed", [str(n) for n in range(150)])

    first, *others = jobs.gathered
    assert (first, others[0]) == (0, SLOW_ROUND_S)
    assert others == sorted(others, reverse=True)
    assert others[-1] <= EACH_S


def test_where_a_look_is_not_held_the_pause_is_made_here(call: Call) -> None:
    jobs = Jobs(per_look=1)
    api = Api(jobs)

    call(api, "as_completed", [str(n) for n in range(5)])

    assert api.pauses == pytest.approx([*jobs.gathered[:-1], 0.0])


def test_jobs_that_end_fast_are_looked_at_more_often(call: Call) -> None:
    jobs = Jobs(per_look=2 * MANY)

    call(Api(jobs), "as_completed", [str(n) for n in range(8 * MANY)])

    assert jobs.gathered == [0, ROUND_S, ROUND_S, ROUND_S]


def test_one_request_brings_the_jobs_that_have_ended(call: Call) -> None:
    api = Api(Jobs(per_look=10))

    call(api, "as_completed", [str(n) for n in range(50)])

    assert len(api.requests) == 5


def test_answers_that_one_look_has_no_room_for_are_asked_for_at_once(call: Call) -> None:
    api = Api(Jobs(per_look=50, most=10))

    outcomes = call(api, "as_completed", [str(n) for n in range(50)])

    assert sorted(int(job.response["text"]) for _, job in outcomes) == list(range(50))
    assert not any(api.pauses)


def test_many_jobs_are_looked_at_at_once(call: Call) -> None:
    api = Api(Jobs(per_look=0))

    first, second = call(api, "jobs_status", ["a", "unknown"])

    assert (first.id, first.state) == ("a", "running")
    assert isinstance(second, JobNotFound)


def test_lists_go_on_from_page_to_page(call: Call) -> None:
    def page(ids: str, has_more: bool) -> httpx.Response:
        data = [{"id": each, "state": "queued"} for each in ids]
        return httpx.Response(200, json={"data": data, "last_id": ids[-1], "has_more": has_more})

    api = Api(page("ab", True), page("c", False))

    found = call(api, "jobs", state="queued", metadata={"customer": "42"}, model=None)

    assert [each.id for each in found] == ["a", "b", "c"]
    first, second = (dict(request.url.params) for request in api.requests)
    assert first == {"state": "queued", "metadata[customer]": "42", "limit": "100"}
    assert second == first | {"after": "b"}


def test_many_jobs_are_cancelled_at_once(call: Call) -> None:
    conflict = {"code": "job_state_conflict", "detail": "It has completed."}
    items = [
        {"status": 200, "id": "a", "state": "cancelled"},
        {"status": 202, "id": "b", "state": "running"},
        {"status": 409, "id": "c", "state": "completed", "error": conflict},
    ]
    api = Api(httpx.Response(200, json={"items": items}))

    outcomes = call(api, "cancel_many", ["a", "b", "c"])

    assert [(each.id, each.state) for each in outcomes] == [
        ("a", "cancelled"),
        ("b", "running"),
        ("c", "completed"),
    ]
    assert [type(each.error) for each in outcomes] == [type(None), type(None), JobStateConflict]


def test_jobs_are_cancelled_by_what_they_are_until_there_are_no_more(call: Call) -> None:
    def page(ids: str, has_more: bool) -> httpx.Response:
        items = [{"status": 200, "id": each, "state": "cancelled"} for each in ids]
        return httpx.Response(200, json={"items": items, "has_more": has_more})

    api = Api(page("ab", True), page("c", False))
    since = datetime(2030, 1, 1, tzinfo=UTC)

    outcomes = call(api, "cancel_chosen", model="stub", since=since, state=None)

    assert [each.id for each in outcomes] == ["a", "b", "c"]
    assert api.body()["filter"] == {"model": "stub", "since": "2030-01-01T00:00:00+00:00"}


def test_jobs_that_nobody_can_cancel_now_do_not_come_for_ever(call: Call) -> None:
    busy = {"code": "unavailable", "detail": "Try again."}
    items = [{"status": 503, "id": "a", "error": busy}]
    api = Api(httpx.Response(200, json={"items": items, "has_more": True}))

    [outcome] = call(api, "cancel_chosen", model="stub")

    assert isinstance(outcome.error, Unavailable)


def test_a_job_is_purged(call: Call) -> None:
    api = Api(httpx.Response(204))

    assert call(api, "purge", "a/b") is None
    assert (api.requests[0].method, api.requests[0].url.raw_path) == (
        "DELETE",
        b"/v1/jobs/a%2Fb",
    )


def test_the_limits_are_told(call: Call) -> None:
    assert call(Api(httpx.Response(200, json={"max_ids": 7})), "limits") == {"max_ids": 7}


def test_cancelling_answers_with_the_job(call: Call) -> None:
    api = Api(job("cancelled"))

    assert call(api, "cancel", "j1").state == "cancelled"
    assert (api.requests[0].method, api.requests[0].url.path) == ("POST", "/v1/jobs/j1/cancel")


def test_a_key_and_headers_go_with_every_request(call: Call) -> None:
    api = Api(job())

    call(api, "job", "j1", made={"key": "abc", "headers": {"X-Team": "mill"}})

    sent = api.requests[0].headers
    assert (sent["authorization"], sent["x-team"]) == ("Bearer abc", "mill")


def test_a_caller_is_told_of_pauses(call: Call) -> None:
    told: list[tuple[GristmillError, float]] = []
    api = Api(problem(503, "unavailable", {"Retry-After": "7"}), job())

    call(api, "job", "j1", made={"on_pause": lambda *pause: told.append(pause)})

    [(error, seconds)] = told
    assert isinstance(error, Unavailable) and seconds == 7.0


def test_a_certificate_that_is_not_trusted_is_not_tried_again(call: Call) -> None:
    untrusted = httpx.ConnectError("TLS")
    untrusted.__cause__ = ssl.SSLCertVerificationError("self-signed")
    api = Api(untrusted)

    with pytest.raises(Unavailable, match="certificate is not trusted"):
        call(api, "job", "j1")

    assert len(api.requests) == 1


def test_an_address_that_is_none_is_refused_at_once() -> None:
    for address in ("localhost:8000", "127.0.0.1", "ftp://host", "http://", "http://[::1", "x\0y"):
        with pytest.raises(ValueError, match="http://"):
            Client(address)
    with pytest.raises(ValueError, match=r"no \? or #"):
        Client("http://host/?key=1")
    for key in ("a\nb", "é", "a "):
        with pytest.raises(ValueError, match="visible ASCII"):
            AsyncClient("http://host", key=key)
    wrong: list[ExchangeOptions] = [{"timeout_s": 0}, {"timeout_s": math.inf}, {"patience_s": -1}]
    for options in wrong:
        with pytest.raises(ValueError, match="_s is"):
            Client("http://host", **options)


@pytest.mark.parametrize("address", ["http://test/mill", "http://test/mill/v1/"])
def test_an_address_may_be_the_one_that_other_clients_have(address: str) -> None:
    api = Api(job())
    with Client(address, transport=httpx.MockTransport(api)) as client:
        client.job("j1")

    assert str(api.requests[0].url) == "http://test/mill/v1/jobs/j1"


def test_what_is_no_job_is_said_to_be_none(call: Call) -> None:
    for answer in ({}, {"id": "j1", "state": "brand new"}):
        with pytest.raises(GristmillError, match="same version"):
            call(Api(httpx.Response(200, json=answer)), "job", "j1")


def test_a_password_in_the_address_is_in_no_error_and_no_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = Api(httpx.ConnectError("refused"))
    transport = httpx.MockTransport(api)
    address = "http://me:secret@test"
    with (
        caplog.at_level("INFO"),
        Client(address, transport=transport, patience_s=0) as client,
        pytest.raises(Unavailable) as raised,
    ):
        client.job("j1")

    assert api.requests[0].headers["authorization"] == "Basic bWU6c2VjcmV0"
    assert "secret" not in f"{raised.value} {caplog.text} {api.requests[0].url}"


def test_what_is_passed_on_and_shown_has_no_answer_in_it_and_stays_whole() -> None:
    found = Job.of(job("failed", response={"choices": ["private"]}).json())
    event = JobEvent("tokens", {"text": "private"}, "1-0")
    failed = pickle.loads(pickle.dumps(JobFailed(found)))

    assert (failed.job, failed.message) == (found, JobFailed(found).message)
    assert "private" not in f"{found!r} {event!r} {failed!r}"
    for error in (RequestError("Why.", param="body"), QueueFull("Later.", code="other")):
        again = pickle.loads(pickle.dumps(error))
        assert (vars(again), again.message) == (vars(error), error.message)


def test_a_child_that_was_forked_makes_connections_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[object] = []
    connections = exchange.Connections(lambda: made.append(object()) or made[-1])
    of_the_parent = connections.get()

    monkeypatch.setattr(exchange.os, "getpid", lambda: -1)

    assert connections.get() is connections.get() is not of_the_parent
    assert len(made) == 2


def test_who_has_all_connections_in_use_waits_for_one_and_not_for_the_api(call: Call) -> None:
    def no_more_than(seconds: float) -> Api:
        def answer(_: httpx.Request) -> httpx.Response:
            api.held_s += 30
            if api.held_s <= seconds:
                raise httpx.PoolTimeout("all in use")
            return job("completed", response={})

        api = Api(answer)
        return api

    told: list[object] = []
    made = {"patience_s": 0, "on_pause": lambda *pause: told.append(pause)}

    assert call(no_more_than(600), "result", "j1", made=made) == {}
    with pytest.raises(TimeoutError):
        call(no_more_than(600), "wait", "j1", timeout_s=90)
    assert told == []


def test_what_leads_elsewhere_is_no_job(call: Call) -> None:
    for job_id in ("", ".", ".."):
        with pytest.raises(JobNotFound):
            call(Api(job()), "purge", job_id)
    moved = httpx.Response(307, headers={"Location": "https://test/v1/jobs/%3F"})
    with pytest.raises(GristmillError, match=r"307: it is at https://test/v1/jobs/%3F now"):
        call(Api(moved), "job", "\udcff")


def test_both_clients_have_the_same_methods() -> None:
    def surface(client: type) -> dict[str, str]:
        methods = {name: each for name, each in vars(client).items() if not name.startswith("_")}
        return {
            name: str(inspect.signature(each)).replace("Async", "")
            for name, each in methods.items()
        }

    assert surface(Client) == surface(AsyncClient)
