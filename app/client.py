"""A small client of the HTTP API, sync and async. Of third parties it needs httpx alone.

    with Client("http://127.0.0.1:8000") as gristmill:
        job_id = gristmill.submit({"prompt": "A grist mill is", "max_tokens": 32})
        print(gristmill.result(job_id)["choices"][0]["text"])

`AsyncClient` has the same methods, to be awaited. What a method does is written once, as a flow
that yields the requests to send and the pauses to make; each client only carries flows out.

Answers 429, 502, 503 and 504 and lost connections are tried again, a bounded number of times and
not sooner than Retry-After says. That is safe: a submission has an idempotency key in any case.
Errors are those of `app.errors`, by the `code` of the answer.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypedDict, TypeVar, Unpack
from uuid import uuid4

import httpx

from app.config.host import is_loopback
from app.errors import GristmillError, RequestError, ResponseRemoved, Unavailable
from app.jobs import JobState

RETRIED: Final = frozenset({429, 502, 503, 504})
MAX_PAUSE_S: Final = 60.0
POLL_S: Final = 30
"""How long one long poll is held; a wait is made of many."""
BULK_SIZE: Final = 1_000
PAGE_SIZE: Final = 100


class JobFailed(GristmillError):
    """A job ended without a result to give: failed, cancelled or expired."""

    code = "job_failed"

    def __init__(self, job: Job) -> None:
        error = job.error or {}
        self.job = job
        self.error_code: str | None = error.get("code")
        super().__init__(f"Job {job.id} {job.state}: {error.get('message', 'no reason given')}")


@dataclass(frozen=True, slots=True)
class Job:
    """A job as the API told of it. `raw` is all of it, timing, usage and cost included."""

    id: str
    state: JobState
    response: dict[str, Any] | None
    error: dict[str, Any] | None
    raw: dict[str, Any]


class Options(TypedDict, total=False):
    """How a job is to be run; see the API's documentation of POST /v1/jobs."""

    url: str
    priority: int
    not_before: datetime
    deadline: datetime
    metadata: dict[str, str]
    idempotency_key: str


class Filters(TypedDict, total=False):
    """Which jobs to list; see the API's documentation of GET /v1/jobs."""

    state: str
    model: str
    error_code: str
    since: datetime


T = TypeVar("T")
Outcome = httpx.Response | httpx.TransportError | None
Flow = Generator[httpx.Request | float, Outcome, T]
"""Yields requests, answered by a response or the error that came instead, and pauses in seconds."""


