"""What the statements of `app.store.submissions` and `app.store.counts` do."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from app.store import counts, submissions
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import FINAL, Params, Row, is_known, is_waiting, records


def _new_row(self: MemoryConnection, job: Row, **more: Any) -> Row:
    stamps = {"created_at": self.now, "queued_at": self.now, "state": "queued"}
    job = {**job, "not_before": job.get("not_before") or self.now}
    return self.insert("jobs", stamps | job | more)


def _by_key(self: MemoryConnection, job: Row) -> Row | None:
    key = (job["tenant"], job.get("idempotency_key"))
    same = (row for row in self.jobs.values() if key == (row["tenant"], row["idempotency_key"]))
    return next(same, None) if key[1] is not None else None


def _replays(self: MemoryConnection, job: Row) -> Row | None:
    """The job that replays the same one."""
    old = job.get("replay_of")
    same = (row for row in self.jobs.values() if row["replay_of"] == old)
    return next(same, None) if old is not None else None


@statement(submissions._INSERT_NEW)
def _insert_new(self: MemoryConnection, given: Params) -> Answer:
    created = []
    jobs = records("jobs", given["jobs"])
    sent = {job["id"] for job, is_sent in zip(jobs, given["sent"], strict=True) if is_sent}
    for job in sorted(jobs, key=lambda job: job.get("idempotency_key") or chr(0x10FFFF)):
        if job["id"] not in self.jobs and _by_key(self, job) is None and not _replays(self, job):
            is_due = (job.get("not_before") or self.now) <= self.now
            is_sent = is_due and job["id"] in sent
            row = _new_row(self, job, enqueued_at=self.now if is_sent else None)
            created.append({"id": row["id"], "is_sent": is_sent, "created_at": self.now})
    return Answer(created)


@statement(submissions._FIND_EARLIER)
def _find_earlier(self: MemoryConnection, given: Params) -> Answer:
    found = []
    for job in records("jobs", given["jobs"]):
        old = self.jobs.get(job["id"]) or _by_key(self, job) or _replays(self, job)
        if old is not None:
            same = all(old[name] == job[name] for name in ("tenant", "fingerprint"))
            found.append({"asked": job["id"], "id": old["id"], "fingerprint_matches": same})
    return Answer(found)


@statement(submissions._RECEIVE)
def _receive(self: MemoryConnection, given: Params) -> Answer:
    brought = {job["id"]: job for job in records("jobs", given["jobs"])}
    rows = []
    for job_id, fingerprint in zip(given["ids"], given["fingerprints"], strict=True):
        row, job = self.jobs.get(job_id), brought.get(job_id)
        if row is not None and row["state"] not in FINAL:
            row = self.update("jobs", job_id, **_noted(row, given["worker_id"], self.now))
            rows.append(received(row, fingerprint, self.now))
        elif row is None and job is not None:
            is_due = (job.get("not_before") or self.now) <= self.now
            holder, sent_at = (given["worker_id"], self.now) if is_due else (None, None)
            row = _new_row(self, job, received_by=holder, received_at=sent_at, enqueued_at=sent_at)
            rows.append(received(row, fingerprint, self.now))
    return Answer(rows)


@statement(submissions._LOOK_BACK)
def _look_back(self: MemoryConnection, given: Params) -> Answer:
    rows = []
    for job_id, fingerprint in zip(given["ids"], given["fingerprints"], strict=True):
        row = self.jobs.get(job_id)
        if row is not None and row["state"] in FINAL:
            rows.append(received(row, fingerprint, self.now))
    return Answer(rows)


def _noted(row: Row, worker_id: UUID, now: datetime) -> Row:
    """`delivery.RECEIVED`."""
    if row["state"] != "queued":
        return {}
    is_due = row["not_before"] <= now
    is_held = is_due and is_known(row)
    return {
        "received_by": worker_id if is_held else row["received_by"],
        "received_at": now if is_held else row["received_at"],
        "enqueued_at": None
        if not is_due and row["received_by"] is None
        else row["enqueued_at"] or now,
    }


def received(row: Row, fingerprint: str | None, now: datetime) -> Row:
    """What the statements show of a row."""
    names = (
        "not_before", "deadline", "time_limit_s", "stream_events", "format", "priority",
        "attempts_charged", "losses", "created_at",
    )  # fmt: skip
    is_same = fingerprint is not None and fingerprint == row["fingerprint"]
    found = {
        **{name: row[name] for name in ("id", "tenant", "model", "kind", "state")},
        "is_due": row["not_before"] <= now,
        "expires_in_s": None
        if row["deadline"] is None
        else (row["deadline"] - now).total_seconds(),
        **{name: row[name] for name in (*names, "url")},
        "request": None if is_same else row["request"],
    }
    return {name: found[name] for name in submissions.Received.__slots__}


@statement(submissions._REJECT)
def _reject(self: MemoryConnection, given: Params) -> Answer:
    written = []
    for bad in records("jobs", given["rejected"]):
        if bad["id"] not in self.jobs:
            error = (bad.pop("error_code"), bad.pop("error_message"))
            row = _new_row(self, bad, source="message", finished_at=self.now)
            self.record_ended(row, *error)
            written.append({"id": row["id"]})
    return Answer(written)


@statement(counts._QUEUED)
def _queued(self: MemoryConnection, _: Params) -> Answer:
    return _load(filter(is_waiting, self.jobs.values()))


@statement(counts._ENDED)
def _ended(self: MemoryConnection, given: Params) -> Answer:
    since = self.now - timedelta(seconds=given["window_s"])
    return _load(
        job for job in self.jobs.values() if job["finished_at"] and job["finished_at"] > since
    )


def _load(jobs: Iterable[Row]) -> Answer:
    tokens = [(job["input_tokens"] or 0) + (job["max_output_tokens"] or 0) for job in jobs]
    return Answer([{"jobs": len(tokens), "tokens": sum(tokens)}])
