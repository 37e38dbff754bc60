"""The client for asyncio."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx

from gristmill_client.errors import GristmillError
from gristmill_client.events import JobEvent, Open, Read
from gristmill_client.exchange import LIMITS, Connections, Exchange, ExchangeOptions, Flow, Outcome
from gristmill_client.flows import Flows, Given, Stream
from gristmill_client.job import Cancelled, Job
from gristmill_client.options import Chosen, Filters, Options, Submission, Usage

T = TypeVar("T")


class AsyncClient:
    """The API for asyncio: `Client` with every method awaited, and every iterator an async one.

    What is submitted or followed is taken from its iterable between two awaits: one that blocks
    keeps the loop waiting.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8000",
        *,
        verify: ssl.SSLContext | bool = True,
        transport: httpx.AsyncBaseTransport | None = None,
        **options: Unpack[ExchangeOptions],
    ) -> None:
        api = Exchange(base_url, **options)
        self._flows = Flows(api)
        self._http = Connections(
            lambda: httpx.AsyncClient(
                verify=verify, transport=transport, trust_env=api.heeds_proxies, limits=LIMITS
            )
        )

    # ── submit ──────────────────────────────────────────────────────────────────────────────────

    async def submit(self, body: Mapping[str, Any], **options: Unpack[Options]) -> str:
        """Submit the body of an OpenAI-style call; returns the job's id."""
        return await self._run(self._flows.submit(body, options))

    async def quote(self, body: Mapping[str, Any], **options: Unpack[Options]) -> dict[str, Any]:
        """What a job would meet: its tokens, place, start, finish and cost; nothing is submitted.
        See the API's documentation of POST /v1/jobs."""
        return await self._run(self._flows.quote(body, options))

    async def quote_many(self, submissions: Iterable[Submission]) -> dict[str, Any]:
        """The same for many, each as if those before it were submitted: as many as one call of the
        API takes."""
        return await self._run(self._flows.quote_many(submissions))

    async def submit_many(self, submissions: Iterable[Submission]) -> list[str | GristmillError]:
        """Submit many; returns a job id or an error for each, in order, whatever happens on the
        way. Whoever may be interrupted takes `iter_submit`."""
        return [each async for each in self.iter_submit(submissions)]

    def iter_submit(
        self, submissions: Iterable[Submission | None]
    ) -> AsyncIterator[str | GristmillError]:
        """Submit many, and hand out a job id or an error for each, in order, as soon as the API
        has answered.

        They are sent in pages of up to 1,000 jobs and 4 MB, and taken from the iterable no sooner
        than a page wants them; None among them sends what there is. Errors that say "later"
        (`Unavailable`, `QueueFull`) come after `patience_s`, which is renewed by any answer.
        """
        return self._stream(self._flows.iter_submit(submissions))

    # ── follow ──────────────────────────────────────────────────────────────────────────────────

    async def job(self, job_id: str) -> Job:
        """The job as it is now."""
        return await self._run(self._flows.job(job_id))

    async def timeline(self, job_id: str) -> dict[str, Any]:
        """Where the job's time went so far: see the API's documentation of
        GET /v1/jobs/{job_id}/timeline."""
        return await self._run(self._flows.timeline(job_id))

    async def jobs_status(
        self, job_ids: Iterable[str], *, with_responses: bool = False
    ) -> list[Job | GristmillError]:
        """Jobs as they are now, each in its place, or why one cannot be told of."""
        return await self._run(self._flows.jobs_status(job_ids, with_responses))

    async def wait(self, job_id: str, timeout_s: float | None = None) -> Job:
        """The job once it has ended, however it did.

        Raises `TimeoutError` after `timeout_s`, and not before, whatever becomes of the API.
        Without one it raises `Unavailable` if the API is away for longer than `patience_s`.
        """
        return await self._run(self._flows.wait(job_id, timeout_s))

    async def stream(self, job_id: str, after: str | None = None) -> AsyncIterator[JobEvent]:
        """What happens to a job, as it happens: where it waits, when it begins, its tokens (of one
        that was submitted with `stream_events`), and at the `end` the job itself.

        A connection that breaks off is opened anew where it was, for `patience_s`, which any event
        renews; `after` is the `id` of the last event that was had before. `restarted` says that
        the tokens of before are void. Raises `JobNotFound`, and `Unavailable` as `wait` does.
        """
        opened = _Opened(self._http.get())
        outcome: httpx.Response | bytes | httpx.RequestError | None = None
        listening = self._flows.stream(job_id, after)
        async with aclosing(opened):
            while True:
                try:
                    step = listening.send(outcome)
                except StopIteration:
                    return
                outcome = None
                match step:
                    case JobEvent():
                        yield step
                    case Open(request):
                        outcome = await opened.open(request)
                    case Read():
                        outcome = await opened.read()
                    case _:
                        await asyncio.sleep(step)

    def as_completed(
        self, job_ids: Iterable[str | None], timeout_s: float | None = None
    ) -> AsyncIterator[tuple[str, Job | GristmillError]]:
        """Each id with its job once that has ended, in the order in which they do, or with why it
        cannot be told of. An id that is given twice comes once.

        Follows 1,000 jobs at a time: further ids are taken as others end. None among them says
        that nothing else may come for a while. Raises as `wait` does.
        """
        return self._stream(self._flows.as_completed(job_ids, timeout_s))

    def iter_run(
        self, submissions: Iterable[Submission | None]
    ) -> AsyncIterator[tuple[int, Job | GristmillError]]:
        """Submit many and hand out each, by its place among them, once it has ended: its job, or
        why there is none.

        At most 1,000 are under way, and no more are taken from the iterable than that. With an
        `idempotency_key` each, the same once more after an interruption runs none of them again.
        None among them sends what there is, and looks for what has ended.
        """
        return self._stream(self._flows.iter_run(submissions))

    async def result(self, job_id: str, timeout_s: float | None = None) -> dict[str, Any]:
        """The response body once there is one.

        Raises `JobFailed` if the job ends without one, `ResponseRemoved` if it is not kept any
        more, and as `wait` does.
        """
        return await self._run(self._flows.result(job_id, timeout_s))

    async def jobs(self, *, limit: int | None = None, **filters: Unpack[Filters]) -> list[Job]:
        """Jobs without their responses, newest first; all that fit, or `limit`."""
        return [each async for each in self.iter_jobs(limit=limit, **filters)]

    def iter_jobs(
        self, *, limit: int | None = None, **filters: Unpack[Filters]
    ) -> AsyncIterator[Job]:
        """The same, page by page."""
        return self._stream(self._flows.iter_jobs(limit, filters))

    async def limits(self) -> dict[str, Any]:
        """What the API takes: see its documentation of GET /v1/limits."""
        return await self._run(self._flows.limits())

    async def usage(self, **asked: Unpack[Usage]) -> dict[str, Any]:
        """What jobs used and cost, summed: see its documentation of GET /v1/usage."""
        return await self._run(self._flows.usage(asked))

    # ── act ─────────────────────────────────────────────────────────────────────────────────────

    async def replay(self, job_id: str) -> Job:
        """Run a job that ended badly once more; returns the new job, the same one every time."""
        return await self._run(self._flows.replay(job_id))

    async def cancel(self, job_id: str) -> Job:
        """Cancel the job; raises `JobStateConflict` if it has ended otherwise."""
        return await self._run(self._flows.cancel(job_id))

    async def cancel_many(self, job_ids: Iterable[str]) -> list[Cancelled]:
        """Cancel jobs; what became of each, in its place."""
        return await self._run(self._flows.cancel_many(job_ids))

    def cancel_chosen(self, **chosen: Unpack[Chosen]) -> AsyncIterator[Cancelled]:
        """Cancel all jobs of which all of this holds, newest first; at least one thing is given."""
        return self._stream(self._flows.cancel_chosen(chosen))

    async def purge(self, job_id: str) -> None:
        """Remove what a job was asked and what it answered, for good; what it cost stays.

        One that has not ended is cancelled. May be repeated; raises `JobNotFound`.
        """
        await self._run(self._flows.purge(job_id))

    # ── carrying flows out ──────────────────────────────────────────────────────────────────────

    async def close(self) -> None:
        await self._http.get().aclose()

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
            outcome = await self._take(step)

    async def _stream(self, stream: Stream[T]) -> AsyncIterator[T]:
        outcome: Outcome = None
        while True:
            try:
                step = stream.send(outcome)
            except StopIteration:
                return
            if isinstance(step, Given):
                yield step.value
                outcome = None
            else:
                outcome = await self._take(step)

    async def _take(self, step: httpx.Request | float) -> Outcome:
        if not isinstance(step, httpx.Request):
            await asyncio.sleep(step)
            return None
        try:
            return await self._http.get().send(step)
        except httpx.RequestError as error:
            return error


class _Opened:
    """A response whose body is read piece by piece."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._response: httpx.Response | None = None
        self._pieces: AsyncIterator[bytes] | None = None

    async def open(self, request: httpx.Request) -> httpx.Response | httpx.RequestError:
        await self.aclose()
        try:
            self._response = await self._http.send(request, stream=True)
            if not self._response.is_success:
                await self._response.aread()
        except httpx.RequestError as error:
            return error
        self._pieces = self._response.aiter_bytes()
        return self._response

    async def read(self) -> bytes | httpx.RequestError:
        assert self._pieces is not None
        try:
            return await anext(self._pieces, b"")
        except httpx.RequestError as error:
            return error

    async def aclose(self) -> None:
        if self._response is not None:
            await self._response.aclose()
