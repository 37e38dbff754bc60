"""Claim, take, finish: the moves of a job to a worker and, with its result, to the end.

    queued ──claim, take──▶ running ──finish──▶ final
       ▲                       │
       └───────release─────────┘  see `app.store.releases`

A job is claimed by a worker that has received it, or taken by one that its message came to.
Each is one statement for any number of jobs and is fenced: it moves only jobs that are still
`running` under the attempt it names. Each may be repeated after a commit whose fate is unknown.

Rows are looked up and locked one by one in the order of their ids. So groups of different workers
never deadlock, and no plan depends on how many jobs the planner believes to be queued: in a queue
that is wrong most of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Row, TextClause, text

from app.books.energy import EnergyMethod
from app.errors import Unavailable
from app.jobs import SUSPECT_AFTER, CloseReason, JobState
from app.store import delivery, submissions
from app.store.encoding import encode
from app.store.lookup import locked
from app.store.results import COPIED, copied, elapsed_ms
from app.store.submissions import Received


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """An admission batch that was closed and is to be claimed."""

    id: UUID
    worker_id: UUID
    model: str
    engine: str
    close_reason: CloseReason
    wait_ms: float  #: of its oldest member


@dataclass(frozen=True, slots=True)
class Member:
    """A job of a batch to be claimed, and the id that its attempt is to have."""

    job_id: UUID
    attempt_id: UUID
    num_sequences: int = 1


@dataclass(frozen=True, slots=True)
class Claimed:
    """A running attempt."""

    job_id: UUID
    attempt_id: UUID
    number: int
    claimed_at: datetime
    created_at: datetime  #: of the job


@dataclass(frozen=True, slots=True)
class Taken:
    """A running attempt, and the row of its job, which nobody here had read before."""

    claimed: Claimed
    row: Received


def _claiming(*names: str, also: str = "", noted: str = "") -> str:
    """SQL: `claimed`, the members of a batch that may run now, as far as `also` says so; it opens
    their attempts and the batch. Its rows have the columns of these names; `noted` is what else is
    written into those of jobs."""

    def of(table: str) -> str:
        return ", ".join(f"{table}.{name}" for name in names)

    return f"""
    WITH lease AS MATERIALIZED (
        SELECT EXISTS (
            SELECT FROM workers WHERE id = :worker_id AND lease_expires_at > now()
        ) AS is_held
    ), member AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:members AS jsonb))
            AS member(job_id uuid, attempt_id uuid, num_sequences int)
        ORDER BY job_id
    ), locked AS MATERIALIZED (
        SELECT member.attempt_id AS new_attempt_id, {of("job")}
        FROM member {locked("member.job_id")}
    ), opened AS (
        INSERT INTO attempts (
            id, tenant, created_at, job_id, number, worker_id, batch_id, claimed_at
        )
        SELECT new_attempt_id, tenant, created_at, id, attempt + 1, :worker_id, :id, now()
        FROM locked
        WHERE locked.state = 'queued'
            AND locked.not_before <= now() AND (locked.deadline > now()) IS NOT FALSE
            AND (SELECT is_held FROM lease)
            {also}
        ON CONFLICT (id, created_at) DO NOTHING  -- opened by this very call before, and lost since
        RETURNING id, job_id, number
    ), moved AS (
        UPDATE open_jobs SET
            state = 'running', attempt = number, attempt_id = opened.id,
            worker_id = :worker_id, batch_id = :id, claimed_at = now() {noted}
        FROM opened WHERE open_jobs.id = opened.job_id
        RETURNING opened.id AS new_attempt_id, {of("open_jobs")}
    ), batch AS (
        INSERT INTO batches (
            id, worker_id, model, kind, engine, close_reason, num_jobs, num_sequences, wait_ms,
            opened_at, claimed_at, job_ids
        )
        SELECT
            :id, :worker_id, :model, min(kind), :engine, :close_reason, count(*),
            sum(num_sequences), :wait_ms, now() - :wait_ms * interval '1 ms', now(),
            array_agg(job_id)
        FROM moved JOIN member ON member.job_id = moved.id
        HAVING count(*) > 0
        ON CONFLICT (id) DO UPDATE SET  -- a repeated call may get more than the first
            num_jobs = batches.num_jobs + excluded.num_jobs,
            num_sequences = batches.num_sequences + excluded.num_sequences,
            job_ids = batches.job_ids || excluded.job_ids
    ), claimed AS (
        SELECT * FROM moved
        UNION ALL  -- claimed by this very call before, if it is repeated
        SELECT * FROM locked WHERE state = 'running' AND attempt_id = new_attempt_id
    )
    """


_CLAIM: Final = text(f"""
    {
    _claiming(
        *("id", "tenant", "kind", "created_at", "state", "not_before", "deadline"),
        *("attempt_id", "attempt", "claimed_at"),
    )
}
    SELECT is_held, id, attempt_id, attempt, claimed_at, created_at
    FROM lease LEFT JOIN claimed ON true
