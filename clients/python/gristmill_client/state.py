"""The states of a job."""

from __future__ import annotations

import enum


class JobState(enum.StrEnum):
    QUEUED = "queued"  #: waits for a worker
    RUNNING = "running"  #: a worker has it
    COMPLETED = "completed"  #: answered
    FAILED = "failed"  #: ended by an error
    CANCELLED = "cancelled"  #: ended by its caller; partial output is kept where there is some
    EXPIRED = "expired"  #: its deadline passed first; partial output is kept where there is some

    @property
    def is_final(self) -> bool:
        return self not in (JobState.QUEUED, JobState.RUNNING)
