"""Invariants that hold whatever happens: conservation, one result, forward only."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from app.errors import JobStateConflict
from app.jobs import FINAL_STATES, MAX_UNCHARGED, JobState, can_move
from app.store import cancellation, claims, reads, sweeps
from app.store.database import Database
from tests.rows import Worker, completed, end_lease, insert, new_job, view


class RandomLife:
    """What can happen to jobs among workers that crash, cancel, release and come late."""

    def __init__(self, database: Database, seed: int) -> None:
        self.chance = random.Random(seed)
        self.database = database
        self.ids = insert(database, *(new_job(max_attempts=2) for _ in range(25)))
        self.workers = [Worker.registered(database) for _ in range(3)]
        self.grants: list[tuple[Worker, claims.Claimed]] = []

    def happen(self) -> None:
        events = [self.claim, self.finish, self.release, self.crash, self.cancel]
        self.chance.choices(events, weights=[4, 4, 2, 1, 0.5])[0]()

    def claim(self) -> None:
        worker = self.chance.choice(self.workers)
        worker.heartbeat()
        claimed = worker.claim(self.chance.sample(self.ids, 5))
        self.grants.extend((worker, each) for each in claimed)

    def finish(self) -> None:
        for worker, grant in self.chance.sample(self.grants, min(1, len(self.grants))):
            worker.finish(completed(grant, state=self.chance.choice(sorted(FINAL_STATES))))

    def release(self) -> None:
        for worker, grant in self.chance.sample(self.grants, min(1, len(self.grants))):
            worker.release(grant, charged=self.chance.random() < 0.5)

    def crash(self) -> None:
        end_lease(self.database, self.chance.choice(self.workers).id)
        with self.database.begin() as connection:
            sweeps.expire_leases(connection, sweeps.find_lost(connection, 3))

    def cancel(self) -> None:
        with suppress(JobStateConflict), self.database.begin() as connection:
            cancellation.cancel(connection, self.chance.choice(self.ids))


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_states_only_move_forward_and_each_job_gets_one_result(
    database: Database, seed: int
) -> None:
    life = RandomLife(database, seed)
    before = dict.fromkeys(life.ids, JobState.QUEUED)

    for _ in range(150):
        life.happen()
        with database.begin() as connection:
            now = reads.states(connection, life.ids)
        for job_id in life.ids:
            assert now[job_id] is before[job_id] or can_move(before[job_id], now[job_id])
        before = now

    for job_id in life.ids:
        job = view(database, job_id)
        assert (job.result is not None) == job.state.is_final
        assert [each.number for each in job.attempts] == list(range(1, job.attempt + 1))
        num_open = sum(each.outcome is None for each in job.attempts)
        assert num_open == (1 if job.state is JobState.RUNNING else 0)
        assert job.attempts_charged == sum(bool(each.charged) for each in job.attempts)
        assert job.attempts_charged <= job.max_attempts
        assert job.attempt - job.attempts_charged <= MAX_UNCHARGED
