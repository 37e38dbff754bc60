"""A Postgres in memory for the simulation: the store's own functions run on it unchanged.

Only the statements are replaced: each is known by its object in `app.store`, gets the parameters
that Postgres would get, and does the same to rows that are dicts. `test_store_contract` holds it
to the real Postgres. One transaction at a time; `now()` is a clock that the caller turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from app.errors import NotStorable
from app.store.results import COPIED
from tests.memory_store.rows import KEYS, Params, Row, Table, blank, ms

_COPIED: Final = tuple(
    {*COPIED, "state", "attempts_charged", "losses", "finished_at"} - {"batch_id"}
)


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
        self.on_told: Callable[[UUID], None] = lambda _: None
        self.refuses: Callable[[str, Row], bool] = lambda *_: False  #: a table's new row

    @contextmanager
    def begin(self) -> Iterator[MemoryConnection]:
        connection = MemoryConnection(self.tables, self.now(), self.refuses)
        try:
            yield connection
        except BaseException:
            self.tables = connection.before or self.tables
            raise
        if connection.before is not None:
            _check(connection)
            self.on_commit(connection)
        for job_id in connection.told:
            self.on_told(job_id)

    autocommit = begin  # one statement in a transaction of its own

    def rows(self, table: str) -> list[Row]:
        return list(self.tables[table].values())


class MemoryConnection:
    """One transaction. A row is replaced, never changed in place, so that it can be taken back."""

    def __init__(
        self, tables: dict[str, Table], now: datetime, refuses: Callable[[str, Row], bool]
    ) -> None:
        self.now = now
        self._refuses = refuses
        self.told: list[UUID] = []  #: jobs that ended
        self.before: dict[str, Table] | None = None  #: the tables before the first write
        self.written: set[tuple[str, UUID]] = set()
        self.tables = tables
        self.jobs, self.workers = tables["jobs"], tables["workers"]
        self.results, self.attempts = tables["results"], tables["attempts"]
        self.batches = tables["batches"]
        self.windows = tables["windows"]

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
        if table == "windows":
            key = UUID(int=key.int ^ row["number"])
        if key in self.tables[table]:
            raise NotStorable(f"Postgres refused a statement, UniqueViolation of {table}_pkey.")
        if self._refuses(table, row):
            raise NotStorable(f"Postgres refused a statement, DataError of {table}.")
        return self._write(table, key, blank(table) | row)

    def lease_is_over(self, worker_id: UUID | None) -> bool:
        worker = self.workers.get(worker_id) if worker_id else None
        return worker is None or worker["lease_expires_at"] <= self.now

    def record_ended(self, job: Row, error_code: str, error_message: str, **last: Any) -> None:
        """`RECORD_ENDED`: the result of a job that ends without an answer."""
        self.record(job, error_code=error_code, error_message=error_message, **last)
        self.told.append(job["id"])

    def record(self, job: Row, **result: Any) -> None:
        """A result has all that its job has."""
        self.insert(
            "results",
            {
                **{name: job[name] for name in _COPIED},
                "job_id": job["id"],
                "expected_input_tokens": job["input_tokens"],
                "queue_ms": ms(job["created_at"], job["claimed_at"]),
                "total_ms": ms(job["created_at"], job["finished_at"]),
                **result,
            },
        )


def _check(connection: MemoryConnection) -> None:
    """The check constraints of `jobs`, for the rows that were written."""
    written = (connection.jobs.get(key) for table, key in connection.written if table == "jobs")
    for job in filter(None, written):
        is_open = job["state"] in ("queued", "running")
        fence = [job[name] for name in ("attempt_id", "worker_id", "batch_id")]
        assert is_open == (job["finished_at"] is None), "jobs_finished_at_check"
        assert fence.count(None) == (0 if job["state"] == "running" else 3), "jobs_attempt_check"
        is_delivered = job["state"] == "queued" and job["enqueued_at"] is not None
        assert job["received_by"] is None or is_delivered, "jobs_delivery_check"
        assert job["state"] != "queued" or job["cancel_requested_at"] is None, (
            "jobs_cancel_requested_at_check"
        )
