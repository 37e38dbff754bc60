"""A Postgres in memory for the simulation: the store's own functions run on it unchanged.

Only the statements are replaced: each is known by its object in `app.store`, gets the parameters
that Postgres would get, and does the same to rows that are dicts. `test_store_contract` holds it
to the real Postgres. One transaction at a time; `now()` is a clock that the caller turns.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from sqlalchemy import DateTime, Numeric, Uuid

from app.errors import GristmillError
from app.jobs import ALONE_AFTER, MAX_UNCHARGED
from app.store import cancellation, claims, intake, rescue, retention, workers
from app.store.notices import CANCEL, DONE
from app.store.tables import metadata

Row = dict[str, Any]
Table = dict[UUID, Row]
Params = Mapping[str, Any]

KEYS: Final = {
    "jobs": "id",
    "attempts": "id",
    "results": "job_id",
    "batches": "id",
    "workers": "id",
}
FINAL: Final = ("completed", "failed", "cancelled", "expired")


class Answer:
    """What a statement gives back: rows with names."""

    def __init__(self, rows: list[Row], rowcount: int | None = None) -> None:
        self._rows = [_Named(row) for row in rows]
        self.rowcount = len(rows) if rowcount is None else rowcount

    def __iter__(self) -> Iterator[_Named]:
        return iter(self._rows)

    def all(self) -> list[_Named]:
        return self._rows


class _Named(tuple):  # type: ignore[type-arg]
    """A row: by place, by name, and as a mapping."""

    def __new__(cls, row: Row) -> _Named:
        self = super().__new__(cls, row.values())
        self._mapping = row
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self._mapping[name]
        except KeyError:
            raise AttributeError(name) from None


Statement = Callable[["MemoryConnection", Params], Answer]
STATEMENTS: Final[dict[int, Statement]] = {}


def statement(of: Any) -> Callable[[Statement], Statement]:
    """What this statement of the store does here."""

    def register(function: Statement) -> Statement:
        STATEMENTS[id(of)] = function
        return function

    return register


class MemoryDatabase:
    """Stands in for `app.store.database.Database`."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.tables: dict[str, Table] = {name: {} for name in KEYS}
        self.on_commit: Callable[[MemoryConnection], None] = lambda _: None
        self.on_notice: Callable[[str, UUID], None] = lambda *_: None

    @contextmanager
    def begin(self) -> Iterator[MemoryConnection]:
        connection = MemoryConnection(self.tables, self.now())
        try:
            yield connection
        except BaseException:
            self.tables = connection.before or self.tables
            raise
        if connection.before is not None:
            _check(connection)
            self.on_commit(connection)
        for channel, job_id in connection.notices:
            self.on_notice(channel, job_id)

    autocommit = begin  # one statement in a transaction of its own

    def rows(self, table: str) -> list[Row]:
        return list(self.tables[table].values())


class MemoryConnection:
    """One transaction. A row is replaced, never changed in place, so that it can be taken back."""

    def __init__(self, tables: dict[str, Table], now: datetime) -> None:
        self.now = now
        self.notices: list[tuple[str, UUID]] = []
        self.before: dict[str, Table] | None = None  #: the tables before the first write
        self.written: set[tuple[str, UUID]] = set()
        self.tables = tables
        self.jobs, self.workers = tables["jobs"], tables["workers"]
        self.results, self.attempts = tables["results"], tables["attempts"]
        self.batches = tables["batches"]

    def execute(self, statement: Any, params: Params | None = None) -> Answer:
        return STATEMENTS[id(statement)](self, params or {})

    def scalars(self, statement: Any, params: Params | None = None) -> list[Any]:
        return [row[0] for row in self.execute(statement, params)]

    def scalar(self, statement: Any, params: Params | None = None) -> Any:
        return next(iter(self.scalars(statement, params)), None)

    def update(self, table: str, key: UUID, **changes: Any) -> Row:
        return self._write(table, key, self.tables[table][key] | changes)

    def _write(self, table: str, key: UUID, row: Row) -> Row:
        self._note(table, key)
        self.tables[table][key] = row
        return row

    def delete(self, table: str, key: UUID) -> None:
        self._note(table, key)
        del self.tables[table][key]

    def _note(self, table: str, key: UUID) -> None:
        if self.before is None:
            self.before = {name: dict(rows) for name, rows in self.tables.items()}
        self.written.add((table, key))

    def insert(self, table: str, row: Row) -> Row:
        key = row[KEYS[table]]
        if key in self.tables[table]:
            raise GristmillError(f"Postgres refused a statement, UniqueViolation of {table}_pkey.")
        return self._write(table, key, _blank(table) | row)

    def lease_is_over(self, worker_id: UUID | None) -> bool:
        worker = self.workers.get(worker_id) if worker_id else None
        return worker is None or worker["lease_expires_at"] <= self.now

    def record_ended(self, job: Row, error_code: str, error_message: str, **last: Any) -> None:
        """`RECORD_ENDED`: the result of a job that ends without an answer."""
        self.insert(
            "results",
            {
                **{name: job[name] for name in _COPIED},
                "job_id": job["id"],
                "queue_ms": _ms(job["created_at"], job["claimed_at"]),
                "total_ms": _ms(job["created_at"], job["finished_at"]),
                "error_code": error_code,
                "error_message": error_message,
                **last,
            },
        )
        self.notices.append((DONE, job["id"]))


