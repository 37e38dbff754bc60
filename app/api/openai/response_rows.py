"""Responses as they are read back: the `response` object of a job, made of its rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NoReturn
from uuid import UUID

from app.api.schemas import Job, JobSummary
from app.api.services import Services
from app.errors import JobNotFound, JobUnreadable, RequestError
from app.ids import id_in
from app.jobs import JobState
from app.requests.bodies import Url, parse_stored
from app.requests.response import RESPONSE_PREFIX, ResponsesBody
from app.requests.response_answer import ended, response_id, response_shell
from app.store.asked import Asked, asked
from app.store.database import Database

_OPEN: Final = {JobState.QUEUED: "queued", JobState.RUNNING: "in_progress"}


def job_id_in(response_id: str) -> UUID:
    """Raises `JobNotFound` for what is no id of a response."""
    return id_in(RESPONSE_PREFIX, response_id) or _not_found()


def _not_found() -> NoReturn:
    raise JobNotFound("There is no such response.")


@dataclass(frozen=True)
class Row:
    """A response that may be told of: it is this tenant's, stored, and not deleted."""

    job: Job
    asked: Asked
    body: ResponsesBody

    @cached_property
    def response(self) -> dict[str, Any]:
        return response_of(self.job, self.body)


async def row_of(here: Services, tenant: str, response_id: str) -> Row:
    """Raises `JobNotFound`: for one whose answer is not kept any more, as well."""
    return await _row(here, tenant, await _job(here, tenant, response_id))


async def response_at(here: Services, tenant: str, response_id: str) -> dict[str, Any]:
    """The response as it is now; of one that has ended the answer tells all. Raises as `row_of`
    does."""
    job = await _job(here, tenant, response_id)
    if job.response is None:
        return (await _row(here, tenant, job)).response
    return answered(job) if job.response.get("store", True) else _not_found()


async def _job(here: Services, tenant: str, response_id: str) -> Job:
    job = whole((await here.job(tenant, job_id_in(response_id))).job)
    is_gone = job.state is JobState.COMPLETED and job.response is None
    if job.url != Url.RESPONSES or job.purged_at is not None or is_gone:
        _not_found()
    return job


async def _row(here: Services, tenant: str, job: Job) -> Row:
    found = await here.read(_asked, here.database, job.id, tenant)
    if found is None or not found[1].store:
        _not_found()
    return Row(job, *found)


def _asked(database: Database, job_id: UUID, tenant: str) -> tuple[Asked, ResponsesBody] | None:
    """Not for the event loop: a conversation may be long."""
    with database.autocommit(looks_up=True) as connection:
        found = asked(connection, job_id, tenant=tenant)
    return None if found is None else (found, body_of(found))


def whole(job: JobSummary | None) -> Job:
    assert isinstance(job, Job)  # single jobs are read with their answers
    return job


def body_of(found: Asked) -> ResponsesBody:
    """Raises `JobUnreadable` for one that was written by hand, or by a later version."""
    try:
        body = parse_stored(found.request, found.url, found.format).sent
    except RequestError:
        raise JobUnreadable() from None
    assert isinstance(body, ResponsesBody)
    return body


def shell_of(job: Job, body: ResponsesBody) -> dict[str, Any]:
    """The response without what has become of it."""
    return response_shell(
        body,
        job_id=job.id,
        model=job.model,
        created_at=int(job.created_at.timestamp()),
        metadata=job.metadata,
    )


def response_of(job: Job, body: ResponsesBody) -> dict[str, Any]:
    """The response as it is now."""
    if (status := _OPEN.get(job.state)) is not None:
        return shell_of(job, body) | {"status": status}
    if job.response is not None:
        return answered(job)
    if job.error is None:
        return ended(shell_of(job, body), job.state)
    return ended(shell_of(job, body), job.state, job.error.code, job.error.message)


def answered(job: Job) -> dict[str, Any]:
    """The response of a job that has one: what its worker told, with what the row knows better."""
    told = job.response
    assert told is not None
    known: dict[str, Any] = {
        "id": response_id(job.id),
        "created_at": int(job.created_at.timestamp()),
        "metadata": job.metadata,
    }
    if told["status"] == "completed" and job.finished_at is not None:
        known["completed_at"] = int(job.finished_at.timestamp())
    return told | known


async def history_of(here: Services, tenant: str, previous: str) -> list[dict[str, Any]]:
    """The conversation that ends with a response: what it was asked, and what it answered.

    Raises `RequestError` if there is none, or it is not complete.
    """
    try:
        row = await row_of(here, tenant, previous)
    except JobNotFound:
        raise RequestError(
            "There is no such response to go on from.", param="previous_response_id"
        ) from None
    if row.job.state is not JobState.COMPLETED:
        raise RequestError(
            f"The response to go on from is {row.response['status']}: only what is complete has an "
            "answer to go on from.",
            param="previous_response_id",
        )
    asked_for = row.asked.request
    given = asked_for["input"]
    items = [{"role": "user", "content": given}] if isinstance(given, str) else given
    return [*asked_for.get("history", ()), *items, *map(_kept, row.response["output"])]


def _kept(item: dict[str, Any]) -> dict[str, Any]:
    """An output item without what the next answer has no use for."""
    if item["type"] != "message":
        return item
    parts = [{"type": part["type"], "text": part["text"]} for part in item["content"]]
    return item | {"content": parts}
