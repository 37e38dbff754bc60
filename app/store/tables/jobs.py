"""Jobs: their keys, requests and rows while they are open; and the view of all, ended or not."""

from __future__ import annotations

from sqlalchemy import (
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.jobs import LIVE_PRIORITY, MAX_PRIORITY, OPEN_STATES, Kind
from app.store.tables.columns import (
    AGEING,
    BUSY,
    Stamp,
    by_metadata,
    delivery_columns,
    in_range,
    metadata,
    not_negative,
    one_of,
    tenant_column,
    terms,
    tries,
)

job_keys = Table(
    "job_keys",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Job id; also the id of its Celery message."),
    tenant_column("Who owns the job; one tenant never sees another's."),
    Column("fingerprint", LargeBinary, comment="SHA-256 of url and request in canonical JSON."),
    Column("idempotency_key", Text, comment="The caller's key; unique per tenant."),
    Column("replay_of", Uuid, comment="Ended job that it runs once more; null if none."),
    Column("created_at", Stamp, nullable=False, comment="The job's: the month its rows are in."),
    in_range("created_at"),
    CheckConstraint(
        "char_length(tenant) <= 200 AND char_length(idempotency_key) BETWEEN 1 AND 255",
        name="lengths",
    ),
    Index(
        "job_keys_idempotency_key",
        "tenant",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    # An ended job is replayed by one job.
    Index(
        "job_keys_replay_of",
        "replay_of",
        unique=True,
        postgresql_where=text("replay_of IS NOT NULL"),
    ),
    postgresql_with=AGEING,
    comment="One row per accepted job, open or ended: what it is known by. Written once.",
)

requests = Table(
    "requests",
    metadata,
    Column("created_at", Stamp, nullable=False, comment="The job's: the month it is kept in."),
    Column("job_id", Uuid, nullable=False, comment="Job that asks for it."),
    tenant_column("Owner of the job."),
    Column("request", JSONB, nullable=False, comment="Body as sent, prompt included."),
    CheckConstraint("jsonb_typeof(request) = 'object'", name="request"),
    PrimaryKeyConstraint("created_at", "job_id"),
    postgresql_partition_by="RANGE (created_at)",
    comment="One row per job with a request that is kept. Written once.",
)

open_jobs = Table(
    "open_jobs",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Job id; also the id of its Celery message."),
    tenant_column("Who owns the job; one tenant never sees another's."),
    Column(
        "model", Text, nullable=False, comment="Name of a configured model; empty if unreadable."
    ),
    Column(
        "kind",
        Text,
        nullable=False,
        comment="What the model does: generate, embed, classify, rerank or translate.",
    ),
    *terms(),
    Column("input_tokens", Integer, comment="Prompt tokens counted at submission, if they were."),
    Column("created_at", Stamp, nullable=False, comment="Row written: the job is accepted."),
    # What changes comes last: what is logged of an update is from its first change to its last.
    Column("state", Text, nullable=False, comment="queued or running."),
    *tries(),
    Column("attempt_id", Uuid, comment="The running attempt: the fence of every write; else null."),
    Column(
        "worker_id",
        Uuid,
        comment="Worker that holds its message, while queued, or runs it; else null.",
    ),
    Column("batch_id", Uuid, comment="Batch that it runs in; null unless running."),
    *delivery_columns(),
    Column("queued_at", Stamp, nullable=False, comment="Last became queued."),
    Column("claimed_at", Stamp, comment="Last claimed."),
    one_of("kind", Kind),
    one_of("state", OPEN_STATES),
    CheckConstraint("source = ANY ('{api,message}')", name="source"),
    CheckConstraint(f"priority BETWEEN {LIVE_PRIORITY} AND {MAX_PRIORITY}", name="priority"),
    CheckConstraint("max_attempts >= 1", name="max_attempts"),
    CheckConstraint("format >= 1", name="format"),
    in_range(
        "not_before",
        "deadline",
        "enqueued_at",
        "received_at",
        "cancel_requested_at",
        "purged_at",
        "created_at",
        "queued_at",
        "claimed_at",
    ),
    not_negative(
        "attempt, attempts_charged, input_tokens, max_output_tokens", "losses, wake_count"
    ),
    CheckConstraint("greatest(input_tokens, max_output_tokens) <= 1000000000", name="tokens"),
    CheckConstraint(
        "greatest(char_length(tenant), char_length(model), char_length(url)) <= 200",
        name="lengths",
    ),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata"),
    CheckConstraint("purged_at IS NULL OR metadata = '{}'", name="purged"),
    CheckConstraint("time_limit_s > 0 AND time_limit_s < 'Infinity'", name="time_limit"),
    CheckConstraint(
        "least(quoted_ms, quoted_p90_ms) >= 0 AND greatest(quoted_ms, quoted_p90_ms) < 'Infinity'",
        name="quoted",
    ),
    CheckConstraint(
        "CASE state WHEN 'running' THEN num_nulls(attempt_id, worker_id, batch_id) = 0"
        " ELSE num_nonnulls(attempt_id, batch_id) = 0"
        " AND (worker_id IS NULL OR enqueued_at IS NOT NULL) END",
        name="holder",
    ),
    CheckConstraint("state <> 'queued' OR cancel_requested_at IS NULL", name="cancel_requested_at"),
    # Listing, model by model if none is asked for.
    Index("open_jobs_by_model", "model", "created_at", "id"),
    # Limits of tenants.
    Index("open_jobs_by_tenant", "tenant", postgresql_where=text("tenant <> 'default'")),
    # Listing by labels.
    by_metadata("open_jobs"),
    # Rescue: never sent; sent longest ago; with a worker; with a deadline.
    Index(
        "open_jobs_unsent",
        "model",
        "tenant",
        "priority",
        "not_before",
        postgresql_where=text("enqueued_at IS NULL"),
    ),
    Index("open_jobs_sent", "model", "enqueued_at"),
    Index("open_jobs_by_worker", "worker_id", postgresql_where=text("worker_id IS NOT NULL")),
    Index("open_jobs_deadline", "deadline", postgresql_where=text("deadline IS NOT NULL")),
    postgresql_with={"fillfactor": "50"} | BUSY,
    comment="One row per queued or running job: its state, and who may move it next.",
)

jobs = Table(
    "jobs",
    MetaData(),
    Column("id", Uuid),
    Column("tenant", Text),
    Column("model", Text),
    Column("kind", Text),
    Column("url", Text),
    Column("request", JSONB),
    Column("format", SmallInteger),
    Column("fingerprint", Text),
    Column("source", Text),
    Column("idempotency_key", Text),
    Column("replay_of", Uuid),
    Column("metadata", JSONB),
    Column("priority", SmallInteger),
    Column("input_tokens", Integer),
    Column("max_output_tokens", Integer),
    Column("not_before", Stamp),
    Column("deadline", Stamp),
    Column("time_limit_s", Double),
    Column("quoted_ms", Double),
    Column("quoted_p90_ms", Double),
    Column("webhook_url", Text),
    Column("stream_events", Boolean),
    Column("stored", Boolean),
    Column("state", Text),
    Column("attempt", Integer),
    Column("attempts_charged", Integer),
    Column("max_attempts", SmallInteger),
    Column("losses", SmallInteger),
    Column("attempt_id", Uuid),
    Column("worker_id", Uuid),
    Column("batch_id", Uuid),
    Column("received_by", Uuid),
    Column("enqueued_at", Stamp),
    Column("received_at", Stamp),
    Column("wake_count", SmallInteger),
    Column("cancel_requested_at", Stamp),
    Column("purged_at", Stamp),
    Column("created_at", Stamp),
    Column("queued_at", Stamp),
    Column("claimed_at", Stamp),
    Column("finished_at", Stamp),
)
"""The view of all jobs, open and ended, in the columns of their tables."""
