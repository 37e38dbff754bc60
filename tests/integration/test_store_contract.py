"""The store in memory, on which the simulation runs, does what Postgres does.

Random moves go to both; after each one their answers and all their rows are compared. Time is
counted in thousands of seconds: what Postgres itself takes then never matters.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import DateTime, text

from app.books.cost import device_cost
from app.books.energy import EnergyMethod
from app.errors import GristmillError, JobNotFound, JobStateConflict, LeaseLost, Unavailable
from app.jobs import FINAL_STATES, AttemptOutcome, CloseReason, Kind
from app.store import (
    cancellation,
    claims,
    counts,
    delivery,
    purging,
    retention,
    submissions,
    sweeps,
    windows,
    workers,
)
from app.store.claims import BatchStats, Finished, Member, NewBatch
from app.store.database import Database
from app.store.delivery import DELIVERY_TRANSITIONS, Delivery, delivery_of
from app.store.releases import Release, Released, release
from app.store.submissions import Incoming, RejectedJob
from app.store.tables import metadata
from app.store.windows import Window
from app.store.workers import NewWorker
from tests.memory_store import KEYS, MemoryDatabase
from tests.rows import MODEL, created_at, new_job

UNIT_S = 1_000
HALF_S = 500
LEASE_S = 3_500.0
PAGE = 100


class Postgres:
    """A real store whose stamps are moved back to let time pass."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def now(self) -> datetime:
        with self.database.begin() as connection:
            return connection.scalar(text("SELECT now()")) or datetime.now(UTC)

    def rows(self, table: str) -> list[dict[str, Any]]:
        with self.database.begin() as connection:
            return [dict(row._mapping) for row in connection.execute(text(f"TABLE {table}"))]

    def let_pass(self, seconds: int) -> None:
        with self.database.begin() as connection:
            for table in metadata.sorted_tables:
                stamps = [
                    f"{column.name} = {column.name} - interval '{seconds} s'"
                    for column in table.columns
                    if isinstance(column.type, DateTime)
                ]
                connection.execute(text(f"UPDATE {table.name} SET {', '.join(stamps)}"))


class Memory:
    """The store in memory, on a clock of its own."""

    def __init__(self) -> None:
        self._now = datetime(2030, 1, 1, tzinfo=UTC)
        self.database = MemoryDatabase(self.now)

    def now(self) -> datetime:
        return self._now

    def rows(self, table: str) -> list[dict[str, Any]]:
        return self.database.rows(table)

    def let_pass(self, seconds: int) -> None:
        self._now += timedelta(seconds=seconds)


def new_worker(worker_id: UUID) -> NewWorker:
    return NewWorker(
        id=worker_id,
        name="worker@mill",
        host="mill",
        pid=1,
        models=[MODEL],
        device="cpu",
        price_id="cpu",
        currency="EUR",
        price_per_device_hour=Decimal("0.036"),
    )


Move = Callable[[Any, datetime], Any]
"""What is done in one transaction: with a connection, at a time."""