_COPIED: Final = (
    "tenant", "model", "kind", "state", "created_at", "queued_at", "claimed_at", "finished_at",
)  # fmt: skip


# ── claims ──────────────────────────────────────────────────────────────────────────────────────


@statement(claims._CLAIM)
def _claim(self: MemoryConnection, given: Params) -> Answer:
    members = sorted(_records(None, given["members"]), key=lambda member: member["job_id"])
    moved, repeated = [], []
    for member in members:
        job = self.jobs.get(member["job_id"])
        if job is None:
            continue
        if job["state"] == "running" and job["attempt_id"] == member["attempt_id"]:
            repeated.append(_claimed(job))
        elif _may_start(job, self.now) and not self.lease_is_over(given["worker_id"]):
            job = self.update(
                "jobs",
                job["id"],
                state="running",
                attempt=job["attempt"] + 1,
                attempt_id=member["attempt_id"],
                worker_id=given["worker_id"],
                batch_id=given["id"],
                claimed_at=self.now,
            )
            self.insert(
                "attempts",
                {
                    "id": job["attempt_id"],
                    "number": job["attempt"],
                    "job_id": job["id"],
                    **{name: job[name] for name in ("tenant", "worker_id", "batch_id")},
                    "claimed_at": self.now,
                },
            )
            moved.append((job, member["num_sequences"]))
    if moved:
        _open_batch(self, given, moved)
    lease = {"is_held": not self.lease_is_over(given["worker_id"])}
    claimed = [_claimed(job) for job, _ in moved] + repeated
    return Answer([lease | row for row in claimed or [dict.fromkeys(CLAIMED)]])


def _open_batch(self: MemoryConnection, given: Params, moved: list[tuple[Row, int]]) -> None:
    names = ("id", "worker_id", "model", "engine", "close_reason", "wait_ms")
    num_jobs, num_sequences = len(moved), sum(number for _, number in moved)
    if batch := self.batches.get(given["id"]):
        num_jobs, num_sequences = (
            num_jobs + batch["num_jobs"],
            num_sequences + batch["num_sequences"],
        )
        self.update("batches", batch["id"], num_jobs=num_jobs, num_sequences=num_sequences)
        return
    self.insert(
        "batches",
        {name: given[name] for name in names}
        | {
            "kind": min(job["kind"] for job, _ in moved),
            "num_jobs": num_jobs,
            "num_sequences": num_sequences,
            "opened_at": self.now - timedelta(milliseconds=given["wait_ms"]),
            "claimed_at": self.now,
        },
    )


def _may_start(job: Row, now: datetime) -> bool:
    late = job["deadline"] is not None and job["deadline"] <= now
    return job["state"] == "queued" and job["not_before"] <= now and not late


CLAIMED = ("job_id", "attempt_id", "number", "claimed_at")


def _claimed(job: Row) -> Row:
    values = (job["id"], job["attempt_id"], job["attempt"], job["claimed_at"])
    return dict(zip(CLAIMED, values, strict=True))


