"""The tables, and `jobs`, the view of all jobs.

    job_keys     what a job is known by: its id and keys, unique over open and ended jobs
    requests     what it asks for, written once, for as long as prompts are kept
    open_jobs    its state, while it is queued or running: few rows, hot
    results      the same, and how it ended, written by the statement that ends it
    attempts     each try by a worker; then there are batches, workers, their loads and windows,
                 and prices
    tenants      who shares the system; then there are their API keys, and a log of what was
                 done about both
    files        what is known of files; their bytes lie elsewhere
    job_batches  batches that callers submit; then there are their lines
    usage_hours  what ended jobs used, summed by hour, for ever; see `RollUp`
    webhook_deliveries  whom to tell of an end, written by the statement that ends the job

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

from app.jobs import DEFAULT_TENANT
from app.store.tables.attempts import attempts, batches
from app.store.tables.columns import Stamp, device_cost, metadata
from app.store.tables.comparisons import comparisons
from app.store.tables.files import files
from app.store.tables.job_batches import job_batch_lines, job_batches
from app.store.tables.jobs import job_keys, jobs, open_jobs, requests
from app.store.tables.prices import prices
from app.store.tables.results import results
from app.store.tables.sums import ROLL_UPS, RollUp, device_sums, usage_sums
from app.store.tables.tenants import admin_log, api_keys, tenants
from app.store.tables.webhooks import (
    webhook_attempts,
    webhook_deliveries,
    webhook_endpoints,
    webhook_receivers,
)
from app.store.tables.workers import loads, windows, workers

__all__ = [
    "DEFAULT_TENANT",
    "ROLL_UPS",
    "RollUp",
    "Stamp",
    "admin_log",
    "api_keys",
    "attempts",
    "batches",
    "comparisons",
    "device_cost",
    "device_sums",
    "files",
    "job_batch_lines",
    "job_batches",
    "job_keys",
    "jobs",
    "loads",
    "metadata",
    "open_jobs",
    "prices",
    "requests",
    "results",
    "tenants",
    "usage_sums",
    "webhook_attempts",
    "webhook_deliveries",
    "webhook_endpoints",
    "webhook_receivers",
    "windows",
    "workers",
]