class _Flows:
    """What each method does, without sending anything itself."""

    def __init__(self, base_url: str, timeout_s: float, max_retries: int) -> None:
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    def submit(self, body: Mapping[str, Any], options: Options) -> Flow[str]:
        response = yield from self._exchange("POST", "/v1/jobs", _submission(body, options))
        return str(response.json()["id"])

    def submit_many(
        self, submissions: Iterable[Mapping[str, Any]]
    ) -> Flow[list[str | GristmillError]]:
        given = [_submission(each["body"], each) for each in submissions]
        outcomes: list[str | GristmillError] = []
        for start in range(0, len(given), BULK_SIZE):
            page = {"jobs": given[start : start + BULK_SIZE]}
            response = yield from self._exchange("POST", "/v1/jobs/bulk", page)
            outcomes += [
                str(item["id"]) if "id" in item else _error(item["error"])
                for item in response.json()["items"]
            ]
        return outcomes

    def job(self, job_id: str, hold_s: int = 0) -> Flow[Job]:
        response = yield from self._exchange("GET", f"/v1/jobs/{job_id}", hold_s=hold_s)
        return _job(response.json())

    def jobs(self, limit: int | None, filters: Filters) -> Flow[list[Job]]:
        found: list[Job] = []
        query = {name: _plain(value) for name, value in filters.items() if value is not None}
        while limit is None or len(found) < limit:
            page = PAGE_SIZE if limit is None else min(PAGE_SIZE, limit - len(found))
            params = query | {"limit": page} | ({"after": found[-1].id} if found else {})
            response = yield from self._exchange("GET", "/v1/jobs", params=params)
            answer = response.json()
            found += map(_job, answer["data"])
            if not answer["has_more"]:
                break
        return found

    def replay(self, job_id: str) -> Flow[Job]:
        response = yield from self._exchange("POST", f"/v1/jobs/{job_id}/replay")
        return _job(response.json())

    def cancel(self, job_id: str) -> Flow[Job]:
        response = yield from self._exchange("POST", f"/v1/jobs/{job_id}/cancel")
        return _job(response.json())

    def wait(self, job_id: str, timeout_s: float | None) -> Flow[Job]:
        give_up_at = time.monotonic() + (float("inf") if timeout_s is None else timeout_s)
        while True:
            asked_at = time.monotonic()
            hold_s = max(0, int(min(POLL_S, give_up_at - asked_at)))
            job = yield from self.job(job_id, hold_s)
            if job.state.is_final:
                return job
            now = time.monotonic()
            if now >= give_up_at:
                raise TimeoutError(f"Job {job_id} is still {job.state} after {timeout_s} s.")
            if now - asked_at < hold_s or hold_s == 0:
                yield min(1.0, give_up_at - now)  # the server did not hold it

    def result(self, job_id: str, timeout_s: float | None) -> Flow[dict[str, Any]]:
        job = yield from self.wait(job_id, timeout_s)
        if job.state is JobState.COMPLETED and job.response is None:
            raise ResponseRemoved()
        if job.state is not JobState.COMPLETED or job.response is None:
            raise JobFailed(job)
        return job.response

    def _exchange(
        self,
        method: str,
        path: str,
        json: object = None,
        *,
        hold_s: int = 0,
        params: Mapping[str, Any] | None = None,
    ) -> Flow[httpx.Response]:
        """One answer, after as many tries as it takes or is allowed."""
        for tries in itertools.count(1):
            outcome = yield httpx.Request(
                method,
                self._base_url + path,
                params={"wait": hold_s} if hold_s else params,
                json=json,
                extensions={"timeout": httpx.Timeout(self._timeout_s + hold_s).as_dict()},
            )
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                return outcome
            if tries > self._max_retries or not _may_pass(outcome):
                raise self._failure(outcome)
            yield _pause(outcome, tries)
        raise AssertionError("unreachable")

    def _failure(self, outcome: Outcome) -> GristmillError:
        if not isinstance(outcome, httpx.Response):
            return Unavailable(
                f"The API at {self._base_url} does not answer ({type(outcome).__name__})."
            )
        try:
            return _error(outcome.json())
        except (ValueError, TypeError, KeyError):
            return GristmillError(
                f"The API at {self._base_url} answered {outcome.status_code} without a reason."
            )