""")

# Claim and read jobs of one model, but for suspects.
_TAKE: Final = text(f"""
    {
    _claiming(
        "*",
        also=f"AND locked.model = :model AND {delivery.known('locked')}"
        f" AND locked.losses < {SUSPECT_AFTER}",
        noted=f", {delivery.TAKEN}",
    )
}
    SELECT
        is_held, id, attempt_id, attempt, claimed_at, {submissions.RECEIVED},
        {submissions.request_of("id")} AS request
    FROM lease LEFT JOIN claimed AS job ON true
""")


def claim(connection: Connection, batch: NewBatch, members: Sequence[Member]) -> list[Claimed]:
    """Move a batch's members from `queued` to `running`; returns those that it got.

    The rest is finished, cancelled, expired, not due or somebody else's; or this very call got it
    before, its answer was lost, and so was the attempt since. Raises `Unavailable` if the worker's
    lease is over: rescue would take the jobs at once. The next heartbeat renews it.
    """
    return list(map(_claimed, _granted(connection, _CLAIM, batch, members)))


def take(connection: Connection, batch: NewBatch, members: Sequence[Member]) -> list[Taken]:
    """Claim, as `claim` does, jobs of which only the messages are known; returns their rows, too.

    It does not get either what runs apart as a suspect, is of another model than the batch, or of a
    kind or format that is not known here. What it does not get is as it was, and to be received.
    """
    return [
        Taken(_claimed(row), submissions.received(row))
        for row in _granted(connection, _TAKE, batch, members)
    ]


def _claimed(row: Row[Any]) -> Claimed:
    return Claimed(row.id, row.attempt_id, row.attempt, row.claimed_at, row.created_at)


def _granted(
    connection: Connection, statement: TextClause, batch: NewBatch, members: Sequence[Member]
) -> list[Row[Any]]:
    rows = connection.execute(
        statement,
        {
            "id": batch.id,
            "worker_id": batch.worker_id,
            "model": batch.model,
            "engine": batch.engine,
            "close_reason": batch.close_reason,
            "wait_ms": batch.wait_ms,
            "members": encode(members),
        },
    ).all()
    granted = [row for row in rows if row.id is not None]
    # Said by the statement itself: asked again, the lease may have been renewed in between, and
    # jobs that were only refused for it would be taken for somebody else's.
    if not rows[0].is_held and len(granted) < len(members):
        raise Unavailable("The lease of this worker is over until its next heartbeat.")
    return granted


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """How an attempt ended, answer and bill included. Field names are columns of `results`.

    Stamps are `claimed_at` plus what the worker's monotonic clock measured since.
    """

    job_id: UUID
    attempt_id: UUID
    created_at: datetime  #: of the job
    state: JobState  #: final
    response: dict[str, Any] | None = None  #: the answer, whole or partial
    error_code: str | None = None
    error_message: str | None = None
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    started_at: datetime | None = None
    first_token_at: datetime | None = None
    batch_wait_ms: float | None = None
    inference_ms: float | None = None
    batch_size: int | None = None
    device_ns: int = 0
    wasted_ns: int = 0
    prefill_ns: int | None = None
    recomputed_ns: int | None = None
    preemptions: int | None = None
    preempted_ms: float | None = None
    cost: Decimal | None = Decimal(0)  #: None if the device has no price
    upstream_cost: Decimal | None = None
    currency: str | None = None
    price_id: str | None = None
    price: Decimal | None = None
    charge: Decimal | None = None
    energy_nj: int | None = None  #: None where nothing is known of it
    wasted_nj: int | None = None
    energy_method: EnergyMethod = EnergyMethod.ABSENT
    energy_boundary: str | None = None
    carbon_ug: int | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """What now stands in the row of an attempt that this worker ended."""

    attempt_id: UUID
    device_ns: int
    wasted_ns: int
    energy_nj: int  #: 0 where nothing is known of it
    wasted_nj: int
    counts: bool  #: its result is the job's; else it was taken from this worker before


@dataclass(frozen=True, slots=True)
class BatchStats:
    """What a batch has computed so far: totals since it was claimed, not increments."""

    id: UUID
    useful_tokens: int
    padded_tokens: int
    device_ns: int
    num_sequences: int | None = None  #: of its jobs; None: as many as its claim said


MONTHS: Final = "CAST(:created AS timestamptz[])"
"""When the jobs were created: keeps a plan from all other months, however many there are."""

SUM_BATCHES: Final = """
    summed AS (
        UPDATE batches SET
            useful_tokens = stats.useful_tokens, padded_tokens = stats.padded_tokens,
            device_ns = stats.device_ns, finished_at = now(),
            num_sequences = coalesce(stats.num_sequences, batches.num_sequences)
        FROM jsonb_populate_recordset(NULL::batches, CAST(:batches AS jsonb)) AS stats
        WHERE batches.id = stats.id AND batches.id = ANY(CAST(:batch_ids AS uuid[]))
    )
