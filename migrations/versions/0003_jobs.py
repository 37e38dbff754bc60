"""Keys, requests, open jobs, results, attempts, batches, workers, prices, windows; and the view of
all jobs."""

from typing import Any

from alembic import op
from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    DateTime,
    Double,
    ForeignKeyConstraint,
    Identity,
    Integer,
    LargeBinary,
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
BUSY = {
    "autovacuum_vacuum_scale_factor": "0.02",
    "autovacuum_vacuum_insert_scale_factor": "0.02",
    "autovacuum_vacuum_cost_limit": "2000",
}

revision = "0003"  # those before had other tables, before the first release
down_revision = None
branch_labels = None
depends_on = None

TABLES = (
    "job_keys",
    "requests",
    "open_jobs",
    "attempts",
    "results",
    "batches",
    "workers",
    "loads",
    "prices",
    "windows",
    "comparisons",
    "tenants",
    "api_keys",
    "admin_log",
    "files",
    "webhook_attempts",
    "webhook_deliveries",
    "webhook_endpoints",
    "webhook_receivers",
    "job_batch_lines",
    "job_batches",
)
IN_MONTHS = {"requests": {}, "attempts": {"fillfactor": "50"}, "results": {}}
"""Tables in monthly partitions, and what their partitions have beside `AGEING`. Rescue makes one
for each month in time; what belongs to none is in the default partition."""

# Unused columns cost nothing: their subqueries are not run.
JOBS = """
CREATE VIEW jobs AS
SELECT
    job.id, job.tenant, job.model, job.kind, job.url,
    (
        SELECT request FROM requests
        WHERE requests.created_at = job.created_at AND requests.job_id = job.id
    ) AS request,
    job.format, encode(job_keys.fingerprint, 'hex') AS fingerprint, job.source,
    job_keys.idempotency_key, job_keys.replay_of,
    job.metadata, job.priority, job.input_tokens, job.max_output_tokens, job.not_before,
    job.deadline, job.time_limit_s, job.quoted_ms, job.quoted_p90_ms, job.webhook_url,
    job.stream_events, job.stored, job.state, job.attempt,
    job.attempts_charged, job.max_attempts, job.losses, job.attempt_id, job.worker_id,
    job.batch_id, job.received_by, job.enqueued_at, job.received_at, job.wake_count,
    job.cancel_requested_at, job.purged_at, job.created_at, job.queued_at, job.claimed_at,
    job.finished_at
FROM (
    SELECT
        id, tenant, model, kind, url, format, source, metadata, priority, input_tokens,
        max_output_tokens, not_before, deadline, time_limit_s, quoted_ms, quoted_p90_ms,
        webhook_url, stream_events, stored, state, attempt, attempts_charged, max_attempts, losses,
        attempt_id,
        CASE state WHEN 'running' THEN worker_id END AS worker_id, batch_id,
        CASE state WHEN 'queued' THEN worker_id END AS received_by, enqueued_at, received_at,
        wake_count, cancel_requested_at, purged_at, created_at, queued_at, claimed_at,
        CAST(NULL AS timestamptz) AS finished_at
    FROM open_jobs
    UNION ALL
    SELECT
        job_id, tenant, model, kind, url, format, source, metadata, priority, expected_input_tokens,
        max_output_tokens, not_before, deadline, time_limit_s, quoted_ms, quoted_p90_ms,
        webhook_url, stream_events, stored, state, attempt, attempts_charged, max_attempts, losses,
        CAST(NULL AS uuid),
        CAST(NULL AS uuid), CAST(NULL AS uuid), CAST(NULL AS uuid), enqueued_at,
        received_at, wake_count, cancel_requested_at, purged_at, created_at, queued_at, claimed_at,
        finished_at
    FROM results
) AS job
LEFT JOIN job_keys ON job_keys.id = job.id
"""

# So that jobs can be deleted by hand, each with all that is of it.
DELETE_JOB = """
CREATE FUNCTION delete_job() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    DELETE FROM open_jobs WHERE id = OLD.id;
    DELETE FROM results WHERE created_at = OLD.created_at AND job_id = OLD.id;
    DELETE FROM attempts WHERE created_at = OLD.created_at AND job_id = OLD.id;
    DELETE FROM requests WHERE created_at = OLD.created_at AND job_id = OLD.id;
    DELETE FROM job_keys WHERE id = OLD.id;
    RETURN OLD;
END
$$
"""

# A bill can be read again only as long as its price is what it was.
KEEP_PRICE = """
CREATE FUNCTION keep_price() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'A price is never changed: add one with a new id.';
END
$$
"""

# Whoever row-level security holds for cannot use the index of labels. This runs as the owner, and
# so asks itself whose rows its caller may see. The tables that it names are bound when it is made:
# no `search_path` or temporary table of a caller leads it to others. Other conditions are kept out
# of its look by OFFSET: they would tempt the planner to walk through an index of these.
LABELLED = """
CREATE FUNCTION labelled(of_tenant text, labels jsonb, most int) RETURNS TABLE (
    id uuid, tenant text, state text, model text, created_at timestamptz,
    cancel_requested_at timestamptz
) LANGUAGE sql STABLE SECURITY DEFINER BEGIN ATOMIC
    SELECT id, tenant, state, model, created_at, cancel_requested_at FROM (
        SELECT * FROM jobs WHERE metadata @> labels AND metadata <> '{}' OFFSET 0
    ) AS job
    WHERE tenant = of_tenant AND (
        current_setting('gristmill.tenant', true) IN (of_tenant, '*')
        OR pg_has_role(  -- it is the owner who asks
            CASE current_setting('role') WHEN 'none' THEN session_user
                ELSE CAST(current_setting('role') AS name) END,
            current_user, 'USAGE'
        )
    )
    LIMIT most;
END
"""

KEEP_LOG = """
CREATE FUNCTION keep_log() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'What was done stays in the log.';
END
$$
"""

# Sums by the hour. Whatever statement writes the rows that are summed writes what it adds to a sum
# as well: all of it is kept or undone with them. A batch's totals are written again and again, from
# the first end of a member on: the sum gets the differences.
ROLL_UPS = {
    "usage": "they ended in",
    "batch_usage": "they were claimed in",
    "device_time": "their windows closed in",
}
SUMMED = {
    "usage": {
        "jobs_cancelled": (BigInteger, "Jobs that are cancelled."),
        "jobs_completed": (BigInteger, "Jobs that are completed."),
        "jobs_expired": (BigInteger, "Jobs that are expired."),
        "jobs_failed": (BigInteger, "Jobs that are failed."),
        "jobs_ran": (BigInteger, "Jobs that were in a batch."),
        "batch_jobs": (
            BigInteger,
            "Sizes of these batches, summed: by jobs_ran the mean that a job saw.",
        ),
        "input_tokens": (BigInteger, "Tokens of prompts, cached ones too."),
        "cached_tokens": (BigInteger, "Of these, found in a prefix cache."),
        "output_tokens": (BigInteger, "Tokens generated."),
        "jobs_measured": (BigInteger, "Jobs whose energy was measured."),
        "jobs_estimated": (BigInteger, "Jobs whose energy was estimated."),
        "device_ns": (Numeric, "Device time billed, in nanoseconds."),
        "wasted_ns": (
            Numeric,
            "Device time of last attempts that nobody pays, in nanoseconds.",
        ),
        "cost": (
            Numeric,
            "What they were charged, in `currency`; nothing where the device has no price.",
        ),
        "upstream_cost": (Numeric, "Of `cost`: what servers elsewhere asked for them."),
        "charge": (Numeric, "What their tokens cost by the price's tariff, in `currency`."),
        "energy_nj": (Numeric, "Energy of jobs whose energy is known, in nanojoules."),
        "wasted_nj": (Numeric, "Energy of their last attempts without an answer, in nanojoules."),
        "carbon_ug": (
            Numeric,
            "CO2-equivalent of energy_nj where its intensity is set, in micrograms.",
        ),
    },
    "batch_usage": {
        "batches": (BigInteger, "Admission batches of which something has ended."),
        "jobs": (BigInteger, "Jobs claimed in them."),
        "sequences": (BigInteger, "Sequences of those jobs."),
        "useful_tokens": (Numeric, "Prompt and output tokens that were asked for."),
        "padded_tokens": (Numeric, "Token positions computed, padding included."),
    },
    "device_time": {
        "up_ns": (
            Numeric,
            "Time that devices were up, in nanoseconds: the sum of the next six.",
        ),
        "load_ns": (Numeric, "Loading models, in nanoseconds."),
        "busy_ns": (Numeric, "Billed by attempts, in nanoseconds."),
        "idle_ns": (Numeric, "Nothing to run, in nanoseconds."),
        "waste_ns": (Numeric, "Computed in vain, in nanoseconds."),
        "overhead_ns": (Numeric, "Between steps, and between engine processes, in nanoseconds."),
        "open_ns": (
            Numeric,
            "Computed for attempts settled later, less what was so before, in nanoseconds.",
        ),
        "energy_nj": (
            Numeric,
            "Energy of that time where it is known, in nanojoules: the sum of the next six.",
        ),
        "load_nj": (Numeric, "Of load_ns, in nanojoules."),
        "busy_nj": (Numeric, "Of answers, in nanojoules."),
        "idle_nj": (Numeric, "Of idle_ns, in nanojoules."),
        "waste_nj": (Numeric, "Spent in vain, in nanojoules."),
        "overhead_nj": (Numeric, "Of overhead_ns, in nanojoules."),
        "open_nj": (Numeric, "For attempts settled later, less what was so before, in nanojoules."),
    },
}
OF_SUMS = {
    "usage": "What ended jobs used, by hour. Read it through the view `usage`. Never removed.",
    "batch_usage": "How batches were filled, by hour. Read it through the view `batch_usage`. "
    "Never removed.",
    "device_time": "Where the time of devices went, by hour. Read it through the view "
    "`device_time`. Never removed.",
}
OF_VIEWS = {
    "usage": "What ended jobs used, by hour, tenant, model, priority and price, whether they are "
    "kept or not.",
    "batch_usage": "How batches were filled, by hour and model, whether they are kept or not.",
    "device_time": "Where the time of devices went, by hour, device and price.",
}
ALWAYS_SUM = " An hour may have several rows of one kind until rescue has added them: always sum."

