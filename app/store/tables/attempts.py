"""Attempts: each try of a job by a worker; and the batches that they ran in."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    Index,
    Integer,
    PrimaryKeyConstraint,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY

from app.books.energy import EnergyMethod
from app.jobs import AttemptOutcome, CloseReason, Kind
from app.store.tables.columns import (
    AGEING,
    Stamp,
    bill,
    energy_columns,
    in_range,
    known_energy,
    metadata,
    not_negative,
    one_of,
    recomputable,
    tenant_column,
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Uuid, nullable=False, comment="Attempt id, made by the worker: the fence."),
    tenant_column("Owner of the job."),
    Column("created_at", Stamp, nullable=False, comment="The job's: the month it is kept in."),
    Column("job_id", Uuid, nullable=False, comment="Job that is tried."),
    Column("number", Integer, nullable=False, comment="1 for the job's first attempt."),
    Column("worker_id", Uuid, nullable=False, comment="Worker; its lease is the attempt's lease."),
    Column("batch_id", Uuid, nullable=False, comment="Admission batch that it was claimed in."),
    Column("claimed_at", Stamp, nullable=False, comment="Opened."),
    Column("started_at", Stamp, comment="The engine began its prompt."),
    Column("ended_at", Stamp, comment="Closed; null while running."),
    Column("outcome", Text, comment="How it ended; null while running."),
    Column("charged", Boolean, comment="Counts towards max_attempts; null while running."),
    Column(
        "device_ns",
        BigInteger,
        comment="Device time of its answer, in nanoseconds: it is billed. Null while it runs.",
    ),
    Column(
        "wasted_ns",
        BigInteger,
        comment="Device time without an answer in time, in nanoseconds. Null while it runs.",
    ),
    *bill(),
    *energy_columns(),
    Column(
        "energy_method",
        Text,
        comment="How that is known: measured, estimated or absent; null while it runs.",
    ),
    Column(
        "window_number",
        Integer,
        comment="Window of its worker in which its time was settled; null while it runs, and for "
        "good if its worker never told.",
    ),
    Column("error_code", Text, comment="Stable code of what ended it, see app.errors."),
    one_of("outcome", AttemptOutcome),
    in_range("claimed_at", "started_at", "ended_at"),
    one_of("energy_method", EnergyMethod),
    not_negative(
        "number", "device_ns, wasted_ns, energy_nj, wasted_nj", "cost, upstream_cost, price"
    ),
    CheckConstraint(
        "num_nulls(ended_at, outcome, charged, device_ns, wasted_ns, energy_method) IN (0, 6)",
        name="ended",
    ),
    CheckConstraint(
        "outcome NOT IN ('lost', 'released')"
        " OR device_ns = 0 AND price IS NULL AND coalesce(energy_nj, 0) = 0",
        name="billed",
    ),
    known_energy(),
    *recomputable(),
    PrimaryKeyConstraint("id", "created_at"),
    UniqueConstraint("created_at", "job_id", "number"),
    postgresql_partition_by="RANGE (created_at)",
    comment="One row per try of a job by a worker; never overwritten by the next try.",
)

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Admission batch id."),
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
        nullable=False,
        server_default=text("0"),
        comment="Prompt and output tokens that were asked for.",
    ),
    Column(
        "padded_tokens",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Token positions computed, padding included.",
    ),
    Column(
        "device_ns",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Device time of all members, in nanoseconds, waste included.",
    ),
    Column("opened_at", Stamp, nullable=False, comment="Its oldest member arrived."),
    Column("claimed_at", Stamp, nullable=False, comment="Closed and claimed."),
    Column("finished_at", Stamp, comment="Statistics last written; final once all members are."),
    # Last, so that what changes is logged without it.
    Column(
        "job_ids",
        ARRAY(Uuid),
        nullable=False,
        server_default=text("'{}'"),
        comment="Jobs claimed; some may be deleted since.",
    ),
    one_of("kind", Kind),
    one_of("close_reason", CloseReason),
    in_range("opened_at", "claimed_at", "finished_at"),
    not_negative("num_jobs, num_sequences", "useful_tokens, padded_tokens, device_ns"),
    Index("batches_by_age", "claimed_at"),
    postgresql_with={"fillfactor": "80"} | AGEING,
    comment="One row per admission batch. It may mix tenants, so it belongs to none.",
)
