"""What the statements of `app.store.delivery` do."""

from __future__ import annotations

from datetime import timedelta

from app.store import delivery
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params, Row, is_known, is_waiting


def _is_unsent(job: Row) -> bool:
    return is_waiting(job) and job["enqueued_at"] is None


def _is_sent(job: Row) -> bool:
    return is_waiting(job) and job["enqueued_at"] is not None


def _is_held(job: Row, worker_id: object) -> bool:
    return job["state"] == "queued" and job["received_by"] == worker_id is not None


def _is_overdue(self: MemoryConnection, job: Row, lost_after_s: float) -> bool:
    age = self.now - job["enqueued_at"]
    return age > timedelta(seconds=lost_after_s * 2 ** min(job["wake_count"], 16))


def _mark(self: MemoryConnection, job: Row, **more: object) -> Row:
    """`_wake_ups` takes it."""
    job = self.update("jobs", job["id"], enqueued_at=self.now, **more)
    return {name: job[name] for name in ("id", "model", "kind", "priority", "not_before", "tenant")}


@statement(delivery._UNSENT)
def _unsent(self: MemoryConnection, _: Params) -> Answer:
    found = {(job["model"], job["tenant"]) for job in self.jobs.values() if _is_unsent(job)}
    return Answer([{"model": model, "tenant": tenant} for model, tenant in sorted(found)])


@statement(delivery._SEND_DUE)
def _send_due(self: MemoryConnection, given: Params) -> Answer:
    due = [
        job
        for job in self.jobs.values()
        if _is_unsent(job)
        and (job["model"], job["tenant"]) == (given["model"], given["tenant"])
        and job["priority"] in given["priorities"]
        and job["not_before"] <= self.now
        and is_known(job)
    ]
    due.sort(key=lambda job: (job["priority"], job["not_before"]))
    return Answer([_mark(self, job) for job in due[: given["page"]]])


@statement(delivery._OVERDUE)
def _overdue(self: MemoryConnection, given: Params) -> Answer:
    late = [
        job
        for job in self.jobs.values()
        if _is_sent(job)
        and is_known(job)
        and job["not_before"] <= self.now
        and _is_overdue(self, job, given["lost_after_s"])
    ]
    late.sort(key=lambda job: (job["model"], job["enqueued_at"]))
    return Answer([{"id": job["id"], "model": job["model"]} for job in late])


@statement(delivery._SEND_AGAIN)
def _send_again(self: MemoryConnection, given: Params) -> Answer:
    sent = [
        _mark(self, job, wake_count=min(job["wake_count"], 32_766) + 1)
        for job in filter(None, map(self.jobs.get, given["ids"]))
        if _is_sent(job) and _is_overdue(self, job, given["lost_after_s"])
    ]
    return Answer(sent)


@statement(delivery._NOT_SENT)
def _not_sent(self: MemoryConnection, given: Params) -> Answer:
    for job in filter(None, map(self.jobs.get, given["ids"])):
        if _is_sent(job):
            self.update("jobs", job["id"], enqueued_at=None)
    return Answer([])


@statement(delivery._LET_GO)
def _let_go(self: MemoryConnection, given: Params) -> Answer:
    for job in filter(None, map(self.jobs.get, given["ids"])):
        if _is_held(job, given["worker_id"]):
            sent_at = self.now if job["not_before"] <= self.now else None
            self.update("jobs", job["id"], received_by=None, received_at=None, enqueued_at=sent_at)
    return Answer([])


@statement(delivery._FREE_FORGOTTEN)
def _free_forgotten(self: MemoryConnection, given: Params) -> Answer:
    known = set(given["known"])
    forgotten = [
        job["id"]
        for job in self.jobs.values()
        if _is_held(job, given["worker_id"]) and job["id"] not in known
    ]
    for job_id in forgotten:
        self.update("jobs", job_id, received_by=None, received_at=None, enqueued_at=None)
    return Answer([{"id": job_id} for job_id in forgotten])


@statement(delivery._FREE_LOST)
def _free_lost(self: MemoryConnection, given: Params) -> Answer:
    orphans = [
        job["id"]
        for job in self.jobs.values()
        if job["state"] == "queued"
        and job["received_by"] is not None
        and self.lease_is_over(job["received_by"])
    ][: given["page"]]
    for job_id in orphans:
        self.update("jobs", job_id, received_by=None, received_at=None, enqueued_at=None)
    return Answer([], rowcount=len(orphans))