NOTE_USAGE = """
CREATE FUNCTION note_usage() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO usage_deltas (
        hour, tenant, model, priority, price_id, currency,
        jobs_cancelled, jobs_completed, jobs_expired, jobs_failed, jobs_ran, batch_jobs,
        input_tokens, cached_tokens, output_tokens, device_ns, wasted_ns, cost, upstream_cost,
        charge, jobs_measured, jobs_estimated, energy_nj, wasted_nj, carbon_ug
    )
    SELECT
        date_trunc('hour', finished_at, 'UTC'), tenant, model, priority, price_id, currency,
        count(*) FILTER (WHERE state = 'cancelled'), count(*) FILTER (WHERE state = 'completed'),
        count(*) FILTER (WHERE state = 'expired'), count(*) FILTER (WHERE state = 'failed'),
        count(batch_size), coalesce(sum(batch_size), 0), coalesce(sum(input_tokens), 0),
        coalesce(sum(cached_tokens), 0), coalesce(sum(output_tokens), 0), sum(device_ns),
        sum(wasted_ns), coalesce(sum(cost), 0), coalesce(sum(upstream_cost), 0),
        coalesce(sum(charge), 0), count(*) FILTER (WHERE energy_method = 'measured'),
        count(*) FILTER (WHERE energy_method = 'estimated'), coalesce(sum(energy_nj), 0),
        coalesce(sum(wasted_nj), 0), coalesce(sum(carbon_ug), 0)
    FROM written GROUP BY 1, 2, 3, 4, 5, 6;
    RETURN NULL;
END
$$
"""
NOTE_BATCHES = """
CREATE FUNCTION note_batches() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO batch_usage_deltas (
        hour, model, batches, jobs, sequences, useful_tokens, padded_tokens
    )
    SELECT
        date_trunc('hour', claimed_at, 'UTC'), model, sum(way), sum(way * num_jobs),
        sum(way * num_sequences), sum(way * CAST(useful_tokens AS numeric)),
        sum(way * CAST(padded_tokens AS numeric))
    FROM (SELECT 1 AS way, * FROM written UNION ALL SELECT -1, * FROM before) AS each
    WHERE finished_at IS NOT NULL
    GROUP BY 1, 2;
    RETURN NULL;
END
$$
"""
NOTE_WINDOWS = """
CREATE FUNCTION note_windows() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO device_time_deltas (
        hour, device, price_id, currency, price,
        up_ns, load_ns, busy_ns, idle_ns, waste_ns, overhead_ns, open_ns,
        energy_nj, load_nj, busy_nj, idle_nj, waste_nj, overhead_nj, open_nj
    )
    SELECT
        date_trunc('hour', until_at, 'UTC'), device, price_id, currency, price,
        sum(up_ns), sum(load_ns), sum(busy_ns), sum(idle_ns), sum(waste_ns), sum(overhead_ns),
        sum(open_ns), sum(energy_nj), sum(load_nj), sum(busy_nj), sum(idle_nj), sum(waste_nj),
        sum(overhead_nj), sum(open_nj)
    FROM written GROUP BY 1, 2, 3, 4, 5;
    RETURN NULL;
END
$$
"""
# Who is told of what ended: the tenant's endpoints that ask for such events, and the URL that it
# brought. Whoever ends anything calls this in the same transaction.
ANNOUNCE_ENDS = """
CREATE FUNCTION announce_ends(ids uuid[], tenants text[], types text[], objects text[], urls text[])
RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    WITH ended AS MATERIALIZED (
        SELECT * FROM unnest(ids, tenants, types, objects, urls)
            AS ended(id, tenant, type, object_id, url)
    ), told AS MATERIALIZED (
        SELECT id, tenant, type, object_id, CAST(NULL AS uuid) AS endpoint_id, url
        FROM ended WHERE url IS NOT NULL
        UNION ALL
        SELECT ended.id, ended.tenant, ended.type, object_id, webhook_endpoints.id,
            webhook_endpoints.url
        FROM ended JOIN webhook_endpoints ON webhook_endpoints.tenant = ended.tenant
            AND ended.type = ANY(event_types)
            AND webhook_endpoints.url IS NOT NULL AND disabled_at IS NULL
    ), placed AS MATERIALIZED (
        SELECT * FROM (SELECT *, substring(url FROM '^https?://[^/]+') AS origin FROM told) AS each
        -- A row may have been written by hand: it keeps nobody's job from its end.
        WHERE origin IS NOT NULL AND char_length(url) <= 2100
    ), received AS (
        INSERT INTO webhook_receivers (tenant, origin)
        SELECT DISTINCT tenant, origin FROM placed
        WHERE NOT EXISTS (  -- most are known, and need no new version of their row
            SELECT FROM webhook_receivers AS known
            WHERE known.tenant = placed.tenant AND known.origin = placed.origin
        )
        ORDER BY tenant, origin  -- so that those who write several never wait for each other
        ON CONFLICT DO NOTHING
    )
    INSERT INTO webhook_deliveries (
        id, tenant, event_id, endpoint_id, type, object_id, url, origin, state,
        created_at, since, next_at
    )
    SELECT gen_random_uuid(), tenant, id, endpoint_id, type, object_id, url, origin, 'pending',
        now(), now(), now()
    FROM placed
    ON CONFLICT DO NOTHING;
END
$$
"""

