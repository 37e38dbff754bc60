"""The moves of those who bring jobs, and of those who take them back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Final
from uuid import UUID

from app.broker.message import Message as WakeUp
from app.broker.queues import queue_name
from app.errors import JobStateConflict
from app.jobs import Kind
from app.store import cancellation, submissions
from app.store.submissions import NewJob
from app.worker.commands import Revoked
from tests.memory_store import MemoryDatabase
from tests.simulation.broken import expect
from tests.simulation.effects import Effect
from tests.simulation.engine import MODELS
from tests.simulation.processes import SimulatedWorker
from tests.simulation.prompts import PROMPTS, Expected, new_job, num_sequences, outcome_of, with_key
from tests.simulation.servers import DEFAULT, Clock, Message, Queue
from tests.simulation.settings import LEAST_ROWS
from tests.simulation.versions import LATER, speaking

MAX_JOBS: Final = 24
LEAST_FLOOD: Final = 40


class Producers:
    """A part of `World`."""

    clock: Clock
    store: MemoryDatabase
    queue: Queue
    expected: dict[UUID, Expected]
    workers: list[SimulatedWorker]
    postgres_back_ns: int
    redis_back_ns: int
    deaf: bool

    def submit(self, prompt: int, way: int, times: int) -> None:
        """A producer brings a job: a row and a message, or one of them."""
        if self.is_full:
            return None
        words, model = PROMPTS[prompt % len(PROMPTS)], MODELS[way // 6 % 2]
        job_id, now = self.new_id(), self.clock.now()
        limit_s = {4: 1.0, 5: 0.3, 6: 0.3}.get(times % 11)
        expected = self._expect("good 60" if limit_s else words, model)
        priority = 9 if times % 13 > 8 else 0
        eta = now + timedelta(seconds=4) if times % 5 == 1 else None
        expires = now + timedelta(seconds=(1, 8)[times % 2]) if times % 7 in (2, 3) else None
        if expires:
            expected.states.add("expired")
        if limit_s:
            expected.states.add("failed")
        self.expected[job_id] = expected
        message = Message(job_id, expected.prompt, model, eta, expires, limit_s, priority)
        if way % 6 == 0:  # a bare message; the job is accepted once it has a row
            expected.limit_s = limit_s
            queue = DEFAULT if times % 2 else message.queue
            return self.queue.put(replace(message, queue=queue))
        is_sent = way % 6 in (1, 2, 4)
        job = new_job(job_id, expected.prompt, model, eta, expires, priority)
        if not self._insert(job, is_sent):
            del self.expected[job_id]
            return None
        if way % 6 in (1, 2, 3) and self.clock.ns >= self.redis_back_ns:
            # 3: sent, though the row does not say so; 4: the other way round
            wake_up = Message(job_id, None, model, priority=priority)
            self.queue.put(message if way % 6 == 1 else wake_up)
        return None

    def submit_later(self, prompt: int, way: int, times: int) -> None:
        """The same by an API of a later version, whose requests are of its own format."""
        if self.is_full:
            return
        words, model = PROMPTS[prompt % len(PROMPTS)], MODELS[way // 4 % 2]
        job_id, expected = self.new_id(), self._expect(words, model)
        priority = 9 if times % 13 > 8 else 0
        with speaking(LATER):
            job = new_job(job_id, expected.prompt, model, None, None, priority)
            is_accepted = self._insert(job, way % 4 < 3)
        if not is_accepted:
            return
        self.expected[job_id] = expected
        if way % 4 < 3 and self.clock.ns >= self.redis_back_ns:
            body = expected.prompt if way % 4 else None  # broker.inline_requests
            queue = queue_name(model) if way % 4 == 2 else ""  # it got into that of before
            message = Message(job_id, body, model, None, None, None, priority, False, LATER, queue)
            self.queue.put(message)

    @property
    def is_full(self) -> bool:
        """There are enough jobs, whatever came in a flood."""
        return len(self.expected) >= MAX_JOBS + self._flood_size

    def flood(self, way: int, number: int) -> None:
        """One model's queue is far busier than the other's, which gets one job just then."""
        if self._flood_size or self.clock.ns < max(self.postgres_back_ns, self.redis_back_ns):
            return
        words, size = ("good 9", "good 30", "good 60")[way // 8 % 3], LEAST_FLOOD + number % 40
        busy, idle = MODELS[way // 4 % 2], MODELS[way // 4 % 2 - 1]
        self._flooded, self._flood_size = busy, size + 1
        sent: list[WakeUp] = []
        for model in [*[busy] * size, idle]:
            job_id, expected = self.new_id(), self._expect(words, model)
            self.expected[job_id] = expected
            if way % 4 < 2:
                self._insert(new_job(job_id, expected.prompt, model), way % 4 == 1)
            if way % 4 == 1:
                sent.append(WakeUp(job_id, Kind.GENERATE, model))
            elif way % 4 > 1:
                queue = DEFAULT if way % 4 == 2 else ""
                self.queue.put(Message(job_id, expected.prompt, model, queue=queue))
        self.queue.send_many(sent)

    def submit_unstorable(self, way: int) -> None:
        """A bare message with something that the store refuses, for all that come with it."""
        job_id, model = self.new_id(), MODELS[way % 2]
        self.queue.put(Message(job_id, "good 1 of many", model, is_unstorable=True))

    def submit_again(self, job: int) -> None:
        """The same idempotency key and request once more are the same job."""
        if (job_id := self._some_job(job)) is None:
            return
        row = self.store.tables["jobs"].get(job_id)
        if row is None or row["idempotency_key"] is None:
            return
        again = new_job(self.new_id(), self.expected[job_id].prompt, row["model"])
        same = with_key(again, row["idempotency_key"])
        with self.store.begin() as connection:
            [inserted] = submissions.insert_jobs(connection, [same])
        expect(inserted.id == job_id and not inserted.created, "one key made two jobs")

    def cancel(self, job: int) -> None:
        if (job_id := self._some_job(job)) not in self.store.tables["jobs"]:
            return
        assert job_id is not None
        self.expected[job_id].states.add("cancelled")
        with suppress(JobStateConflict), self.store.begin() as connection:
            cancellation.cancel(connection, job_id)
        if not self.deaf:
            self._tell_workers(job_id)

    def _tell_workers(self, job_id: UUID) -> None:
        """What the API does after the commit of a cancel."""
        with self.store.begin() as connection:
            told = cancellation.who_runs(connection, [job_id])
        for worker in self.workers:
            if worker.is_alive and worker.id in told:
                worker.lease.hear_cancel(frozenset(told[worker.id]))

    def revoke(self, job: int, worker: int) -> None:
        """Celery's revoke, which each worker hears."""
        if (job_id := self._some_job(job)) is None:
            return
        self.expected[job_id].states.add("cancelled")
        if self._worker(worker).is_alive:
            self._worker(worker).post(Revoked(job_id))
            self.must_have_row(job_id, self._worker(worker))
            if job_id not in self.store.tables["jobs"]:
                self.note(Effect.REVOKED_WITHOUT_ROW)

    def revoke_unread(self, job: int, worker: int) -> None:
        """Celery's revoke of a task whose message lies in Redis: some workers note it, and drop
        the message when it comes to them."""
        sent = [
            id for each in self.queue.lists.values() for message in each for id in message.job_ids
        ]
        if not (ours := [job_id for job_id in sent if job_id in self.expected]):
            return
        job_id = ours[job % len(ours)]
        self.expected[job_id].states.add("cancelled")
        for place, each in enumerate(self.workers):
            if worker % 4 != place:  # 2 and 3: all of them
                each.revoked.add(job_id)

    def must_have_row(self, job_id: UUID, worker: SimulatedWorker) -> None:
        """This worker owes the job a row, unless it dies first."""
        self._owed_rows.append((job_id, worker))

    def _expect(self, words: str, model: str) -> Expected:
        """What a new job with these words may become, and its prompt, which is like no other's."""
        expected = Expected(f"{words} {len(self.expected)}", model)
        expected.states.add(outcome_of(words))
        if model == "static" and num_sequences(words) > LEAST_ROWS:
            expected.states.add("failed")  # one of the workers cannot take it
        return expected

    def _insert(self, job: NewJob, is_sent: bool) -> bool:
        """Whether the job was accepted."""
        if self.clock.ns < self.postgres_back_ns:
            return False
        with self.store.begin() as connection:
            sent = [job.id] if is_sent else []
            submissions.insert_jobs(connection, [with_key(job, str(job.id))], sent)
        return True
