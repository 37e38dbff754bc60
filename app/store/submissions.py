"""How jobs come in: rows from the API, rows from messages, and rows of what cannot run."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, text

from app.errors import Unavailable
from app.jobs import JobState, Kind
from app.requests.bodies import FORMAT, readable
from app.store import delivery
from app.store.encoding import encode
from app.store.lookup import locked, result
from app.store.notices import telling
from app.store.tables import DEFAULT_TENANT


@dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job to be written. Field names are columns of `jobs`."""

    id: UUID
    model: str
    kind: Kind
    url: str
    request: dict[str, Any]
    fingerprint: str
    source: Literal["api", "message"]
    priority: int = 0
    not_before: datetime | None = None  #: None is now
    deadline: datetime | None = None
    time_limit_s: float | None = None  #: of each attempt; None is any time
    stream_events: bool = False  #: its tokens are put into a stream in Redis as they come
    stored: bool = False  #: it is a stored chat completion, once completed
    format: int = FORMAT  #: version of the request's format
    metadata: dict[str, str] = field(default_factory=dict)
    tenant: str = DEFAULT_TENANT
    idempotency_key: str | None = None
    replay_of: UUID | None = None  #: the ended job that this one runs once more
    input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_attempts: int = 3
    quoted_ms: float | None = None  #: its estimated time to its end; None if nothing is known
    quoted_p90_ms: float | None = None
    webhook_url: str | None = None  #: who is told of its end


@dataclass(frozen=True, slots=True)
class Inserted:
    """The row that answers for a `NewJob`: its own, or the one that its key or id had before."""

    id: UUID
    created: bool
    fingerprint_matches: bool
    is_sent: bool = False  #: due, and marked as asked: its message is to be sent now
    created_at: datetime | None = field(default=None, compare=False)  #: of one that was created


@dataclass(frozen=True, slots=True)
class Incoming:
    """A message that reached a worker. Without a job it only wakes the row."""

    id: UUID
    job: NewJob | None = None


@dataclass(frozen=True, slots=True)
class Received:
    """The row of an arrival, now that it is registered. The row wins over the message."""

    id: UUID
    tenant: str
    model: str
    kind: Kind
    state: JobState
    is_due: bool  #: `not_before` has passed
    not_before: datetime
    deadline: datetime | None
    expires_in_s: float | None  #: from now to the deadline
    time_limit_s: float | None
    stream_events: bool
    format: int
    priority: int
    attempts_charged: int
    losses: int  #: times its worker was lost while it ran
    created_at: datetime
    url: str | None  #: with `request`
    request: dict[str, Any] | None  #: only if the message brought none, or another one


# Keys first: whoever has written these has the job, and nobody else writes the rest of it. In the
# order of the keys' code points, and with equal keys as given: transactions that share keys meet at
# the same one first and never deadlock, also where they write in several such statements.
_WRITE: Final = """
    given AS MATERIALIZED (
        SELECT * FROM jsonb_populate_recordset(NULL::jobs, CAST(:jobs AS jsonb)) WITH ORDINALITY
        {where}
    ), new AS (
        INSERT INTO job_keys (id, tenant, fingerprint, idempotency_key, replay_of, created_at)
        SELECT id, tenant, decode(fingerprint, 'hex'), idempotency_key, replay_of, now()
        FROM given ORDER BY idempotency_key COLLATE "C", ordinality
        ON CONFLICT {conflict} DO NOTHING
        RETURNING id
    ), asked AS (
        INSERT INTO requests (created_at, job_id, tenant, request)
        SELECT now(), id, tenant, request FROM given JOIN new USING (id)
    ), queued AS (
        INSERT INTO open_jobs (
            id, tenant, model, kind, url, format, source, metadata, priority, input_tokens,
            max_output_tokens, not_before, deadline, time_limit_s, max_attempts, quoted_ms,
            quoted_p90_ms, webhook_url, stream_events, stored, created_at, state, queued_at,
            worker_id, received_at, enqueued_at
        )
        SELECT
            id, tenant, model, kind, url, format, source, metadata, priority, input_tokens,
            max_output_tokens, coalesce(not_before, now()), deadline, time_limit_s, max_attempts,
            quoted_ms, quoted_p90_ms, webhook_url, stream_events, stored, now(), 'queued', now(),
            {delivery}
        FROM given JOIN new USING (id)
        RETURNING *
    )
"""

# Write jobs that are not there yet.
_INSERT_NEW: Final = text(
    f"WITH {_WRITE.format(where='', conflict='', delivery=delivery.INSERTED)}"
    "SELECT id, enqueued_at IS NOT NULL AS is_sent, created_at FROM queued"
)