# What is told of a job. One that was asked for as a response is a response to its caller.
NOTE_ENDS = """
CREATE FUNCTION note_ends() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM announce_ends(
        array_agg(job_id), array_agg(tenant), array_agg(type), array_agg(object_id),
        array_agg(webhook_url)
    )
    FROM (
        SELECT job_id, tenant, webhook_url,
            CASE WHEN url IS DISTINCT FROM '/v1/responses' THEN 'job.' || state
                WHEN response ->> 'status' = 'incomplete' THEN 'response.incomplete'
                WHEN state = 'expired' THEN 'response.failed'
                ELSE 'response.' || state END AS type,
            CASE WHEN url IS DISTINCT FROM '/v1/responses' THEN CAST(job_id AS text)
                ELSE 'resp_' || replace(CAST(job_id AS text), '-', '') END AS object_id
        FROM written
        WHERE webhook_url IS NOT NULL OR tenant IN (
            SELECT tenant FROM webhook_endpoints WHERE url IS NOT NULL AND disabled_at IS NULL
        )
    ) AS told
    HAVING count(*) > 0;
    RETURN NULL;
END
$$
"""
# The same of batches that callers submitted, whoever moves them to their last state.
NOTE_BATCH_ENDS = """
CREATE FUNCTION note_batch_ends() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    PERFORM announce_ends(
        array_agg(written.id), array_agg(written.tenant), array_agg('batch.' || written.state),
        array_agg(
            CASE written.door WHEN 'anthropic' THEN 'msgbatch_' ELSE 'batch_' END
            || replace(CAST(written.id AS text), '-', '')
        ),
        array_agg(written.webhook_url)
    )
    FROM written JOIN before ON before.id = written.id
    WHERE written.ended_at IS NOT NULL AND before.ended_at IS NULL
    HAVING count(*) > 0;
    RETURN NULL;
END
$$
"""
TRIGGERS = (
    ("note_windows", "INSERT", "windows", "NEW TABLE AS written"),
    ("note_usage", "INSERT", "results", "NEW TABLE AS written"),
    ("note_ends", "INSERT", "results", "NEW TABLE AS written"),
    ("note_batches", "UPDATE", "batches", "OLD TABLE AS before NEW TABLE AS written"),
    ("note_batch_ends", "UPDATE", "job_batches", "OLD TABLE AS before NEW TABLE AS written"),
)


def hour_of(roll_up):
    """What tells one row of its sums from another."""
    hour = Column(
        "hour", Stamp, nullable=False, comment=f"Begin of the hour, in UTC, {ROLL_UPS[roll_up]}."
    )
    if roll_up == "batch_usage":
        return hour, Column("model", Text, nullable=False, comment="Model of the batches.")
    if roll_up == "device_time":
        return (
            hour,
            Column("device", Text, nullable=False, comment="Device as its driver names it."),
            Column("price_id", Text, comment="Price of the device; null if it has none."),
            Column("currency", Text, comment="ISO 4217 code of the price."),
            Column("price", Money, comment="Money per device and hour."),
        )
    return (
        hour,
        Column("tenant", Text, nullable=False, comment="Owner of the jobs."),
        Column("model", Text, nullable=False, comment="Model of the jobs."),
        Column("priority", SmallInteger, nullable=False, comment="Priority of the jobs."),
        Column("price_id", Text, comment="Price that was charged; null if they never ran."),
        Column("currency", Text, comment="ISO 4217 code; null if they never ran."),
    )


def sums_of(roll_up):
    return (
        Column(name, kind(), nullable=False, comment=comment)
        for name, (kind, comment) in SUMMED[roll_up].items()
    )


def create_roll_up(name):
    keys = [column.name for column in hour_of(name)]
    op.create_table(
        f"{name}_hours",
        *hour_of(name),
        *sums_of(name),
        UniqueConstraint(*keys, name=op.f(f"{name}_hours_key"), postgresql_nulls_not_distinct=True),
        comment=OF_SUMS[name],
        postgresql_with={"fillfactor": "85"} | AGEING,
    )
    op.create_table(
        f"{name}_deltas",
        *hour_of(name),
        *sums_of(name),
        comment=f"What is still to be added to {name}_hours; rescue does so every few seconds.",
        postgresql_with=BUSY,
    )
    op.execute(f"CREATE VIEW {name} AS TABLE {name}_hours UNION ALL TABLE {name}_deltas")
    op.execute(f"COMMENT ON VIEW {name} IS '{OF_VIEWS[name]}{ALWAYS_SUM}'")


def one_of(table: str, column: str, words: str) -> CheckConstraint:
    return CheckConstraint(f"{column} = ANY ('{{{words}}}')", name=op.f(f"{table}_{column}_check"))


def in_range(table: str, *stamps: str) -> CheckConstraint:
    each = ", ".join(stamps)
    checks = f"least({each}) >= '0001-01-02Z' AND greatest({each}) <= '9999-12-30Z'"
    return CheckConstraint(checks, name=op.f(f"{table}_stamps_check"))


def not_negative(table: str, *counts: str) -> CheckConstraint:
    checks = " AND ".join(f"least({each}) >= 0" for each in counts)
    return CheckConstraint(checks, name=op.f(f"{table}_counts_check"))


COST = """
CASE WHEN price IS NULL THEN coalesce(cost, 0) = 0 ELSE cost =
    div(2 * CAST(device_ns AS numeric) * (price * 1000000000) + 3600000000000, 7200000000000)
    * 0.000000001 + coalesce(upstream_cost, 0) END
"""


def recomputable(table: str) -> tuple[CheckConstraint, CheckConstraint]:
    return (
        CheckConstraint(COST, name=op.f(f"{table}_cost_check")),
        CheckConstraint(
            "num_nulls(price, price_id, currency) IN (0, 3)", name=op.f(f"{table}_price_check")
        ),
    )


def tenant(comment: str) -> Column[Any]:
    return Column("tenant", Text, server_default="default", nullable=False, comment=comment)


METHODS = "absent,estimated,measured"


def energy() -> tuple[Column[Any], Column[Any]]:
    return (
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
    )


def known_energy(table: str) -> tuple[CheckConstraint, CheckConstraint]:
    return (
        one_of(table, "energy_method", METHODS),
        CheckConstraint(
            "num_nulls(energy_nj, wasted_nj)"
            " = CASE WHEN coalesce(energy_method, 'absent') = 'absent' THEN 2 ELSE 0 END",
            name=op.f(f"{table}_energy_check"),
        ),
    )


def create_files() -> None:
    op.create_table(
        "files",
        Column("id", Uuid, nullable=False, comment="File id, after `file-`; rises with time."),
        Column(
            "tenant",
            Text,
            server_default="default",
            nullable=False,
            comment="Who owns the file; one tenant never sees another's.",
        ),
        Column("purpose", Text, nullable=False, comment="What it is for, as the caller says."),
        Column("filename", Text, nullable=False, comment="Its name at the caller's."),
        Column(
            "batch_id",
            Uuid,
            comment="Batch that writes it, or wrote it; null for a caller's own file.",
        ),
        Column("created_at", Stamp, nullable=False, comment="Its upload began, in whole seconds."),
        Column("expires_at", Stamp, comment="Not there any more from then on; null is never."),
        Column(
            "state",
            Text,
            nullable=False,
            comment="uploading, growing (an output of a batch that runs), ready or deleted.",
        ),
        Column("bytes", BigInteger, comment="Its size; null before it is ready."),
        Column("sha256", Text, comment="Hex SHA-256 of its bytes; null before it is ready."),
        one_of("files", "state", "deleted,growing,ready,uploading"),
        in_range("files", "created_at", "expires_at"),
        not_negative("files", "bytes"),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(purpose) <= 64"
            " AND char_length(filename) BETWEEN 1 AND 255",
            name=op.f("files_lengths_check"),
        ),
        CheckConstraint(
            "(state = 'ready') <= (num_nulls(bytes, sha256) = 0)", name=op.f("files_ready_check")
        ),
        PrimaryKeyConstraint("id", name=op.f("files_pkey")),
        comment="One row per file. Its bytes are in the storage of files, under its id.",
        postgresql_with=AGEING,
    )
    op.create_index(
        "files_by_id",
        "files",
        ["tenant", "id"],
        postgresql_where=text("state IN ('growing', 'ready')"),
    )
    op.create_index(
        "files_expire", "files", ["expires_at"], postgresql_where=text("expires_at IS NOT NULL")
    )
    op.create_index(
        "files_going",
        "files",
        ["id"],
        postgresql_where=text("state IN ('uploading', 'deleted')"),
    )


