"""What each method of a client does, without sending anything itself."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar
from urllib.parse import quote

import httpx

from gristmill_client.errors import (
    GristmillError,
    JobNotFound,
    NotStorable,
    RequestError,
    RequestTooLarge,
    ResponseRemoved,
)
from gristmill_client.events import Listening, listen
from gristmill_client.exchange import COME_BACK, Exchange, Flow, Outcome, Patience, Query, encode
from gristmill_client.items import items_of, list_of
from gristmill_client.job import Cancelled, Job, JobFailed
from gristmill_client.options import Chosen, Filters, Options, Usage, plain, query_of
from gristmill_client.pages import PageSize, job_of, pages, submission_of
from gristmill_client.state import JobState
from gristmill_client.timer import Timer

PAGE_S: Final = 60
"""What a page may take beyond other requests: all of it is tokenised before it is answered."""
USAGE_S: Final = 30
"""The same for a sum over what metadata says."""
LIST_PAGE: Final = 100
MAX_IDS: Final = 1_000
"""Most ids of one request."""
MAX_IDS_FULL: Final = 25
"""The same where the answer holds responses: a hundredth part of the jobs may be megabytes each."""
RUN_PAGE: Final = 500
"""Jobs that a run submits at once: the next ones follow while these run."""
MANY: Final = 100
"""Answers that one look at many jobs brings at most."""
ROUND_S: Final = 0.2
"""Shortest time from one look at many jobs to the next, while each brings so many."""
SLOW_ROUND_S: Final = 1.0
"""The same where fewer end: all of them are looked at each time, so they come in handfuls."""
EACH_S: Final = 0.02
"""For each job that is left no more than this, so that the last ones come at once."""

END: Final = object()
_DRY_RUN: Final = {"dry_run": "true"}

T = TypeVar("T")
Accepted = str | GristmillError
"""A job's id, or why there is no job."""
Found = Job | GristmillError
"""A job, or why it cannot be told of."""


@dataclass(frozen=True, slots=True)
class Given(Generic[T]):
    """A value of a stream, to be handed out."""

    value: T


Stream = Generator[httpx.Request | float | Given[T], Outcome, None]
"""A flow that hands out values on its way."""


