"""What the statements of `app.store.sweeps` do."""

from __future__ import annotations

from datetime import timedelta

from app.jobs import ALONE_AFTER
from app.store import sweeps
from tests.memory_store.claims import give_back
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params, Row, is_unreceived


@statement(sweeps._EXPIRE_LEASES)
def _expire_leases(self: MemoryConnection, given: Params) -> Answer:
    lost = [
        job
        for job in self.jobs.values()
        if job["state"] == "running" and self.lease_is_over(job["worker_id"])
    ]
    return Answer([give_back(self, job, _lost(job)) for job in lost[: given["page"]]])


def _lost(job: Row) -> Row:
    losses, alone = job["losses"] + 1, job["attempts_charged"] + 1
    return {
        "outcome": "lost",
        "charged": job["losses"] >= ALONE_AFTER,
        "delay_s": 0.0,
        "error_code": "worker_lost",
        "error_message": f"The worker was lost {losses} times while it ran the job, "
        f"{alone} of them with nothing else running.",
        "device_ns": None,
        "cost": None,
    }


@statement(sweeps._RETURN_RECEIVED)
def _return_received(self: MemoryConnection, given: Params) -> Answer:
    orphans = [
        job["id"]
        for job in self.jobs.values()
        if job["state"] == "queued"
        and job["received_by"] is not None
        and self.lease_is_over(job["received_by"])
    ][: given["page"]]
    for job_id in orphans:
        self.update("jobs", job_id, received_by=None, enqueued_at=None)
    return Answer([], rowcount=len(orphans))


@statement(sweeps._EXPIRE_QUEUED)
def _expire_queued(self: MemoryConnection, given: Params) -> Answer:
    late = [
        job
        for job in self.jobs.values()
        if job["state"] == "queued" and job["deadline"] and job["deadline"] <= self.now
    ]
    ended = sorted(late, key=lambda job: job["deadline"])[: given["page"]]
    for job in ended:
        row = self.update("jobs", job["id"], state="expired", finished_at=self.now)
        self.record_ended(row, "deadline_exceeded", "The deadline passed before the job was run.")
    return Answer([{"id": job["id"]} for job in ended])


@statement(sweeps._UNSENT_MODELS)
def _unsent_models(self: MemoryConnection, _: Params) -> Answer:
    models = {job["model"] for job in self.jobs.values() if _is_unsent(job)}
    return Answer([{"model": model} for model in sorted(models)])


def _is_unsent(job: Row) -> bool:
    return is_unreceived(job) and job["enqueued_at"] is None


@statement(sweeps._FIND_UNSENT)
def _find_unsent(self: MemoryConnection, given: Params) -> Answer:
    sent_before = self.now - timedelta(seconds=given["grace_s"])
    found = [
        job
        for job in self.jobs.values()
        if _is_unsent(job)
        and job["model"] == given["model"]
        and job["priority"] in given["priorities"]
        and job["not_before"] <= self.now
        and (
            job["attempt"] > 0
            or job["not_before"] > job["created_at"]
            or job["created_at"] <= sent_before
        )
    ]
    found.sort(key=lambda job: (job["priority"], job["not_before"]))
    return Answer(list(map(_wake_up, found[: given["page"]])))


@statement(sweeps._OVERDUE)
def _overdue(self: MemoryConnection, given: Params) -> Answer:
    found = [
        job
        for job in self.jobs.values()
        if is_unreceived(job)
        and job["model"] == given["model"]
        and job["not_before"] <= self.now
        and job["enqueued_at"] is not None
        and self.now - job["enqueued_at"]
        > timedelta(seconds=given["lost_after_s"] * 2 ** min(job["wake_count"], 16))
    ]
    found.sort(key=lambda job: job["enqueued_at"])
    return Answer(list(map(_wake_up, found[: given["page"]])))


def _wake_up(job: Row) -> Row:
    return {name: job[name] for name in ("id", "model", "kind", "priority")}


@statement(sweeps._COUNT_UNRECEIVED)
def _count_unreceived(self: MemoryConnection, _: Params) -> Answer:
    counts: dict[str, int] = {}
    for job in self.jobs.values():
        if is_unreceived(job) and job["enqueued_at"] is not None:
            counts[job["model"]] = counts.get(job["model"], 0) + 1
    return Answer([{"model": model, "count": count} for model, count in counts.items()])