"""
"""The ids are said twice, so that only their rows are read, by whatever plan."""

SPENT: Final = ("device_ns", "wasted_ns", "energy_nj", "wasted_nj")
"""What an attempt took."""


def _spent(table: str) -> str:
    return ", ".join(f"coalesce({table}.{name}, 0) AS {name}" for name in SPENT)


BILL: Final = ("cost", "upstream_cost", "currency", "price_id", "price")
"""What an attempt and its result are billed."""

_BILLED: Final = ", ".join(
    f"{name} = CASE WHEN outcome IS NULL THEN given.{name} ELSE attempts.{name} END"
    for name in BILL
)

NO_ANSWER_NJ: Final = "CASE WHEN given.energy_method = 'absent' THEN attempts.energy_nj ELSE 0 END"
BETTER_METHOD: Final = (
    "CASE WHEN given.energy_method = 'absent' THEN attempts.energy_method ELSE given.energy_method"
    " END"
)
"""Of an attempt that was closed without its energy, and is told of it late."""

_CLOSE: Final = f"""
        UPDATE attempts SET
            ended_at = coalesce(ended_at, now()),
            outcome = coalesce(
                outcome, CASE given.state WHEN 'completed' THEN 'succeeded' ELSE 'failed' END),
            charged = coalesce(charged, true),
            error_code = coalesce(attempts.error_code, given.error_code),
            started_at = coalesce(attempts.started_at, given.started_at),
            device_ns = coalesce(attempts.device_ns, given.device_ns),
            {_BILLED},
            wasted_ns = CASE WHEN outcome IS NULL THEN given.wasted_ns
                ELSE greatest(attempts.wasted_ns, given.device_ns + given.wasted_ns) END,
            energy_nj = CASE WHEN outcome IS NULL THEN given.energy_nj ELSE {NO_ANSWER_NJ} END,
            wasted_nj = CASE WHEN outcome IS NULL THEN given.wasted_nj
                ELSE greatest(attempts.wasted_nj, given.energy_nj + given.wasted_nj) END,
            energy_method = CASE WHEN outcome IS NULL THEN given.energy_method
                ELSE {BETTER_METHOD} END,
            window_number = coalesce(window_number, :window_number)
        FROM {{whose}}
        WHERE attempts.created_at = given.created_at
            AND attempts.job_id = given.job_id AND attempts.id = given.attempt_id AND {{which}}
"""
_TAKEN: Final = f"attempts.created_at = ANY({MONTHS}) AND outcome IN ('lost', 'released')"

_GIVEN: Final = """
    given AS MATERIALIZED (
        SELECT * FROM jsonb_populate_recordset(NULL::results, CAST(:finished AS jsonb))
        ORDER BY job_id
    )