def create_job_batches() -> None:
    op.create_table(
        "job_batches",
        Column("id", Uuid, nullable=False, comment="Batch id, after `batch_`; rises with time."),
        Column(
            "tenant",
            Text,
            server_default="default",
            nullable=False,
            comment="Who owns the batch; one tenant never sees another's.",
        ),
        Column("door", Text, nullable=False, comment="Protocol of its lines: openai or anthropic."),
        Column("url", Text, nullable=False, comment="Call that all its lines are."),
        Column("model", Text, comment="Model that all its lines name; null if they name several."),
        Column("input_name", Text, nullable=False, comment="File with its lines, as it was named."),
        Column("input_file_id", Uuid, comment="That file; null if there is no such one."),
        Column("input_bytes", BigInteger, nullable=False, comment="Size of that file."),
        Column(
            "metadata",
            JSONB,
            server_default=text("'{}'::jsonb"),
            nullable=False,
            comment="The caller's own labels, returned as they came.",
        ),
        Column("idempotency_key", Text, comment="The caller's key; unique per tenant."),
        Column("fingerprint", Text, nullable=False, comment="Hex SHA-256 of what was asked."),
        Column("created_at", Stamp, nullable=False, comment="Accepted, in whole seconds."),
        Column("expires_at", Stamp, nullable=False, comment="Lines that are open then expire."),
        Column(
            "output_expires_s",
            Double,
            nullable=False,
            comment="How long its files are kept from when they are made, in seconds.",
        ),
        Column("webhook_url", Text, comment="Who is told of its end; null if it names nobody."),
        Column("state", Text, nullable=False, comment="See app.batches."),
        Column("in_progress_at", Stamp, comment="Its lines were found right."),
        Column("cancelling_at", Stamp, comment="Cancelled by the caller."),
        Column("finalizing_at", Stamp, comment="Its last line had its outcome."),
        Column("ended_at", Stamp, comment="Reached its final state; its files are there."),
        Column("errors", JSONB, comment="What is wrong with its lines; null unless it failed."),
        Column("output_file_id", Uuid, comment="Its output; null before it has a line."),
        Column("error_file_id", Uuid, comment="The lines without an answer; null likewise."),
        Column(
            "total",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines; 0 until they are all read.",
        ),
        Column(
            "fed",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines that became jobs, or have an outcome without.",
        ),
        Column(
            "fed_bytes",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Where the next one begins in the input.",
        ),
        Column(
            "fed_rows",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Rows of text before that place, empty ones too.",
        ),
        Column(
            "succeeded",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines whose jobs completed.",
        ),
        Column(
            "errored",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines that were refused, or whose jobs failed.",
        ),
        Column(
            "cancelled",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines that were cancelled.",
        ),
        Column(
            "expired",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines that expired.",
        ),
        Column(
            "output",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines in the output.",
        ),
        Column(
            "error_lines",
            Integer,
            server_default=text("0"),
            nullable=False,
            comment="Lines in the error file.",
        ),
        Column(
            "input_tokens",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Prompt tokens of its ended jobs, cached ones too.",
        ),
        Column(
            "cached_tokens",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Of these, found in a prefix cache.",
        ),
        Column(
            "output_tokens",
            BigInteger,
            server_default=text("0"),
            nullable=False,
            comment="Tokens generated by its ended jobs.",
        ),
        Column("keeper_id", Uuid, comment="Rescue process that works on it; null if none does."),
        Column("keeper_until", Stamp, comment="Another one may take it from then on."),
        CheckConstraint(
            "(ended_at IS NOT NULL) = (state IN ('failed', 'completed', 'expired', 'cancelled'))",
            name=op.f("job_batches_ended_check"),
        ),
        CheckConstraint(
            "(state IN ('completed', 'expired', 'cancelled', 'finalizing')) <= "
            "(output + error_lines = total)",
            name=op.f("job_batches_whole_check"),
        ),
        in_range(
            "job_batches",
            "created_at",
            "expires_at",
            "in_progress_at",
            "cancelling_at",
            "finalizing_at",
            "ended_at",
            "keeper_until",
        ),
        one_of("job_batches", "door", "anthropic,openai"),
        CheckConstraint(
            "jsonb_typeof(metadata) = 'object'", name=op.f("job_batches_metadata_check")
        ),
        one_of(
            "job_batches",
            "state",
            "cancelled,cancelling,completed,expired,failed,finalizing,in_progress,validating",
        ),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(url) <= 200 AND "
            "char_length(model) <= 200 AND char_length(input_name) <= 200 AND "
            "char_length(idempotency_key) BETWEEN 1 AND 255",
            name=op.f("job_batches_lengths_check"),
        ),
        CheckConstraint(
            "succeeded + errored + cancelled + expired = output + error_lines AND "
            "output + error_lines <= fed AND fed <= total",
            name=op.f("job_batches_sums_check"),
        ),
        not_negative(
            "job_batches",
            "total",
            "fed",
            "fed_bytes",
            "fed_rows",
            "succeeded",
            "errored",
            "cancelled",
            "expired",
            "output",
            "error_lines",
            "input_tokens",
            "cached_tokens",
            "output_tokens",
            "input_bytes",
            "output_expires_s",
        ),
        PrimaryKeyConstraint("id", name=op.f("job_batches_pkey")),
        comment="One row per batch that a caller submitted: its state, and what became "
        "of its lines.",
        postgresql_with={"fillfactor": "50"} | AGEING,
    )
    op.create_index("job_batches_by_id", "job_batches", ["tenant", "id"])
    op.create_index(
        "job_batches_ended",
        "job_batches",
        ["ended_at"],
        postgresql_where=text("ended_at IS NOT NULL"),
    )
    op.create_index(
        "job_batches_open", "job_batches", ["id"], postgresql_where=text("ended_at IS NULL")
    )
    op.create_index(
        "job_batches_idempotency_key",
        "job_batches",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "job_batch_lines",
        Column("batch_id", Uuid, nullable=False, comment="Batch of the line."),
        Column("number", Integer, nullable=False, comment="Its row in the input, from 1 on."),
        Column(
            "tenant", Text, server_default="default", nullable=False, comment="Owner of the batch."
        ),
        Column("custom_id", Text, nullable=False, comment="The caller's name for it."),
        Column("job_id", Uuid, comment="Its job; null if it never became one."),
        Column(
            "job_created_at", Stamp, comment="When that was accepted: the month its rows are in."
        ),
        Column("error", JSONB, comment="Why it is no job: status, code, message and param."),
        Column("outcome", Text, comment="What became of it; null while it is open."),
        Column(
            "file", Text, comment="File that it is in: output or errors; null while it is open."
        ),
        Column("place", Integer, comment="Its place in that file, from 1 on; null likewise."),
        one_of("job_batch_lines", "file", "errors,output"),
        one_of("job_batch_lines", "outcome", "cancelled,errored,expired,succeeded"),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(custom_id) <= 512",
            name=op.f("job_batch_lines_lengths_check"),
        ),
        CheckConstraint(
            "num_nulls(job_id, job_created_at) IN (0, 2)", name=op.f("job_batch_lines_job_check")
        ),
        CheckConstraint(
            "num_nulls(outcome, file, place) IN (0, 3)", name=op.f("job_batch_lines_ended_check")
        ),
        CheckConstraint(
            "outcome IS NOT NULL OR job_id IS NOT NULL", name=op.f("job_batch_lines_open_check")
        ),
        ForeignKeyConstraint(
            ["batch_id"],
            ["job_batches.id"],
            name=op.f("job_batch_lines_batch_id_fkey"),
            ondelete="CASCADE",
        ),
        PrimaryKeyConstraint("batch_id", "number", name=op.f("job_batch_lines_pkey")),
        comment="One row per line of a batch, from when it became a job, or could not.",
        postgresql_with={"fillfactor": "70"} | BUSY,
    )
    op.create_index(
        "job_batch_lines_by_job",
        "job_batch_lines",
        ["job_id"],
        postgresql_where=text("job_id IS NOT NULL"),
    )
    op.create_index(
        "job_batch_lines_by_place",
        "job_batch_lines",
        ["batch_id", "file", "place"],
        unique=True,
        postgresql_where=text("place IS NOT NULL"),
    )
    op.create_index(
        "job_batch_lines_open",
        "job_batch_lines",
        ["batch_id", "number"],
        postgresql_where=text("outcome IS NULL"),
    )


