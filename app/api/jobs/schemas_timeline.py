"""What GET /v1/jobs/ID/timeline answers with, field by field."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, Field

from app.api.schemas import Cost, Energy, JobError, Money, TokenUsage
from app.books.timeline import WORDS, Awaits, Phase, Use
from app.jobs import AttemptOutcome, CloseReason, JobState, Kind

_PHASES: Final = "; ".join(f"{phase}: {words}" for phase, words in WORDS.items())


class TimelineSpan(BaseModel):
    """A part of the job's life. Each begins where the one before ends."""

    phase: Phase = Field(description=f"What the job was at. {_PHASES}.")
    attempt: int | None = Field(
        description="The attempt it is in; null while the job waited for one.", examples=[1]
    )
    began_at: datetime = Field(description="When it began, on the database's clock.")
    ended_at: datetime = Field(description="When it ended, or now.")
    ms: float = Field(
        description="Its length in milliseconds, exact to the microsecond; together they are "
        "`total_ms`.",
        examples=[104.217],
    )
    adjusted: bool = Field(
        description="Whether a stamp did not fit between its neighbours, as after a clock was set, "
        "and was moved.",
        examples=[False],
    )


class TimelineWorker(BaseModel):
    """A worker that had the job."""

    id: UUID = Field(description="Its id; a new one at each start.")
    name: str | None = Field(description="Its Celery node name.", examples=["celery@gpu-1"])
    host: str | None = Field(description="Its host.", examples=["gpu-1"])
    up: bool = Field(description="Whether its lease runs now.", examples=[True])


class TimelineBatch(BaseModel):
    """The admission batch that the job was claimed in, and who else was."""

    id: UUID = Field(description="The batch's id; also in the table `batches`.")
    engine: str | None = Field(description="The engine that ran it.", examples=["inflight"])
    close_reason: CloseReason | None = Field(
        description="Why it was closed: it was full (size, tokens), its oldest member had waited "
        "long enough (wait), or the engine had room (join)."
    )
    wait_ms: float | None = Field(
        description="What its oldest member had waited for company, in ms.", examples=[100.1]
    )
    jobs: int | None = Field(description="Jobs claimed, this one included.", examples=[16])
    sequences: int | None = Field(description="Sequences of those jobs.", examples=[16])
    mates: list[UUID] = Field(description="The other jobs of the same tenant.")
    others: int = Field(
        description="How many more there were: of other tenants, or deleted since.", examples=[0]
    )


class TimelineAttempt(BaseModel):
    """One try: who, in which company, how it ended and what it took."""

    number: int = Field(description="1 for the first.", examples=[1])
    worker: TimelineWorker = Field(description="The worker that ran it.")
    batch: TimelineBatch = Field(description="The batch it was claimed in.")
    claimed_at: datetime = Field(description="When the worker took the job.")
    ended_at: datetime | None = Field(description="When it ended; null while it runs.")
    ms: float = Field(description="From the one to the other, or to now.", examples=[536.083])
    outcome: AttemptOutcome | None = Field(description="How it ended; null while it runs.")
    charged: bool | None = Field(description="Whether it counts towards the most attempts.")
    error_code: str | None = Field(
        description="What ended it, if an error did.", examples=["worker_lost"]
    )
    billed_ns: int = Field(description="Device time that is billed.", examples=[412_000_000])
    wasted_ns: int = Field(description="Device time that brought no answer.", examples=[0])
    cost: Money | None = Field(description="What it is billed.", examples=["0.000004120"])


class DevicePart(BaseModel):
    """Device time of an attempt, by what it was for, and what that costs."""

    attempt: int = Field(description="The attempt's number.", examples=[1])
    use: Use = Field(
        description="The prompt (prefill), the output (decode), what a preemption had dropped "
        "(recomputed), the answer as a whole where the engine does not tell these apart "
        "(computed), or nothing that was answered (wasted)."
    )
    ns: int = Field(description="Nanoseconds.", examples=[52_000_000])
    cost: Money | None = Field(
        description="Its part of the cost, by time; null if the device has no price.",
        examples=["0.000000520"],
    )
    energy_j: float | None = Field(
        description="Its part of the joules, by time; null where nothing is known.", examples=[4.1]
    )


class Device(BaseModel):
    """Device time of all attempts, in nanoseconds."""

    total_ns: int = Field(description="Billed and wasted.", examples=[412_000_000])
    billed_ns: int = Field(description="What the job is billed for.", examples=[412_000_000])
    wasted_ns: int = Field(description="What nobody is billed for.", examples=[0])
    parts: list[DevicePart] = Field(
        description="What it was for. Adds up to `total_ns`, its costs to that of the job less "
        "what servers elsewhere asked for, and its joules to those of all attempts."
    )


