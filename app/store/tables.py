"""The tables, and `jobs`, the view of all jobs.

    job_keys     what a job is known by: its id and keys, unique over open and ended jobs
    requests     what it asks for, written once, for as long as prompts are kept
    open_jobs    its state, while it is queued or running: few rows, hot
    results      the same, and how it ended, written by the statement that ends it
    attempts     each try by a worker; then there are batches, workers, their loads and windows,
                 and prices
    usage_hours  what ended jobs used, summed by hour, for ever; see `RollUp`

A job's row is the truth; a message in Redis is only a wake-up. A job's keys are written first and
removed last: whoever inserts a job that is there, open, ended or just between, meets its keys, and
nobody has to look into two tables at one moment. All rows of a job have its `created_at`, by which
`requests`, `results` and `attempts` are kept in months.

A job moves only along `app.jobs.TRANSITIONS`, and every write names the state that it expects.
Listing pages by (created_at, id): ids are the producers' and say nothing of time.

Of `open_jobs` no column that changes while a job waits or runs is indexed but `worker_id` and
`enqueued_at`. A claim by the worker that holds the message changes neither, and so is a heap-only
update: Postgres compares values, and what is set to what it was has not changed.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from app.books.cost import HOUR_NS
from app.books.energy import EnergyMethod
from app.jobs import (
    EARLIEST,
    FINAL_STATES,
    LATEST,
    MAX_PRIORITY,
    OPEN_STATES,
    AttemptOutcome,
    CloseReason,
    JobState,
    Kind,
)

DEFAULT_TENANT = "default"

metadata = MetaData(
    naming_convention={
        "pk": "%(table_name)s_pkey",
        "fk": "%(table_name)s_%(column_0_name)s_fkey",
        "uq": "%(table_name)s_%(column_0_N_name)s_key",
        "ck": "%(table_name)s_%(constraint_name)s_check",
    }
)

Stamp = DateTime(timezone=True)
Money = Numeric(20, 9)
Sum = Numeric()
"""A sum that cannot overflow, whatever its parts are."""


_BUSY = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.02",
    "autovacuum_vacuum_cost_limit": "2000",
}
"""A queue turns its rows over many times its size: vacuum long before a fifth is dead or new, and
ten times as fast as by default. Counting reads only the index where vacuum has been."""
_AGEING = {"autovacuum_vacuum_scale_factor": "0.05", "autovacuum_vacuum_cost_limit": "2000"}
"""For tables whose rows are written once or twice, and deleted by the page when they are old."""


def _one_of(column: str, values: type[enum.StrEnum] | frozenset[JobState]) -> CheckConstraint:
    """The column holds a word of this vocabulary."""
    listed = ", ".join(f"'{value}'" for value in sorted(values))
    return CheckConstraint(f"{column} IN ({listed})", name=column)


def _in_range(*stamps: str) -> CheckConstraint:
    """Times that every client can read, see `app.jobs.bounded`; infinity is none of them."""
    span = f"BETWEEN '{EARLIEST.date()}Z' AND '{LATEST.date()}Z'"
    return CheckConstraint(" AND ".join(f"{stamp} {span}" for stamp in stamps), name="stamps")


def _not_negative(*counts: str) -> CheckConstraint:
    return CheckConstraint(" AND ".join(f"{count} >= 0" for count in counts), name="counts")


def device_cost(ns: str, per_hour: str) -> str:
    """SQL of the rule in `app.books.cost`: money for device time, of terms that are not negative.

    In whole nano-units, so that no digit is lost: (2 · ns · P + H) div 2H.
    """
    twice = f"2 * CAST({ns} AS numeric) * ({per_hour} * 1000000000)"
    return f"div({twice} + {HOUR_NS}, {2 * HOUR_NS}) * 0.000000001"


def _bill(**of_cost: Any) -> list[Column[Any]]:
    """What an attempt and its result are billed, and what that can be computed again from."""
    return [
        Column(
            "cost",
            Money,
            comment="What its device time costs at `price`, by the rule of app.books.cost, and "
            "`upstream_cost`; null if the device has no price.",
            **of_cost,
        ),
        Column("upstream_cost", Money, comment="Of `cost`: what servers elsewhere asked for it."),
        Column("currency", Text, comment="ISO 4217 code; null if the job never ran."),
        Column("price_id", Text, comment="Row of `prices` that was charged."),
        Column("price", Money, comment="Money per device and hour, by that row."),
    ]


def _recomputable() -> list[CheckConstraint]:
    billed = f"{device_cost('device_ns', 'price')} + coalesce(upstream_cost, 0)"
    return [
        CheckConstraint(
            f"CASE WHEN price IS NULL THEN coalesce(cost, 0) = 0 ELSE cost = {billed} END",
            name="cost",
        ),
        CheckConstraint("num_nulls(price, price_id, currency) IN (0, 3)", name="price"),
    ]


def _energy() -> list[Column[Any]]:
    return [
        Column(
            "energy_nj",
            BigInteger,
            comment="Energy of its answer, in nanojoules, by the rule of app.books.energy; null if "
            "nothing is known of it.",
        ),
        Column(
            "wasted_nj",
            BigInteger,
            comment="Energy without an answer in time, in nanojoules; null likewise.",
        ),
    ]


def _known_energy() -> CheckConstraint:
    return CheckConstraint(
        "num_nulls(energy_nj, wasted_nj)"
        " = CASE WHEN coalesce(energy_method, 'absent') = 'absent' THEN 2 ELSE 0 END",
        name="energy",
    )


def _tenant(comment: str) -> Column[Any]:
    return Column("tenant", Text, nullable=False, server_default=DEFAULT_TENANT, comment=comment)


def _terms() -> list[Column[Any]]:
    """How a job is to be run, and what its caller notes of it: in its row as long as it is open,
    then in its result."""
    return [
        Column(
            "url", Text, comment="OpenAI-style path of the request; null if it was never readable."
        ),
        Column(
            "format",
            SmallInteger,
            nullable=False,
            server_default=text("1"),
            comment="Version of the request's format; only workers that know it take the job.",
        ),
        Column("source", Text, nullable=False, comment="Where it came from: api or message."),
        Column(
            "metadata",
            JSONB,
            nullable=False,
            server_default=text("'{}'::jsonb"),
            comment="The caller's own labels, returned as they came.",
        ),
        Column(
            "priority",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="0 (served first) to 9.",
        ),
        Column("max_output_tokens", Integer, comment="Most output tokens allowed, if counted."),
        Column("not_before", Stamp, nullable=False, comment="May be claimed from this time on."),
        Column("deadline", Stamp, comment="Expires if not finished by this time; null is never."),
        Column(
            "time_limit_s", Double, comment="Longest time an attempt may take; null is any time."
        ),
        Column(
            "max_attempts",
            SmallInteger,
            nullable=False,
            server_default=text("3"),
            comment="Charged attempts after which the job fails.",
        ),
        Column(
            "quoted_ms",
            Double,
            comment="Time to its end as it was estimated when it was accepted, in ms, from then or "
            "from not_before; null if nothing was known.",
        ),
        Column(
            "quoted_p90_ms",
            Double,
            comment="The same, within which nine of ten jobs were to end: its p90, in ms.",
        ),
    ]


def _tries() -> list[Column[Any]]:
    return [
        Column(
            "attempt",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts opened so far; the number of the last one.",
        ),
        Column(
            "attempts_charged",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts that count towards max_attempts.",
        ),
        Column(
            "losses",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="Times its worker was lost while it ran; a suspect from "
            "app.jobs.SUSPECT_AFTER on.",
        ),
    ]


def _delivery() -> list[Column[Any]]:
    return [
        Column("enqueued_at", Stamp, comment="Message last sent; null if none is under way."),
        Column("received_at", Stamp, comment="A worker received it; null if none has it."),
        Column(
            "wake_count",
            SmallInteger,
            nullable=False,
            server_default=text("0"),
            comment="Times the message was sent again because it seemed lost.",
        ),
        Column("cancel_requested_at", Stamp, comment="Cancelled by the caller while running."),
        Column(
            "purged_at",
            Stamp,
            comment="What it says was removed by the caller; null if it was not.",
        ),
    ]


def _by_metadata(table: str) -> Index:
    """Jobs without labels are left out: they would all be one entry of it."""
    return Index(
        f"{table}_by_metadata",
        "metadata",
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata <> '{}'"),
    )


job_keys = Table(
    "job_keys",
    metadata,
    Column("id", Uuid, primary_key=True, comment="Job id; also the id of its Celery message."),
    _tenant("Who owns the job; one tenant never sees another's."),
    Column("fingerprint", LargeBinary, comment="SHA-256 of url and request in canonical JSON."),
    Column("idempotency_key", Text, comment="The caller's key; unique per tenant."),
    Column("replay_of", Uuid, comment="Ended job that it runs once more; null if none."),
    Column("created_at", Stamp, nullable=False, comment="The job's: the month its rows are in."),
    _in_range("created_at"),
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
    postgresql_with=_AGEING,
    comment="One row per accepted job, open or ended: what it is known by. Written once.",
)

requests = Table(
    "requests",
    metadata,
    Column("created_at", Stamp, nullable=False, comment="The job's: the month it is kept in."),
    Column("job_id", Uuid, nullable=False, comment="Job that asks for it."),
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
    _tenant("Who owns the job; one tenant never sees another's."),
    Column(
        "model", Text, nullable=False, comment="Name of a configured model; empty if unreadable."
    ),
    Column(
        "kind",
        Text,
        nullable=False,
        comment="What the model does: generate, embed, classify, rerank or translate.",
    ),
    *_terms(),
    Column("input_tokens", Integer, comment="Prompt tokens counted at submission, if they were."),
    Column("created_at", Stamp, nullable=False, comment="Row written: the job is accepted."),
    # What changes comes last: what is logged of an update is from its first change to its last.
    Column("state", Text, nullable=False, comment="queued or running."),
    *_tries(),
    Column("attempt_id", Uuid, comment="The running attempt: the fence of every write; else null."),
    Column(
        "worker_id",
        Uuid,
        comment="Worker that holds its message, while queued, or runs it; else null.",
    ),
    Column("batch_id", Uuid, comment="Batch that it runs in; null unless running."),
    *_delivery(),
    Column("queued_at", Stamp, nullable=False, comment="Last became queued."),
    Column("claimed_at", Stamp, comment="Last claimed."),
    _one_of("kind", Kind),
    _one_of("state", OPEN_STATES),
    CheckConstraint("source IN ('api', 'message')", name="source"),
    CheckConstraint(f"priority BETWEEN 0 AND {MAX_PRIORITY}", name="priority"),
    CheckConstraint("max_attempts >= 1", name="max_attempts"),
    CheckConstraint("format >= 1", name="format"),
    _in_range(
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
    _not_negative("attempt", "attempts_charged", "losses", "input_tokens", "max_output_tokens"),
    CheckConstraint(
        "input_tokens <= 1000000000 AND max_output_tokens <= 1000000000", name="tokens"
    ),
    CheckConstraint(
        "char_length(tenant) <= 200 AND char_length(model) <= 200 AND char_length(url) <= 200",
        name="lengths",
    ),
    CheckConstraint("jsonb_typeof(metadata) = 'object'", name="metadata"),
    CheckConstraint("purged_at IS NULL OR metadata = '{}'", name="purged"),
    CheckConstraint("wake_count >= 0", name="wake_count"),
    CheckConstraint("time_limit_s > 0 AND time_limit_s < 'Infinity'", name="time_limit"),
    CheckConstraint(
        "quoted_ms >= 0 AND quoted_ms < 'Infinity'"
        " AND quoted_p90_ms >= 0 AND quoted_p90_ms < 'Infinity'",
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
    # Listing by labels.
    _by_metadata("open_jobs"),
    # Rescue: never sent; sent longest ago; with a worker; with a deadline.
    Index(
        "open_jobs_unsent",
        "model",
        "priority",
        "not_before",
        postgresql_where=text("enqueued_at IS NULL"),
    ),
    Index("open_jobs_sent", "model", "enqueued_at"),
    Index("open_jobs_by_worker", "worker_id", postgresql_where=text("worker_id IS NOT NULL")),
    Index("open_jobs_deadline", "deadline", postgresql_where=text("deadline IS NOT NULL")),
    postgresql_with={"fillfactor": "50"} | _BUSY,
    comment="One row per queued or running job: its state, and who may move it next.",
)

attempts = Table(
    "attempts",
    metadata,
    Column("id", Uuid, nullable=False, comment="Attempt id, made by the worker: the fence."),
    _tenant("Owner of the job."),
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
    *_bill(),
    *_energy(),
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
    _one_of("outcome", AttemptOutcome),
    _in_range("claimed_at", "started_at", "ended_at"),
    _one_of("energy_method", EnergyMethod),
    _not_negative(
        *("number", "device_ns", "wasted_ns", "cost", "upstream_cost", "price"),
        *("energy_nj", "wasted_nj"),
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
    _known_energy(),
    *_recomputable(),
    PrimaryKeyConstraint("id", "created_at"),
    UniqueConstraint("created_at", "job_id", "number"),
    postgresql_partition_by="RANGE (created_at)",
    comment="One row per try of a job by a worker; never overwritten by the next try.",
)

results = Table(
    "results",
    metadata,
    Column("job_id", Uuid, nullable=False, comment="Job; its only result."),
    _tenant("Owner of the job."),
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
    *_bill(server_default=text("0")),
    Column(
        "charge",
        Money,
        comment="What its tokens cost by that row's tariff, in `currency`; null without one.",
    ),
    *_energy(),
    Column(
        "energy_method",
        Text,
        nullable=False,
        server_default=EnergyMethod.ABSENT,
        comment="How that is known: measured, estimated or absent.",
    ),
    Column(
        "energy_boundary",
        Text,
        comment="Whose energy it is a part of: gpu, cpu packages or device; null if absent.",
    ),
    Column(
        "carbon_ug",
        BigInteger,
        comment="CO2-equivalent of energy_nj, in micrograms; null if no intensity is set.",
    ),
    # What else is known of the job.
    *_terms(),
    Column(
        "expected_input_tokens",
        Integer,
        comment="Prompt tokens counted at submission, if they were.",
    ),
    *_tries(),
    *_delivery(),
    _one_of("kind", Kind),
    _one_of("state", FINAL_STATES),
    _in_range(
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
    _not_negative(
        "batch_size",
        "input_tokens",
        "cached_tokens",
        "output_tokens",
        "device_ns",
        "wasted_ns",
        "prefill_ns",
        "recomputed_ns",
        "preemptions",
        "cost",
        "upstream_cost",
        "price",
        "charge",
        "energy_nj",
        "wasted_nj",
        "carbon_ug",
    ),
    _one_of("energy_method", EnergyMethod),
    _known_energy(),
    *_recomputable(),
    CheckConstraint("prefill_ns + recomputed_ns <= device_ns", name="uses"),
    CheckConstraint("purged_at IS NULL OR metadata = '{}'", name="purged"),
    PrimaryKeyConstraint("job_id", "created_at"),
    # Listing, with and without a model, and by labels.
    Index("results_by_state", "tenant", "state", "created_at", "job_id"),
    Index("results_by_model", "tenant", "model", "state", "created_at", "job_id"),
    _by_metadata("results"),
    # How fast the queue drains; retention: jobs to delete, by age.
    Index("results_finished", "tenant", "finished_at"),
    CheckConstraint("jsonb_typeof(response) = 'object'", name="response"),
    # Retention: responses to remove, by age.
    Index(
        "results_responses",
        "tenant",
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
    _one_of("kind", Kind),
    _one_of("close_reason", CloseReason),
    _in_range("opened_at", "claimed_at", "finished_at"),
    _not_negative("num_jobs", "num_sequences", "useful_tokens", "padded_tokens", "device_ns"),
    Index("batches_by_age", "claimed_at"),
    postgresql_with={"fillfactor": "80"} | _AGEING,
    comment="One row per admission batch. It may mix tenants, so it belongs to none.",
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id at each start of the process."),
    Column("name", Text, nullable=False, comment="Celery node name."),
    Column("host", Text, nullable=False, comment="Host name."),
    Column("pid", Integer, nullable=False, comment="Process id on that host."),
    Column("models", ARRAY(Text), nullable=False, comment="Models served."),
    Column("device", Text, nullable=False, comment="Device as its driver names it."),
    Column("device_index", Integer, comment="Its number on its host, if any."),
    Column(
        "engine",
        JSONB,
        nullable=False,
        server_default=text("'{}'::jsonb"),
        comment="Versions, and the engine and the kernels that compute, by model.",
    ),
    Column("price_id", Text, comment="Price of its device; null if it has none."),
    Column("currency", Text, comment="ISO 4217 code of the price."),
    Column("price_per_device_hour", Money, comment="Money per device and hour."),
    Column("started_at", Stamp, nullable=False, comment="Registered."),
    Column("heartbeat_at", Stamp, nullable=False, comment="Lease last renewed."),
    Column("lease_expires_at", Stamp, nullable=False, comment="Its attempts are lost after this."),
    Column("stopped_at", Stamp, comment="Said goodbye; null while up, and for ever if killed."),
    _in_range("started_at", "heartbeat_at", "lease_expires_at", "stopped_at"),
    # Renewed every few seconds and tiny: room for each renewal to stay in its page.
    postgresql_with={"fillfactor": "50"},
    comment="One row per start of a worker process: its lease, device and price.",
)


def _counts(**named: str) -> list[Column[Any]]:
    """Whole numbers in sums, each with its comment."""
    return [
        Column(name, BigInteger, nullable=False, comment=comment) for name, comment in named.items()
    ]


def _sums(**named: str) -> list[Column[Any]]:
    return [Column(name, Sum, nullable=False, comment=comment) for name, comment in named.items()]


def _hour(comment: str) -> Column[Any]:
    return Column("hour", Stamp, nullable=False, comment=f"Begin of the hour, in UTC, {comment}.")


@dataclass(frozen=True, slots=True)
class RollUp:
    """Sums of what happened in an hour, and what is to be added to them: the same columns.

    Whoever writes what is summed inserts deltas in the same transaction; see `app.store.usage`.
    """

    hours: Table
    deltas: Table
    by: tuple[str, ...]  #: what tells one row of the sums from another

    @property
    def sums(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.hours.columns if each.name not in self.by)


def _again(column: Column[Any]) -> Column[Any]:
    return Column(column.name, column.type, nullable=column.nullable, comment=column.comment)


def _roll_up(name: str, by: list[Column[Any]], sums: list[Column[Any]], comment: str) -> RollUp:
    keys = tuple(column.name for column in by)
    hours = Table(
        f"{name}_hours",
        metadata,
        *map(_again, (*by, *sums)),
        UniqueConstraint(*keys, name=f"{name}_hours_key", postgresql_nulls_not_distinct=True),
        # The rows of this hour are added to every few seconds; all others are only read.
        postgresql_with={"fillfactor": "85"} | _AGEING,
        comment=comment,
    )
    deltas = Table(
        f"{name}_deltas",
        metadata,
        *map(_again, (*by, *sums)),
        postgresql_with=_BUSY,
        comment=f"What is still to be added to {hours.name}; rescue does so every few seconds.",
    )
    return RollUp(hours, deltas, keys)


usage_sums = _roll_up(
    "usage",
    [
        _hour("they ended in"),
        Column("tenant", Text, nullable=False, comment="Owner of the jobs."),
        Column("model", Text, nullable=False, comment="Model of the jobs."),
        Column("priority", SmallInteger, nullable=False, comment="Priority of the jobs."),
        Column("price_id", Text, comment="Price that was charged; null if they never ran."),
        Column("currency", Text, comment="ISO 4217 code; null if they never ran."),
    ],
    [
        *_counts(**{f"jobs_{state}": f"Jobs that are {state}." for state in sorted(FINAL_STATES)}),
        *_counts(
            jobs_ran="Jobs that were in a batch.",
            batch_jobs="Sizes of these batches, summed: by jobs_ran the mean that a job saw.",
            input_tokens="Tokens of prompts, cached ones too.",
            cached_tokens="Of these, found in a prefix cache.",
            output_tokens="Tokens generated.",
            jobs_measured="Jobs whose energy was measured.",
            jobs_estimated="Jobs whose energy was estimated.",
        ),
        *_sums(
            device_ns="Device time billed, in nanoseconds.",
            wasted_ns="Device time of last attempts that nobody pays, in nanoseconds.",
            cost="What they were charged, in `currency`; nothing where the device has no price.",
            upstream_cost="Of `cost`: what servers elsewhere asked for them.",
            charge="What their tokens cost by the price's tariff, in `currency`.",
            energy_nj="Energy of jobs whose energy is known, in nanojoules.",
            wasted_nj="Energy of their last attempts without an answer, in nanojoules.",
            carbon_ug="CO2-equivalent of energy_nj where its intensity is set, in micrograms.",
        ),
    ],
    "What ended jobs used, by hour. Read it through the view `usage`. Never removed.",
)

batch_sums = _roll_up(
    "batch_usage",
    [
        _hour("they were claimed in"),
        Column("model", Text, nullable=False, comment="Model of the batches."),
    ],
    [
        *_counts(
            batches="Admission batches of which something has ended.",
            jobs="Jobs claimed in them.",
            sequences="Sequences of those jobs.",
        ),
        *_sums(
            useful_tokens="Prompt and output tokens that were asked for.",
            padded_tokens="Token positions computed, padding included.",
        ),
    ],
    "How batches were filled, by hour. Read it through the view `batch_usage`. Never removed.",
)

prices = Table(
    "prices",
    metadata,
    Column("id", Text, primary_key=True, comment="Its name in prices.toml."),
    Column("per_device_hour", Money, nullable=False, comment="Money per device and hour."),
    Column(
        "per_million_input_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of prompts that were not cached.",
    ),
    Column(
        "per_million_cached_input_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of prompts that were cached.",
    ),
    Column(
        "per_million_output_tokens",
        Money,
        nullable=False,
        comment="Tariff: money for a million tokens of answers.",
    ),
    Column(
        "batch_discount", Money, nullable=False, comment="Part of the tariff that is taken off."
    ),
    Column("currency", Text, nullable=False, comment="ISO 4217 code."),
    Column("device", Text, comment="Name that the prices of one device share, if any."),
    Column("valid_from", Stamp, nullable=False, comment="As its file said; else first written."),
    Column("valid_until", Stamp, comment="As its file said; null is until another one."),
    Column("note", Text, nullable=False, comment="What it is made of."),
    _in_range("valid_from", "valid_until"),
    _not_negative(
        "per_device_hour",
        "per_million_input_tokens",
        "per_million_cached_input_tokens",
        "per_million_output_tokens",
        "batch_discount",
        "1 - batch_discount",
    ),
    comment="One row per price that was ever in force. It only grows: no row is changed.",
)

loads = Table(
    "loads",
    metadata,
    Column("worker_id", Uuid, primary_key=True, comment="Worker that loads its models."),
    Column("models", ARRAY(Text), nullable=False, comment="These models."),
    Column("began_at", Stamp, nullable=False, comment="Began."),
    Column("ended_at", Stamp, comment="Has loaded them all; null until then, or if it failed."),
    _in_range("began_at", "ended_at"),
    Index("loads_by_age", "began_at"),
    comment="One row per start of a worker: how long it loaded its models.",
)

windows = Table(
    "windows",
    metadata,
    Column("worker_id", Uuid, nullable=False, comment="Worker whose time it is."),
    Column("number", Integer, nullable=False, comment="From 1 on, without a gap."),
    Column("from_at", Stamp, nullable=False, comment="`until_at` less `up_ns`."),
    Column("until_at", Stamp, nullable=False, comment="Closed."),
    Column(
        "up_ns",
        BigInteger,
        nullable=False,
        comment="Time that the engine process was up, in nanoseconds: the sum of the next six.",
    ),
    Column("load_ns", BigInteger, nullable=False, comment="Loading models, in nanoseconds."),
    Column(
        "busy_ns",
        BigInteger,
        nullable=False,
        comment="Billed by attempts that were settled in it, in nanoseconds: their device_ns.",
    ),
    Column("idle_ns", BigInteger, nullable=False, comment="Nothing to run, in nanoseconds."),
    Column(
        "waste_ns",
        BigInteger,
        nullable=False,
        comment="Computed in vain, in nanoseconds: their wasted_ns, and stray_ns.",
    ),
    Column(
        "overhead_ns",
        BigInteger,
        nullable=False,
        comment="Between steps, and between engine processes, in nanoseconds.",
    ),
    Column(
        "open_ns",
        BigInteger,
        nullable=False,
        comment="Computed in it for attempts that are settled later, in nanoseconds, less "
        "what was so before and is settled in it; negative if that is more.",
    ),
    Column(
        "stray_ns",
        BigInteger,
        nullable=False,
        comment="Of waste_ns, what no attempt's row tells, in nanoseconds: it was refused or "
        "deleted.",
    ),
    Column(
        "owed_ns",
        BigInteger,
        nullable=False,
        comment="At its end: device time that is billed and not in up_ns yet, in nanoseconds.",
    ),
    Column(
        "energy_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Energy of that time, in nanojoules: the sum of the next six; 0 if absent.",
    ),
    Column(
        "load_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of load_ns, in nanojoules.",
    ),
    Column(
        "busy_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of the answers of attempts that were settled in it, in nanojoules: their "
        "energy_nj.",
    ),
    Column(
        "idle_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of idle_ns, in nanojoules.",
    ),
    Column(
        "waste_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="What these attempts took in vain, in nanojoules: their wasted_nj, and stray_nj.",
    ),
    Column(
        "overhead_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of overhead_ns, in nanojoules.",
    ),
    Column(
        "open_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Drawn in it for attempts that are settled later, in nanojoules, less what was "
        "so before and is settled in it.",
    ),
    Column(
        "stray_nj",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="Of waste_nj, what no attempt's row tells, in nanojoules.",
    ),
    Column(
        "energy_method",
        Text,
        nullable=False,
        server_default=EnergyMethod.ABSENT,
        comment="How that is known: measured, estimated or absent.",
    ),
    Column(
        "energy_boundary",
        Text,
        comment="Whose energy it is a part of: gpu, cpu packages or device; null if absent.",
    ),
    Column(
        "counter_resets",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="Times that the energy counter was seen to begin anew.",
    ),
    Column("is_last", Boolean, nullable=False, comment="The worker ended, with nothing open."),
    Column("device", Text, nullable=False, comment="Device as its driver names it."),
    Column("device_index", Integer, comment="Its number on its host, if any."),
    Column("price_id", Text, comment="Price of its device; null if it has none."),
    Column("currency", Text, comment="ISO 4217 code of the price."),
    Column("price", Money, comment="Money per device and hour."),
    Column(
        "rounding",
        Money,
        comment="Price of up_ns less the prices of its parts, each rounded by the rule of "
        "app.books.cost; busy_ns by its attempts.",
    ),
    _in_range("from_at", "until_at"),
    CheckConstraint(
        "up_ns = load_ns + busy_ns + idle_ns + waste_ns + overhead_ns + open_ns", name="sum"
    ),
    CheckConstraint("busy_ns + waste_ns + open_ns >= 0 AND stray_ns <= waste_ns", name="spent"),
    _not_negative(
        *("number", "up_ns", "load_ns", "busy_ns", "idle_ns", "waste_ns", "overhead_ns"),
        *("stray_ns", "owed_ns", "price"),
        *("energy_nj", "load_nj", "busy_nj", "idle_nj", "waste_nj", "overhead_nj"),
        *("stray_nj", "counter_resets"),
    ),
    CheckConstraint(
        "energy_nj = load_nj + busy_nj + idle_nj + waste_nj + overhead_nj + open_nj",
        name="energy_sum",
    ),
    CheckConstraint(
        "busy_nj + waste_nj + open_nj >= 0 AND stray_nj <= waste_nj", name="energy_spent"
    ),
    _one_of("energy_method", EnergyMethod),
    CheckConstraint("num_nulls(price, price_id, currency, rounding) IN (0, 4)", name="price"),
    PrimaryKeyConstraint("worker_id", "number"),
    # Reports and retention: by time.
    Index("windows_by_time", "until_at"),
    postgresql_with=_AGEING,
    comment="One row per worker and heartbeat: where the time of its device went.",
)

device_sums = _roll_up(
    "device_time",
    [
        _hour("their windows closed in"),
        Column("device", Text, nullable=False, comment="Device as its driver names it."),
        Column("price_id", Text, comment="Price of the device; null if it has none."),
        Column("currency", Text, comment="ISO 4217 code of the price."),
        Column("price", Money, comment="Money per device and hour."),
    ],
    _sums(
        up_ns="Time that devices were up, in nanoseconds: the sum of the next six.",
        load_ns="Loading models, in nanoseconds.",
        busy_ns="Billed by attempts, in nanoseconds.",
        idle_ns="Nothing to run, in nanoseconds.",
        waste_ns="Computed in vain, in nanoseconds.",
        overhead_ns="Between steps, and between engine processes, in nanoseconds.",
        open_ns="Computed for attempts settled later, less what was so before, in nanoseconds.",
        energy_nj="Energy of that time where it is known, in nanojoules: the sum of the next six.",
        load_nj="Of load_ns, in nanojoules.",
        busy_nj="Of answers, in nanojoules.",
        idle_nj="Of idle_ns, in nanojoules.",
        waste_nj="Spent in vain, in nanojoules.",
        overhead_nj="Of overhead_ns, in nanojoules.",
        open_nj="For attempts settled later, less what was so before, in nanojoules.",
    ),
    "Where the time of devices went, by hour. Read it through the view `device_time`. Never"
    " removed.",
)

ROLL_UPS = (usage_sums, batch_sums, device_sums)

comparisons = Table(
    "comparisons",
    metadata,
    Column("id", Uuid, primary_key=True, comment="A new id for each."),
    Column("made_at", Stamp, nullable=False, comment="Ended."),
    Column("machine", Text, nullable=False, comment="Device and software, in words."),
    Column("kind", Text, nullable=False, comment="Kind of both models."),
    Column("prompts_digest", Text, nullable=False, comment="Hex SHA-256 of the prompts."),
    Column("num_prompts", Integer, nullable=False, comment="How many they were."),
    Column("a", Text, nullable=False, comment="The first model, as it was named."),
    Column("b", Text, nullable=False, comment="The second."),
    Column("a_digest", Text, nullable=False, comment="Hex SHA-256 of the first's settings."),
    Column("b_digest", Text, nullable=False, comment="Hex SHA-256 of the second's."),
    Column(
        "figures", JSONB, nullable=False, comment="What was measured; no prompts and no answers."
    ),
    _one_of("kind", Kind),
    _in_range("made_at"),
    _not_negative("num_prompts"),
    Index("comparisons_by_both", "a_digest", "b_digest", "made_at"),
    comment="One row per run of `gristmill compare`. Kept until they are deleted by hand.",
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
"""The view of all jobs, open and ended, in the columns of these tables."""
