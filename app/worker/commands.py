"""What other threads tell the runner."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from app.jobs import Kind
from app.worker.pool.arrivals import Refusal
from app.worker.pool.ticket import Ticket
from app.worker.work import LeaseNews


@dataclass(frozen=True, slots=True)
class Revoked:
    """Celery revoked this job."""

    job_id: UUID
    kind: Kind = Kind.GENERATE  #: of the row that it gets if it has none


@dataclass(frozen=True, slots=True)
class Nameless:
    """A message without a task id was received, and dropped."""


@dataclass(frozen=True, slots=True)
class Flush:
    """The broker connection was lost: every message not yet acknowledged comes again."""


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more; give back what is not finished by `until_ns`, and end."""

    until_ns: int


Command = Ticket | Refusal | Nameless | Revoked | LeaseNews | Flush | Drain
