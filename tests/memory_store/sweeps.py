"""What the statements of `app.store.sweeps` do."""

from __future__ import annotations

from app.jobs import ALONE_AFTER
from app.store import sweeps
from tests.memory_store.claims import give_back
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params, Row


def _is_lost(self: MemoryConnection, job: Row | None) -> bool:
    return job is not None and job["state"] == "running" and self.lease_is_over(job["worker_id"])


@statement(sweeps._FIND_LOST)
def _find_lost(self: MemoryConnection, given: Params) -> Answer:
    lost = [job for job in self.jobs.values() if _is_lost(self, job)]
    return Answer(
        [{"id": job["id"]} for job in lost if job["id"] not in given["but"]][: given["page"]]
    )


@statement(sweeps._EXPIRE_LEASES)
def _expire_leases(self: MemoryConnection, given: Params) -> Answer:
    lost = [self.jobs[id_] for id_ in given["ids"] if _is_lost(self, self.jobs.get(id_))]
    return Answer([give_back(self, job, _lost(job)) for job in lost])


def _lost(job: Row) -> Row:
    losses, alone = job["losses"] + 1, job["attempts_charged"] + 1
    return {
        "outcome": "lost",
        "charged": job["losses"] >= ALONE_AFTER,
        "error_code": "worker_lost",
        "error_message": f"The worker was lost {losses} times while it ran the job, "
        f"{alone} of them with nothing else running.",
        "wasted_ns": 0,
        "wasted_nj": None,
        "energy_method": "absent",
    }


def _is_late(self: MemoryConnection, job: Row | None) -> bool:
    return bool(
        job and job["state"] == "queued" and job["deadline"] and job["deadline"] <= self.now
    )


@statement(sweeps._FIND_LATE)
def _find_late(self: MemoryConnection, given: Params) -> Answer:
    late = [job for job in self.jobs.values() if _is_late(self, job)]
    late.sort(key=lambda job: job["deadline"])
    return Answer(
        [{"id": job["id"]} for job in late if job["id"] not in given["but"]][: given["page"]]
    )


@statement(sweeps._EXPIRE_QUEUED)
def _expire_queued(self: MemoryConnection, given: Params) -> Answer:
    ended = [self.jobs[id_] for id_ in given["ids"] if _is_late(self, self.jobs.get(id_))]
    for job in ended:
        row = self.update(
            "jobs", job["id"], state="expired", finished_at=self.now, received_by=None
        )
        self.record_ended(row, "deadline_exceeded", "The deadline passed before the job was run.")
    return Answer([{"id": job["id"]} for job in ended])
