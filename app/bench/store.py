"""What the benchmarks of the tables do to them: jobs of one model, in batches, by one worker."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Final
from uuid import UUID

from app.jobs import CloseReason, JobState, Kind, new_id
from app.store import claims, submissions, workers
from app.store.database import Database
from app.store.submissions import Incoming, NewJob

MODEL: Final = "bench"
BATCH: Final = 64
PROMPT: Final = "The old miller had never cared for the river. " * 12
DAY_S: Final = 86_400


@dataclass(slots=True)
class Store:
    database: Database
    worker_id: UUID
    prompt: str = PROMPT
    response: str = PROMPT
    batch_id: UUID = field(default_factory=new_id, init=False)  #: claimed last

    @classmethod
    def of(cls, database: Database, **texts: str) -> Store:
        """With a worker of its own."""
        return cls(database, _register(database), **texts)

    def submit(self, number: int) -> list[UUID]:
        jobs = [_new_job(self.prompt) for _ in range(number)]
        ids = [job.id for job in jobs]
        with self.database.begin() as connection:
            submissions.insert_jobs(connection, jobs, sent=ids)
        return ids

    def receive(self, ids: Sequence[UUID]) -> None:
        with self.database.begin() as connection:
            submissions.receive(connection, self.worker_id, map(Incoming, ids))

    def claim(self, ids: Sequence[UUID]) -> list[claims.Claimed]:
        batch = claims.NewBatch(
            id=new_id(),
            worker_id=self.worker_id,
            model=MODEL,
            engine="stub",
            close_reason=CloseReason.SIZE,
            wait_ms=1.0,
        )
        self.batch_id = batch.id
        with self.database.begin() as connection:
            return claims.claim(connection, batch, [claims.Member(id, new_id()) for id in ids])

    def finish(self, claimed: Sequence[claims.Claimed]) -> None:
        response = {"choices": [{"text": self.response}]}
        done = [
            claims.Finished(
                job_id=each.job_id,
                attempt_id=each.attempt_id,
                created_at=each.created_at,
                state=JobState.COMPLETED,
                response=response,
            )
            for each in claimed
        ]
        with self.database.begin() as connection:
            claims.finish(connection, done, [claims.BatchStats(self.batch_id, 1, 1, 1)])

    def run(self, number: int) -> None:
        """Jobs from their submission to their results, batch by batch."""
        for _ in range(number // BATCH):
            ids = self.submit(BATCH)
            self.receive(ids)
            self.finish(self.claim(ids))

    def remove(self, step: Callable[..., int], keep_s: float, page: int) -> int:
        with self.database.begin() as connection:
            return step(connection, keep_s, page)


def _new_job(prompt: str) -> NewJob:
    return NewJob(
        id=new_id(),
        model=MODEL,
        kind=Kind.GENERATE,
        url="/v1/completions",
        request={"prompt": prompt},
        fingerprint=secrets.token_hex(32),
        source="api",
        input_tokens=100,
        max_output_tokens=100,
    )


def _register(database: Database) -> UUID:
    worker = workers.NewWorker(
        id=new_id(),
        name="bench",
        host="here",
        pid=1,
        models=[MODEL],
        device="none",
        price_id="cpu",
        currency="USD",
        price_per_device_hour=Decimal(0),
    )
    with database.begin() as connection:
        workers.register_worker(connection, worker, lease_s=DAY_S)
    return worker.id
