"""Prompts, what each may become, and the requests and rows of jobs with them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from typing import Any, Final
from uuid import UUID

from app.requests import bodies
from app.store.submissions import NewJob
from app.worker.suspects import KILLS_ALONE
from tests.simulation.engine import MAX_ROWS

PROMPTS: Final = (
    "good 1", "good 2", "good 4", "good 9", "good 3", "good 30", "nan 2", "poison 1", "poison 3",
    "oom 2", "oom 0", "hang 2", "good 2 x2", "good 3 x3", "good 4 x4", "nan 2 x2", "poison 2 x3",
    "good 1 x5", "good 1 m200", "good 2 unstorable", "good 60",
)  # fmt: skip
"""What the engine does with it and after how many steps; then, how many sequences it asks for, how
many tokens at most, and whether the store refuses its answer."""

UNSTORABLE: Final = "unstorable"

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
    model: str
    states: set[str] = field(default_factory=set)
    limit_s: float | None = None  #: that its row must have
    kills_alone: int = 0  #: times that a fault killed the engine while it ran nothing else

    @property
    def is_unlucky(self) -> bool:
        """Faults hit it as often as its own guilt would have."""
        return self.kills_alone >= KILLS_ALONE


def outcome_of(words: str) -> str:
    """The state that a prompt ends in if nothing else happens."""
    if is_doomed(words) or UNSTORABLE in words:
        return "failed"
    return OUTCOMES.get(words.split()[0]) or ("failed" if words == "oom 0" else "completed")


def is_doomed(prompt: str) -> bool:
    """Whether no worker can run it."""
    return num_sequences(prompt) > MAX_ROWS or _option(prompt, "m") is not None


def num_sequences(prompt: str) -> int:
    return int(_option(prompt, "x") or 1)


def _option(prompt: str, letter: str) -> str | None:
    found = (word[1:] for word in prompt.split()[2:] if re.fullmatch(rf"{letter}\d+", word))
    return next(found, None)


@cache
def request_of(prompt: str) -> bodies.Request:
    body: dict[str, Any] = {"prompt": prompt, "n": num_sequences(prompt)}
    if most := _option(prompt, "m"):
        body["max_tokens"] = int(most)
    return bodies.parse(body)


def new_job(
    job_id: UUID,
    prompt: str,
    model: str,
    eta: datetime | None = None,
    expires: datetime | None = None,
    priority: int = 0,
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
        priority=priority,
        not_before=eta,
        deadline=expires,
    )


def with_key(job: NewJob, key: str) -> NewJob:
    return NewJob(**{name: getattr(job, name) for name in job.__slots__} | {"idempotency_key": key})