class Flows:
    def __init__(self, api: Exchange) -> None:
        self._api = api

    # ── submit ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, body: Mapping[str, Any], options: Options) -> Flow[str]:
        answer = yield from self._api.ask("POST", "/v1/jobs", submission_of(body, options))
        return Job.of(answer).id

    def quote(self, body: Mapping[str, Any], options: Options) -> Flow[dict[str, Any]]:
        told = submission_of(body, options)
        return (yield from self._api.ask("POST", "/v1/jobs", told, params=_DRY_RUN))

    def quote_many(self, submissions: Iterable[Mapping[str, Any]]) -> Flow[dict[str, Any]]:
        jobs = []
        for job in map(job_of, submissions):
            if isinstance(job, RequestError):
                raise job
            jobs.append(job)
        query: Query = {"params": _DRY_RUN, "hold_s": PAGE_S}
        return (yield from self._api.ask("POST", "/v1/jobs/bulk", _page(jobs), **query))

    def iter_submit(self, submissions: Iterable[Mapping[str, Any] | None]) -> Stream[Accepted]:
        patience = Patience(self._api.patience_s)  # of all pages: an API that is gone costs it once
        most = PageSize()
        for page in pages(submissions, most):
            jobs = [job for job in page if isinstance(job, bytes)]
            accepted = iter((yield from self._submit_page(jobs, most, patience)))
            for job in page:
                yield Given(next(accepted) if isinstance(job, bytes) else job)

    def _submit_page(
        self, jobs: Sequence[bytes], most: PageSize, patience: Patience
    ) -> Flow[list[Accepted]]:
        """One outcome a job, whatever happens.

        A page that is refused for what is in it is sent again in halves: one job that spoils it
        must not cost the others theirs, and a proxy may take less than the server.
        """
        if not jobs:
            return []
        body = _page(jobs)
        try:
            answer = yield from self._api.ask(
                "POST", "/v1/jobs/bulk", body, hold_s=PAGE_S, patience=patience
            )
            return items_of(answer, len(jobs), lambda item: str(item["id"]))
        except (RequestError, NotStorable) as error:
            if len(jobs) == 1:
                return [error]
            if isinstance(error, RequestTooLarge):
                most.bytes = min(most.bytes, len(body) // 2)
            elif getattr(error, "param", None) == "jobs":  # there are too many
                most.jobs = min(most.jobs, len(jobs) // 2)
        except GristmillError as error:
            return [error] * len(jobs)
        middle = len(jobs) // 2
        first = yield from self._submit_page(jobs[:middle], most, patience)
        return first + (yield from self._submit_page(jobs[middle:], most, patience))

    # ── follow ──────────────────────────────────────────────────────────────────────────────────

    def job(self, job_id: str) -> Flow[Job]:
        return Job.of((yield from self._api.ask("GET", _path(job_id))))

    def timeline(self, job_id: str) -> Flow[dict[str, Any]]:
        return (yield from self._api.ask("GET", f"{_path(job_id)}/timeline"))

    def jobs_status(
        self, job_ids: Iterable[str], with_responses: bool, patience: Patience | None = None
    ) -> Flow[list[Found]]:
        ids = list(job_ids)
        view, most = ("full", MAX_IDS_FULL) if with_responses else ("summary", MAX_IDS)
        found: list[Found] = []
        for start in range(0, len(ids), most):
            part = ids[start : start + most]
            body = encode({"ids": part, "view": view})
            answer = yield from self._api.ask("POST", "/v1/jobs/status", body, patience=patience)
            found += items_of(answer, len(part), lambda item: Job.of(item["job"]))
        return found

    def wait(self, job_id: str, timeout_s: float | None) -> Flow[Job]:
        timer = Timer(timeout_s)
        while True:
            poll = self._poll("GET", _path(job_id), None, timer)
            job = Job.of((yield from self._within(timer, poll)))
            if job.state.is_final:
                return job
            yield timer.pause_s(f"Job {job_id} is still {job.state}", shortest_round_s=1.0)

    def as_completed(
        self, job_ids: Iterable[str | None], timeout_s: float | None
    ) -> Stream[tuple[str, Found]]:
        timer = Timer(timeout_s)
        coming = iter(job_ids)
        followed: dict[str, None] = {}
        round_s = 0.0
        while True:
            while len(followed) < MAX_IDS and (job_id := next(coming, END)) is not END:
                if job_id is not None:
                    followed[str(job_id)] = None
                elif followed:
                    break
            if not followed:
                return
            ended = yield from self._within(timer, self._ended(list(followed), timer, round_s))
            for job_id, job in ended:
                del followed[job_id]
                yield Given((job_id, job))
            what = f"{len(followed)} jobs have not ended"
            yield timer.pause_s(what, shortest_round_s=round_s if followed else 0.0)
            round_s = _round_s(len(ended), len(followed))

    def _ended(
        self, job_ids: list[str], timer: Timer, round_s: float
    ) -> Flow[list[tuple[str, Found]]]:
        """Those that have ended by the end of a round, with their responses: it is no shorter than
        `round_s`, unless all have."""
        asked = {"ids": job_ids, "view": "ended", "wait_for": "any", "gather_s": round_s}
        body = encode(asked)
        answer = yield from self._poll("POST", "/v1/jobs/status", body, timer)
        told = items_of(answer, len(job_ids), _ended_or_state)
        found = dict(zip(job_ids, told, strict=True))
        rest = [
            job_id for job_id, each in found.items() if isinstance(each, JobState) and each.is_final
        ]
        patience = timer.patience(self._api.patience_s)
        jobs = yield from self.jobs_status(rest, with_responses=True, patience=patience)
        found.update(zip(rest, jobs, strict=True))
        return [(job_id, each) for job_id, each in found.items() if not isinstance(each, JobState)]

    def iter_run(
        self, submissions: Iterable[Mapping[str, Any] | None]
    ) -> Stream[tuple[int, Found]]:
        most = PageSize(jobs=RUN_PAGE)
        patience = Patience(self._api.patience_s)
        coming = pages(submissions, most)
        places: dict[str, list[int]] = {}  #: of the jobs that are followed
        timer, index, has_more, round_s = Timer(None), 0, True, 0.0
        while has_more or places:
            while has_more and len(places) <= MAX_IDS - RUN_PAGE:
                page = next(coming, None)
                if page is None:
                    has_more = False
                    break
                jobs = [job for job in page if isinstance(job, bytes)]
                accepted = iter((yield from self._submit_page(jobs, most, patience)))
                for job in page:
                    outcome = next(accepted) if isinstance(job, bytes) else job
                    if isinstance(outcome, COME_BACK):
                        raise outcome
                    if isinstance(outcome, GristmillError):
                        yield Given((index, outcome))
                    else:
                        places.setdefault(outcome, []).append(index)
                    index += 1
                if len(page) < most.jobs:  # the next one may take its time
                    break
            if places:
                ended = yield from self._ended(list(places), timer, round_s)
                for job_id, found in ended:
                    for place in places.pop(job_id):
                        yield Given((place, found))
            if places:
                yield timer.pause_s("", shortest_round_s=round_s)
                round_s = _round_s(len(ended), len(places))

    def _poll(
        self, method: str, path: str, body: bytes | None, timer: Timer
    ) -> Flow[dict[str, Any]]:
        """An answer that the server may hold. While there is time, an API that is away is waited
        for: for as long as the timer says, or for a client's patience where it says nothing."""
        hold_s = timer.begin_round()
        query: Query = {"params": {"wait": hold_s} if hold_s else None, "hold_s": hold_s}
        patience = timer.patience(self._api.patience_s)
        return (yield from self._api.ask(method, path, body, patience=patience, **query))

    def _within(self, timer: Timer, flow: Flow[T]) -> Flow[T]:
        """A flow whose time is the timer's, if that has an end: an API that is away is no end."""
        try:
            return (yield from flow)
        except COME_BACK as error:
            if timer.is_endless:
                raise
            yield timer.left_s
            raise TimeoutError(f"Not known within the time: {error}") from error

    def result(self, job_id: str, timeout_s: float | None) -> Flow[dict[str, Any]]:
        job = yield from self.wait(job_id, timeout_s)
        if job.state is JobState.COMPLETED and job.response is None:
            raise ResponseRemoved()
        if job.state is not JobState.COMPLETED or job.response is None:
            raise JobFailed(job)
        return job.response

    def iter_jobs(self, limit: int | None, filters: Filters) -> Stream[Job]:
        query = query_of(filters)
        while limit is None or limit > 0:
            page = LIST_PAGE if limit is None else min(LIST_PAGE, limit)
            answer = yield from self._api.ask("GET", "/v1/jobs", params=query | {"limit": page})
            jobs = [Job.of(raw) for raw in list_of(answer, "data")]
            for job in jobs:
                yield Given(job)
            if not (jobs and answer.get("has_more")):
                return
            query["after"] = jobs[-1].id
            limit = None if limit is None else limit - page

    def limits(self) -> Flow[dict[str, Any]]:
        return (yield from self._api.ask("GET", "/v1/limits"))

    def usage(self, asked: Usage) -> Flow[dict[str, Any]]:
        query = {"by": ""} | query_of(asked)
        return (yield from self._api.ask("GET", "/v1/usage", params=query, hold_s=USAGE_S))

    def stream(self, job_id: str, after: str | None) -> Listening:
        return listen(self._api, f"{_path(job_id)}/events", after)

    # ── act ─────────────────────────────────────────────────────────────────────────────────────

    def replay(self, job_id: str) -> Flow[Job]:
        return Job.of((yield from self._api.ask("POST", f"{_path(job_id)}/replay")))

    def cancel(self, job_id: str) -> Flow[Job]:
        return Job.of((yield from self._api.ask("POST", f"{_path(job_id)}/cancel")))

    def cancel_many(self, job_ids: Iterable[str]) -> Flow[list[Cancelled]]:
        ids = list(job_ids)
        cancelled: list[Cancelled] = []
        for start in range(0, len(ids), MAX_IDS):
            part = ids[start : start + MAX_IDS]
            answer = yield from self._api.ask("POST", "/v1/jobs/cancel", encode({"ids": part}))
            cancelled += map(Cancelled.of, list_of(answer, "items"))
        return cancelled

    def cancel_chosen(self, chosen: Chosen) -> Stream[Cancelled]:
        told = {name: plain(value) for name, value in chosen.items() if value}
        body = encode({"filter": told, "limit": MAX_IDS})
        while True:
            answer = yield from self._api.ask("POST", "/v1/jobs/cancel", body)
            items = [Cancelled.of(item) for item in list_of(answer, "items")]
            for each in items:
                yield Given(each)
            # A page of nothing but refusals would come again for ever.
            if not answer.get("has_more") or all(each.error for each in items):
                return

    def purge(self, job_id: str) -> Flow[None]:
        yield from self._api.ask("DELETE", _path(job_id))


def _round_s(ended: int, left: int) -> float:
    """The shortest round after one in which so many jobs have ended."""
    if not ended:  # the server did not hold its answer
        return SLOW_ROUND_S
    return min(ROUND_S if ended >= MANY else SLOW_ROUND_S, EACH_S * left)


def _ended_or_state(item: dict[str, Any]) -> Job | JobState:
    """A job with its response, if that came along; else its state."""
    return Job.of(item["job"]) if "job" in item else JobState(item["state"])


def _path(job_id: str) -> str:
    """Raises `JobNotFound` for what would lead elsewhere."""
    if not job_id.strip("."):
        raise JobNotFound()
    return f"/v1/jobs/{quote(job_id, safe='', errors='replace')}"


def _page(jobs: Iterable[bytes]) -> bytes:
    return b'{"jobs":[' + b",".join(jobs) + b"]}"
