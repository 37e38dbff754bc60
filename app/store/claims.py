"""Claim, finish, release: the moves of a job while a worker has it.

    queued ──claim──▶ running ──finish──▶ final
       ▲                 │
       └────release──────┘

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

from sqlalchemy import Connection, text

from app.books.energy import EnergyMethod
from app.errors import AttemptsExhausted, Unavailable
from app.jobs import MAX_UNCHARGED, AttemptOutcome, CloseReason, JobState
from app.store.delivery import QUEUED_AGAIN
from app.store.encoding import encode
from app.store.lookup import locked
from app.store.results import COPIED, RECORD_ENDED, copied, elapsed_ms


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


# Claim the members of a batch that may run now; open their attempts and the batch.
_CLAIM: Final = text(f"""
    WITH lease AS MATERIALIZED (
        SELECT EXISTS (
            SELECT FROM workers WHERE id = :worker_id AND lease_expires_at > now()
        ) AS is_held
    ), member AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:members AS jsonb))
            AS member(job_id uuid, attempt_id uuid, num_sequences int)
        ORDER BY job_id
    ), locked AS MATERIALIZED (
        SELECT
            id, tenant, created_at, state, not_before, deadline, job.attempt_id, attempt,
            claimed_at, member.attempt_id AS new_attempt_id
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
        ON CONFLICT (id, created_at) DO NOTHING  -- opened by this very call before, and lost since
        RETURNING id, job_id, number
    ), moved AS (
        UPDATE open_jobs SET
            state = 'running', attempt = number, attempt_id = opened.id,
            worker_id = :worker_id, batch_id = :id, claimed_at = now()
        FROM opened WHERE open_jobs.id = opened.job_id
        RETURNING open_jobs.id AS job_id, kind, attempt_id, attempt AS number, created_at
    ), batch AS (
        INSERT INTO batches (
            id, worker_id, model, kind, engine, close_reason, num_jobs, num_sequences, wait_ms,
            opened_at, claimed_at, job_ids
        )
        SELECT
            :id, :worker_id, :model, min(kind), :engine, :close_reason, count(*),
            sum(num_sequences), :wait_ms, now() - :wait_ms * interval '1 ms', now(),
            array_agg(job_id)
        FROM moved JOIN member USING (job_id)
        HAVING count(*) > 0
        ON CONFLICT (id) DO UPDATE SET  -- a repeated call may get more than the first
            num_jobs = batches.num_jobs + excluded.num_jobs,
            num_sequences = batches.num_sequences + excluded.num_sequences,
            job_ids = batches.job_ids || excluded.job_ids
    )
    SELECT is_held, claimed.* FROM lease LEFT JOIN (
        SELECT job_id, attempt_id, number, now() AS claimed_at, created_at FROM moved
        UNION ALL  -- claimed by this very call before, if it is repeated
        SELECT id, attempt_id, attempt, claimed_at, created_at FROM locked
        WHERE state = 'running' AND attempt_id = new_attempt_id
    ) AS claimed ON true