EXAMPLE: Final[dict[str, Any]] = {
    "id": "0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a11",
    "object": "timeline",
    "state": "completed",
    "summary": "Completed after 640.300 ms.",
    "model": "smollm2-135m-instruct",
    "kind": "generate",
    "created_at": "2027-01-31T12:00:00Z",
    "until": "2027-01-31T12:00:00.640300Z",
    "total_ms": 640.3,
    "spans": [
        {
            "phase": phase,
            "attempt": attempt,
            "began_at": f"2027-01-31T12:00:00{f'.{began:06}' if began else ''}Z",
            "ended_at": f"2027-01-31T12:00:00.{ended:06}Z",
            "ms": (ended - began) / 1_000,
            "adjusted": False,
        }
        for phase, attempt, began, ended in (
            ("sent", None, 0, 3_100),
            ("held", None, 3_100, 104_217),
            ("claimed", 1, 104_217, 106_020),
            ("prefill", 1, 106_020, 180_500),
            ("decode", 1, 180_500, 633_900),
            ("commit", 1, 633_900, 640_300),
        )
    ],
    "awaits": None,
    "worker": None,
    "attempts": [
        {
            "number": 1,
            "worker": {
                "id": "0197c0de-0000-7000-8000-000000000001",
                "name": "celery@gpu-1",
                "host": "gpu-1",
                "up": True,
            },
            "batch": {
                "id": "0197c0de-0000-7000-8000-000000000002",
                "engine": "inflight",
                "close_reason": "join",
                "wait_ms": 101.0,
                "jobs": 3,
                "sequences": 3,
                "mates": ["0b9f1c5e-6c8f-4d3a-9a3f-0d9b7f2f6a12"],
                "others": 1,
            },
            "claimed_at": "2027-01-31T12:00:00.104217Z",
            "ended_at": "2027-01-31T12:00:00.640300Z",
            "ms": 536.083,
            "outcome": "succeeded",
            "charged": True,
            "error_code": None,
            "billed_ns": 412_000_000,
            "wasted_ns": 0,
            "cost": "0.000004120",
        }
    ],
    "device": {
        "total_ns": 412_000_000,
        "billed_ns": 412_000_000,
        "wasted_ns": 0,
        "parts": [
            {
                "attempt": 1,
                "use": "prefill",
                "ns": 52_000_000,
                "cost": "0.000000520",
                "energy_j": 4.1,
            },
            {
                "attempt": 1,
                "use": "decode",
                "ns": 360_000_000,
                "cost": "0.000003600",
                "energy_j": 27.4,
            },
        ],
    },
    "preemptions": 0,
    "preempted_ms": 0.0,
    "usage": {"input_tokens": 31, "cached_tokens": 16, "output_tokens": 64, "total_tokens": 95},
    "cost": {
        "amount": "0.000004120",
        "currency": "EUR",
        "price_id": "cpu",
        "per_device_hour": "0.036000000",
        "upstream": None,
        "charge": None,
        "device_seconds": 0.412,
        "wasted_seconds": 0.0,
    },
    "energy": {
        "energy_j": 31.5,
        "wasted_j": 0.0,
        "energy_method": "measured",
        "energy_boundary": "gpu",
        "carbon_g": None,
    },
    "error": None,
    "replay_of": None,
    "replayed_by": None,
    "notes": [],
}


class Timeline(BaseModel):
    """What a job waited for and what it took: every millisecond from its acceptance to its end, or
    to now, and every nanosecond of device time."""

    model_config = ConfigDict(json_schema_extra={"example": EXAMPLE})

    id: UUID = Field(description="The job's id.")
    object: Literal["timeline"] = Field("timeline", description="Always `timeline`.")
    state: JobState = Field(description="The job's state.")
    summary: str = Field(
        description="A sentence for people.", examples=["Completed after 640.300 ms."]
    )
    model: str = Field(description="The model asked.", examples=["smollm2-135m-instruct"])
    kind: Kind = Field(description="What the model does.")
    created_at: datetime = Field(description="When the job was accepted.")
    until: datetime = Field(description="When it ended; now, if it has not.")
    total_ms: float = Field(
        description="From the one to the other, in milliseconds.", examples=[640.3]
    )
    spans: list[TimelineSpan] = Field(
        description="Where that time went. A phase that took none is left out."
    )
    awaits: Awaits | None = Field(
        description="What an open job waits for: its time (time), rescue to send its message "
        "(sending), a worker with room (worker), any worker that serves its model (no_worker), "
        "company or room in the worker that has it (batch), its answer (engine), its worker to "
        "stop it (stop), rescue to take it from a worker that is lost (rescue); null once it is "
        "final."
    )
    worker: TimelineWorker | None = Field(description="Who has an open job, if a worker has.")
    attempts: list[TimelineAttempt] = Field(description="Its tries, oldest first.")
    device: Device = Field(description="Where the device time went.")
    preemptions: int | None = Field(
        description="Times it gave way to others in the engine; null if the engine does not tell.",
        examples=[0],
    )
    preempted_ms: float | None = Field(
        description="For how long: a part of the time in the engine, in milliseconds; of several "
        "sequences the sum.",
        examples=[0.0],
    )
    usage: TokenUsage | None = Field(description="Tokens; null until it is final.")
    cost: Cost | None = Field(description="What it is charged; null until it is final.")
    energy: Energy | None = Field(description="The joules it took; null until it is final.")
    error: JobError | None = Field(description="Why it has no answer.")
    replay_of: UUID | None = Field(description="The ended job that this one runs once more.")
    replayed_by: UUID | None = Field(description="The job that runs this one once more.")
    notes: list[str] = Field(
        description="What else explains it, for people.",
        examples=[["Its message was lost and sent again: 2 times."]],
    )