@statement(claims._FINISH)
def _finish(self: MemoryConnection, given: Params) -> Answer:
    counted = []
    given_records = [_blank("results") | each for each in _records("results", given["finished"])]
    for record in sorted(given_records, key=lambda each: each["job_id"]):
        job, earlier = self.jobs.get(record["job_id"]), self.results.get(record["job_id"])
        if earlier is not None and earlier["attempt_id"] == record["attempt_id"]:
            counted.append(record["attempt_id"])
        is_held = _is_held(job, record)
        if job is not None and is_held:
            counted.append(record["attempt_id"])
            _record_finished(self, job, record)
        _close_finished(self, record, is_held)
    for stats in _records("batches", given["batches"]):
        if stats["id"] in self.batches:
            self.update("batches", stats["id"], **stats, finished_at=self.now)
    return Answer([{"attempt_id": attempt_id} for attempt_id in counted])


def _is_held(job: Row | None, given: Params) -> bool:
    return (
        job is not None and job["state"] == "running" and job["attempt_id"] == given["attempt_id"]
    )


def _record_finished(self: MemoryConnection, job: Row, record: Row) -> None:
    self.update(
        "jobs",
        job["id"],
        state=record["state"],
        finished_at=self.now,
        attempts_charged=job["attempts_charged"] + 1,
        **_NOBODYS,
    )
    names = ("tenant", "model", "kind", "batch_id", "created_at", "queued_at", "claimed_at")
    self.insert(
        "results",
        record
        | {name: job[name] for name in names}
        | {
            "finished_at": self.now,
            "queue_ms": _ms(job["created_at"], job["claimed_at"]),
            "ttft_ms": _ms(job["created_at"], record["first_token_at"]),
            "total_ms": _ms(job["created_at"], self.now),
        },
    )
    self.notices.append((DONE, job["id"]))


def _close_finished(self: MemoryConnection, record: Row, is_held: bool) -> None:
    attempt = self.attempts.get(record["attempt_id"])
    if attempt is None or not (is_held or attempt["device_ns"] is None):
        return
    outcome = "succeeded" if record["state"] == "completed" else "failed"
    self.update(
        "attempts",
        attempt["id"],
        ended_at=attempt["ended_at"] or self.now,
        outcome=attempt["outcome"] or outcome,
        charged=True if attempt["charged"] is None else attempt["charged"],
        error_code=attempt["error_code"] or record["error_code"],
        started_at=record["started_at"],
        device_ns=record["device_ns"],
        cost=record["cost"],
    )


_NOBODYS: Final = {"attempt_id": None, "worker_id": None, "batch_id": None}


@statement(claims._RELEASE)
def _release(self: MemoryConnection, given: Params) -> Answer:
    optional = {"error_code": None, "error_message": None}
    moved = []
    for release in sorted(_records(None, given["releases"]), key=lambda each: each["job_id"]):
        job = self.jobs.get(release["job_id"])
        if job is not None and _is_held(job, release):
            moved.append(_give_back(self, job, optional | release))
    return Answer(moved)


def _give_back(self: MemoryConnection, job: Row, release: Row) -> Row:
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
        not_before=max(job["not_before"], self.now + timedelta(seconds=release["delay_s"])),
        queued_at=self.now if state == "queued" else job["queued_at"],
        finished_at=None if state == "queued" else self.now,
        received_by=None,
        enqueued_at=None,
        wake_count=0,
        **_NOBODYS,
    )
    names = ("outcome", "charged", "error_code", "device_ns", "cost")
    self.update(
        "attempts", attempt_id, ended_at=self.now, **{name: release[name] for name in names}
    )
    if state != "queued":
        failure = (release["error_code"], release["error_message"])
        if not charged:
            failure = (claims.NEVER_FINISHED.code, str(claims.NEVER_FINISHED))
        late = ("deadline_exceeded", "The deadline passed before the job could run again.")
        cancelled = ("cancelled", "The job was cancelled.")
        error = {"failed": failure, "expired": late, "cancelled": cancelled}[state]
        self.record_ended(job, *error, attempt_id=attempt_id, batch_id=batch_id)
    return {"id": job["id"], "attempt_id": attempt_id, "state": state}


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


# ── intake ──────────────────────────────────────────────────────────────────────────────────────


def _new_row(self: MemoryConnection, job: Row, **more: Any) -> Row:
    stamps = {"created_at": self.now, "queued_at": self.now, "state": "queued"}
    job = job | {"not_before": job.get("not_before") or self.now}
    return self.insert("jobs", job | stamps | more)