""")


def claim(connection: Connection, batch: NewBatch, members: Sequence[Member]) -> list[Claimed]:
    """Move a batch's members from `queued` to `running`; returns those that it got.

    The rest is finished, cancelled, expired, not due or somebody else's; or this very call got it
    before, its answer was lost, and so was the attempt since. Raises `Unavailable` if the worker's
    lease is over: rescue would take the jobs at once. The next heartbeat renews it.
    """
    rows = connection.execute(
        _CLAIM,
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
    claimed = [Claimed(*row[1:]) for row in rows if row.job_id is not None]
    # Said by the statement itself: asked again, the lease may have been renewed in between, and
    # jobs that were only refused for it would be taken for somebody else's.
    if not rows[0].is_held and len(claimed) < len(members):
        raise Unavailable("The lease of this worker is over until its next heartbeat.")
    return claimed


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


_MONTHS: Final = "CAST(:created AS timestamptz[])"
"""When the jobs were created: keeps a plan from all other months, however many there are."""

_SUM_BATCHES: Final = """
    summed AS (
        UPDATE batches SET
            useful_tokens = stats.useful_tokens, padded_tokens = stats.padded_tokens,
            device_ns = stats.device_ns, finished_at = now()
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

_NO_ANSWER_NJ: Final = "CASE WHEN given.energy_method = 'absent' THEN attempts.energy_nj ELSE 0 END"
_BETTER_METHOD: Final = (
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
            energy_nj = CASE WHEN outcome IS NULL THEN given.energy_nj ELSE {_NO_ANSWER_NJ} END,
            wasted_nj = CASE WHEN outcome IS NULL THEN given.wasted_nj
                ELSE greatest(attempts.wasted_nj, given.energy_nj + given.wasted_nj) END,
            energy_method = CASE WHEN outcome IS NULL THEN given.energy_method
                ELSE {_BETTER_METHOD} END,
            window_number = coalesce(window_number, :window_number)
        FROM {{whose}}
        WHERE attempts.created_at = given.created_at
            AND attempts.job_id = given.job_id AND attempts.id = given.attempt_id AND {{which}}
"""
_TAKEN: Final = f"attempts.created_at = ANY({_MONTHS}) AND outcome IN ('lost', 'released')"

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
    ), {_SUM_BATCHES}
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
        WHERE results.created_at = given.created_at AND results.created_at = ANY({_MONTHS})
            AND results.job_id = given.job_id AND results.attempt_id = given.attempt_id
        OFFSET 0
    ) AS result
    CROSS JOIN LATERAL (
        SELECT {", ".join(SPENT)} FROM attempts
        WHERE attempts.created_at = given.created_at AND attempts.created_at = ANY({_MONTHS})
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
    will. Whoever waits hears of it by `notices.tell_ended`, after the commit.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """An attempt given up without a result, so that its job runs again."""

    job_id: UUID
    attempt_id: UUID
    created_at: datetime  #: of the job
    outcome: AttemptOutcome
    charged: bool  #: counts towards the job's max_attempts
    error_code: str | None = None
    error_message: str | None = None  #: shown if this was the last attempt
    wasted_ns: int = 0  #: all that it took of the device's time
    wasted_nj: int | None = None  #: and of its energy; None where nothing is known
    energy_method: EnergyMethod = EnergyMethod.ABSENT


@dataclass(frozen=True, slots=True)
class Released:
    """Where a job went: back to `queued`, or to a final state."""

    job_id: UUID
    attempt_id: UUID
    state: JobState | None  #: None: it was taken from this worker before
    wasted_ns: int  #: what the row of the attempt says now
    wasted_nj: int  #: 0 where nothing is known of it


NEVER_FINISHED: Final = AttemptsExhausted(
    f"The job was interrupted {MAX_UNCHARGED} times, by shutdowns or with its worker."
)

GIVE_BACK: Final = f"""
    next AS MATERIALIZED (
        SELECT *, CASE
            WHEN cancel_requested_at IS NOT NULL THEN 'cancelled'
            WHEN deadline <= now() THEN 'expired'
            WHEN charged AND attempts_charged + 1 >= max_attempts THEN 'failed'
            WHEN attempt - attempts_charged >= {MAX_UNCHARGED} AND NOT charged THEN 'failed'
            ELSE 'queued' END AS next_state
        FROM held
    ), moved AS (
        UPDATE open_jobs SET
            state = 'queued', attempts_charged = open_jobs.attempts_charged + CAST(charged AS int),
            losses = open_jobs.losses + CAST(outcome = 'lost' AS int),
            attempt_id = NULL, batch_id = NULL, queued_at = now(), {QUEUED_AGAIN}
        FROM next WHERE open_jobs.id = next.job_id AND next_state = 'queued'
    ), ended AS (
        DELETE FROM open_jobs USING next
        WHERE open_jobs.id = next.job_id AND next_state <> 'queued'
        RETURNING
            open_jobs.id, input_tokens, {copied("open_jobs")}, open_jobs.attempt_id,
            open_jobs.attempts_charged + CAST(charged AS int) AS attempts_charged,
            losses + CAST(outcome = 'lost' AS int) AS losses, next_state,
            CASE next_state
                WHEN 'failed' THEN
                    CASE WHEN charged THEN error_code ELSE '{NEVER_FINISHED.code}' END
                WHEN 'expired' THEN 'deadline_exceeded' ELSE next_state END AS error_code,
            CASE next_state
                WHEN 'failed' THEN
                    CASE WHEN charged THEN error_message ELSE '{NEVER_FINISHED}' END
                WHEN 'expired' THEN 'The deadline passed before the job could run again.'
                ELSE 'The job was cancelled.' END AS error_message
    ), closed AS (
        UPDATE attempts SET
            ended_at = now(), outcome = next.outcome, charged = next.charged,
            error_code = next.error_code, device_ns = 0, wasted_ns = next.wasted_ns, cost = 0,
            energy_nj = CASE WHEN next.energy_method <> 'absent' THEN 0 END,
            wasted_nj = next.wasted_nj, energy_method = next.energy_method,
            window_number = next.window_number
        FROM next WHERE attempts.created_at = next.created_at
            AND attempts.job_id = next.job_id AND attempts.id = next.attempt_id
    ), {RECORD_ENDED}
    SELECT job_id, attempt_id, next_state, wasted_ns, coalesce(wasted_nj, 0) FROM next
"""
"""What becomes of jobs whose attempt ended without a result. It reads a sibling `held`: the fields
of `Release` and `window_number` beside those of the locked row that decide. A job that was
cancelled or whose deadline passed meanwhile ends so, and one that was given up `MAX_UNCHARGED`
times, though never charged, as failed."""

# Give up attempts. One that was taken from this worker before only has its waste noted, and so has
# one that this very call gave up before, if it is repeated.
_RELEASE: Final = text(f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:releases AS jsonb)) AS given(
            job_id uuid, attempt_id uuid, created_at timestamptz, outcome text, charged bool,
            error_code text, error_message text, wasted_ns bigint,
            wasted_nj bigint, energy_method text
        )
        ORDER BY job_id
    ), held AS MATERIALIZED (
        SELECT
            given.*, cancel_requested_at, deadline, attempt, attempts_charged, max_attempts,
            CAST(:window_number AS int) AS window_number
        FROM given {locked("given.job_id")}
        WHERE job.state = 'running' AND job.attempt_id = given.attempt_id
    ), noted AS (
        UPDATE attempts SET
            wasted_ns = greatest(attempts.wasted_ns, given.wasted_ns),
            wasted_nj = greatest(attempts.wasted_nj, given.wasted_nj),
            energy_nj = {_NO_ANSWER_NJ}, energy_method = {_BETTER_METHOD},
            window_number = coalesce(window_number, :window_number)
        FROM given
        WHERE attempts.created_at = given.created_at AND attempts.created_at = ANY({_MONTHS})
            AND attempts.job_id = given.job_id AND attempts.id = given.attempt_id
            AND attempts.outcome IN ('lost', 'released')
        RETURNING attempts.job_id, attempts.id, attempts.wasted_ns, attempts.wasted_nj
    ), {_SUM_BATCHES}, {GIVE_BACK}
    UNION ALL
    SELECT job_id, id, NULL, wasted_ns, coalesce(wasted_nj, 0) FROM noted
""")


def release(
    connection: Connection,
    releases: Sequence[Release],
    batches: Sequence[BatchStats] = (),
    *,
    window_number: int | None = None,
) -> list[Released]:
    """Give up attempts; returns what their rows say now, and where the jobs went that were still
    held.

    Their jobs are `queued` again, or `failed` if that was their last attempt, or `cancelled` or
    `expired` if that was asked or due. The old message is to be acked: rescue sends a new one.
    """
    given = {
        "releases": encode(releases),
        "batches": encode(batches),
        "batch_ids": [each.id for each in batches],
        "created": [each.created_at for each in releases],
        "window_number": window_number,
    }
    return [
        Released(job_id, attempt_id, JobState(state) if state else None, *wasted)
        for job_id, attempt_id, state, *wasted in connection.execute(_RELEASE, given)
    ]
