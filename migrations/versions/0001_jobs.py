"""Jobs, attempts, results, batches and workers."""

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Integer,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

Stamp = DateTime(timezone=True)
Money = Numeric(20, 9)
AGEING = {"autovacuum_vacuum_scale_factor": "0.05", "autovacuum_vacuum_cost_limit": "2000"}

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def in_range(table: str, *stamps: str) -> CheckConstraint:
    span = "BETWEEN '0001-01-02Z' AND '9999-12-30Z'"
    checks = " AND ".join(f"{stamp} {span}" for stamp in stamps)
    return CheckConstraint(checks, name=op.f(f"{table}_stamps_check"))


def not_negative(table: str, *counts: str) -> CheckConstraint:
    checks = " AND ".join(f"{count} >= 0" for count in counts)
    return CheckConstraint(checks, name=op.f(f"{table}_counts_check"))


def upgrade() -> None:
    op.create_table(
        "batches",
        Column("id", Uuid, nullable=False, comment="Admission batch id."),
        Column("worker_id", Uuid, nullable=False, comment="Worker that claimed it."),
        Column("model", Text, nullable=False, comment="Model of all members."),
        Column("kind", Text, nullable=False, comment="Kind of all members."),
        Column("engine", Text, nullable=False, comment="Engine that ran it."),
        Column("close_reason", Text, nullable=False, comment="Why it was closed."),
        Column("num_jobs", Integer, nullable=False, comment="Jobs claimed."),
        Column("num_sequences", Integer, nullable=False, comment="Sequences of those jobs."),
        Column("wait_ms", Double, nullable=False, comment="Wait of its oldest member, in ms."),
        Column(
            "useful_tokens",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Prompt and output tokens that were asked for.",
        ),
        Column(
            "padded_tokens",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Token positions computed, padding included.",
        ),
        Column(
            "device_ns",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Device time of all members, in nanoseconds.",
        ),
        Column("opened_at", Stamp, nullable=False, comment="Its oldest member arrived."),
        Column("claimed_at", Stamp, nullable=False, comment="Closed and claimed."),
        Column(
            "finished_at", Stamp, comment="Statistics last written; final once all members are."
        ),
        CheckConstraint(
            "close_reason IN ('join', 'size', 'tokens', 'wait')",
            name=op.f("batches_close_reason_check"),
        ),
        CheckConstraint(
            "kind IN ('classify', 'embed', 'generate', 'rerank', 'translate')",
            name=op.f("batches_kind_check"),
        ),
        in_range("batches", "opened_at", "claimed_at", "finished_at"),
        not_negative(
            "batches",
            "num_jobs",
            "num_sequences",
            "useful_tokens",
            "padded_tokens",
            "device_ns",
        ),
        PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
        comment="One row per admission batch. It may mix tenants, so it belongs to none.",
        postgresql_with={"fillfactor": "80"} | AGEING,
    )
    op.create_index("batches_by_age", "batches", ["claimed_at"])
    op.create_table(
        "jobs",
        Column("id", Uuid, nullable=False, comment="Job id; also the id of its Celery message."),
        Column(
            "tenant",
            Text,
            server_default="default",
            nullable=False,
            comment="Who owns the job; one tenant never sees another's.",
        ),
        Column(
            "model",
            Text,
            nullable=False,
            comment="Name of a configured model; empty if unreadable.",
        ),
        Column(
            "kind",
            Text,
            nullable=False,
            comment="What the model does: generate, embed, classify, rerank or translate.",
        ),
        Column(
            "url", Text, comment="OpenAI-style path of the request; null if it was never readable."
        ),
        Column("request", JSONB, comment="Body as sent, prompt included; null once redacted."),
        Column(
            "format",
            SmallInteger,
            server_default=text("1"),
            nullable=False,
            comment="Version of the request's format; only workers that know it take the job.",
        ),
        Column("fingerprint", Text, comment="Hex SHA-256 of url and request in canonical JSON."),
        Column("source", Text, nullable=False, comment="Where it came from: api or message."),
        Column("idempotency_key", Text, comment="The caller's key; unique per tenant."),
        Column("replay_of", Uuid, comment="Ended job that it runs once more; null if none."),
        Column(
            "metadata",
            JSONB,
            server_default=text("'{}'::jsonb"),
            nullable=False,
            comment="The caller's own labels, returned as they came.",
        ),
        Column(
            "priority",
            SmallInteger,
            server_default=text("0"),
            nullable=False,
            comment="0 (served first) to 9.",
        ),
        Column(
            "input_tokens", Integer, comment="Prompt tokens counted at submission, if they were."
        ),
        Column("max_output_tokens", Integer, comment="Most output tokens allowed, if counted."),
        Column("not_before", Stamp, nullable=False, comment="May be claimed from this time on."),
        Column("deadline", Stamp, comment="Expires if not finished by this time; null is never."),
        Column(
            "time_limit_s", Double, comment="Longest time an attempt may take; null is any time."
        ),
        Column(
            "state", Text, nullable=False, comment="State; the last four of app.jobs are final."
        ),
        Column(
            "attempt",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Attempts opened so far; the number of the last one.",
        ),
        Column(
            "attempts_charged",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Attempts that count towards max_attempts.",
        ),
        Column(
            "max_attempts",
            SmallInteger,
            server_default=text("3"),
            nullable=False,
            comment="Charged attempts after which the job fails.",
        ),
        Column(
            "losses",
            SmallInteger,
            server_default=text("0"),
            nullable=False,
            comment="Times its worker was lost while it ran; "
            "a suspect from app.jobs.SUSPECT_AFTER on.",
        ),
        Column(
            "attempt_id", Uuid, comment="The running attempt: the fence of every write; else null."
        ),
        Column("worker_id", Uuid, comment="Worker that runs it; null unless running."),
        Column("batch_id", Uuid, comment="Batch that it runs in; null unless running."),
        Column("received_by", Uuid, comment="Worker that holds its message, while queued."),
        Column("enqueued_at", Stamp, comment="Message last sent; null if none is under way."),
        Column(
            "wake_count",
            SmallInteger,
            server_default=text("0"),
            nullable=False,
            comment="Times the message was sent again because it seemed lost.",
        ),
        Column("cancel_requested_at", Stamp, comment="Cancelled by the caller while running."),
        Column(
            "purged_at",
            Stamp,
            comment="What it says was removed by the caller; null if it was not.",
        ),
        Column("created_at", Stamp, nullable=False, comment="Row written: the job is accepted."),
        Column("queued_at", Stamp, nullable=False, comment="Last became queued."),
        Column("claimed_at", Stamp, comment="Last claimed."),
        Column("finished_at", Stamp, comment="Reached its final state; null before."),
        CheckConstraint(
            "(state IN ('queued', 'running')) = (finished_at IS NULL)",
            name=op.f("jobs_finished_at_check"),
        ),
        CheckConstraint(
            "kind IN ('classify', 'embed', 'generate', 'rerank', 'translate')",
            name=op.f("jobs_kind_check"),
        ),
        CheckConstraint(
            "num_nulls(attempt_id, worker_id, batch_id)"
            " = CASE state WHEN 'running' THEN 0 ELSE 3 END",
            name=op.f("jobs_attempt_check"),
        ),
        CheckConstraint("source IN ('api', 'message')", name=op.f("jobs_source_check")),
        CheckConstraint(
            "state <> 'queued' OR cancel_requested_at IS NULL",
            name=op.f("jobs_cancel_requested_at_check"),
        ),
        CheckConstraint(
            "state IN ('cancelled', 'completed', 'expired', 'failed', 'queued', 'running')",
            name=op.f("jobs_state_check"),
        ),
        CheckConstraint("max_attempts >= 1", name=op.f("jobs_max_attempts_check")),
        CheckConstraint("priority BETWEEN 0 AND 9", name=op.f("jobs_priority_check")),
        CheckConstraint("format >= 1", name=op.f("jobs_format_check")),
        CheckConstraint(
            "received_by IS NULL OR (state = 'queued' AND enqueued_at IS NOT NULL)",
            name=op.f("jobs_delivery_check"),
        ),
        CheckConstraint(
            "purged_at IS NULL OR (num_nonnulls(request, fingerprint, idempotency_key) = 0"
            " AND metadata = '{}')",
            name=op.f("jobs_purged_check"),
        ),
        CheckConstraint("wake_count >= 0", name=op.f("jobs_wake_count_check")),
        CheckConstraint(
            "time_limit_s > 0 AND time_limit_s < 'Infinity'", name=op.f("jobs_time_limit_check")
        ),
        in_range(
            "jobs",
            "not_before",
            "deadline",
            "enqueued_at",
            "cancel_requested_at",
            "purged_at",
            "created_at",
            "queued_at",
            "claimed_at",
            "finished_at",
        ),
        not_negative(
            "jobs", "attempt", "attempts_charged", "losses", "input_tokens", "max_output_tokens"
        ),
        CheckConstraint(
            "input_tokens <= 1000000000 AND max_output_tokens <= 1000000000",
            name=op.f("jobs_tokens_check"),
        ),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(model) <= 200 AND char_length(url) <= 200"
            " AND char_length(idempotency_key) BETWEEN 1 AND 255",
            name=op.f("jobs_lengths_check"),
        ),
        CheckConstraint(
            "jsonb_typeof(request) = 'object' AND jsonb_typeof(metadata) = 'object'",
            name=op.f("jobs_objects_check"),
        ),
        PrimaryKeyConstraint("id", name=op.f("jobs_pkey")),
        comment="One row per accepted job: its request, its state, and who may move it next.",
        postgresql_with={
            "autovacuum_vacuum_scale_factor": "0.02",
            "autovacuum_vacuum_insert_scale_factor": "0.02",
            "autovacuum_vacuum_cost_limit": "2000",
        },
    )
    op.create_index("jobs_by_model", "jobs", ["tenant", "model", "state", "created_at", "id"])
    op.create_index("jobs_by_state", "jobs", ["tenant", "state", "created_at", "id"])
    op.create_index(
        "jobs_by_metadata",
        "jobs",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata <> '{}'"),
    )
    op.create_index(
        "jobs_deadline",
        "jobs",
        ["deadline"],
        postgresql_where=text("state = 'queued' AND deadline IS NOT NULL"),
    )
    op.create_index(
        "jobs_idempotency_key",
        "jobs",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "jobs_received",
        "jobs",
        ["received_by"],
        postgresql_where=text("state = 'queued' AND received_by IS NOT NULL"),
    )
    op.create_index(
        "jobs_running", "jobs", ["worker_id"], postgresql_where=text("state = 'running'")
    )
    op.create_index(
        "jobs_unsent",
        "jobs",
        ["model", "priority", "not_before"],
        postgresql_where=text("state = 'queued' AND received_by IS NULL AND enqueued_at IS NULL"),
    )
    op.create_index(
        "jobs_waiting",
        "jobs",
        ["model", "enqueued_at"],
        postgresql_where=text("state = 'queued' AND received_by IS NULL"),
        postgresql_include=["input_tokens", "max_output_tokens"],
    )
    op.create_index(
        "jobs_replay_of",
        "jobs",
        ["replay_of"],
        unique=True,
        postgresql_where=text("replay_of IS NOT NULL"),
    )
    op.create_index(
        "jobs_finished",
        "jobs",
        ["tenant", "finished_at"],
        postgresql_where=text("finished_at IS NOT NULL"),
    )
    op.create_index(
        "jobs_requests",
        "jobs",
        ["tenant", "finished_at"],
        postgresql_where=text("finished_at IS NOT NULL AND request IS NOT NULL"),
    )
    op.create_table(
        "workers",
        Column("id", Uuid, nullable=False, comment="A new id at each start of the process."),
        Column("name", Text, nullable=False, comment="Celery node name."),
        Column("host", Text, nullable=False, comment="Host name."),
        Column("pid", Integer, nullable=False, comment="Process id on that host."),
        Column("models", ARRAY(Text), nullable=False, comment="Models served."),
        Column("device", Text, nullable=False, comment="Device as the engine names it."),
        Column(
            "engine",
            JSONB,
            server_default=text("'{}'::jsonb"),
            nullable=False,
            comment="Python's version, and the kernels that compute, by model.",
        ),
        Column("price_id", Text, nullable=False, comment="Entry of prices.toml in force."),
        Column("currency", Text, nullable=False, comment="ISO 4217 code of the price."),
        Column(
            "price_per_device_hour", Money, nullable=False, comment="Money per device and hour."
        ),
        Column("started_at", Stamp, nullable=False, comment="Registered."),
        Column("heartbeat_at", Stamp, nullable=False, comment="Lease last renewed."),
        Column(
            "lease_expires_at", Stamp, nullable=False, comment="Its attempts are lost after this."
        ),
        Column("stopped_at", Stamp, comment="Said goodbye; null while up, and for ever if killed."),
        in_range("workers", "started_at", "heartbeat_at", "lease_expires_at", "stopped_at"),
        PrimaryKeyConstraint("id", name=op.f("workers_pkey")),
        comment="One row per start of a worker process: its lease, device and price.",
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "attempts",
        Column("id", Uuid, nullable=False, comment="Attempt id, made by the worker: the fence."),
        Column(
            "tenant", Text, server_default="default", nullable=False, comment="Owner of the job."
        ),
        Column("job_id", Uuid, nullable=False, comment="Job that is tried."),
        Column("number", Integer, nullable=False, comment="1 for the job's first attempt."),
        Column(
            "worker_id", Uuid, nullable=False, comment="Worker; its lease is the attempt's lease."
        ),
        Column("batch_id", Uuid, nullable=False, comment="Admission batch that it was claimed in."),
        Column("claimed_at", Stamp, nullable=False, comment="Opened."),
        Column("started_at", Stamp, comment="The engine began its prompt."),
        Column("ended_at", Stamp, comment="Closed; null while running."),
        Column("outcome", Text, comment="How it ended; null while running."),
        Column("charged", Boolean, comment="Counts towards max_attempts; null while running."),
        Column(
            "device_ns",
            BigInteger,
            comment="Device time spent on it, in nanoseconds; null if it was never reported.",
        ),
        Column("cost", Money, comment="Price of that device time, in the worker's currency."),
        Column("error_code", Text, comment="Stable code of what ended it, see app.errors."),
        CheckConstraint(
            "outcome IN ('failed', 'lost', 'released', 'succeeded')",
            name=op.f("attempts_outcome_check"),
        ),
        CheckConstraint(
            "num_nulls(ended_at, outcome, charged) IN (0, 3)", name=op.f("attempts_ended_check")
        ),
        in_range("attempts", "claimed_at", "started_at", "ended_at"),
        not_negative("attempts", "number", "device_ns", "cost"),
        ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("attempts_job_id_fkey"), ondelete="CASCADE"
        ),
        PrimaryKeyConstraint("id", name=op.f("attempts_pkey")),
        UniqueConstraint("job_id", "number", name=op.f("attempts_job_id_number_key")),
        comment="One row per try of a job by a worker; never overwritten by the next try.",
        postgresql_with={"fillfactor": "80"} | AGEING,
    )
    op.create_table(
        "results",
        Column("job_id", Uuid, nullable=False, comment="Job; its only result."),
        Column(
            "tenant", Text, server_default="default", nullable=False, comment="Owner of the job."
        ),
        Column("model", Text, nullable=False, comment="Model of the job."),
        Column("kind", Text, nullable=False, comment="Kind of the job."),
        Column("state", Text, nullable=False, comment="Final state of the job."),
        Column("attempt_id", Uuid, comment="Attempt that ended it; null if it never ran."),
        Column("batch_id", Uuid, comment="Admission batch of that attempt."),
        Column("batch_size", Integer, comment="Jobs that were claimed with it, itself included."),
        Column(
            "response",
            JSONB,
            comment="Body of the answer, whole or partial, if any; null once redacted.",
        ),
        Column("error_code", Text, comment="Stable code, see app.errors; null if it completed."),
        Column(
            "error_message", Text, comment="A sentence for people; holds no prompt and no output."
        ),
        Column("input_tokens", Integer, comment="Prompt tokens, cached ones too."),
        Column("cached_tokens", Integer, comment="Of these, found in the engine's prefix cache."),
        Column("output_tokens", Integer, comment="Tokens generated."),
        Column("created_at", Stamp, nullable=False, comment="Accepted."),
        Column("queued_at", Stamp, nullable=False, comment="Last became queued."),
        Column("claimed_at", Stamp, comment="Claimed by the attempt that ended it."),
        Column("started_at", Stamp, comment="The engine began its prompt."),
        Column("first_token_at", Stamp, comment="First token; for an embedding or scores, these."),
        Column("finished_at", Stamp, nullable=False, comment="Result written."),
        Column("queue_ms", Double, comment="created_at to started_at, in ms; else to claimed_at."),
        Column("batch_wait_ms", Double, comment="Part of queue_ms in the worker's batcher, in ms."),
        Column("ttft_ms", Double, comment="created_at to first_token_at, in ms."),
        Column("inference_ms", Double, comment="started_at to the last token, in ms."),
        Column("total_ms", Double, nullable=False, comment="created_at to finished_at, in ms."),
        Column(
            "device_ns",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Its share of the device's time, in nanoseconds.",
        ),
        Column(
            "cost",
            Money,
            server_default=text("0"),
            nullable=False,
            comment="Its device time, and tokens where they have a price, in `currency`.",
        ),
        Column("currency", Text, comment="ISO 4217 code; null if the job never ran."),
        Column("price_id", Text, comment="Entry of prices.toml that was charged."),
        CheckConstraint(
            "kind IN ('classify', 'embed', 'generate', 'rerank', 'translate')",
            name=op.f("results_kind_check"),
        ),
        CheckConstraint(
            "state IN ('cancelled', 'completed', 'expired', 'failed')",
            name=op.f("results_state_check"),
        ),
        in_range(
            "results",
            "created_at",
            "queued_at",
            "claimed_at",
            "started_at",
            "first_token_at",
            "finished_at",
        ),
        not_negative(
            "results",
            *("batch_size", "input_tokens", "cached_tokens", "output_tokens", "device_ns", "cost"),
        ),
        CheckConstraint("jsonb_typeof(response) = 'object'", name=op.f("results_response_check")),
        ForeignKeyConstraint(
            ["job_id"], ["jobs.id"], name=op.f("results_job_id_fkey"), ondelete="CASCADE"
        ),
        PrimaryKeyConstraint("job_id", name=op.f("results_pkey")),
        comment="One row per final job, written once: the answer, its timing and its cost.",
        postgresql_with=AGEING,
    )
    op.create_index(
        "results_responses",
        "results",
        ["tenant", "finished_at"],
        postgresql_where=text("response IS NOT NULL"),
    )
    op.create_index(
        "results_by_error",
        "results",
        ["tenant", "error_code", "created_at", "job_id"],
        postgresql_where=text("error_code IS NOT NULL"),
    )


def downgrade() -> None:
    for table in ("results", "attempts", "jobs", "batches", "workers"):
        op.drop_table(table)