"""

# Finish attempts that are still held: job state, result, attempt and batch.
_FINISH: Final = text(f"""
    WITH {_GIVEN}, held AS MATERIALIZED (
        SELECT job.*, job.purged_at IS NULL AS is_kept
        FROM given {locked("given.job_id")}
        WHERE job.state = 'running' AND job.attempt_id = given.attempt_id
    ), gone AS (
        DELETE FROM open_jobs USING held WHERE open_jobs.id = held.id
    ), recorded AS (
        INSERT INTO results (
            job_id, expected_input_tokens, attempts_charged, losses, {", ".join(COPIED)},
            state, attempt_id, batch_size, response, error_code, error_message,
            input_tokens, cached_tokens, output_tokens,
            started_at, first_token_at, finished_at,
            queue_ms, batch_wait_ms, ttft_ms, inference_ms, total_ms,
            device_ns, wasted_ns, prefill_ns, recomputed_ns, preemptions, preempted_ms,
            {", ".join(BILL)}, charge,
            energy_nj, wasted_nj, energy_method, energy_boundary, carbon_ug
        )
        SELECT
            id, held.input_tokens, held.attempts_charged + 1, held.losses, {copied("held")},
            given.state, given.attempt_id, batch_size, CASE WHEN is_kept THEN response END,
            error_code, CASE WHEN is_kept THEN error_message END,
            given.input_tokens, cached_tokens, output_tokens,
            started_at, first_token_at, now(),
            {elapsed_ms("held.created_at", "coalesce(started_at, held.claimed_at)")},
            batch_wait_ms,
            {elapsed_ms("held.created_at", "first_token_at")}, inference_ms,
            {elapsed_ms("held.created_at", "now()")},
            device_ns, wasted_ns, prefill_ns, recomputed_ns, preemptions, preempted_ms,
            {", ".join(BILL)}, charge,
            energy_nj, wasted_nj, energy_method, energy_boundary, carbon_ug
        FROM held JOIN given ON given.job_id = held.id
    ), closed AS (
        {_CLOSE.format(whose="given JOIN held ON held.id = given.job_id", which="true")}
        RETURNING attempts.id, {_spent("attempts")}, true
    ), {SUM_BATCHES}
    SELECT * FROM closed
    UNION ALL  -- whose attempt somebody has deleted
    SELECT attempt_id, {", ".join("0" for _ in SPENT)}, true
    FROM held WHERE attempt_id NOT IN (SELECT id FROM closed)
""")

# Settle attempts that are held no more. One that was taken from this worker is billed nothing: all
# its device time was wasted, and is noted as that. They are few, and most calls have none: a
# statement of their own, for Postgres makes ready all parts of one, whether they have rows or not.
_FINISH_LATE: Final = text(f"""
    WITH {_GIVEN}, late AS (
        {_CLOSE.format(whose="given", which=_TAKEN)}
        RETURNING attempts.id, {_spent("attempts")}, false
    )
    SELECT * FROM late
    UNION ALL  -- committed by this very call before, if it is repeated, and not by who took the job
    SELECT attempt_id, {_spent("attempt")}, true FROM given
    CROSS JOIN LATERAL (
        SELECT FROM results
        WHERE results.created_at = given.created_at AND results.created_at = ANY({MONTHS})
            AND results.job_id = given.job_id AND results.attempt_id = given.attempt_id
        OFFSET 0
    ) AS result
    CROSS JOIN LATERAL (
        SELECT {", ".join(SPENT)} FROM attempts
        WHERE attempts.created_at = given.created_at AND attempts.created_at = ANY({MONTHS})
            AND attempts.job_id = given.job_id AND attempts.id = given.attempt_id
            AND outcome IN ('succeeded', 'failed')
        OFFSET 0
    ) AS attempt
""")


def finish(
    connection: Connection,
    finished: Sequence[Finished],
    batches: Sequence[BatchStats] = (),
    *,
    window_number: int | None = None,
) -> list[Settled]:
    """Record the ends of attempts, each with its result; returns what their rows say now.

    An attempt does not count if its job was taken from this worker: another one has answered or
    will. Whoever waits hears of it by `notices.ended`, after the commit.
    """
    given: dict[str, Any] = {
        "finished": encode(finished),
        "batches": encode(batches),
        "batch_ids": [each.id for each in batches],
        "window_number": window_number,
    }
    settled = [Settled(*row) for row in connection.execute(_FINISH, given)]
    known = {each.attempt_id for each in settled}
    if late := [each for each in finished if each.attempt_id not in known]:
        given |= {"finished": encode(late), "created": [each.created_at for each in late]}
        settled += [Settled(*row) for row in connection.execute(_FINISH_LATE, given)]
    return settled