def _by_key(self: MemoryConnection, job: Row) -> Row | None:
    key = (job["tenant"], job.get("idempotency_key"))
    same = (row for row in self.jobs.values() if key == (row["tenant"], row["idempotency_key"]))
    return next(same, None) if key[1] is not None else None


def _replays(self: MemoryConnection, job: Row) -> Row | None:
    """The job that replays the same one."""
    old = job.get("replay_of")
    same = (row for row in self.jobs.values() if row["replay_of"] == old)
    return next(same, None) if old is not None else None


@statement(intake._INSERT_NEW)
def _insert_new(self: MemoryConnection, given: Params) -> Answer:
    created = []
    for job in _records("jobs", given["jobs"]):
        if job["id"] not in self.jobs and _by_key(self, job) is None and not _replays(self, job):
            row = _new_row(self, job)
            created.append({"id": row["id"]})
    return Answer(created)


@statement(intake._FIND_EARLIER)
def _find_earlier(self: MemoryConnection, given: Params) -> Answer:
    found = []
    for job in _records("jobs", given["jobs"]):
        old = self.jobs.get(job["id"]) or _by_key(self, job) or _replays(self, job)
        if old is not None:
            same = all(old[name] == job[name] for name in ("tenant", "fingerprint"))
            found.append({"asked": job["id"], "id": old["id"], "fingerprint_matches": same})
    return Answer(found)


@statement(intake._MARK_ENQUEUED)
def _mark_enqueued(self: MemoryConnection, given: Params) -> Answer:
    for job_id in dict.fromkeys(given["ids"]):
        job = self.jobs.get(job_id)
        if job is not None and job["state"] == "queued" and job["received_by"] is None:
            again = job["enqueued_at"] is not None
            self.update("jobs", job_id, enqueued_at=self.now, wake_count=job["wake_count"] + again)
    return Answer([])


@statement(intake._RECEIVE)
def _receive(self: MemoryConnection, given: Params) -> Answer:
    brought = {job["id"]: job for job in _records("jobs", given["jobs"])}
    rows = []
    for job_id in [*brought, *given["ids"]]:
        row, job = self.jobs.get(job_id), brought.get(job_id)
        if row is not None:
            row = self.update("jobs", job_id, **_noted(row, given["worker_id"], self.now))
        elif job is not None:
            due = (job.get("not_before") or self.now) <= self.now
            row = _new_row(
                self,
                job,
                received_by=given["worker_id"] if due else None,
                enqueued_at=self.now if due else None,
            )
        if row is not None:
            rows.append(_received(row, job, self.now))
    return Answer(rows)


def _noted(row: Row, worker_id: UUID, now: datetime) -> Row:
    """`_NOTE_RECEIVED`."""
    is_queued, is_due = row["state"] == "queued", row["not_before"] <= now
    return {
        "received_by": worker_id if is_queued and is_due else row["received_by"],
        "enqueued_at": None if is_queued and not is_due else row["enqueued_at"] or now,
    }


def _received(row: Row, job: Row | None, now: datetime) -> Row:
    names = ("not_before", "deadline", "priority", "attempts_charged", "losses", "created_at")
    is_same = job is not None and job.get("fingerprint") == row["fingerprint"]
    return {
        **{name: row[name] for name in ("id", "tenant", "model", "kind", "state")},
        "is_due": row["not_before"] <= now,
        **{name: row[name] for name in (*names, "url")},
        "request": None if is_same else row["request"],
    }


@statement(intake._UNRECEIVE)
def _unreceive(self: MemoryConnection, given: Params) -> Answer:
    for job_id in given["ids"]:
        job = self.jobs.get(job_id)
        if job and job["state"] == "queued" and job["received_by"] == given["worker_id"]:
            sent_at = self.now if job["not_before"] <= self.now else None
            self.update("jobs", job_id, received_by=None, enqueued_at=sent_at)
    return Answer([])


@statement(intake._REJECT)
def _reject(self: MemoryConnection, given: Params) -> Answer:
    written = []
    for bad in _records("jobs", given["rejected"]):
        if bad["id"] not in self.jobs:
            error = (bad.pop("error_code"), bad.pop("error_message"))
            row = _new_row(self, bad, source="message", state="failed", finished_at=self.now)
            self.record_ended(row, *error)
            written.append({"id": row["id"]})
    return Answer(written)