class Moves:
    """Random moves, as likely to be wrong, late or repeated as to be right."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.jobs = [self._uuid() for _ in range(20)]
        self.workers = [self._uuid() for _ in range(3)]
        self.registered: set[UUID] = set()
        self.claims: list[tuple[NewBatch, list[Member]]] = []

    def _uuid(self) -> UUID:
        return UUID(int=self.chance.getrandbits(128), version=4)

    def next(self) -> tuple[str, Move]:
        kinds = {
            self.insert: 8, self.receive: 3, self.let_go: 1, self.not_sent: 1, self.forget: 1,
            self.reject: 0.3, self.claim: 6, self.take: 5, self.finish: 4, self.release: 5,
            self.register: 1,
            self.beat: 7, self.stop: 0.2, self.cancel: 5, self.sweep: 8,
            self.write_window: 1,
        }  # fmt: skip
        if len(self.registered) < len(self.workers):
            return "register", self.register()
        move = self.chance.choices(list(kinds), list(kinds.values()))[0]
        return move.__name__, move()

    def some_jobs(self) -> list[UUID]:
        return self.chance.sample(self.jobs, self.chance.randint(1, 4))

    def insert(self) -> Move:
        wanted = [(job_id, *self._times()) for job_id in self.some_jobs()]
        keys = self.chance.choices([None, "a", "b"], weights=[4, 1, 1], k=len(wanted))
        prints = self.chance.choices(["f00d", "beef"], k=len(wanted))
        replayed = self.chance.choice(self.jobs) if self.chance.random() < 0.1 else None
        max_attempts = self.chance.randint(1, 2)
        sent = [job_id for job_id, *_ in wanted if self.chance.random() < 0.6]

        def move(connection: Any, now: datetime) -> Any:
            jobs = [
                new_job(
                    id=job_id,
                    not_before=_after(now, early),
                    deadline=_after(now, late),
                    time_limit_s=late,
                    idempotency_key=key,
                    fingerprint=fingerprint,
                    replay_of=replayed,
                    max_attempts=max_attempts,
                )
                for (job_id, early, late), key, fingerprint in zip(
                    wanted, keys, prints, strict=True
                )
            ]
            return submissions.insert_jobs(connection, jobs, sent)

        return move

    def _times(self) -> tuple[int | None, int | None]:
        """Units until it is due and until its deadline."""
        return (
            self.chance.choice([None, None, None, None, 1]),
            self.chance.choice([None, None, None, 2, 5]),
        )

    def receive(self) -> Move:
        worker, ids = self.chance.choice(self.workers), self.some_jobs()
        times = [self._times() for _ in ids]
        bare = [self.chance.random() < 0.4 for _ in ids]

        def move(connection: Any, now: datetime) -> Any:
            arrivals = []
            for job_id, (early, late), is_bare in zip(ids, times, bare, strict=True):
                job = new_job(
                    id=job_id,
                    source="message",
                    not_before=_after(now, early),
                    deadline=_after(now, late),
                )
                arrivals.append(Incoming(job_id, None if is_bare else job))
            return list(submissions.receive(connection, worker, arrivals).values())

        return move

    def let_go(self) -> Move:
        worker, ids = self.chance.choice(self.workers), self.some_jobs()
        return lambda connection, _: delivery.let_go(connection, worker, ids)

    def not_sent(self) -> Move:
        ids = self.some_jobs()
        return lambda connection, _: delivery.not_sent(connection, ids)

    def forget(self) -> Move:
        worker, known = self.chance.choice(self.workers), self.chance.sample(self.jobs, 15)
        return lambda connection, _: delivery.free_forgotten(connection, worker, known)

    def reject(self) -> Move:
        [job_id, *_] = self.some_jobs()
        bad = RejectedJob(id=job_id, kind=Kind.EMBED, error_code="bad", error_message="Bad.")
        return lambda connection, _: submissions.reject(connection, [bad])

    def claim(self) -> Move:
        batch, members = self._claim()
        return lambda connection, _: claims.claim(connection, batch, members)

    def take(self) -> Move:
        batch, members = self._claim()

        def move(connection: Any, _: datetime) -> list[claims.Taken]:
            taken = claims.take(connection, batch, members)
            return sorted(taken, key=lambda each: each.row.id)

        return move

    def _claim(self) -> tuple[NewBatch, list[Member]]:
        if self.claims and self.chance.random() < 0.3:
            batch, members = self.chance.choice(self.claims[-4:])  # its answer was lost
        else:
            batch = NewBatch(
                id=self._uuid(),
                worker_id=self.chance.choice(self.workers),
                model=MODEL if self.chance.random() < 0.9 else "another",
                engine="stub",
                close_reason=CloseReason.SIZE,
                wait_ms=5.0,
            )
            members = [Member(job_id, self._uuid(), 2) for job_id in self.some_jobs()]
            self.claims.append((batch, members))
        return batch, members

    def _some_members(self) -> tuple[NewBatch | None, list[Member]]:
        if not self.claims:
            return None, []
        batch, members = self.chance.choice(self.claims[-5:])
        return batch, self.chance.sample(members, self.chance.randint(1, len(members)))

    def finish(self) -> Move:
        batch, members = self._some_members()
        given = [
            partial(
                Finished,
                job_id=member.job_id,
                attempt_id=member.attempt_id,
                state=self.chance.choice(sorted(FINAL_STATES)),
                response={"text": "Flour."},
                error_code=self.chance.choice([None, "oops"]),
                wasted_ns=self.chance.randint(0, 9),
                **self._bill(),
                **self._energy("energy_nj", "wasted_nj", "carbon_ug"),
            )
            for member in members
        ]
        sequences = self.chance.choice([None, 7])
        stats = [BatchStats(batch.id, 3, 4, 5, sequences)] if batch else []

        number = self.chance.randint(1, 9)

        def move(connection: Any, _: datetime) -> list[claims.Settled]:
            records = [
                each(created_at=created_at(connection, each.keywords["job_id"])) for each in given
            ]
            settled = claims.finish(connection, records, stats, window_number=number)
            return sorted(settled, key=lambda each: each.attempt_id)

        return move

    def _bill(self) -> dict[str, Any]:
        """Of device time at some price; it may have none."""
        device_ns, price = self.chance.randint(0, 9_999), self.chance.choice([None, Decimal(36)])
        if price is None:
            return {"device_ns": device_ns, "cost": None}
        upstream = self.chance.choice([None, Decimal("0.000000007")])
        return {
            "device_ns": device_ns,
            "cost": device_cost(device_ns, price) + (upstream or 0),
            "upstream_cost": upstream,
            "currency": "EUR",
            "price_id": "cpu",
            "price": price,
            "charge": Decimal("0.5"),
        }

    def _energy(self, *names: str) -> dict[str, Any]:
        """Known somehow, or not at all."""
        method = self.chance.choice(list(EnergyMethod))
        if method is EnergyMethod.ABSENT:
            return {}
        return {name: self.chance.randint(0, 9_999) for name in names} | {"energy_method": method}

    def release(self) -> Move:
        batch, members = self._some_members()
        given = [
            partial(
                Release,
                job_id=member.job_id,
                attempt_id=member.attempt_id,
                outcome=self.chance.choice([AttemptOutcome.RELEASED, AttemptOutcome.LOST]),
                charged=self.chance.random() < 0.3,
                error_code="oops",
                error_message="Oops.",
                wasted_ns=self.chance.randint(0, 99),
                **self._energy("wasted_nj"),
            )
            for member in members
        ]
        stats = [BatchStats(batch.id, 3, 4, 6)] if batch else []
        number = self.chance.randint(1, 9)

        def move(connection: Any, _: datetime) -> list[Released]:
            releases = [
                each(created_at=created_at(connection, each.keywords["job_id"])) for each in given
            ]
            released = release(connection, releases, stats, window_number=number)
            return sorted(released, key=lambda each: each.attempt_id)

        return move

    def write_window(self) -> Move:
        busy_ns, waste_ns, open_ns = self.chance.randint(0, 99), self.chance.randint(5, 9), -5
        window = Window(
            worker_id=self.chance.choice(self.workers),
            number=self.chance.randint(1, 9),
            up_ns=1_000 + busy_ns + waste_ns + open_ns,
            load_ns=100,
            busy_ns=busy_ns,
            idle_ns=200,
            waste_ns=waste_ns,
            overhead_ns=700,
            open_ns=open_ns,
            stray_ns=3,
            owed_ns=2,
            is_last=False,
            rounding=Decimal("-0.000000002"),
            energy_nj=1_000 + busy_ns + waste_ns + open_ns,
            load_nj=300,
            busy_nj=busy_ns,
            idle_nj=100,
            waste_nj=waste_ns,
            overhead_nj=600,
            open_nj=open_ns,
            stray_nj=4,
            energy_method=EnergyMethod.MEASURED,
            energy_boundary="gpu",
            counter_resets=1,
        )
        return lambda connection, _: windows.write(connection, window, 1.5)

    def register(self) -> Move:
        self.registered.add(worker_id := self.workers[len(self.registered) % len(self.workers)])
        worker = new_worker(worker_id)
        return lambda connection, _: workers.register_worker(connection, worker, LEASE_S)

    def beat(self) -> Move:
        worker = self.chance.choice(self.workers)
        return lambda connection, _: workers.heartbeat(connection, worker, LEASE_S)

    def stop(self) -> Move:
        worker = self.chance.choice(self.workers)
        return lambda connection, _: workers.stop_worker(connection, worker)

    def cancel(self) -> Move:
        members = self._some_members()[1] if self.chance.random() < 0.6 else []
        job_id = members[0].job_id if members else self.some_jobs()[0]
        chance = self.chance.random()
        if chance < 0.2:
            return lambda connection, _: purging.purge(connection, job_id)
        if chance < 0.4:
            ids = self.some_jobs()
            return lambda connection, _: cancellation.cancel_free(connection, ids)
        if chance < 0.5:
            return lambda connection, _: cancellation.cancel_or_record(
                connection, job_id, Kind.GENERATE
            )
        return lambda connection, _: cancellation.cancel(connection, job_id)

    def sweep(self) -> Move:
        looks: list[Move] = [
            lambda connection, _: sweeps.expire_leases(
                connection, sweeps.find_lost(connection, PAGE)
            ),
            lambda connection, _: delivery.free_lost(connection, PAGE),
            lambda connection, _: sweeps.expire_deadlines(
                connection, sweeps.find_late(connection, PAGE)
            ),
            lambda connection, _: sweeps.expire_leases(connection, self.jobs),
            lambda connection, _: sweeps.expire_deadlines(connection, self.jobs),
            lambda connection, _: delivery.unsent(connection),
            lambda connection, _: delivery.send_due(connection, MODEL, range(10), PAGE),
            lambda connection, _: list(delivery.overdue(connection, 1_700.0, PAGE)),
            lambda connection, _: delivery.send_again(connection, self.jobs, 1_700.0),
            lambda connection, _: counts.queued(connection),
            lambda connection, _: counts.ended(connection, 700.0),
            lambda connection, _: retention.remove_requests(connection, 2_500.0, PAGE),
            lambda connection, _: retention.redact_responses(connection, 2_500.0, PAGE),
            lambda connection, _: retention.delete_jobs(connection, 5_500.0, PAGE),
            lambda connection, _: retention.delete_batches(connection, 5_500.0, PAGE),
            lambda connection, _: retention.delete_windows(connection, 6_100.0, PAGE),
        ]
        return self.chance.choice(looks)


def _after(now: datetime, units: int | None) -> datetime | None:
    return None if units is None else now + timedelta(seconds=units * UNIT_S + HALF_S)


_SPANS = {"_ms": 1e3, "n_s": 1.0}
"""Ends of names of what grows with time, and how much of it is a second."""


def _plain(value: Any, now: datetime) -> Any:
    """A value that can be compared between stores: stamps by their age, groups in one order."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {each.name: getattr(value, each.name) for each in fields(value)}
    if isinstance(value, datetime):
        return ("age", round((now - value).total_seconds() / HALF_S))
    if isinstance(value, dict):
        return {
            key: round(each / _SPANS[key[-3:]] / HALF_S)
            if isinstance(each, float) and str(key)[-3:] in _SPANS
            else _plain(each, now)
            for key, each in value.items()
        }
    if isinstance(value, list | set | frozenset):
        return sorted((_plain(each, now) for each in value), key=repr)
    return value