# Find the rows that already had the ids or the idempotency keys of new jobs, or replay the same.
_FIND_EARLIER: Final = text("""
    SELECT
        new.id AS asked, old.id,
        (old.tenant, encode(old.fingerprint, 'hex'))
            IS NOT DISTINCT FROM (new.tenant, new.fingerprint)
            AS fingerprint_matches
    FROM jsonb_populate_recordset(NULL::jobs, CAST(:jobs AS jsonb)) AS new
    JOIN LATERAL (
        SELECT id, tenant, fingerprint FROM job_keys WHERE job_keys.id = new.id
        UNION ALL
        SELECT id, tenant, fingerprint FROM job_keys
        WHERE job_keys.tenant = new.tenant AND job_keys.idempotency_key = new.idempotency_key
        UNION ALL
        SELECT id, tenant, fingerprint FROM job_keys WHERE job_keys.replay_of = new.replay_of
        LIMIT 1
    ) AS old ON true
""")


MAX_TRIES: Final = 3
"""An earlier job may be purged or deleted after its key was found taken, and before it is read."""


def insert_jobs(
    connection: Connection, jobs: Sequence[NewJob], sent: Collection[UUID] = ()
) -> list[Inserted]:
    """Write many jobs in one statement; one answer each, in order. May be repeated.

    Those of `sent` that are due count as sent: the caller sends their messages after the commit.

    A job whose id or idempotency key is taken, or that replays what another does, is not written:
    the answer names the earlier job and whether it was the same request.
    """
    found: dict[UUID, Inserted] = {}
    sent = frozenset(sent)
    for _ in range(MAX_TRIES):
        rest = [job for job in jobs if job.id not in found]
        new = _once(rest)
        given = {"jobs": encode(new), "sent": [job.id in sent for job in new]}
        for row in connection.execute(_INSERT_NEW, given):
            found[row.id] = Inserted(row.id, True, True, row.is_sent, row.created_at)
        # A statement of its own: it also sees what another transaction committed during the first.
        if rest := [job for job in rest if job.id not in found]:
            for row in connection.execute(_FIND_EARLIER, {"jobs": encode(rest)}):
                found[row.asked] = Inserted(row.id, False, row.fingerprint_matches)
        if all(job.id in found for job in jobs):
            return [found[job.id] for job in jobs]
    raise Unavailable("Jobs with the same idempotency keys came and went.")


def earlier(connection: Connection, jobs: Sequence[NewJob]) -> dict[UUID, Inserted]:
    """For those of new jobs whose idempotency key is taken, by their ids: what `insert_jobs` would
    answer. Writes nothing."""
    keyed = [job for job in jobs if job.idempotency_key is not None]
    if not keyed:
        return {}
    rows = connection.execute(_FIND_EARLIER, {"jobs": encode(keyed)})
    return {row.asked: Inserted(row.id, False, row.fingerprint_matches) for row in rows}


def _once(jobs: Iterable[NewJob]) -> Collection[NewJob]:
    """The first job of each id."""
    first: dict[UUID, NewJob] = {}
    for job in jobs:
        first.setdefault(job.id, job)
    return first.values()


_KINDS: Final[dict[str, Kind]] = {kind.value: kind for kind in Kind}
_STATES: Final[dict[str, JobState]] = {state.value: state for state in JobState}

RECEIVED: Final = """
    tenant, model, kind, state, not_before <= now() AS is_due, not_before, deadline,
    CAST(extract(epoch FROM deadline - now()) AS double precision) AS expires_in_s, time_limit_s,
    stream_events, format, priority, attempts_charged, losses, created_at, url
"""
"""What `Received` has of an open job or a result, but for its id and request."""


def request_of(job_id: str) -> str:
    """SQL: the request of the `job` with this id; null if it was removed."""
    return f"""(
        SELECT request FROM requests
        WHERE requests.created_at = job.created_at AND requests.job_id = {job_id}
    )"""


# The request of a row, unless the message brought the same. (NOT EXISTS instead of the comparison
# is planned, while the table is small, as one look at all of it, and keeps its plan as that grows.)
_REQUEST: Final = f"""
    CASE WHEN asked.fingerprint IS NULL OR decode(asked.fingerprint, 'hex') IS DISTINCT FROM (
        SELECT fingerprint FROM job_keys WHERE job_keys.id = asked.id
    ) THEN {request_of("asked.id")} END AS request
"""
_ASKED: Final = """
    unnest(CAST(:ids AS uuid[]), CAST(:fingerprints AS text[])) AS asked(id, fingerprint)
"""

