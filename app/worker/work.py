"""What the runner keeps of a job while it is in this worker.

Ticket ──register──▶ Job ──batch, claim──▶ Job with a Run ──finish──▶ row, then ack
   └───────────────batch, take───────────────────▲
"""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass, field, replace
from uuid import UUID

from app.books.energy import Paid
from app.engines.base import Generation, Sequence
from app.errors import GristmillError
from app.jobs import SUSPECT_AFTER, CloseReason, JobState, int64, new_id
from app.requests.bodies import Request
from app.requests.prepare import Prepared
from app.store.claims import Finished
from app.worker.batcher import Candidate
from app.worker.pool.ticket import Ticket


@dataclass(slots=True, eq=False)
class Batch:
    """An admission batch: the jobs that were claimed together."""

    id: UUID
    model: str
    reason: CloseReason
    wait_ns: int  #: of its oldest member
    num_jobs: int = 0
    num_claimed: int | None = None  #: sequences of its jobs, if its claim did not know
    num_sequences: int = 0  #: answered so far
    useful_tokens: int = 0
    padded_tokens: int = 0
    device_ns: int = 0  #: of its members so far, what was wasted included


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """A batch of jobs whose rows nobody here has read, and that are to be claimed all the same."""

    batch: Batch
    attempts: dict[UUID, UUID]  #: by job, the attempt that its claim is to open


@dataclass(slots=True, eq=False)
class Run:
    """A granted attempt. Its stamps are on the database's clock: `claimed_at` plus what this
    machine's monotonic clock measured since."""

    attempt_id: UUID
    number: int  #: of the attempt: 1 for the job's first
    batch: Batch
    claimed_at: dt.datetime
    created_at: dt.datetime  #: of the job
    claimed_ns: int
    generations: list[Generation | None]
    began_ns: int | None = None  #: when it first went into the engine; it may be claimed before
    device_ns: int = 0  #: shares of the device's time in its answers so far
    wasted_ns: int = 0  #: shares that brought no answer
    deaths: int = 0  #: engine processes that were lost while they ran it
    deaths_alone: int = 0  #: those of them that ran nothing else
    paid: Paid | None = None  #: its energy, once it is told; asked for once
    ending: Ending | None = None  #: why it is being cut short
    record: Finished | None = None  #: what is to be committed; made once, so that it is priced once
    is_withheld: bool = False  #: the store refused the answer; the record goes without it

    def forget_answers(self, took_ns: int) -> None:
        """The engine dropped the job: what it had answered is computed again. The rest took
        `took_ns`."""
        self.generations = [None] * len(self.generations)
        self.wasted_ns += self.device_ns + took_ns
        self.device_ns = 0
        self.batch.device_ns += took_ns

    @property
    def spent_ns(self) -> int:
        """All that the attempt has taken of the device's time."""
        return self.device_ns + self.wasted_ns

    @property
    def is_over(self) -> bool:
        return None not in self.generations

    @property
    def ended_ns(self) -> int:
        """When it had the last of its answers so far; 0 without any."""
        return max((each.finished_ns for each in self.generations if each is not None), default=0)

    @property
    def lasted_ns(self) -> int:
        """From when it went into the engine to the last of its answers so far."""
        return self.ended_ns - (self.began_ns or 0)

    def stamp(self, monotonic_ns: int) -> dt.datetime:
        """A monotonic reading of this machine as a time of the database, not before the claim."""
        since_ns = max(0, monotonic_ns - self.claimed_ns)
        return self.claimed_at + dt.timedelta(microseconds=since_ns / 1_000)


@dataclass(frozen=True, slots=True)
class Ending:
    """The final state of a job that does not run to its end, and the error that says why."""

    state: JobState
    code: str
    message: str

    @classmethod
    def failed(cls, error: GristmillError) -> Ending:
        return cls(JobState.FAILED, error.code, error.message)


CANCELLED = Ending(JobState.CANCELLED, "cancelled", "The job was cancelled.")
EXPIRED = Ending(JobState.EXPIRED, "deadline_exceeded", "The deadline passed before the job ended.")
TIMED_OUT = Ending(JobState.FAILED, "time_limit", "The time limit of the job passed.")


@dataclass(slots=True, eq=False)
class Doomed:
    """A job that cannot run, here or anywhere: it ends without a run."""

    ticket: Ticket
    model: str
    ending: Ending
    attempt_id: UUID = field(default_factory=new_id)
    batch_id: UUID = field(default_factory=new_id)

    @property
    def id(self) -> UUID:
        return self.ticket.job_id