@statement(intake._QUEUED)
def _queued(self: MemoryConnection, _: Params) -> Answer:
    return _load(filter(_is_unreceived, self.jobs.values()))


@statement(intake._ENDED)
def _ended(self: MemoryConnection, given: Params) -> Answer:
    since = self.now - timedelta(seconds=given["window_s"])
    jobs = _of(self.jobs, given)
    return _load(job for job in jobs if job["finished_at"] and job["finished_at"] > since)


def _load(jobs: Iterable[Row]) -> Answer:
    tokens = [(job["input_tokens"] or 0) + (job["max_output_tokens"] or 0) for job in jobs]
    return Answer([{"jobs": len(tokens), "tokens": sum(tokens)}])


def _of(table: Table, given: Params) -> list[Row]:
    """The rows of a tenant."""
    return [row for row in table.values() if row["tenant"] == given["tenant"]]


def _is_unreceived(job: Row) -> bool:
    return job["state"] == "queued" and job["received_by"] is None


# ── rescue ──────────────────────────────────────────────────────────────────────────────────────


@statement(rescue._EXPIRE_LEASES)
def _expire_leases(self: MemoryConnection, given: Params) -> Answer:
    lost = [
        job
        for job in self.jobs.values()
        if job["state"] == "running" and self.lease_is_over(job["worker_id"])
    ]
    return Answer([_give_back(self, job, _lost(job)) for job in lost[: given["page"]]])


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


@statement(rescue._RETURN_RECEIVED)
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


@statement(rescue._EXPIRE_QUEUED)
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


@statement(rescue._UNSENT_MODELS)
def _unsent_models(self: MemoryConnection, _: Params) -> Answer:
    models = {job["model"] for job in self.jobs.values() if _is_unsent(job)}
    return Answer([{"model": model} for model in sorted(models)])


def _is_unsent(job: Row) -> bool:
    return _is_unreceived(job) and job["enqueued_at"] is None


@statement(rescue._FIND_UNSENT)
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


