"""Batches that callers submit: thousands of requests as one, each line a job. Pure.

    validating ──▶ in_progress ──▶ finalizing ──▶ completed | expired
        │    └──────────┬────────▶ cancelling ──▶ cancelled
        └──▶ failed                                  (its lines are wrong: nothing runs)

A line has an outcome once it is over, be it that its job has ended, that its request was refused,
or that the batch was over before it became a job. With the outcome it gets its place in one of the
batch's two files. So at any time

    total = open + succeeded + errored + cancelled + expired

and what is in the files is what is counted. A batch ends when no line is open: one that was
cancelled, or whose time is over, keeps what was finished.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from app import ids
from app.jobs import JobState


class Door(enum.StrEnum):
    """Whose protocol a batch was submitted in: it decides the shape of its lines."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"


class BatchState(enum.StrEnum):
    VALIDATING = "validating"  #: its lines are read; none is a job yet
    FAILED = "failed"  #: its lines are wrong, and `errors` says which and why; nothing ran
    IN_PROGRESS = "in_progress"  #: lines become jobs as the queue has room, and end
    FINALIZING = "finalizing"  #: every line has its outcome; the files are written
    COMPLETED = "completed"  #: every line had its turn, however it ended
    EXPIRED = "expired"  #: its time was over before every line had its turn
    CANCELLING = "cancelling"  #: lines that run are stopped, those that wait are cancelled
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        return self in FINAL


FINAL: Final = frozenset(
    {BatchState.FAILED, BatchState.COMPLETED, BatchState.EXPIRED, BatchState.CANCELLED}
)

TRANSITIONS: Final[dict[BatchState, frozenset[BatchState]]] = {
    BatchState.VALIDATING: frozenset(
        {BatchState.FAILED, BatchState.IN_PROGRESS, BatchState.CANCELLING}
    ),
    BatchState.IN_PROGRESS: frozenset({BatchState.FINALIZING, BatchState.CANCELLING}),
    BatchState.CANCELLING: frozenset({BatchState.CANCELLED}),
    BatchState.FINALIZING: frozenset({BatchState.COMPLETED, BatchState.EXPIRED}),
    **{state: frozenset() for state in FINAL},
}

CANCELLABLE: Final = frozenset(
    state for state, others in TRANSITIONS.items() if BatchState.CANCELLING in others
)
"""Whoever cancels one that is cancelling or cancelled is told so; others cannot be cancelled."""


class LineOutcome(enum.StrEnum):
    SUCCEEDED = "succeeded"  #: its job completed
    ERRORED = "errored"  #: its request was refused, or its job failed
    CANCELLED = "cancelled"  #: its job was cancelled, or it never became one
    EXPIRED = "expired"  #: the same for the time of the batch


_OUTCOMES: Final = {
    JobState.COMPLETED: LineOutcome.SUCCEEDED,
    JobState.FAILED: LineOutcome.ERRORED,
    JobState.CANCELLED: LineOutcome.CANCELLED,
    JobState.EXPIRED: LineOutcome.EXPIRED,
}


def outcome_of(state: JobState) -> LineOutcome:
    """What the end of its job is to a line."""
    return _OUTCOMES[state]


class LineFile(enum.StrEnum):
    """The files of a batch."""

    OUTPUT = "output"
    ERRORS = "errors"


def file_of(door: Door, outcome: LineOutcome) -> LineFile:
    """Where a line is told. To Anthropic's clients all are results."""
    if door is Door.ANTHROPIC or outcome is LineOutcome.SUCCEEDED:
        return LineFile.OUTPUT
    return LineFile.ERRORS


@dataclass(frozen=True, slots=True)
class Counts:
    """How many lines a batch has, what became of them, and how many are in each file."""

    total: int = 0
    succeeded: int = 0
    errored: int = 0
    cancelled: int = 0
    expired: int = 0
    output: int = 0
    errors: int = 0

    @property
    def ended(self) -> int:
        return self.succeeded + self.errored + self.cancelled + self.expired

    @property
    def open(self) -> int:
        return self.total - self.ended

    def placed(
        self, door: Door, outcomes: Iterable[LineOutcome]
    ) -> tuple[Counts, list[tuple[LineFile, int]]]:
        """The counts once so many more lines have ended; and for each, in order, its file and its
        place in that, from 1 on."""
        now = self
        places: list[tuple[LineFile, int]] = []
        for outcome in outcomes:
            file = file_of(door, outcome)
            place = getattr(now, file) + 1
            now = replace(
                now, **{outcome.value: getattr(now, outcome.value) + 1, file.value: place}
            )
            places.append((file, place))
        return now, places


def end_of(state: BatchState, counts: Counts) -> BatchState:
    """How a batch ends that has no open line."""
    if state is BatchState.CANCELLING:
        return BatchState.CANCELLED
    return BatchState.EXPIRED if counts.expired else BatchState.COMPLETED


def outcome_without_job(state: BatchState, *, is_over: bool) -> LineOutcome | None:
    """What becomes of a line that is no job yet; None: it becomes one."""
    if state is BatchState.CANCELLING:
        return LineOutcome.CANCELLED
    return LineOutcome.EXPIRED if is_over else None


_PREFIXES: Final = {Door.OPENAI: "batch_", Door.ANTHROPIC: "msgbatch_"}


def name_of(door: Door, batch_id: UUID) -> str:
    return ids.name_of(_PREFIXES[door], batch_id)


def id_in(door: Door, name: str) -> UUID | None:
    """The id in a name that `name_of` wrote; None in any other text."""
    return ids.id_in(_PREFIXES[door], name)
