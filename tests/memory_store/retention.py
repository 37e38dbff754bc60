"""What the statements of `app.store.retention` do."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta

from app.store import months, retention, webhooks
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params, Row


def _kept_for_long(self: MemoryConnection, rows: Iterable[Row], given: Params) -> list[Row]:
    """The page of those that ended first."""
    until = self.now - timedelta(seconds=given["keep_s"])
    old = [row for row in rows if row["finished_at"] is not None and row["finished_at"] < until]
    return sorted(old, key=lambda row: row["finished_at"])[: given["page"]]


@statement(months._NOW)
def _now(self: MemoryConnection, _: Params) -> Answer:
    return Answer([{"now": self.now}])


@statement(months._PARTITIONS)
def _partitions(self: MemoryConnection, given: Params) -> Answer:
    """All that are made ahead. Here no month is ever over."""
    upcoming = months.upcoming(self.now)
    return Answer([{"relname": month.partition(given["name"])} for month in upcoming])


@statement(months._IS_OVER)
def _is_over(self: MemoryConnection, _: Params) -> Answer:
    return Answer([{"is_over": False}])


@statement(retention._REMOVE_REQUESTS)
def _remove_requests(self: MemoryConnection, given: Params) -> Answer:
    kept = [job for job in self.jobs.values() if job["request"] is not None]
    old = _kept_for_long(self, kept, given)
    for job in old:
        self.update("jobs", job["id"], request=None)
    return Answer([], rowcount=len(old))


@statement(retention._REDACT_RESPONSES)
def _redact_responses(self: MemoryConnection, given: Params) -> Answer:
    kept = [result for result in self.results.values() if result["response"] is not None]
    old = _kept_for_long(self, kept, given)
    for result in old:
        self.update("results", result["job_id"], response=None)
    return Answer([], rowcount=len(old))


@statement(retention._DELETE_JOBS)
def _delete_jobs(self: MemoryConnection, given: Params) -> Answer:
    old = [job["id"] for job in _kept_for_long(self, self.jobs.values(), given)]
    for job_id in old:
        self.delete("jobs", job_id)
        if job_id in self.results:
            self.delete("results", job_id)
        for attempt in [each for each in self.attempts.values() if each["job_id"] == job_id]:
            self.delete("attempts", attempt["id"])
    return Answer([], rowcount=len(old))


@statement(retention._DELETE_WINDOWS)
def _delete_windows(self: MemoryConnection, given: Params) -> Answer:
    until = self.now - timedelta(seconds=max(0, given["keep_s"] - retention.BEFORE_S))
    old = [(key, each) for key, each in self.windows.items() if each["until_at"] < until]
    old = sorted(old, key=lambda each: (each[1]["until_at"], each[1]["number"]))[: given["page"]]
    for key, _ in old:
        self.delete("windows", key)
    return Answer([], rowcount=len(old))


@statement(retention._DELETE_BATCHES)
def _delete_batches(self: MemoryConnection, given: Params) -> Answer:
    until = self.now - timedelta(seconds=given["keep_s"])
    old = [
        batch
        for batch in self.batches.values()
        if batch["claimed_at"] < until and (batch["finished_at"] or batch["claimed_at"]) < until
    ]
    old = sorted(old, key=lambda batch: batch["claimed_at"])[: given["page"]]
    for batch in old:
        self.delete("batches", batch["id"])
    return Answer([], rowcount=len(old))


def _none_here(self: MemoryConnection, _: Params) -> Answer:
    return Answer([], rowcount=0)


for each in (retention._DELETE_LINES, retention._DELETE_CALLERS_BATCHES, webhooks._DELETE):
    statement(each)(_none_here)
