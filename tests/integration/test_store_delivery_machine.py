"""Nothing is forgotten, whatever becomes of messages, workers and answers.

Hypothesis invents what happens and cuts it down; Postgres and the store in memory both live
through it. In the end faults stop, rescue sweeps, a new worker takes what it finds, and every job
has to end.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test
from sqlalchemy import text

from app.errors import JobNotFound, JobStateConflict, LeaseLost, Unavailable
from app.jobs import AttemptOutcome, CloseReason, JobState
from app.store import cancellation, claims, delivery, releases, submissions, sweeps, workers
from app.store.claims import Finished, Member, NewBatch
from app.store.database import Database
from app.store.submissions import Incoming
from app.store.tables import metadata
from tests.integration.test_store_contract import (
    HALF_S,
    LEASE_S,
    PAGE,
    UNIT_S,
    Memory,
    Move,
    Postgres,
    check_deliveries,
    do,
    new_worker,
    rows_of,
)
from tests.rows import MODEL, counting, created_at, new_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LOST_AFTER_S = 1_700.0
NUM_JOBS, NUM_WORKERS = 5, 2

JOB, WORKER = st.integers(0, NUM_JOBS - 1), st.integers(0, NUM_WORKERS - 1)


class Histories(RuleBasedStateMachine):
    """Two stores, the messages in Redis, and what workers know."""

    postgres: Database  #: of the test

    def __init__(self) -> None:
        super().__init__()
        with self.postgres.begin() as connection:
            connection.execute(text(f"TRUNCATE {', '.join(metadata.tables)}"))
        self.stores = (Memory(), Postgres(self.postgres))
        self.jobs = [uuid4() for _ in range(NUM_JOBS)]
        self.workers = [uuid4() for _ in range(NUM_WORKERS)]
        self.messages: list[UUID] = []  #: in Redis
        self.members: dict[UUID, Member] = {}  #: the last claim of each job
        for worker_id in self.workers:
            self.both(
                lambda c, _, id=worker_id: workers.register_worker(c, new_worker(id), LEASE_S)
            )

    def both(self, move: Move) -> Any:
        """What both stores answer, to a move that may be refused."""
        memory, postgres = self.stores
        before = memory.rows("jobs")
        answer = do(memory, move)
        assert answer == do(postgres, move)
        assert rows_of(memory) == rows_of(postgres)
        check_deliveries(before, memory.rows("jobs"))
        allowed = (JobNotFound, JobStateConflict, LeaseLost, Unavailable)
        assert not isinstance(answer, type) or answer in allowed
        return answer

    def marked(self, move: Move) -> list[UUID]:
        """The jobs that a move marked as sent, for their messages to be sent or lost."""
        return [wake_up["id"] for wake_up in self.both(move)]

    # ── the producer, and Redis ──────────────────────────────────────────────────────────────

    @rule(job=JOB, is_early=st.booleans(), ending=st.sampled_from(["sent", "killed", "refused"]))
    def submit(self, job: int, is_early: bool, ending: str) -> None:
        job_id = self.jobs[job]

        def move(connection: Any, now: datetime) -> Any:
            due = now + timedelta(seconds=HALF_S) if is_early else None
            new = new_job(id=job_id, not_before=due)
            return submissions.insert_jobs(connection, [new], [job_id])

        [inserted] = self.both(move)
        if inserted["created"] and inserted["is_sent"]:
            self._send([job_id], ending)

    def _send(self, ids: list[UUID], ending: str) -> None:
        """What was marked is sent, or its sender is killed before, or Redis refuses it."""
        if ending == "sent":
            self.messages += ids
        elif ending == "refused":
            self.both(lambda connection, _: delivery.not_sent(connection, ids))

    @rule(job=JOB)
    def double_or_forge(self, job: int) -> None:
        self.messages.append(self.jobs[job])

    @rule(place=st.integers(0, 9))
    def lose_a_message(self, place: int) -> None:
        del self.messages[place : place + 1]

    # ── workers ──────────────────────────────────────────────────────────────────────────────

    @rule(worker=WORKER, num=st.integers(1, 3), is_bare=st.booleans())
    def receive(self, worker: int, num: int, is_bare: bool) -> None:
        taken, self.messages = self.messages[:num], self.messages[num:]
        arrivals = [Incoming(id, None if is_bare else new_job(id=id)) for id in taken]
        self.both(lambda c, _: [*submissions.receive(c, self.workers[worker], arrivals).values()])

    @rule(worker=WORKER, job=JOB)
    def claim(self, worker: int, job: int) -> None:
        """Also of a job that it has not received, or of one that it has claimed before."""
        member = Member(self.jobs[job], uuid4())
        batch = _batch(self.workers[worker])
        answer = self.both(lambda c, _: claims.claim(c, batch, [member]))
        if isinstance(answer, list) and answer:
            self.members[member.job_id] = member

    @rule(job=JOB)
    def finish(self, job: int) -> None:
        if member := self.members.get(self.jobs[job]):
            self.both(lambda c, _: claims.finish(c, [_finished(c, member)]))

    @rule(job=JOB, is_charged=st.booleans())
    def release(self, job: int, is_charged: bool) -> None:
        if member := self.members.get(self.jobs[job]):
            given = partial(
                releases.Release,
                job_id=member.job_id,
                attempt_id=member.attempt_id,
                outcome=AttemptOutcome.RELEASED,
                charged=is_charged,
            )
            self.both(
                lambda c, _: releases.release(c, [given(created_at=created_at(c, member.job_id))])
            )

    @rule(worker=WORKER, job=JOB)
    def let_go(self, worker: int, job: int) -> None:
        """The message goes back to Redis in a connection that is lost."""
        ids = [self.jobs[job]]
        self.both(lambda c, _: delivery.let_go(c, self.workers[worker], ids))

    @rule(worker=WORKER, known=st.sets(JOB))
    def compare(self, worker: int, known: set[int]) -> None:
        ids = [self.jobs[job] for job in sorted(known)]
        self.both(lambda c, _: delivery.free_forgotten(c, self.workers[worker], ids))

    @rule(worker=WORKER)
    def beat(self, worker: int) -> None:
        self.both(lambda c, _: workers.heartbeat(c, self.workers[worker], LEASE_S))

    @rule(worker=WORKER)
    def stop(self, worker: int) -> None:
        self.both(lambda c, _: workers.stop_worker(c, self.workers[worker]))

    @rule(job=JOB)
    def cancel(self, job: int) -> None:
        self.both(lambda c, _: cancellation.cancel(c, self.jobs[job]))

    # ── time, and rescue ─────────────────────────────────────────────────────────────────────

    @rule(units=st.sampled_from([1, 4]))
    def let_pass(self, units: int) -> None:
        for store in self.stores:
            store.let_pass(units * UNIT_S)

    @rule(ending=st.sampled_from(["sent", "killed", "refused"]))
    def sweep(self, ending: str = "sent") -> None:
        self.both(lambda c, _: sweeps.expire_leases(c, sweeps.find_lost(c, PAGE)))
        self.both(lambda c, _: delivery.free_lost(c, PAGE))
        self._send(self.marked(lambda c, _: delivery.send_due(c, MODEL, range(10), PAGE)), ending)
        late = self.both(lambda c, _: list(delivery.overdue(c, LOST_AFTER_S, PAGE)))
        missing = [id for id in late if id not in self.messages]
        self._send(self.marked(lambda c, _: delivery.send_again(c, missing, LOST_AFTER_S)), ending)

    def teardown(self) -> None:
        """Faults stop: every job that was accepted ends."""
        worker_id = uuid4()
        for _ in range(4):
            self.let_pass(1_000)
            self.sweep()
        self.both(lambda c, _: workers.register_worker(c, new_worker(worker_id), LEASE_S))
        ids, self.messages = sorted(set(self.messages)), []
        self.both(lambda c, _: [*submissions.receive(c, worker_id, map(Incoming, ids)).values()])
        members = [Member(id, uuid4()) for id in ids]
        batch = _batch(worker_id)
        self.both(lambda c, _: claims.claim(c, batch, members))
        self.both(lambda c, _: counting(claims.finish(c, [_finished(c, each) for each in members])))
        left = [row for row in self.stores[0].rows("jobs") if row["finished_at"] is None]
        assert not left


def _batch(worker_id: UUID) -> NewBatch:
    return NewBatch(
        id=uuid4(),
        worker_id=worker_id,
        model=MODEL,
        engine="stub",
        close_reason=CloseReason.SIZE,
        wait_ms=5.0,
    )


def _finished(connection: Any, member: Member) -> Finished:
    return Finished(
        job_id=member.job_id,
        attempt_id=member.attempt_id,
        created_at=created_at(connection, member.job_id),
        state=JobState.COMPLETED,
        response={"text": "Flour."},
    )


def test_whatever_happens_to_messages_every_job_ends_once_faults_stop(database: Database) -> None:
    class OnPostgres(Histories):
        postgres = database

    few = settings(
        max_examples=20,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(OnPostgres, settings=few)
