"""Results: jobs that have ended, each with its answer."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from app.books.energy import EnergyMethod
from app.jobs import FINAL_STATES, Kind
from app.store.tables.columns import (
    Money,
    Stamp,
    bill,
    by_metadata,
    delivery_columns,
    energy_columns,
    energy_source,
    in_range,
    known_energy,
    metadata,
    not_negative,
    one_of,
    recomputable,
    tenant_column,
    terms,
    tries,
)

results = Table(
    "results",
    metadata,
    Column("job_id", Uuid, nullable=False, comment="Job; its only result."),
    tenant_column("Owner of the job."),
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
    Column("error_message", Text, comment="A sentence for people; holds no prompt and no output."),
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
        nullable=False,
        server_default=text("0"),
        comment="Its share of the device's time, in nanoseconds.",
    ),
    Column(
        "wasted_ns",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Unpaid device time of its last attempt, spent in vain, in nanoseconds.",
    ),
    Column(
        "prefill_ns",
        BigInteger,
        comment="Part of device_ns for its prompt, in nanoseconds; null if that is not told.",
    ),
    Column(
        "recomputed_ns",
        BigInteger,
        comment="Part of device_ns for what a preemption had dropped, in nanoseconds; null as "
        "prefill_ns. The rest of device_ns was for its output.",
    ),
    Column(
        "preemptions", Integer, comment="Times it gave way in the engine; null if that is not told."
    ),
    Column(
        "preempted_ms",
        Double,
        comment="Part of inference_ms in which it had given way, in ms; of several sequences the "
        "sum; null as preemptions.",
    ),
    *bill(server_default=text("0")),
    Column(
        "charge",
        Money,
        comment="What its tokens cost by that row's tariff, in `currency`; null without one.",
    ),
    *energy_columns(),
    *energy_source(),
    Column(
        "carbon_ug",
        BigInteger,
        comment="CO2-equivalent of energy_nj, in micrograms; null if no intensity is set.",
    ),
    # What else is known of the job.
    *terms(),
    Column(
        "expected_input_tokens",
        Integer,
        comment="Prompt tokens counted at submission, if they were.",
    ),
    *tries(),
    *delivery_columns(),
    one_of("kind", Kind),
    one_of("state", FINAL_STATES),
    in_range(
        "created_at",
        "queued_at",
        "claimed_at",
        "started_at",
        "first_token_at",
        "finished_at",
        "not_before",
        "deadline",
        "enqueued_at",
        "received_at",
        "cancel_requested_at",
        "purged_at",
    ),
    not_negative(
        "batch_size, input_tokens, cached_tokens, output_tokens, preemptions",
        "device_ns, wasted_ns, prefill_ns, recomputed_ns, energy_nj, wasted_nj, carbon_ug",
        "cost, upstream_cost, price, charge",
    ),
    one_of("energy_method", EnergyMethod),
    known_energy(),
    *recomputable(),
    CheckConstraint("prefill_ns + recomputed_ns <= device_ns", name="uses"),
    CheckConstraint("purged_at IS NULL OR metadata = '{}'", name="purged"),
    PrimaryKeyConstraint("job_id", "created_at"),
    # Listing, with and without a model, and by labels.
    Index("results_by_state", "tenant", "state", "created_at", "job_id"),
    Index("results_by_model", "tenant", "model", "state", "created_at", "job_id"),
    by_metadata("results"),
    # Listing stored chat completions.
    Index(
        "results_stored",
        "tenant",
        "created_at",
        "job_id",
        postgresql_where=text("stored AND response IS NOT NULL AND error_code IS NULL"),
    ),
    # How fast the queue drains; retention: jobs to delete, by age.
    Index("results_finished", "finished_at"),
    CheckConstraint("jsonb_typeof(response) = 'object'", name="response"),
    # Retention: responses to remove, by age.
    Index(
        "results_responses",
        "finished_at",
        postgresql_where=text("response IS NOT NULL"),
    ),
    # Listing jobs by what went wrong.
    Index(
        "results_by_error",
        "tenant",
        "error_code",
        "created_at",
        "job_id",
        postgresql_where=text("error_code IS NOT NULL"),
    ),
    postgresql_partition_by="RANGE (created_at)",
    comment="One row per final job, written once: the answer, its timing and its cost.",
)
