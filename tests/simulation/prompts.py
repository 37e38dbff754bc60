"""Prompts, what each may become, and the requests and rows of jobs with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Final
from uuid import UUID

from app.requests import bodies
from app.store.submissions import NewJob
from app.worker.suspects import KILLS_ALONE

PROMPTS: Final = (
    "good 1", "good 2", "good 4", "good 9", "good 3", "good 30", "nan 2", "poison 1", "poison 3",
    "oom 2", "oom 0", "hang 2",
)  # fmt: skip

OUTCOMES: Final = {
    "good": "completed",
    "nan": "failed",
    "poison": "failed",
    "hang": "failed",
}


@dataclass(slots=True)
class Expected:
    """What a job may become, whatever happens to it."""

    prompt: str
    states: set[str] = field(default_factory=set)
    kills_alone: int = 0  #: times that a fault killed the engine while it ran nothing else

    @property
    def is_unlucky(self) -> bool:
        """Faults hit it as often as its own guilt would have."""
        return self.kills_alone >= KILLS_ALONE


def outcome_of(words: str) -> str:
    """The state that a prompt ends in if nothing else happens."""
    return OUTCOMES.get(words.split()[0]) or ("failed" if words == "oom 0" else "completed")


@cache
def request_of(prompt: str) -> bodies.Request:
    return bodies.parse({"prompt": prompt})


def new_job(
    job_id: UUID, prompt: str, model: str, eta: datetime | None, expires: datetime | None
) -> NewJob:
    request = request_of(prompt)
    return NewJob(
        id=job_id,
        model=model,
        kind=request.kind,
        url=request.url,
        request=request.raw,
        fingerprint=request.fingerprint,
        source="api",
        not_before=eta,
        deadline=expires,
    )


def with_key(job: NewJob, key: str) -> NewJob:
    return NewJob(**{name: getattr(job, name) for name in job.__slots__} | {"idempotency_key": key})