@dataclass(slots=True, eq=False)
class Job:
    """A job that this worker has registered and not yet ended."""

    ticket: Ticket
    model: str
    request: Request
    prepared: Prepared
    priority: int
    deadline: dt.datetime | None
    tenant: str
    losses: int  #: workers that were lost while they ran it
    arrived_ns: int  #: when its message came; the batcher counts from here
    registered_ns: int  #: when its row was known; what the row calls batch wait counts from here
    expires_ns: int | None = None  #: its deadline on this machine's clock, as far as is known
    time_limit_s: float | None = None  #: from when it runs
    stream_events: bool = False  #: its tokens are told as they come
    run: Run | None = None
    attempt_id: UUID = field(default_factory=new_id)  #: of the attempt that its claim is to open
    closed_ns: int = 0  #: when its batch was closed

    @property
    def id(self) -> UUID:
        return self.ticket.job_id

    @property
    def num_sequences(self) -> int:
        return self.request.num_sequences

    @property
    def batch_wait_ns(self) -> int:
        return max(0, self.closed_ns - self.registered_ns)

    @property
    def is_suspect(self) -> bool:
        """Whether it may be what its workers died of."""
        return self.losses >= SUSPECT_AFTER

    def is_over_limit(self, now_ns: int) -> bool:
        """Whether it has run for longer than it may. While it is claimed and waits it does not."""
        began_ns = self.run.began_ns if self.run else None
        if self.time_limit_s is None or began_ns is None:
            return False
        return now_ns - began_ns > self.time_limit_s * 1e9

    @property
    def ended_in_time(self) -> bool:
        """Whether it has all its answers, whole, and had the last before any limit of its own."""
        run = self.claimed_run
        cut = [each for each in run.generations if each is None or each.is_cut_short]
        is_late = self.deadline is not None and run.stamp(run.ended_ns) > self.deadline
        return not cut and not is_late and not self.is_over_limit(run.ended_ns)

    @property
    def max_tokens(self) -> int:
        """Of its longest sequence, prompt and allowed output."""
        return max(map(len, self.prepared.prompts), default=0) + self.prepared.max_tokens

    def candidate(self) -> Candidate:
        """The job as the batcher sees it."""
        return Candidate(
            job_id=self.id,
            group=self.model,
            num_sequences=self.num_sequences,
            prompt_tokens=max(map(len, self.prepared.prompts), default=0),
            max_new_tokens=self.prepared.max_tokens,
            arrived_ns=self.arrived_ns,
            priority=self.priority,
            deadline=self.deadline.timestamp() if self.deadline else math.inf,
            expires_ns=self.expires_ns,
            tenant=self.tenant,
        )

    @property
    def claimed_run(self) -> Run:
        """The run of a job that is known to be claimed."""
        assert self.run is not None
        return self.run

    def sequences(self, first_id: int) -> list[Sequence]:
        """What the engine is to run, in the order of the answers, with ids from `first_id`."""
        answers, types = self.request.num_answers, self.prepared.type_ids
        drawn = self._drawn
        return [
            Sequence(
                id=first_id + place,
                prompt_token_ids=self.prepared.prompts[place // answers],
                params=drawn.sampling(place % answers),
                tenant=self.tenant,
                priority=self.priority,
                adapter=self.request.adapter,
                pooling=self.prepared.pooling,
                stream=self.stream_events,
                token_type_ids=types[place // answers] if types else (),
                arrived_ns=self.arrived_ns,
            )
            for place in range(self.num_sequences)
        ]

    @property
    def _drawn(self) -> Prepared:
        """What is told as it comes has to come again if a worker is lost: without a seed of its own
        the job has that of its id."""
        params = self.prepared.params
        if not self.stream_events or params is None or params.seed is not None:
            return self.prepared
        return replace(self.prepared, params=replace(params, seed=int64(self.id.int)))


@dataclass(frozen=True, slots=True)
class LeaseNews:
    """What a heartbeat or a notification said of this worker's attempts."""

    asked_ns: int  #: attempts claimed after this are not in `held` yet
    held: frozenset[UUID] | None  #: attempts that are still ours; None: nothing was said
    cancelled: frozenset[UUID] = frozenset()  #: attempts whose job is to be cancelled
    expired: frozenset[UUID] = frozenset()  #: attempts whose job is past its deadline
    cancelled_jobs: frozenset[UUID] = frozenset()

    def says_lost(self, run: Run) -> bool:
        """Whether the store no longer counts this attempt as ours."""
        return (
            self.held is not None
            and run.claimed_ns < self.asked_ns
            and run.attempt_id not in self.held
        )