def do(store: Postgres | Memory, move: Move) -> Any:
    now = store.now()
    try:
        with store.database.begin() as connection:
            return _plain(move(connection, now), now)
    except GristmillError as error:
        return type(error)


def rows_of(store: Postgres | Memory) -> dict[str, Any]:
    now = store.now()
    return {table: _plain(store.rows(table), now) for table in KEYS}


REFUSALS = (JobNotFound, JobStateConflict, LeaseLost, Unavailable)
"""All that a statement may raise, however late it is repeated and whoever has the job by then."""


def check_deliveries(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """Messages of queued jobs moved only as they may."""
    were = {row["id"]: _delivery(row) for row in before if row["state"] == "queued"}
    for row in after:
        was = were.get(row["id"])
        if was is not None and row["state"] == "queued":
            now = _delivery(row)
            assert now is was or now in DELIVERY_TRANSITIONS[was], (was, now)


def _delivery(row: dict[str, Any]) -> Delivery:
    return delivery_of(row["received_by"], row["enqueued_at"])


@pytest.mark.parametrize("seed", range(6))
def test_postgres_and_the_store_in_memory_answer_and_keep_the_same(
    database: Database, seed: int
) -> None:
    moves, real, fake = Moves(seed), Postgres(database), Memory()
    done = []

    for _ in range(100):
        name, move = moves.next()
        done.append(name)
        before = fake.rows("jobs")

        answer = do(fake, move)
        assert answer == do(real, move), done
        assert rows_of(fake) == rows_of(real), done
        assert not isinstance(answer, type) or answer in REFUSALS, done
        check_deliveries(before, fake.rows("jobs"))
        if moves.chance.random() < 0.15:
            for store in (fake, real):
                store.let_pass(UNIT_S)