@statement(rescue._OVERDUE)
def _overdue(self: MemoryConnection, given: Params) -> Answer:
    found = [
        job
        for job in self.jobs.values()
        if _is_unreceived(job)
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


@statement(rescue._COUNT_UNRECEIVED)
def _count_unreceived(self: MemoryConnection, _: Params) -> Answer:
    counts: dict[str, int] = {}
    for job in self.jobs.values():
        if _is_unreceived(job) and job["enqueued_at"] is not None:
            counts[job["model"]] = counts.get(job["model"], 0) + 1
    return Answer([{"model": model, "count": count} for model, count in counts.items()])


# ── retention ───────────────────────────────────────────────────────────────────────────────────


def _kept_for_long(self: MemoryConnection, rows: Iterable[Row], given: Params) -> list[Row]:
    """The page of those that ended first."""
    until = self.now - timedelta(seconds=given["keep_s"])
    old = [row for row in rows if row["finished_at"] is not None and row["finished_at"] < until]
    return sorted(old, key=lambda row: row["finished_at"])[: given["page"]]


@statement(retention._REDACT_REQUESTS)
def _redact_requests(self: MemoryConnection, given: Params) -> Answer:
    kept = [job for job in _of(self.jobs, given) if job["request"] is not None]
    old = _kept_for_long(self, kept, given)
    for job in old:
        self.update("jobs", job["id"], request=None)
    return Answer([], rowcount=len(old))


@statement(retention._REDACT_RESPONSES)
def _redact_responses(self: MemoryConnection, given: Params) -> Answer:
    kept = [result for result in _of(self.results, given) if result["response"] is not None]
    old = _kept_for_long(self, kept, given)
    for result in old:
        self.update("results", result["job_id"], response=None)
    return Answer([], rowcount=len(old))


@statement(retention._DELETE_JOBS)
def _delete_jobs(self: MemoryConnection, given: Params) -> Answer:
    old = [job["id"] for job in _kept_for_long(self, _of(self.jobs, given), given)]
    for job_id in old:
        self.delete("jobs", job_id)
        if job_id in self.results:
            self.delete("results", job_id)
        for attempt in [each for each in self.attempts.values() if each["job_id"] == job_id]:
            self.delete("attempts", attempt["id"])
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


# ── workers and cancels ─────────────────────────────────────────────────────────────────────────


@statement(workers._REGISTER)
def _register(self: MemoryConnection, given: Params) -> Answer:
    for worker in _records("workers", given["workers"]):
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


@statement(cancellation._LOCK)
def _lock(self: MemoryConnection, given: Params) -> Answer:
    job = self.jobs.get(given["job_id"])
    is_there = job is not None and job["tenant"] == given["tenant"]
    return Answer([{"state": job["state"]}] if job is not None and is_there else [])


@statement(cancellation._END_QUEUED)
def _end_queued(self: MemoryConnection, given: Params) -> Answer:
    job = self.jobs.get(given["job_id"])
    if job is None or job["state"] != "queued":
        return Answer([])
    row = self.update("jobs", job["id"], state="cancelled", finished_at=self.now)
    self.record_ended(row, "cancelled", "The job was cancelled.")
    return Answer([{"id": job["id"]}])


@statement(cancellation._ASK_WORKER)
def _ask_worker(self: MemoryConnection, given: Params) -> Answer:
    job = self.jobs.get(given["job_id"])
    if job is None or job["state"] != "running":
        return Answer([])
    asked_at = job["cancel_requested_at"] or self.now
    self.update("jobs", job["id"], cancel_requested_at=asked_at)
    self.notices.append((CANCEL, job["id"]))
    return Answer([{"notified": ""}])


# ── rows ────────────────────────────────────────────────────────────────────────────────────────


def _blank(table: str) -> Row:
    """A row with nothing but the columns' defaults."""
    return dict(_BLANKS[table])


_DEFAULTS: Final = {
    "jobs": {
        "tenant": "default", "metadata": {}, "priority": 0, "attempt": 0, "attempts_charged": 0,
        "max_attempts": 3, "losses": 0, "wake_count": 0,
    },
    "attempts": {"tenant": "default"},
    "results": {"tenant": "default", "device_ns": 0, "cost": Decimal(0)},
    "batches": {"useful_tokens": 0, "padded_tokens": 0, "device_ns": 0},
    "workers": {"engine": {}},
}  # fmt: skip

_BLANKS: Final = {
    table: dict.fromkeys(metadata.tables[table].columns.keys()) | _DEFAULTS[table] for table in KEYS
}


def _parsers(table: str) -> dict[str, Callable[[Any], Any]]:
    parsers: dict[str, Callable[[Any], Any]] = {}
    for column in metadata.tables[table].columns:
        for type_, parser in _PARSERS.items():
            if isinstance(column.type, type_):
                parsers[column.name] = parser
    return parsers


_PARSERS: Final[dict[Any, Callable[[Any], Any]]] = {
    Uuid: UUID,
    DateTime: datetime.fromisoformat,
    Numeric: lambda given: Decimal(str(given)),
}
_PARSERS_OF: Final[dict[str | None, dict[str, Callable[[Any], Any]]]] = {
    None: {"job_id": UUID, "attempt_id": UUID, "cost": Decimal},
    **{table: _parsers(table) for table in KEYS},
}
for _parse in _PARSERS_OF.values():  # Double is a Numeric, and stays a float
    for _name in [name for name in _parse if name.endswith("_ms")]:
        del _parse[_name]


def _records(table: str | None, encoded: str) -> list[Row]:
    """What `app.store.encoding.encode` encoded, with the columns' types."""
    parsers = _PARSERS_OF[table]
    return [
        {name: parsers[name](value) if name in parsers else value for name, value in row.items()}
        for row in json.loads(encoded)
    ]


def _ms(start: datetime, end: datetime | None) -> float | None:
    """`elapsed_ms`."""
    return None if end is None else max(0.0, (end - start) / timedelta(milliseconds=1))


def _check(connection: MemoryConnection) -> None:
    """The check constraints of `jobs`, for the rows that were written."""
    written = (connection.jobs.get(key) for table, key in connection.written if table == "jobs")
    for job in filter(None, written):
        is_open = job["state"] in ("queued", "running")
        fence = [job[name] for name in ("attempt_id", "worker_id", "batch_id")]
        assert is_open == (job["finished_at"] is None), "jobs_finished_at_check"
        assert fence.count(None) == (0 if job["state"] == "running" else 3), "jobs_attempt_check"
        assert job["state"] != "queued" or job["cancel_requested_at"] is None, (
            "jobs_cancel_requested_at_check"
        )
