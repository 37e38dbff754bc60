"""What the statements of `app.store.workers`, `windows`, `cancellation`, `notices` and `purging`
do."""

from __future__ import annotations

from collections import defaultdict
from datetime import timedelta
from uuid import UUID

from app.store import cancellation, notices, purging, windows, workers
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import FINAL, Params, records


@statement(workers._REGISTER)
def _register(self: MemoryConnection, given: Params) -> Answer:
    for worker in records("workers", given["workers"]):
        if worker["id"] not in self.workers:
            lease = self.now + timedelta(seconds=given["lease_s"])
            stamps = {"started_at": self.now, "heartbeat_at": self.now, "lease_expires_at": lease}
            self.insert("workers", worker | stamps)
    return Answer([])


@statement(workers._RENEW)
def _renew(self: MemoryConnection, given: Params) -> Answer:
    worker = self.workers.get(given["worker_id"])
    if worker is None or worker["stopped_at"] is not None:
        return Answer([])
    lease = self.now + timedelta(seconds=given["lease_s"])
    self.update("workers", worker["id"], heartbeat_at=self.now, lease_expires_at=lease)
    return Answer([], rowcount=1)


@statement(workers._HELD)
def _held(self: MemoryConnection, given: Params) -> Answer:
    return Answer(
        [
            {
                "attempt_id": job["attempt_id"],
                "cancelled": job["cancel_requested_at"] is not None,
                "late": job["deadline"] is not None and job["deadline"] <= self.now,
            }
            for job in self.jobs.values()
            if job["state"] == "running" and job["worker_id"] == given["worker_id"]
        ]
    )


@statement(workers._STOP)
def _stop(self: MemoryConnection, given: Params) -> Answer:
    worker = self.workers.get(given["worker_id"])
    if worker is not None and worker["stopped_at"] is None:
        self.update("workers", worker["id"], stopped_at=self.now, lease_expires_at=self.now)
    return Answer([])


@statement(windows._WRITE)
def _write(self: MemoryConnection, given: Params) -> Answer:
    [window] = records("windows", given["window"])
    worker = self.workers.get(window["worker_id"])
    names = {(each["worker_id"], each["number"]) for each in self.windows.values()}
    if worker is None or (window["worker_id"], window["number"]) in names:
        return Answer([])
    until_at = self.now - timedelta(seconds=given["age_s"])
    of_worker = {name: worker[name] for name in ("device", "device_index", "price_id", "currency")}
    self.insert(
        "windows",
        window
        | of_worker
        | {
            "price": worker["price_per_device_hour"],
            "until_at": until_at,
            "from_at": until_at - timedelta(microseconds=window["up_ns"] // 1000),
        },
    )
    return Answer([])


@statement(cancellation._LOCK)
@statement(cancellation._LOCK_FREE)
def _lock(self: MemoryConnection, given: Params) -> Answer:
    return _states(self, given, is_ended=False)


@statement(cancellation._ENDED)
def _ended(self: MemoryConnection, given: Params) -> Answer:
    return _states(self, given, is_ended=True)


def _states(self: MemoryConnection, given: Params, *, is_ended: bool) -> Answer:
    found = [self.jobs[id] for id in given["ids"] if id in self.jobs]
    return Answer(
        [
            {"id": job["id"], "state": job["state"]}
            for job in found
            if job["tenant"] == given["tenant"] and (job["state"] in FINAL) == is_ended
        ]
    )


@statement(cancellation._END_QUEUED)
def _end_queued(self: MemoryConnection, given: Params) -> Answer:
    ended = {"state": "cancelled", "finished_at": self.now, "received_by": None}
    for job_id in given["ids"]:
        row = self.update("jobs", job_id, **ended)
        self.record_ended(row, "cancelled", "The job was cancelled.")
    return Answer([])


@statement(cancellation._ASK_WORKERS)
def _ask_workers(self: MemoryConnection, given: Params) -> Answer:
    for job_id in given["ids"]:
        asked_at = self.jobs[job_id]["cancel_requested_at"] or self.now
        self.update("jobs", job_id, cancel_requested_at=asked_at)
    return Answer([])


@statement(cancellation._WHO_RUNS)
def _who_runs(self: MemoryConnection, given: Params) -> Answer:
    told: defaultdict[UUID, list[UUID]] = defaultdict(list)
    for job in filter(None, map(self.jobs.get, given["ids"])):
        if job["state"] == "running" and job["cancel_requested_at"] is not None:
            told[job["worker_id"]].append(job["id"])
    return Answer([{"worker_id": id, "job_ids": job_ids} for id, job_ids in told.items()])


@statement(notices._TELL_ENDED)
def _tell_ended(self: MemoryConnection, given: Params) -> Answer:
    self.told += given["ids"]
    return Answer([])


@statement(purging._PURGE)
def _purge(self: MemoryConnection, given: Params) -> Answer:
    job = self.jobs[given["job_id"]]
    said = {"request": None, "fingerprint": None, "idempotency_key": None, "metadata": {}}
    self.update("jobs", job["id"], **said, purged_at=job["purged_at"] or self.now)
    if job["id"] in self.results:
        said = {"response": None, "error_message": None, "metadata": {}}
        self.update("results", job["id"], **said, purged_at=job["purged_at"] or self.now)
    return Answer([])
