"""Jobs whose callers wait for the answer in the same call, in front of background work.

    read    the body arrives, is understood by its door and checked          RequestError
    place   it goes to the front of the queue, if anybody serves its model   QueueFull, NoWorker
    ended   its end is waited for, as long as its caller waits               TimedOut, its own error

Its deadline is the caller's: nobody computes for one who has gone. One who goes before the end
takes the job along, unless an Idempotency-Key may bring somebody back for it. As with all jobs the
row is the truth: a worker that dies, or this process, changes nothing of that.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

from fastapi import Request
from starlette.requests import ClientDisconnect

from app import errors
from app.api.caller import Caller
from app.api.idempotency import parse_key
from app.api.reader import Snapshot
from app.api.schemas import Job
from app.api.services import Services
from app.api.wire import raw_bodies
from app.errors import GristmillError, NoWorker, RequestError, TimedOut, Unavailable
from app.intake.outlook import Reason, asked_of
from app.jobs import LIVE_PRIORITY, JobState
from app.store import cancellation
from app.store.submissions import NewJob

log = logging.getLogger(__name__)

PATIENCE: Final = ("x-stainless-read-timeout", "x-stainless-timeout")
"""Headers in which OpenAI's and Anthropic's clients say for how many seconds they wait."""

LEAST_PATIENCE_S: Final = 1.0
"""Of a caller that says less: it goes when it likes, and a deadline that is over is no job's."""

STOPPING: Final = "The API is being shut down."

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Understood(Generic[T]):
    """A body, as its door reads it."""

    submission: dict[str, Any]  #: url, body …: what `Submitter.check` takes
    told: T  #: what the door itself has to know of it, as whether to stream


@dataclass(frozen=True, slots=True)
class Placed:
    """A job in the queue, and how long its caller waits for it."""

    id: UUID
    tenant: str
    timeout_s: float
    is_own: bool  #: of this caller alone, and so to be cancelled when it goes
    at: float = field(default_factory=time.monotonic)

    def expect_time(self) -> None:
        """Raises `TimedOut` if its caller has waited for all of its time: a job that nobody begins
        may be ended by rescue later, or not at all while that is away."""
        if time.monotonic() > self.at + self.timeout_s:
            raise TimedOut()


async def read(
    request: Request,
    here: Services,
    who: Caller,
    understand: Callable[[dict[str, Any]], Understood[T]],
    look_up: Callable[[dict[str, Any]], Awaitable[dict[str, Any]]] | None = None,
) -> tuple[NewJob, T]:
    """The job that a call asks for, checked, and what its door has to know.

    `understand` makes a submission of the body; it runs in a thread. Before, `look_up` may complete
    the body with what it refers to. Fields that are not known are left out: clients of other
    protocols send those of later versions. Raises `RequestError`.
    """
    most = here.settings.api.max_body_bytes
    key = request.headers.get("idempotency-key")
    async with raw_bodies.body_of(request, most, here.room) as raw:
        await here.expect_room(1)
        check = partial(_checked, here, who.tenant, key, understand)
        if look_up is None:
            return await here.work.run(len(raw), lambda: check(_object(raw)))
        value = await look_up(await here.work.run(len(raw), _object, raw))
        return await here.work.run(len(raw), check, value)


def _object(raw: bytearray) -> dict[str, Any]:
    value = raw_bodies.parse_json(raw)
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object.", param="body")
    return value


def _checked(
    here: Services,
    tenant: str,
    key: str | None,
    understand: Callable[[dict[str, Any]], Understood[T]],
    value: dict[str, Any],
) -> tuple[NewJob, T]:
    understood = understand(value)
    submission = understood.submission
    if key is not None:
        submission = submission | {"idempotency_key": parse_key(key)}
    job = here.submitter.check(submission, tenant=tenant, unknown_fields="ignore")
    return job, understood.told


