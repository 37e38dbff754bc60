"""How a job is answered: what was read of it, for how long it was waited for, and its ETag."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Final
from uuid import UUID

from fastapi import Depends, Header, Query, Response
from pydantic_core import to_json

from app.api.reader import Snapshot
from app.api.services import Here, Services
from app.api.views import job_of, view_of_new
from app.intake.submit import Stored

log = logging.getLogger(__name__)

JSON: Final = "application/json"
EVENTS: Final = "text/event-stream"
LOOK_AGAIN: Final = {"Retry-After": "1"}
"""Of an answer that tells of a job which is not final."""
_PREFER_WAIT: Final = re.compile(r"(?:^|[,;])\s*wait\s*=\s*\"?(\d{1,9})\"?\s*(?:[,;]|$)", re.I)
_TAG: Final = re.compile(r'(?:W/)?("[^"]*")')


def described(
    answer: str,
    errors: dict[int | str, dict[str, Any]],
    *,
    is_streamable: bool = False,
) -> dict[str, Any]:
    """What a route is told of its answer, in another protocol's shape, and of its errors."""
    content = {JSON: {"schema": {"type": "object"}}}
    if is_streamable:
        content[EVENTS] = {"schema": {"type": "string"}}
    found: dict[int | str, dict[str, Any]] = {200: {"description": answer, "content": content}}
    return {"response_model": None, "responses": found | errors}


def json_of(value: object) -> Response:
    return Response(to_json(value), media_type=JSON)


@dataclass(frozen=True, slots=True)
class Hold:
    """How long the caller lets us hold the answer until the job is final."""

    seconds: float
    is_preferred: bool  #: asked for by a Prefer header, whose fulfilment is to be told

    @classmethod
    async def of(
        cls,
        here: Here,
        wait: Annotated[
            float | None,
            Query(
                ge=0,
                allow_inf_nan=False,
                description="Hold the answer until the job is final, for this many seconds at "
                "most. The server has a limit of its own, 60 by default.",
                examples=[30],
            ),
        ] = None,
        prefer: Annotated[
            str | None,
            Header(
                description="`wait=N` is the same as the parameter wait (RFC 7240).",
                examples=["wait=30"],
            ),
        ] = None,
    ) -> Hold:
        limit = here.settings.api.max_wait_s
        if wait is not None:
            return cls(min(wait, limit), False)
        named = _PREFER_WAIT.search(prefer or "")
        return cls(min(float(named[1]), limit), True) if named else cls(0.0, False)

    @property
    def headers(self) -> dict[str, str]:
        """What tells the caller that its preference was taken."""
        return {"Preference-Applied": f"wait={self.seconds:g}"} if self.is_preferred else {}

    def seconds_at(self, here: Services) -> float:
        """How long the answer is held: not at all if too many are."""
        is_full = here.waiters.num_waiting >= here.settings.api.max_long_polls
        return 0.0 if is_full else self.seconds


Held = Annotated[Hold, Depends(Hold.of)]


async def look(here: Services, tenant: str, job_id: UUID, hold: Hold) -> Snapshot:
    """A tenant's job once it is final, or as it is at the end of the hold: now, if too many are."""

    def still_open(seen: Snapshot) -> list[UUID]:
        return [] if seen.is_final else [job_id]

    read = partial(here.job, tenant, job_id)
    return await here.waiters.until(read, still_open, [job_id], hold.seconds_at(here))


async def look_at_new(here: Services, tenant: str, stored: Stored, hold: Hold) -> Snapshot:
    """The job of a submission. One that is new is accepted, whatever keeps it from being read, and
    is not read if the answer is not to be held."""
    if not stored.new_jobs:
        return await look(here, tenant, stored.only.job_id, hold)
    if hold.seconds:
        try:
            return await look(here, tenant, stored.only.job_id, hold)
        except Exception as error:
            why = type(error).__name__
            log.warning("A new job cannot be read: %s.", why, extra={"action": "new_job_not_read"})
    [job] = stored.new_jobs
    view = view_of_new(job, stored.at)
    return Snapshot.of(job_of(view, here.submitter.outlook.of(view)))


def answer(
    job: Snapshot,
    *,
    status: int = 200,
    hold: Hold | None = None,
    headers: dict[str, str] | None = None,
    if_none_match: str | None = None,
) -> Response:
    """The job, or 304 if the caller has it as it is."""
    told = {"ETag": job.etag, "Cache-Control": "private, no-cache"} | (headers or {})
    if not job.is_final:
        told |= LOOK_AGAIN
    if hold:
        told |= hold.headers
    if if_none_match is not None and _has_tag(if_none_match, job.etag):
        return Response(status_code=304, headers=told)
    return Response(job.body, status, told, media_type=JSON)


def _has_tag(if_none_match: str, etag: str) -> bool:
    """Weak comparison, as RFC 9110 asks for here."""
    return if_none_match.strip() == "*" or etag.removeprefix("W/") in _TAG.findall(if_none_match)