def upgrade() -> None:
    create_files()
    create_job_batches()
    op.create_table(
        "job_keys",
        Column("id", Uuid, nullable=False, comment="Job id; also the id of its Celery message."),
        Column(
            "tenant",
            Text,
            server_default="default",
            nullable=False,
            comment="Who owns the job; one tenant never sees another's.",
        ),
        Column("fingerprint", LargeBinary, comment="SHA-256 of url and request in canonical JSON."),
        Column("idempotency_key", Text, comment="The caller's key; unique per tenant."),
        Column("replay_of", Uuid, comment="Ended job that it runs once more; null if none."),
        Column(
            "created_at", Stamp, nullable=False, comment="The job's: the month its rows are in."
        ),
        in_range("job_keys", "created_at"),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(idempotency_key) BETWEEN 1 AND 255",
            name=op.f("job_keys_lengths_check"),
        ),
        PrimaryKeyConstraint("id", name=op.f("job_keys_pkey")),
        comment="One row per accepted job, open or ended: what it is known by. Written once.",
        postgresql_with=AGEING,
    )
    op.create_index(
        "job_keys_idempotency_key",
        "job_keys",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    )
    op.create_index(
        "job_keys_replay_of",
        "job_keys",
        ["replay_of"],
        unique=True,
        postgresql_where=text("replay_of IS NOT NULL"),
    )
    op.create_table(
        "requests",
        Column("created_at", Stamp, nullable=False, comment="The job's: the month it is kept in."),
        Column("job_id", Uuid, nullable=False, comment="Job that asks for it."),
        tenant("Owner of the job."),
        Column("request", JSONB, nullable=False, comment="Body as sent, prompt included."),
        CheckConstraint("jsonb_typeof(request) = 'object'", name=op.f("requests_request_check")),
        PrimaryKeyConstraint("created_at", "job_id", name=op.f("requests_pkey")),
        comment="One row per job with a request that is kept. Written once.",
        postgresql_partition_by="RANGE (created_at)",
    )
    op.create_table(
        "open_jobs",
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
        Column(
            "format",
            SmallInteger,
            server_default=text("1"),
            nullable=False,
            comment="Version of the request's format; only workers that know it take the job.",
        ),
        Column("source", Text, nullable=False, comment="Where it came from: api or message."),
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
            "stream_events",
            Boolean,
            server_default=text("false"),
            nullable=False,
            comment="Its tokens are put into a stream in Redis as they come.",
        ),
        Column(
            "stored",
            Boolean,
            server_default=text("false"),
            nullable=False,
            comment="A chat that was sent with `store`: a stored chat completion, once completed.",
        ),
        Column(
            "max_attempts",
            SmallInteger,
            server_default=text("3"),
            nullable=False,
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
        Column("webhook_url", Text, comment="Who is told of its end; null if it names nobody."),
        Column("created_at", Stamp, nullable=False, comment="Row written: the job is accepted."),
        Column("state", Text, nullable=False, comment="queued or running."),
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
        Column(
            "worker_id",
            Uuid,
            comment="Worker that holds its message, while queued, or runs it; else null.",
        ),
        Column("batch_id", Uuid, comment="Batch that it runs in; null unless running."),
        Column("enqueued_at", Stamp, comment="Message last sent; null if none is under way."),
        Column("received_at", Stamp, comment="A worker received it; null if none has it."),
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
        Column("queued_at", Stamp, nullable=False, comment="Last became queued."),
        Column("claimed_at", Stamp, comment="Last claimed."),
        one_of("open_jobs", "kind", "classify,embed,generate,rerank,translate"),
        one_of("open_jobs", "state", "queued,running"),
        one_of("open_jobs", "source", "api,message"),
        CheckConstraint("priority BETWEEN -1 AND 9", name=op.f("open_jobs_priority_check")),
        CheckConstraint("max_attempts >= 1", name=op.f("open_jobs_max_attempts_check")),
        CheckConstraint("format >= 1", name=op.f("open_jobs_format_check")),
        in_range(
            "open_jobs",
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
            "open_jobs",
            "attempt, attempts_charged, input_tokens, max_output_tokens",
            "losses, wake_count",
        ),
        CheckConstraint(
            "greatest(input_tokens, max_output_tokens) <= 1000000000",
            name=op.f("open_jobs_tokens_check"),
        ),
        CheckConstraint(
            "greatest(char_length(tenant), char_length(model), char_length(url)) <= 200",
            name=op.f("open_jobs_lengths_check"),
        ),
        CheckConstraint("jsonb_typeof(metadata) = 'object'", name=op.f("open_jobs_metadata_check")),
        CheckConstraint(
            "purged_at IS NULL OR metadata = '{}'", name=op.f("open_jobs_purged_check")
        ),
        CheckConstraint(
            "time_limit_s > 0 AND time_limit_s < 'Infinity'",
            name=op.f("open_jobs_time_limit_check"),
        ),
        CheckConstraint(
            "least(quoted_ms, quoted_p90_ms) >= 0"
            " AND greatest(quoted_ms, quoted_p90_ms) < 'Infinity'",
            name=op.f("open_jobs_quoted_check"),
        ),
        CheckConstraint(
            "CASE state WHEN 'running' THEN num_nulls(attempt_id, worker_id, batch_id) = 0"
            " ELSE num_nonnulls(attempt_id, batch_id) = 0"
            " AND (worker_id IS NULL OR enqueued_at IS NOT NULL) END",
            name=op.f("open_jobs_holder_check"),
        ),
        CheckConstraint(
            "state <> 'queued' OR cancel_requested_at IS NULL",
            name=op.f("open_jobs_cancel_requested_at_check"),
        ),
        PrimaryKeyConstraint("id", name=op.f("open_jobs_pkey")),
        comment="One row per queued or running job: its state, and who may move it next.",
        postgresql_with={"fillfactor": "50"} | BUSY,
    )
    op.create_index(
        "open_jobs_by_metadata",
        "open_jobs",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata <> '{}'"),
    )
    op.create_index("open_jobs_by_model", "open_jobs", ["model", "created_at", "id"])
    op.create_index(
        "open_jobs_by_tenant",
        "open_jobs",
        ["tenant"],
        postgresql_where=text("tenant <> 'default'"),
    )
    op.create_index(
        "open_jobs_by_worker",
        "open_jobs",
        ["worker_id"],
        postgresql_where=text("worker_id IS NOT NULL"),
    )
    op.create_index(
        "open_jobs_deadline",
        "open_jobs",
        ["deadline"],
        postgresql_where=text("deadline IS NOT NULL"),
    )
    op.create_index("open_jobs_sent", "open_jobs", ["model", "enqueued_at"])
    op.create_index(
        "open_jobs_unsent",
        "open_jobs",
        ["model", "tenant", "priority", "not_before"],
        postgresql_where=text("enqueued_at IS NULL"),
    )
    op.create_table(
        "attempts",
        Column("id", Uuid, nullable=False, comment="Attempt id, made by the worker: the fence."),
        Column(
            "tenant", Text, server_default="default", nullable=False, comment="Owner of the job."
        ),
        Column("created_at", Stamp, nullable=False, comment="The job's: the month it is kept in."),
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
            comment="Device time of its answer, in nanoseconds: it is billed. Null while it runs.",
        ),
        Column(
            "wasted_ns",
            BigInteger,
            comment="Device time without an answer in time, in nanoseconds. Null while it runs.",
        ),
        Column(
            "cost",
            Money,
            comment="What its device time costs at `price`, by the rule of app.books.cost, and "
            "`upstream_cost`; null if the device has no price.",
        ),
        Column("upstream_cost", Money, comment="Of `cost`: what servers elsewhere asked for it."),
        Column("currency", Text, comment="ISO 4217 code; null if the job never ran."),
        Column("price_id", Text, comment="Row of `prices` that was charged."),
        Column("price", Money, comment="Money per device and hour, by that row."),
        *energy(),
        Column(
            "energy_method",
            Text,
            comment="How that is known: measured, estimated or absent; null while it runs.",
        ),
        Column(
            "window_number",
            Integer,
            comment="Window of its worker in which its time was settled; null while it runs, and "
            "for good if its worker never told.",
        ),
        Column("error_code", Text, comment="Stable code of what ended it, see app.errors."),
        one_of("attempts", "outcome", "failed,lost,released,succeeded"),
        in_range("attempts", "claimed_at", "started_at", "ended_at"),
        not_negative(
            "attempts",
            "number",
            "device_ns, wasted_ns, energy_nj, wasted_nj",
            "cost, upstream_cost, price",
        ),
        CheckConstraint(
            "num_nulls(ended_at, outcome, charged, device_ns, wasted_ns, energy_method) IN (0, 6)",
            name=op.f("attempts_ended_check"),
        ),
        CheckConstraint(
            "outcome NOT IN ('lost', 'released')"
            " OR device_ns = 0 AND price IS NULL AND coalesce(energy_nj, 0) = 0",
            name=op.f("attempts_billed_check"),
        ),
        *known_energy("attempts"),
        *recomputable("attempts"),
        PrimaryKeyConstraint("id", "created_at", name=op.f("attempts_pkey")),
        UniqueConstraint(
            "created_at", "job_id", "number", name=op.f("attempts_created_at_job_id_number_key")
        ),
        comment="One row per try of a job by a worker; never overwritten by the next try.",
        postgresql_partition_by="RANGE (created_at)",
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
            "wasted_ns",
            BigInteger,
            server_default=text("0"),
            nullable=False,
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
            "preemptions",
            Integer,
            comment="Times it gave way in the engine; null if that is not told.",
        ),
        Column(
            "preempted_ms",
            Double,
            comment="Part of inference_ms in which it had given way, in ms; of several sequences "
            "the sum; null as preemptions.",
        ),
        Column(
            "cost",
            Money,
            server_default=text("0"),
            comment="What its device time costs at `price`, by the rule of app.books.cost, and "
            "`upstream_cost`; null if the device has no price.",
        ),
        Column("upstream_cost", Money, comment="Of `cost`: what servers elsewhere asked for it."),
        Column("currency", Text, comment="ISO 4217 code; null if the job never ran."),
        Column("price_id", Text, comment="Row of `prices` that was charged."),
        Column("price", Money, comment="Money per device and hour, by that row."),
        Column(
            "charge",
            Money,
            comment="What its tokens cost by that row's tariff, in `currency`; null without one.",
        ),
        *energy(),
        Column(
            "energy_method",
            Text,
            nullable=False,
            server_default="absent",
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
        Column(
            "url", Text, comment="OpenAI-style path of the request; null if it was never readable."
        ),
        Column(
            "format",
            SmallInteger,
            server_default=text("1"),
            nullable=False,
            comment="Version of the request's format; only workers that know it take the job.",
        ),
        Column("source", Text, nullable=False, comment="Where it came from: api or message."),
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
            "expected_input_tokens",
            Integer,
            comment="Prompt tokens counted at submission, if they were.",
        ),
        Column("max_output_tokens", Integer, comment="Most output tokens allowed, if counted."),
        Column("not_before", Stamp, nullable=False, comment="May be claimed from this time on."),
        Column("deadline", Stamp, comment="Expires if not finished by this time; null is never."),
        Column(
            "time_limit_s", Double, comment="Longest time an attempt may take; null is any time."
        ),
        Column(
            "stream_events",
            Boolean,
            server_default=text("false"),
            nullable=False,
            comment="Its tokens are put into a stream in Redis as they come.",
        ),
        Column(
            "stored",
            Boolean,
            server_default=text("false"),
            nullable=False,
            comment="A chat that was sent with `store`: a stored chat completion, once completed.",
        ),
        Column(
            "max_attempts",
            SmallInteger,
            server_default=text("3"),
            nullable=False,
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
        Column("webhook_url", Text, comment="Who is told of its end; null if it names nobody."),
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
            "losses",
            SmallInteger,
            server_default=text("0"),
            nullable=False,
            comment="Times its worker was lost while it ran; "
            "a suspect from app.jobs.SUSPECT_AFTER on.",
        ),
        Column("enqueued_at", Stamp, comment="Message last sent; null if none is under way."),
        Column("received_at", Stamp, comment="A worker received it; null if none has it."),
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
        one_of("results", "kind", "classify,embed,generate,rerank,translate"),
        one_of("results", "state", "cancelled,completed,expired,failed"),
        in_range(
            "results",
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
            "results",
            "batch_size, input_tokens, cached_tokens, output_tokens, preemptions",
            "device_ns, wasted_ns, prefill_ns, recomputed_ns, energy_nj, wasted_nj, carbon_ug",
            "cost, upstream_cost, price, charge",
        ),
        *known_energy("results"),
        *recomputable("results"),
        CheckConstraint("prefill_ns + recomputed_ns <= device_ns", name=op.f("results_uses_check")),
        CheckConstraint("purged_at IS NULL OR metadata = '{}'", name=op.f("results_purged_check")),
        PrimaryKeyConstraint("job_id", "created_at", name=op.f("results_pkey")),
        CheckConstraint("jsonb_typeof(response) = 'object'", name=op.f("results_response_check")),
        comment="One row per final job, written once: the answer, its timing and its cost.",
        postgresql_partition_by="RANGE (created_at)",
    )
    op.create_index(
        "results_by_error",
        "results",
        ["tenant", "error_code", "created_at", "job_id"],
        postgresql_where=text("error_code IS NOT NULL"),
    )
    op.create_index(
        "results_by_metadata",
        "results",
        ["metadata"],
        postgresql_using="gin",
        postgresql_ops={"metadata": "jsonb_path_ops"},
        postgresql_where=text("metadata <> '{}'"),
    )
    op.create_index(
        "results_by_model", "results", ["tenant", "model", "state", "created_at", "job_id"]
    )
    op.create_index("results_by_state", "results", ["tenant", "state", "created_at", "job_id"])
    op.create_index("results_finished", "results", ["finished_at"])
    op.create_index(
        "results_responses",
        "results",
        ["finished_at"],
        postgresql_where=text("response IS NOT NULL"),
    )
    op.create_index(
        "results_stored",
        "results",
        ["tenant", "created_at", "job_id"],
        postgresql_where=text("stored AND response IS NOT NULL AND error_code IS NULL"),
    )
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
            comment="Device time of all members, in nanoseconds, waste included.",
        ),
        Column("opened_at", Stamp, nullable=False, comment="Its oldest member arrived."),
        Column("claimed_at", Stamp, nullable=False, comment="Closed and claimed."),
        Column(
            "finished_at", Stamp, comment="Statistics last written; final once all members are."
        ),
        Column(
            "job_ids",
            ARRAY(Uuid),
            server_default=text("'{}'"),
            nullable=False,
            comment="Jobs claimed; some may be deleted since.",
        ),
        one_of("batches", "kind", "classify,embed,generate,rerank,translate"),
        one_of("batches", "close_reason", "join,size,tokens,wait"),
        in_range("batches", "opened_at", "claimed_at", "finished_at"),
        not_negative(
            "batches", "num_jobs, num_sequences", "useful_tokens, padded_tokens, device_ns"
        ),
        PrimaryKeyConstraint("id", name=op.f("batches_pkey")),
        comment="One row per admission batch. It may mix tenants, so it belongs to none.",
        postgresql_with={"fillfactor": "80"} | AGEING,
    )
    op.create_index("batches_by_age", "batches", ["claimed_at"])
    op.create_table(
        "workers",
        Column("id", Uuid, nullable=False, comment="A new id at each start of the process."),
        Column("name", Text, nullable=False, comment="Celery node name."),
        Column("host", Text, nullable=False, comment="Host name."),
        Column("pid", Integer, nullable=False, comment="Process id on that host."),
        Column("models", ARRAY(Text), nullable=False, comment="Models served."),
        Column("device", Text, nullable=False, comment="Device as its driver names it."),
        Column("device_index", Integer, comment="Its number on its host, if any."),
        Column(
            "engine",
            JSONB,
            server_default=text("'{}'::jsonb"),
            nullable=False,
            comment="Versions, and the engine and the kernels that compute, by model.",
        ),
        Column("price_id", Text, comment="Price of its device; null if it has none."),
        Column("currency", Text, comment="ISO 4217 code of the price."),
        Column("price_per_device_hour", Money, comment="Money per device and hour."),
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
        "loads",
        Column("worker_id", Uuid, nullable=False, comment="Worker that loads its models."),
        Column("models", ARRAY(Text), nullable=False, comment="These models."),
        Column("began_at", Stamp, nullable=False, comment="Began."),
        Column("ended_at", Stamp, comment="Has loaded them all; null until then, or if it failed."),
        in_range("loads", "began_at", "ended_at"),
        PrimaryKeyConstraint("worker_id", name=op.f("loads_pkey")),
        comment="One row per start of a worker: how long it loaded its models.",
    )
    op.create_index("loads_by_age", "loads", ["began_at"])
    op.create_table(
        "prices",
        Column("id", Text, nullable=False, comment="Its name in prices.toml."),
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
        Column(
            "valid_from",
            Stamp,
            nullable=False,
            comment="As its file said; else first written.",
        ),
        Column("valid_until", Stamp, comment="As its file said; null is until another one."),
        Column("note", Text, nullable=False, comment="What it is made of."),
        in_range("prices", "valid_from", "valid_until"),
        not_negative(
            "prices",
            "per_device_hour",
            "per_million_input_tokens",
            "per_million_cached_input_tokens",
            "per_million_output_tokens",
            "batch_discount",
            "1 - batch_discount",
        ),
        PrimaryKeyConstraint("id", name=op.f("prices_pkey")),
        comment="One row per price that was ever in force. It only grows: no row is changed.",
    )

    op.create_table(
        "windows",
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
            comment="What these attempts took in vain, in nanojoules: their wasted_nj, and "
            "stray_nj.",
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
            server_default="absent",
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
        in_range("windows", "from_at", "until_at"),
        CheckConstraint(
            "up_ns = load_ns + busy_ns + idle_ns + waste_ns + overhead_ns + open_ns",
            name=op.f("windows_sum_check"),
        ),
        CheckConstraint(
            "busy_ns + waste_ns + open_ns >= 0 AND stray_ns <= waste_ns",
            name=op.f("windows_spent_check"),
        ),
        not_negative(
            "windows",
            *("number", "up_ns", "load_ns", "busy_ns", "idle_ns", "waste_ns", "overhead_ns"),
            *("stray_ns", "owed_ns", "price"),
            *("energy_nj", "load_nj", "busy_nj", "idle_nj", "waste_nj", "overhead_nj"),
            *("stray_nj", "counter_resets"),
        ),
        CheckConstraint(
            "energy_nj = load_nj + busy_nj + idle_nj + waste_nj + overhead_nj + open_nj",
            name=op.f("windows_energy_sum_check"),
        ),
        CheckConstraint(
            "busy_nj + waste_nj + open_nj >= 0 AND stray_nj <= waste_nj",
            name=op.f("windows_energy_spent_check"),
        ),
        one_of("windows", "energy_method", METHODS),
        CheckConstraint(
            "num_nulls(price, price_id, currency, rounding) IN (0, 4)",
            name=op.f("windows_price_check"),
        ),
        PrimaryKeyConstraint("worker_id", "number", name=op.f("windows_pkey")),
        postgresql_with=AGEING,
        comment="One row per worker and heartbeat: where the time of its device went.",
    )

    op.create_index("windows_by_time", "windows", ["until_at"])
    op.create_table(
        "comparisons",
        Column("id", Uuid, nullable=False, comment="A new id for each."),
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
            "figures",
            JSONB,
            nullable=False,
            comment="What was measured; no prompts and no answers.",
        ),
        one_of("comparisons", "kind", "classify,embed,generate,rerank,translate"),
        in_range("comparisons", "made_at"),
        not_negative("comparisons", "num_prompts"),
        PrimaryKeyConstraint("id", name=op.f("comparisons_pkey")),
        comment="One row per run of `gristmill compare`. Kept until they are deleted by hand.",
    )
    op.create_index("comparisons_by_both", "comparisons", ["a_digest", "b_digest", "made_at"])

    op.create_table(
        "tenants",
        Column("name", Text, nullable=False, comment="What `tenant` is in every other table."),
        Column(
            "created_at",
            Stamp,
            server_default=text("now()"),
            nullable=False,
            comment="Added then.",
        ),
        Column(
            "weight",
            Integer,
            server_default=text("1"),
            nullable=False,
            comment="Its share of the devices beside that of others.",
        ),
        Column(
            "max_requests_per_minute", Integer, comment="Calls that submit; null is any number."
        ),
        Column("max_open_jobs", Integer, comment="Queued and running at once; null is any number."),
        Column(
            "max_queued_tokens",
            BigInteger,
            comment="Of queued jobs, with those that they may generate; null is any number.",
        ),
        Column(
            "max_cost_per_day", Money, comment="Of jobs that ended in a day, in UTC; null is any."
        ),
        Column("max_cost_per_month", Money, comment="The same of a month."),
        Column("currency", Text, comment="ISO 4217 code of both; other currencies do not count."),
        not_negative("tenants", "max_cost_per_day", "max_cost_per_month"),
        CheckConstraint(
            "max_requests_per_minute >= 1 AND max_open_jobs >= 1 AND max_queued_tokens >= 1",
            name=op.f("tenants_limits_check"),
        ),
        CheckConstraint(
            "coalesce(max_cost_per_day, max_cost_per_month) IS NULL OR currency IS NOT NULL",
            name=op.f("tenants_currency_check"),
        ),
        CheckConstraint(
            "name ~ '^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$'", name=op.f("tenants_name_check")
        ),
        CheckConstraint("weight BETWEEN 1 AND 1000", name=op.f("tenants_weight_check")),
        PrimaryKeyConstraint("name", name=op.f("tenants_pkey")),
        comment="One row per tenant; `default` is whoever is not named.",
    )
    op.execute("INSERT INTO tenants (name) VALUES ('default')")
    op.create_table(
        "api_keys",
        Column("id", Text, nullable=False, comment="Second part of the key; no secret."),
        tenant("Whose key it is."),
        Column("name", Text, nullable=False, comment="What it is for, in its owner's words."),
        Column("scopes", ARRAY(Text), nullable=False, comment="Of submit, read and admin."),
        Column("digest", LargeBinary, nullable=False, comment="SHA-256 of the whole key."),
        Column(
            "created_at", Stamp, server_default=text("now()"), nullable=False, comment="Made then."
        ),
        Column("expires_at", Stamp, comment="Of no use from then on; null is never."),
        Column("revoked_at", Stamp, comment="Of no use since then; null is not revoked."),
        Column("last_used_at", Stamp, comment="Last use, to some minutes; null is never."),
        CheckConstraint("octet_length(digest) = 32", name=op.f("api_keys_digest_check")),
        CheckConstraint(
            "scopes <@ ARRAY['submit', 'read', 'admin'] AND cardinality(scopes) > 0",
            name=op.f("api_keys_scopes_check"),
        ),
        CheckConstraint(
            "char_length(name) <= 100 AND char_length(tenant) <= 200",
            name=op.f("api_keys_lengths_check"),
        ),
        in_range("api_keys", "created_at", "expires_at"),
        PrimaryKeyConstraint("id", name=op.f("api_keys_pkey")),
        comment="One row per API key, for ever: revoked and expired ones say who had them.",
    )
    op.create_index("api_keys_by_tenant", "api_keys", ["tenant", "created_at"])
    op.create_table(
        "admin_log",
        Column("id", BigInteger, Identity(always=True), nullable=False, comment="In their order."),
        tenant("Whom it was about."),
        Column("at", Stamp, server_default=text("now()"), nullable=False, comment="When."),
        Column(
            "actor",
            Text,
            nullable=False,
            comment="Who: `cli:USER@HOST`, `key:ID` or `anybody`.",
        ),
        Column("action", Text, nullable=False, comment="What, as in key.created."),
        Column(
            "subject",
            Text,
            nullable=False,
            comment="Id of the key or job, or a tenant's name.",
        ),
        Column(
            "details",
            JSONB,
            server_default=text("'{}'::jsonb"),
            nullable=False,
            comment="What else there is to tell; no secret, and nothing that a job says.",
        ),
        PrimaryKeyConstraint("id", name=op.f("admin_log_pkey")),
        comment="What was done about keys, tenants and content. Rows are only added.",
    )
    op.create_index("admin_log_by_tenant", "admin_log", ["tenant", "id"])

    op.create_table(
        "webhook_endpoints",
        Column("id", Uuid, nullable=False, comment="A new id for each."),
        tenant("Whose events it receives."),
        Column("name", Text, nullable=False, comment="The tenant's word for it."),
        Column(
            "url",
            Text,
            comment="Where events go; null for the one that signs for webhook_url of jobs and "
            "batches.",
        ),
        Column(
            "event_types",
            ARRAY(Text),
            nullable=False,
            comment="Which events; see app.webhooks.events.",
        ),
        Column("secret", Text, nullable=False, comment="Signs; sealed if a key is configured."),
        Column("secret_hint", Text, nullable=False, comment="What of the secret may be shown."),
        Column("old_secret", Text, comment="The one before, which signs as well for a while."),
        Column("old_secret_until", Stamp, comment="For how long it does."),
        Column("created_at", Stamp, nullable=False, comment="Made."),
        Column("updated_at", Stamp, nullable=False, comment="Its settings or secret last changed."),
        Column(
            "disabled_at",
            Stamp,
            comment="It answered 410: nothing goes there until it is updated; null if it receives.",
        ),
        in_range(
            "webhook_endpoints", "old_secret_until", "created_at", "updated_at", "disabled_at"
        ),
        CheckConstraint(
            "num_nulls(old_secret, old_secret_until) IN (0, 2)",
            name=op.f("webhook_endpoints_old_secret_check"),
        ),
        CheckConstraint(
            "char_length(tenant) <= 200 AND char_length(name) BETWEEN 1 AND 200"
            " AND char_length(url) <= 2100",
            name=op.f("webhook_endpoints_lengths_check"),
        ),
        PrimaryKeyConstraint("id", name=op.f("webhook_endpoints_pkey")),
        comment="One row per receiver of a tenant's events.",
    )
    op.create_index(
        "webhook_endpoints_by_tenant", "webhook_endpoints", ["tenant", "created_at", "id"]
    )
    op.create_index(
        "webhook_endpoints_own",
        "webhook_endpoints",
        ["tenant"],
        unique=True,
        postgresql_where=text("url IS NULL"),
    )
    op.create_table(
        "webhook_receivers",
        tenant("Whose webhooks."),
        Column("origin", Text, nullable=False, comment="Scheme, host and port of its URLs."),
        Column(
            "failures",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts in a row that it did not answer, or answered 429 or 5xx.",
        ),
        Column("retry_at", Stamp, comment="It rests until then; null if it does not."),
        in_range("webhook_receivers", "retry_at"),
        not_negative("webhook_receivers", "failures"),
        PrimaryKeyConstraint("tenant", "origin", name=op.f("webhook_receivers_pkey")),
        postgresql_with={"fillfactor": "50"} | BUSY,
        comment="One row per server that receives a tenant's webhooks: whether it is well.",
    )
    op.create_table(
        "webhook_deliveries",
        Column("id", Uuid, nullable=False, comment="A new id for each."),
        tenant("Whose event it is."),
        Column(
            "event_id",
            Uuid,
            nullable=False,
            comment="The event's: the id of what ended; that of a test is a new one.",
        ),
        Column("endpoint_id", Uuid, comment="Who receives it; null for a webhook_url of its own."),
        Column("type", Text, nullable=False, comment="What happened, as job.completed."),
        Column("object_id", Text, nullable=False, comment="To what, as the API names it."),
        Column("url", Text, nullable=False, comment="Where it goes."),
        Column("origin", Text, nullable=False, comment="Its receiver: scheme, host and port."),
        Column("state", Text, nullable=False, comment="pending, delivered or failed."),
        Column(
            "is_test",
            Boolean,
            nullable=False,
            server_default=text("false"),
            comment="Asked for by its tenant, and tried once.",
        ),
        Column(
            "attempts",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Attempts that were begun, ever.",
        ),
        Column(
            "attempts_before",
            Integer,
            nullable=False,
            server_default=text("0"),
            comment="Of these, before it was last replayed.",
        ),
        Column("created_at", Stamp, nullable=False, comment="The event's."),
        Column(
            "since", Stamp, nullable=False, comment="Begin of its schedule: created, or replayed."
        ),
        Column("next_at", Stamp, comment="Due; while it is sent, until when that is waited for."),
        Column("lease", Uuid, comment="The sending under way: the fence of its record; else null."),
        Column("ended_at", Stamp, comment="Delivered or given up; null while pending."),
        Column("status_code", Integer, comment="Of the last answer; null if there was none."),
        Column("error", Text, comment="Why the last attempt failed; null if it did not."),
        in_range("webhook_deliveries", "created_at", "since", "next_at", "ended_at"),
        not_negative("webhook_deliveries", "attempts", "attempts_before"),
        CheckConstraint(
            "attempts_before <= attempts", name=op.f("webhook_deliveries_attempts_check")
        ),
        CheckConstraint(
            "CASE state WHEN 'pending' THEN ended_at IS NULL AND next_at IS NOT NULL"
            " WHEN 'delivered' THEN ended_at IS NOT NULL AND error IS NULL"
            " AND num_nonnulls(next_at, lease) = 0"
            " WHEN 'failed' THEN ended_at IS NOT NULL AND error IS NOT NULL"
            " AND num_nonnulls(next_at, lease) = 0 ELSE false END",
            name=op.f("webhook_deliveries_state_check"),
        ),
        PrimaryKeyConstraint("id", name=op.f("webhook_deliveries_pkey")),
        postgresql_with={"fillfactor": "70"} | BUSY,
        comment="One row per event and receiver: the outbox, written by what ends a job.",
    )
    op.create_index(
        "webhook_deliveries_event",
        "webhook_deliveries",
        ["event_id", "endpoint_id"],
        unique=True,
        postgresql_nulls_not_distinct=True,
    )
    op.create_index(
        "webhook_deliveries_due",
        "webhook_deliveries",
        ["tenant", "origin", "next_at"],
        postgresql_where=text("state = 'pending'"),
    )
    op.create_index(
        "webhook_deliveries_pending",
        "webhook_deliveries",
        ["endpoint_id"],
        postgresql_where=text("state = 'pending'"),
    )
    op.create_index(
        "webhook_deliveries_by_tenant", "webhook_deliveries", ["tenant", "created_at", "id"]
    )
    op.create_index(
        "webhook_deliveries_ended",
        "webhook_deliveries",
        ["ended_at"],
        postgresql_where=text("state <> 'pending'"),
    )
    op.create_table(
        "webhook_attempts",
        Column("delivery_id", Uuid, nullable=False, comment="Delivery that was tried."),
        Column("number", Integer, nullable=False, comment="1 for its first attempt."),
        tenant("Whose event it was."),
        Column("started_at", Stamp, nullable=False, comment="Began."),
        Column("took_ms", Double, nullable=False, comment="Until the answer, in ms."),
        Column("status_code", Integer, comment="Of the answer; null if there was none."),
        Column("error", Text, comment="Why it failed, a word of app.webhooks.post; null if not."),
        in_range("webhook_attempts", "started_at"),
        not_negative("webhook_attempts", "number", "took_ms"),
        PrimaryKeyConstraint("delivery_id", "number", name=op.f("webhook_attempts_pkey")),
        ForeignKeyConstraint(
            ["delivery_id"],
            ["webhook_deliveries.id"],
            ondelete="CASCADE",
            name=op.f("webhook_attempts_delivery_id_fkey"),
        ),
        comment="One row per attempt whose end was seen. Holds nothing of what was answered.",
    )

    for table, more in IN_MONTHS.items():
        options = ", ".join(f"{name} = {value}" for name, value in (AGEING | more).items())
        op.execute(f"CREATE TABLE {table}_default PARTITION OF {table} DEFAULT WITH ({options})")
    op.execute(JOBS)
    op.execute("COMMENT ON VIEW jobs IS 'One row per accepted job, open or ended.'")
    op.execute(DELETE_JOB)
    op.execute(
        "CREATE TRIGGER delete_job INSTEAD OF DELETE ON jobs"
        " FOR EACH ROW EXECUTE FUNCTION delete_job()"
    )
    for name in ROLL_UPS:
        create_roll_up(name)
    for function in (
        NOTE_USAGE,
        NOTE_BATCHES,
        NOTE_WINDOWS,
        ANNOUNCE_ENDS,
        NOTE_ENDS,
        NOTE_BATCH_ENDS,
    ):
        op.execute(function)
    for function, event, table, named in TRIGGERS:
        op.execute(
            f"CREATE TRIGGER {function} AFTER {event} ON {table} REFERENCING {named}"
            f" FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
        )
    op.execute(LABELLED)
    op.execute(KEEP_LOG)
    op.execute(
        "CREATE TRIGGER keep_log BEFORE UPDATE OR DELETE ON admin_log"
        " FOR EACH ROW EXECUTE FUNCTION keep_log()"
    )
    op.execute(KEEP_PRICE)
    op.execute(
        "CREATE TRIGGER keep_price BEFORE UPDATE OR DELETE ON prices"
        " FOR EACH ROW EXECUTE FUNCTION keep_price()"
    )


def downgrade() -> None:
    op.execute("DROP FUNCTION labelled")
    op.execute("DROP VIEW jobs")
    op.execute("DROP FUNCTION delete_job")
    for name in ROLL_UPS:
        op.execute(f"DROP VIEW {name}")
        op.drop_table(f"{name}_hours")
        op.drop_table(f"{name}_deltas")
    for table in TABLES:
        op.drop_table(table)
    for function, *_ in TRIGGERS:
        op.execute(f"DROP FUNCTION {function}")
    op.execute("DROP FUNCTION announce_ends")
    op.execute("DROP FUNCTION keep_price")
    op.execute("DROP FUNCTION keep_log")