class Client:
    """The API for plain code. Threads may share one. Close it, or use it as a context manager.

    `timeout_s` bounds each request (a long poll has its own time on top), `max_retries` the tries
    after the first.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout_s: float = 30.0,
        max_retries: int = 5,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self._flows = _Flows(base_url, timeout_s, max_retries)
        self._http = httpx.Client(transport=transport, trust_env=_heeds_proxies(base_url))

    def submit(self, body: Mapping[str, Any], **options: Unpack[Options]) -> str:
        """Submit the body of an OpenAI-style call; returns the job's id."""
        return self._run(self._flows.submit(body, options))

    def submit_many(self, submissions: Iterable[Mapping[str, Any]]) -> list[str | GristmillError]:
        """Submit many `{"body": …, options…}`; returns a job id or an error for each, in order."""
        return self._run(self._flows.submit_many(submissions))

    def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return self._run(self._flows.job(job_id))

    def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended, however it did; raises `TimeoutError`."""
        return self._run(self._flows.wait(job_id, timeout_s))

    def result(self, job_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The response body once there is one; raises `JobFailed` or `TimeoutError`."""
        return self._run(self._flows.result(job_id, timeout_s))

    def jobs(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> list[Job]:
        """Jobs without their responses, newest first; all that fit, or `limit`."""
        return self._run(self._flows.jobs(limit, filters))

    def replay(self, job_id: str) -> Job:
        """Run a job that ended badly once more; returns the new job, the same one every time."""
        return self._run(self._flows.replay(job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel the job; raises `JobStateConflict` if it has ended otherwise."""
        return self._run(self._flows.cancel(job_id))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = None
            if isinstance(step, httpx.Request):
                try:
                    outcome = self._http.send(step)
                except httpx.TransportError as error:
                    outcome = error
            else:
                time.sleep(step)


class AsyncClient:
    """The API for asyncio: `Client` with every method awaited."""

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        timeout_s: float = 30.0,
        max_retries: int = 5,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._flows = _Flows(base_url, timeout_s, max_retries)
        self._http = httpx.AsyncClient(transport=transport, trust_env=_heeds_proxies(base_url))

    async def submit(self, body: Mapping[str, Any], **options: Unpack[Options]) -> str:
        """Submit the body of an OpenAI-style call; returns the job's id."""
        return await self._run(self._flows.submit(body, options))

    async def submit_many(
        self, submissions: Iterable[Mapping[str, Any]]
    ) -> list[str | GristmillError]:
        """Submit many `{"body": …, options…}`; returns a job id or an error for each, in order."""
        return await self._run(self._flows.submit_many(submissions))

    async def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return await self._run(self._flows.job(job_id))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended, however it did; raises `TimeoutError`."""
        return await self._run(self._flows.wait(job_id, timeout_s))

    async def result(self, job_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The response body once there is one; raises `JobFailed` or `TimeoutError`."""
        return await self._run(self._flows.result(job_id, timeout_s))

    async def jobs(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> list[Job]:
        """Jobs without their responses, newest first; all that fit, or `limit`."""
        return await self._run(self._flows.jobs(limit, filters))

    async def replay(self, job_id: str) -> Job:
        """Run a job that ended badly once more; returns the new job, the same one every time."""
        return await self._run(self._flows.replay(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel the job; raises `JobStateConflict` if it has ended otherwise."""
        return await self._run(self._flows.cancel(job_id))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            outcome = None
            if isinstance(step, httpx.Request):
                try:
                    outcome = await self._http.send(step)
                except httpx.TransportError as error:
                    outcome = error
            else:
                await asyncio.sleep(step)


def _heeds_proxies(base_url: str) -> bool:
    """Whether HTTP_PROXY and its like count: prompts for this machine do not leave it."""
    return not is_loopback(httpx.URL(base_url).host)


def _submission(body: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON of one job. A key is made here so that a retry cannot become a second job."""
    told = {name: _plain(value) for name, value in options.items() if value is not None}
    return {"idempotency_key": str(uuid4())} | told | {"body": dict(body)}


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value


def _job(raw: dict[str, Any]) -> Job:
    return Job(
        id=raw["id"],
        state=JobState(raw["state"]),
        response=raw.get("response"),
        error=raw.get("error"),
        raw=raw,
    )


def _may_pass(outcome: Outcome) -> bool:
    """Whether another try may fare better."""
    if not isinstance(outcome, httpx.Response):
        return True
    return (
        outcome.status_code in RETRIED and outcome.headers.get("x-should-retry", "true") != "false"
    )


def _pause(outcome: Outcome, tries: int) -> float:
    """Seconds until the next try: what the server says, or longer each time and never in step."""
    if isinstance(outcome, httpx.Response) and outcome.headers.get("retry-after", "").isdigit():
        return min(float(outcome.headers["retry-after"]), MAX_PAUSE_S)
    return min(0.25 * 2.0**tries, 8.0) * random.uniform(0.75, 1.0)


def _error(problem: dict[str, Any]) -> GristmillError:
    """The error that a problem document tells of."""
    kind = _ERRORS.get(problem["code"], GristmillError)
    if issubclass(kind, RequestError):
        return kind(problem["detail"], param=problem.get("param"))
    return kind(problem["detail"])


def _subclasses(kind: type[GristmillError]) -> Sequence[type[GristmillError]]:
    return [kind, *(each for child in kind.__subclasses__() for each in _subclasses(child))]


_ERRORS: Final = {kind.code: kind for kind in _subclasses(GristmillError) if kind is not JobFailed}
