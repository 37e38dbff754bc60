"""What the statements of `app.store.claims` and `app.store.releases` do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Final

from app.jobs import MAX_UNCHARGED, SUSPECT_AFTER
from app.store import claims, releases, submissions
from tests.memory_store.database import Answer, MemoryConnection, statement
from tests.memory_store.rows import Params, Row, is_known, ms, records
from tests.memory_store.submissions import received


@statement(claims._CLAIM)
def _claim(self: MemoryConnection, given: Params) -> Answer:
    claimed = _claimed_now(self, given, lambda _: True, lambda _: {})
    return _with_lease(self, given, [_claimed(job) for job in claimed], CLAIMED)


@statement(claims._TAKE)
def _take(self: MemoryConnection, given: Params) -> Answer:
    def is_taken(job: Row) -> bool:
        is_ours = job["model"] == given["model"] and is_known(job)
        return is_ours and job["losses"] < SUSPECT_AFTER

    def noted(job: Row) -> Row:
        """`delivery.TAKEN`."""
        is_held = job["received_by"] == given["worker_id"]
        return {
            "received_at": job["received_at"] if is_held else self.now,
            "enqueued_at": job["enqueued_at"] or self.now,
        }

    taken = [
        _claimed(job) | received(job, None, self.now)
        for job in _claimed_now(self, given, is_taken, noted)
    ]
    return _with_lease(self, given, taken, (*CLAIMED, *submissions.Received.__slots__))


def _with_lease(
    self: MemoryConnection, given: Params, claimed: list[Row], names: Sequence[str]
) -> Answer:
    lease = {"is_held": not self.lease_is_over(given["worker_id"])}
    return Answer([lease | row for row in claimed or [dict.fromkeys(names)]])


def _claimed_now(
    self: MemoryConnection,
    given: Params,
    may: Callable[[Row], bool],
    noted: Callable[[Row], Row],
) -> list[Row]:
    """What both statements do; `noted` is what else they write of a job."""
    members = sorted(records(None, given["members"]), key=lambda member: member["job_id"])
    moved, repeated = [], []
    for member in members:
        job = self.jobs.get(member["job_id"])
        if job is None:
            continue
        if job["state"] == "running" and job["attempt_id"] == member["attempt_id"]:
            repeated.append(job)
        elif member["attempt_id"] in self.attempts:
            continue  # this very call's, and lost since
        elif _may_start(job, self.now) and may(job) and not self.lease_is_over(given["worker_id"]):
            job = self.update(
                "jobs",
                job["id"],
                state="running",
                attempt=job["attempt"] + 1,
                attempt_id=member["attempt_id"],
                worker_id=given["worker_id"],
                batch_id=given["id"],
                claimed_at=self.now,
                received_by=None,
                **noted(job),
            )
            self.insert(
                "attempts",
                {
                    "id": job["attempt_id"],
                    "number": job["attempt"],
                    "job_id": job["id"],
                    **{
                        name: job[name]
                        for name in ("tenant", "created_at", "worker_id", "batch_id")
                    },
                    "claimed_at": self.now,
                },
            )
            moved.append((job, member["num_sequences"]))
    if moved:
        _open_batch(self, given, moved)
    return [job for job, _ in moved] + repeated


def _open_batch(self: MemoryConnection, given: Params, moved: list[tuple[Row, int]]) -> None:
    names = ("id", "worker_id", "model", "engine", "close_reason", "wait_ms")
    num_jobs, num_sequences = len(moved), sum(number for _, number in moved)
    job_ids = [job["id"] for job, _ in moved]
    if batch := self.batches.get(given["id"]):
        num_jobs, num_sequences = (
            num_jobs + batch["num_jobs"],
            num_sequences + batch["num_sequences"],
        )
        job_ids = batch["job_ids"] + job_ids
        self.update(
            "batches", batch["id"], num_jobs=num_jobs, num_sequences=num_sequences, job_ids=job_ids
        )
        return
    self.insert(
        "batches",
        {name: given[name] for name in names}
        | {
            "kind": min(job["kind"] for job, _ in moved),
            "num_jobs": num_jobs,
            "num_sequences": num_sequences,
            "job_ids": job_ids,
            "opened_at": self.now - timedelta(milliseconds=given["wait_ms"]),
            "claimed_at": self.now,
        },
    )


def _may_start(job: Row, now: datetime) -> bool:
    late = job["deadline"] is not None and job["deadline"] <= now
    return job["state"] == "queued" and job["not_before"] <= now and not late


CLAIMED: Final = ("id", "attempt_id", "attempt", "claimed_at", "created_at")


def _claimed(job: Row) -> Row:
    return {name: job[name] for name in CLAIMED}


@statement(claims._FINISH)
def _finish(self: MemoryConnection, given: Params) -> Answer:
    settled: list[Row] = []
    for record in _finished(given):
        job = self.jobs.get(record["job_id"])
        if job is not None and _is_held(job, record):
            _record_finished(self, job, record)
            if _close_held(self, record, given["window_number"]):
                settled.append(_settled(self, record, counts=True))
    _sum_batches(self, given)
    return Answer(settled)


@statement(claims._FINISH_LATE)
def _finish_late(self: MemoryConnection, given: Params) -> Answer:
    settled: list[Row] = []
    for record in _finished(given):
        earlier = self.results.get(record["job_id"])
        if earlier is not None and _is_repeated(self, earlier, record):
            settled.append(_settled(self, record, counts=True))
        if _note_late(self, record, given["window_number"]):
            settled.append(_settled(self, record, counts=False))
    return Answer(settled)


def _finished(given: Params) -> list[Row]:
    given_records = [_RECORD | each for each in records("results", given["finished"])]
    return sorted(given_records, key=lambda each: each["job_id"])


def _settled(self: MemoryConnection, record: Row, *, counts: bool) -> Row:
    attempt = self.attempts[record["attempt_id"]]
    return {
        "attempt_id": attempt["id"],
        **{name: attempt[name] or 0 for name in claims.SPENT},
        "counts": counts,
    }


def _sum_batches(self: MemoryConnection, given: Params) -> None:
    for stats in records("batches", given["batches"]):
        if stats["id"] in self.batches:
            self.update("batches", stats["id"], **stats, finished_at=self.now)


def _is_repeated(self: MemoryConnection, earlier: Row, record: Row) -> bool:
    """Whether an earlier result is of this very call, and not of who took the job."""
    attempt = self.attempts.get(record["attempt_id"])
    is_ended = attempt is not None and attempt["outcome"] in ("succeeded", "failed")
    return is_ended and earlier["attempt_id"] == record["attempt_id"]


def _is_held(job: Row | None, given: Params) -> bool:
    return (
        job is not None and job["state"] == "running" and job["attempt_id"] == given["attempt_id"]
    )


def _record_finished(self: MemoryConnection, job: Row, record: Row) -> None:
    batch_id = job["batch_id"]
    job = self.update(
        "jobs",
        job["id"],
        state=record["state"],
        finished_at=self.now,
        attempts_charged=job["attempts_charged"] + 1,
        **_NOBODYS,
    )
    if job["purged_at"] is not None:
        record = record | {"response": None, "error_message": None}
    self.record(
        job,
        **record,
        batch_id=batch_id,
        queue_ms=ms(job["created_at"], record["started_at"] or job["claimed_at"]),
        ttft_ms=ms(job["created_at"], record["first_token_at"]),
    )


def _note_late(self: MemoryConnection, record: Row, window_number: int | None) -> bool:
    """Whether there was anything to note."""
    attempt = self.attempts.get(record["attempt_id"])
    if attempt is None or attempt["outcome"] not in GIVEN_UP:
        return False
    started_at = attempt["started_at"] or record["started_at"]
    self.update("attempts", attempt["id"], started_at=started_at)
    spent_ns = record["device_ns"] + record["wasted_ns"]
    spent_nj = (record["energy_nj"] or 0) + (record["wasted_nj"] or 0)
    _note_waste(self, attempt, spent_ns, window_number)
    _note_energy(self, attempt, spent_nj, record["energy_method"])
    return True


def _close_held(self: MemoryConnection, record: Row, window_number: int | None) -> bool:
    """Whether there was anything to close."""
    attempt = self.attempts.get(record["attempt_id"])
    if attempt is None:
        return False
    outcome = "succeeded" if record["state"] == "completed" else "failed"
    self.update(
        "attempts",
        attempt["id"],
        ended_at=self.now,
        outcome=outcome,
        charged=True,
        error_code=record["error_code"],
        started_at=record["started_at"],
        device_ns=record["device_ns"],
        wasted_ns=record["wasted_ns"],
        window_number=window_number,
        **{name: record[name] for name in (*claims.BILL, *ENERGY)},
    )
    return True


def _note_waste(
    self: MemoryConnection, attempt: Row, spent_ns: int, window_number: int | None
) -> int:
    wasted_ns = max(attempt["wasted_ns"], spent_ns)
    if attempt["window_number"] is not None:
        window_number = attempt["window_number"]
    given = {"wasted_ns": wasted_ns, "window_number": window_number}
    self.update("attempts", attempt["id"], **given)
    return wasted_ns


def _note_energy(self: MemoryConnection, attempt: Row, spent_nj: int, method: str) -> None:
    if method != "absent":
        wasted_nj = max(attempt["wasted_nj"] or 0, spent_nj)
        given = {"energy_nj": 0, "wasted_nj": wasted_nj, "energy_method": method}
        self.update("attempts", attempt["id"], **given)


_RECORD: Final = dict.fromkeys(each.name for each in fields(claims.Finished)) | {
    "device_ns": 0, "wasted_ns": 0, "energy_method": "absent",
}  # fmt: skip
ENERGY: Final = ("energy_nj", "wasted_nj", "energy_method")
GIVEN_UP: Final = ("lost", "released")
AGAIN: Final = {"received_by": None, "received_at": None, "enqueued_at": None, "wake_count": 0}
"""`QUEUED_AGAIN`."""
_NOBODYS: Final = {"attempt_id": None, "worker_id": None, "batch_id": None}


@statement(releases._RELEASE)
def _release(self: MemoryConnection, given: Params) -> Answer:
    optional = {"error_code": None, "error_message": None, "wasted_nj": None}
    moved = []
    for release in sorted(records(None, given["releases"]), key=lambda each: each["job_id"]):
        job = self.jobs.get(release["job_id"])
        if job is not None and _is_held(job, release):
            moved.append(give_back(self, job, optional | release, given["window_number"]))
            continue
        attempt = self.attempts.get(release["attempt_id"])
        if attempt is not None and attempt["outcome"] in GIVEN_UP:
            wasted_ns = _note_waste(self, attempt, release["wasted_ns"], given["window_number"])
            _note_energy(self, attempt, release.get("wasted_nj", 0), release["energy_method"])
            noted = {"id": release["job_id"], "attempt_id": attempt["id"], "state": None}
            wasted_nj = self.attempts[attempt["id"]]["wasted_nj"] or 0
            moved.append(noted | {"wasted_ns": wasted_ns, "wasted_nj": wasted_nj})
    _sum_batches(self, given)
    return Answer(moved)


def give_back(
    self: MemoryConnection, job: Row, release: Row, window_number: int | None = None
) -> Row:
    """`GIVE_BACK`: what becomes of a job whose attempt ended without a result."""
    charged = release["charged"]
    state = _next_state(job, charged, self.now)
    attempt_id, batch_id = job["attempt_id"], job["batch_id"]
    job = self.update(
        "jobs",
        job["id"],
        state=state,
        attempts_charged=job["attempts_charged"] + charged,
        losses=job["losses"] + (release["outcome"] == "lost"),
        **(AGAIN | {"queued_at": self.now} if state == "queued" else {"finished_at": self.now}),
        **_NOBODYS,
    )
    names = ("outcome", "charged", "error_code", "wasted_ns", "wasted_nj", "energy_method")
    given = {name: release[name] for name in names} | {"window_number": window_number}
    given["energy_nj"] = None if given["energy_method"] == "absent" else 0
    self.update("attempts", attempt_id, ended_at=self.now, device_ns=0, cost=Decimal(0), **given)
    if state != "queued":
        failure = (release["error_code"], release["error_message"])
        if not charged:
            failure = (releases.NEVER_FINISHED.code, str(releases.NEVER_FINISHED))
        late = ("deadline_exceeded", "The deadline passed before the job could run again.")
        cancelled = ("cancelled", "The job was cancelled.")
        error = {"failed": failure, "expired": late, "cancelled": cancelled}[state]
        self.record_ended(job, *error, attempt_id=attempt_id, batch_id=batch_id)
    told = {"id": job["id"], "attempt_id": attempt_id, "state": state}
    return told | {"wasted_ns": release["wasted_ns"], "wasted_nj": release["wasted_nj"] or 0}


def _next_state(job: Row, charged: bool, now: datetime) -> str:
    if job["cancel_requested_at"] is not None:
        return "cancelled"
    if job["deadline"] is not None and job["deadline"] <= now:
        return "expired"
    if charged and job["attempts_charged"] + 1 >= job["max_attempts"]:
        return "failed"
    if not charged and job["attempt"] - job["attempts_charged"] >= MAX_UNCHARGED:
        return "failed"
    return "queued"