# Register messages of open jobs, and write the jobs that others bring.
_RECEIVE: Final = text(f"""
    WITH known AS MATERIALIZED (
        SELECT job.id FROM unnest(CAST(:ids AS uuid[])) AS asked(id) {locked("asked.id")}
    ), woken AS (
        UPDATE open_jobs SET {delivery.RECEIVED}
        FROM known WHERE open_jobs.id = known.id
        RETURNING open_jobs.*
    ), {
    _WRITE.format(
        where="WHERE id NOT IN (SELECT id FROM known)",
        conflict="(id)",
        delivery=delivery.BROUGHT,
    )
}
    SELECT asked.id, {RECEIVED}, {_REQUEST} FROM {_ASKED} JOIN woken AS job ON job.id = asked.id
    UNION ALL
    SELECT id, {RECEIVED}, NULL FROM queued
""")

# Find jobs that have ended.
_LOOK_BACK: Final = text(f"""
    SELECT asked.id, {RECEIVED}, {_REQUEST} FROM {_ASKED} {result("asked.id")}
""")


def receive(
    connection: Connection, worker_id: UUID, arrivals: Iterable[Incoming]
) -> dict[UUID, Received]:
    """Register the messages of a group; the answer is by job id.

    Writes the rows that messages bring with them and notes who received which queued job, so that
    rescue knows what is lost when this worker dies. May be repeated. An id that has neither a row
    nor a request is missing from the answer, and so is a job of a kind or format that is not known
    here: it is left to the workers of a later version.
    """
    jobs: dict[UUID, NewJob | None] = {}
    for arrival in sorted(arrivals, key=lambda arrival: arrival.id):  # rows are locked in order
        jobs[arrival.id] = arrival.job or jobs.get(arrival.id)  # one message may come twice
    rows = _register(connection, worker_id, jobs)
    # Each is a statement of its own, so that it sees what was committed during the one before: jobs
    # that somebody else was writing then, and ends of jobs that were open.
    if len(rows) < len(jobs):
        if met := [id for id, job in jobs.items() if job is not None and id not in rows]:
            rows |= _register(connection, worker_id, dict.fromkeys(met))
        if rest := {id: job for id, job in jobs.items() if id not in rows}:
            rows |= {row.id: row for row in connection.execute(_LOOK_BACK, _asked(rest))}
    return {
        id: received(row) for id, row in rows.items() if row.kind in _KINDS and readable(row.format)
    }


def received(row: Row[Any]) -> Received:
    """A row with all columns of `Received`, of a kind that is known here."""
    given = {name: row._mapping[name] for name in Received.__slots__}
    return Received(**given | {"kind": _KINDS[row.kind], "state": _STATES[row.state]})


def _register(
    connection: Connection, worker_id: UUID, jobs: Mapping[UUID, NewJob | None]
) -> dict[UUID, Row[Any]]:
    brought = encode(job for job in jobs.values() if job is not None)
    given = _asked(jobs) | {"worker_id": worker_id, "jobs": brought}
    return {row.id: row for row in connection.execute(_RECEIVE, given)}


def _asked(jobs: Mapping[UUID, NewJob | None]) -> dict[str, Any]:
    prints = [None if job is None else job.fingerprint for job in jobs.values()]
    return {"ids": list(jobs), "fingerprints": prints}


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedJob:
    """A message that can be named but not run. Holds nothing of its body."""

    id: UUID
    kind: Kind
    error_code: str
    error_message: str
    state: JobState = JobState.FAILED
    model: str = ""
    tenant: str = DEFAULT_TENANT


# Write jobs that end before they were ever queued, with their results.
_REJECT: Final = text(f"""
    WITH given AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(CAST(:rejected AS jsonb)) AS given(
            id uuid, tenant text, model text, kind text, state text, error_code text,
            error_message text)
    ), written AS (
        INSERT INTO job_keys (id, tenant, created_at)
        SELECT id, tenant, now() FROM given ORDER BY id
        ON CONFLICT DO NOTHING
        RETURNING id
    ), recorded AS (
        INSERT INTO results (
            job_id, tenant, model, kind, source, state, error_code, error_message,
            not_before, created_at, queued_at, finished_at, total_ms
        )
        SELECT
            id, tenant, model, kind, 'message', state, error_code, error_message,
            now(), now(), now(), now(), 0
        FROM given JOIN written USING (id)
        RETURNING ({telling("SELECT id FROM written")})
    )
    SELECT id FROM written
""")


def reject(connection: Connection, rejected: Sequence[RejectedJob]) -> set[UUID]:
    """Record messages that cannot run as jobs that have ended; the ids that were written.

    A job that already exists, in whatever state, is left alone: anybody can put a bad message
    with its id into Redis.
    """
    if not rejected:
        return set()
    return set(connection.scalars(_REJECT, {"rejected": encode(rejected)}))