async def place(request: Request, here: Services, job: NewJob) -> Placed:
    """Put a job in front of background work. Raises `NoWorker`, `QueueFull` and `Unavailable`, and
    then there is no such job."""
    timeout_s = _patience_s(request.headers, here.settings.api.live_timeout_s)
    outlook = here.submitter.outlook
    try:
        await _expect_worker(here, job)
        deadline = outlook.now() + timedelta(seconds=timeout_s)
        stored = await here.writer.store(replace(job, priority=LIVE_PRIORITY, deadline=deadline))
        submitted = stored.only
    except GristmillError:
        here.metrics.count_submissions("refused")
        raise
    here.metrics.count_submissions("accepted" if submitted.created else "replayed")
    is_own = submitted.created and job.idempotency_key is None
    return Placed(submitted.job_id, job.tenant, timeout_s, is_own)


async def _expect_worker(here: Services, job: NewJob) -> None:
    """Raises `NoWorker` unless one is up, or starts, that serves the job's model."""
    outlook = here.submitter.outlook
    if outlook.expected([asked_of(job)])[0].reason is Reason.NO_WORKER:
        await here.read(outlook.look_if_old)
        if outlook.expected([asked_of(job)])[0].reason is Reason.NO_WORKER:
            raise NoWorker(f"No worker that serves the model {job.model} is up. Try again later.")


def _patience_s(headers: Mapping[str, str], most_s: float) -> float:
    """How long a caller waits: what it says, as far as that is a time, or `most_s`."""
    found = [most_s]
    for name in PATIENCE:
        with suppress(KeyError, ValueError):
            seconds = float(headers[name])
            if math.isfinite(seconds) and seconds > 0:
                found.append(max(seconds, LEAST_PATIENCE_S))
    return min(found)


async def ended(request: Request, here: Services, placed: Placed) -> Job:
    """The job when it has completed. Raises what it ended with, `TimedOut`, and `ClientDisconnect`
    if the caller has gone."""
    return completed(await while_there(request, here, placed, _final(here, placed)))


def completed(seen: Snapshot) -> Job:
    """A final job with its response. Raises what it ended with if it did not complete."""
    job = seen.job
    assert isinstance(job, Job)
    if job.state is JobState.COMPLETED:
        if job.response is None:
            raise errors.ResponseRemoved()
        return job
    raise error_of(job)


def error_of(job: Job) -> GristmillError:
    """What a job ended with that did not complete."""
    if job.state is JobState.CANCELLED:
        return errors.Cancelled()
    if job.state is JobState.EXPIRED or job.error is None:
        return TimedOut()
    return errors.of_code(job.error.code, job.error.message)


async def while_there(request: Request, here: Services, placed: Placed, work: Awaitable[T]) -> T:
    """What `work` brings, if the caller is there until then; its job is cancelled if it is not, or
    if that fails."""
    doing, going = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({doing, going}, return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return doing.result()
    except BaseException:
        await cancel(here, placed)
        raise
    finally:
        doing.cancel()
        going.cancel()


async def _gone(request: Request) -> None:
    """Returns when the caller has; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _final(here: Services, placed: Placed) -> Snapshot:
    def still_open(seen: Snapshot) -> list[UUID]:
        return [] if seen.is_final else [placed.id]

    read = partial(here.job, placed.tenant, placed.id)
    seen = await here.waiters.until(read, still_open, [placed.id], placed.timeout_s)
    if seen.is_final:
        return seen
    raise Unavailable(STOPPING) if here.waiters.is_closed else TimedOut()


async def cancel(here: Services, placed: Placed) -> None:
    """Nobody waits for it any more. What cannot be cancelled now ends by its deadline."""
    if not placed.is_own:
        return
    try:
        state = await here.commit(cancellation.end, placed.id, tenant=placed.tenant)
        await here.tell_workers([placed.id] if state is JobState.RUNNING else [])
    except GristmillError as error:
        log.info("Not cancelled: %s", error, extra={"action": "cancel_failed"})
