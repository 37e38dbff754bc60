"""A world in one thread: the product's own runner, ledger, registrar, lease keeper and rescue on a
simulated clock, broker, database and engine.

`World` is driven by moves: plain methods that take whole numbers, so that a list of them is a
schedule that can be written down and played again. After every commit, every word to Celery and
every move the invariants are checked; `heal` ends all faults and waits for every job to end.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any, Final
from uuid import UUID

from app.errors import JobStateConflict
from app.jobs import JobState
from app.store import cancellation, submissions
from app.store.notices import CANCEL
from app.store.submissions import NewJob
from app.worker.commands import Drain, Flush, Revoked
from tests.memory_store import MemoryDatabase, Row
from tests.simulation.broken import Broken, expect
from tests.simulation.engine import MODELS
from tests.simulation.invariants import after_commit, when_all_have_ended
from tests.simulation.processes import SimulatedRescue, SimulatedWorker
from tests.simulation.prompts import (
    PROMPTS,
    UNSTORABLE,
    Expected,
    new_job,
    num_sequences,
    outcome_of,
    with_key,
)
from tests.simulation.servers import UNKNOWN, Clock, Message, Queue
from tests.simulation.settings import LEAST_ROWS, SERVED

MAX_JOBS: Final = 24
HEAL_S: Final = 300
"""Longest time from the end of all faults to the end of all jobs. Most of it is for messages that
were lost several times: the wait for one doubles with each."""

HEAL_STEPS: Final = 50_000
"""A busy loop, in which no time passes, is no progress either."""


class World:
    """All processes, and what must be true of them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryDatabase(self.clock.now)
        self.store.on_commit, self.store.on_notice = after_commit, self._noticed
        self.store.refuses = _refuses
        self.queue = Queue(self)
        self.postgres_back_ns = self.redis_back_ns = 0
        self.expected: dict[UUID, Expected] = {}
        self.deaf = False  #: notices of cancels are lost
        self._ids = random.Random(0)
        self.workers = [SimulatedWorker(self, models) for models in SERVED]
        self.rescuers = [SimulatedRescue(self), SimulatedRescue(self)]

    def new_id(self) -> UUID:
        return UUID(int=self._ids.getrandbits(128), version=4)

    # ── moves: producers ─────────────────────────────────────────────────────────────────────

    def submit(self, prompt: int, way: int, times: int) -> None:
        """A producer brings a job: a row and a message, or one of them."""
        if len(self.expected) >= MAX_JOBS:
            return None
        words, model = PROMPTS[prompt % len(PROMPTS)], MODELS[way // 6 % 2]
        job_id, now = self.new_id(), self.clock.now()
        expected = Expected(f"{words} {len(self.expected)}")
        expected.states.add(outcome_of(words))
        if model == "static" and num_sequences(words) > LEAST_ROWS:
            expected.states.add("failed")  # one of the workers cannot take it
        priority = 9 if times % 13 > 8 else 0
        eta = now + timedelta(seconds=4) if times % 5 == 1 else None
        expires = now + timedelta(seconds=(1, 8)[times % 2]) if times % 7 in (2, 3) else None
        limit_s = 1.0 if times % 11 == 4 else None
        if expires:
            expected.states.add("expired")
        if limit_s:
            expected.states.add("failed")
        self.expected[job_id] = expected
        message = Message(job_id, expected.prompt, model, eta, expires, limit_s, priority)
        if way % 6 == 0:  # a bare message; the job is accepted once it has a row
            return self.queue.put(message)
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

    def revoke(self, job: int, worker: int) -> None:
        """Celery's revoke, which each worker hears."""
        if (job_id := self._some_job(job)) is None:
            return
        self.expected[job_id].states.add("cancelled")
        self._worker(worker).post(Revoked(job_id))

    # ── moves: the broker ────────────────────────────────────────────────────────────────────

    def lose_message(self, queue: int, place: int) -> None:
        messages = self._list(queue)
        if messages:
            del messages[place % len(messages)]

    def double_message(self, queue: int, place: int) -> None:
        messages = self._list(queue)
        if messages:
            messages.append(messages[place % len(messages)])

    def shuffle_messages(self, queue: int, seed: int) -> None:
        random.Random(seed).shuffle(self._list(queue))

    def forge_message(self, job: int, way: int) -> None:
        """Somebody else writes into Redis: unknown ids, wrong queues, other requests."""
        model = MODELS[way // 4 % 2]
        job_id = self._some_job(job)
        is_stored = job_id in self.store.tables["jobs"]
        match way % 4:
            case 0:
                self.queue.put(Message(self.new_id(), None, model))
            case 1 if job_id and is_stored:  # the row wins
                self.queue.put(Message(job_id, "good 1 forged", model))
            case 2 if job_id and is_stored:  # in a queue whose workers may not serve its model
                self.queue.put(Message(job_id, None, model))
            case 3 if job_id and is_stored:
                self._worker(way).refuse(job_id)
            case 3:
                self._worker(way).refuse(self.new_id())

    def redeliver(self, worker: int) -> None:
        """The visibility timeout: what is being worked on comes again."""
        for message in self._worker(worker).unacked.values():
            self.queue.put(message)

    def flush_redis(self) -> None:
        for messages in self.queue.lists.values():
            messages.clear()

    def disconnect(self, worker: int) -> None:
        """A worker's connection to Redis drops: its messages go back, and it is told so."""
        broken = self._worker(worker)
        broken.give_back()
        broken.post(Flush())

    def redis_away(self, tenths: int) -> None:
        self.redis_back_ns = self.clock.ns + tenths % 100 * 100_000_000

    # ── moves: Postgres, workers, engines, rescue ────────────────────────────────────────────

    def postgres_away(self, tenths: int) -> None:
        self.postgres_back_ns = self.clock.ns + tenths % 100 * 100_000_000

    def fail_transaction(self, worker: int, fault: int, after: int) -> None:
        broken = self._worker(worker).database
        broken.fault, broken.fault_in = fault % 4, after % 4

    def lose_reply(self, worker: int, after: int, tenths: int) -> None:
        """The answer to one of its commits is lost, and then nothing gets through for a time that
        may be longer than its lease."""
        broken = self._worker(worker).database
        broken.fault, broken.fault_in = UNKNOWN, after % 6
        broken.cut_off_ns = tenths % 300 * 100_000_000

    def fail_sweep(self, rescuer: int, fault: int, after: int) -> None:
        broken = self.rescuers[rescuer % len(self.rescuers)].database
        broken.fault, broken.fault_in = fault % 4, after % 6

    def lose_cancels(self) -> None:
        """The connection that brings notices is away: the next heartbeat brings them."""
        self.deaf = not self.deaf

    def kill_worker(self, worker: int, given_back: int) -> None:
        self._worker(worker).die(given_back=given_back % 2 == 1)

    def kill_at_ack(self, worker: int, acks: int) -> None:
        self._worker(worker).acks_until_death = acks % 4

    def pause_worker(self, worker: int, tenths: int) -> None:
        """A zombie: it stands still for so long that its lease may run out, and then goes on."""
        self._worker(worker).paused_until_ns = self.clock.ns + tenths % 300 * 100_000_000

    def miss_beats(self, worker: int, tenths: int) -> None:
        self._worker(worker).beat_ns = self.clock.ns + tenths % 300 * 100_000_000

    def drain(self, worker: int, tenths: int) -> None:
        drained = self._worker(worker)
        drained.is_drained = True
        drained.post(Drain(self.clock.ns + tenths % 30 * 100_000_000))

    def start_worker(self, worker: int) -> None:
        place = worker % len(self.workers)
        if not self.workers[place].is_alive:
            self.workers[place] = SimulatedWorker(self, SERVED[place])

    def kill_engine(self, worker: int) -> None:
        """From outside, say by the kernel: nobody's fault, but it looks like that of one alone."""
        process = self._worker(worker).host.process
        if process is None or not process.is_alive:
            return
        self.killed_with(process.inside)
        process.kill()

    def freeze_engine(self, worker: int, tenths: int) -> None:
        """SIGSTOP: nothing is read from its pipe, and nothing comes."""
        process = self._worker(worker).host.process
        if process is not None and process.is_alive:
            process.freeze(self.clock.ns + tenths % 300 * 100_000_000)

    def restart_rescue(self, rescuer: int) -> None:
        self.rescuers[rescuer % len(self.rescuers)] = SimulatedRescue(self)

    def start_rescue(self, rescuer: int) -> None:
        place = rescuer % len(self.rescuers)
        if not self.rescuers[place].is_alive:
            self.rescuers[place] = SimulatedRescue(self)

    # ── moves: time ──────────────────────────────────────────────────────────────────────────

    def go(self, steps: int, seed: int) -> None:
        """Let everybody do what is due, in an order that `seed` decides."""
        chance = random.Random(seed)
        for _ in range(steps % 80):
            self._step(chance)

    def stand_still(self, tenths: int) -> None:
        """Nobody gets the processor for a while."""
        self.clock.ns += tenths % 50 * 100_000_000

    def heal(self) -> None:
        """End all faults; everything must then come to its end, and everything must be in order."""
        self.postgres_back_ns = self.redis_back_ns = 0
        self.deaf = False
        for place, worker in enumerate(self.workers):
            worker.paused_until_ns = worker.beat_ns = 0
            worker.acks_until_death = None
            worker.database.heal()
            self.start_worker(place)
        for place, rescuer in enumerate(self.rescuers):
            rescuer.database.heal()
            self.start_rescue(place)
        self.run_until_quiet()
        when_all_have_ended(self.store, self.expected)

    def run_until_quiet(self) -> None:
        chance, until_ns = random.Random(0), self.clock.ns + HEAL_S * 1_000_000_000
        steps = 0
        while not self._is_quiet():
            steps += 1
            if self.clock.ns > until_ns or steps > HEAL_STEPS:
                raise Broken(f"I7: not at rest after {HEAL_S} s: {self._open()}")
            self._step(chance)
            for place in range(len(self.workers)):
                self.start_worker(place)  # those that drained

    def _step(self, chance: random.Random) -> None:
        due = list(self._due())
        ready = [act for ns, act in due if ns <= self.clock.ns]
        if ready:
            chance.choice(ready)()
        elif due:
            self.clock.ns = min(ns for ns, _ in due)

    def _due(self) -> Iterator[tuple[int, Any]]:
        """What somebody wants to do, and when."""
        for worker in self.workers:
            if worker.is_alive:
                yield worker.next_turn_ns, worker.turn
                yield max(worker.beat_ns, worker.paused_until_ns), worker.beat
                process = worker.host.process
                if process is not None and process.next_ns is not None:
                    yield process.next_ns, process.run
            if worker.wants_messages:
                for model in worker.models:
                    if self.queue.lists[model]:
                        yield 0, lambda w=worker, m=model: w.take(self.queue.pop(m))
        for rescuer in self.rescuers:
            if rescuer.is_alive:
                yield rescuer.sweep_ns, rescuer.sweep

    # ── helpers ──────────────────────────────────────────────────────────────────────────────

    def _insert(self, job: NewJob, is_sent: bool) -> bool:
        """Whether the job was accepted."""
        if self.clock.ns < self.postgres_back_ns:
            return False
        with self.store.begin() as connection:
            sent = [job.id] if is_sent else []
            submissions.insert_jobs(connection, [with_key(job, str(job.id))], sent)
        return True

    def _some_job(self, number: int) -> UUID | None:
        ids = list(self.expected)
        return ids[number % len(ids)] if ids else None

    def _worker(self, number: int) -> SimulatedWorker:
        return self.workers[number % len(self.workers)]

    def _list(self, number: int) -> list[Message]:
        return self.queue.lists[MODELS[number % len(MODELS)]]

    def killed_with(self, prompts: set[str]) -> None:
        """A fault ended an engine that held these."""
        for expected in self.expected.values():
            expected.kills_alone += {expected.prompt} == prompts

    def _noticed(self, channel: str, job_id: UUID) -> None:
        if channel == CANCEL and not self.deaf:
            for worker in self.workers:
                if worker.is_alive:
                    worker.lease.hear_cancel(job_id)

    def _is_quiet(self) -> bool:
        is_over = all(JobState(row["state"]).is_final for row in self.store.rows("jobs"))
        return (
            is_over
            and not any(self.queue.lists.values())
            and not any(worker.unacked for worker in self.workers if worker.is_alive)
        )

    def _open(self) -> dict[str, Any]:
        jobs = {
            str(row["id"])[:8]: (self._prompt(row), row["state"], row["received_by"])
            for row in self.store.rows("jobs")
            if not JobState(row["state"]).is_final
        }
        unacked = [len(worker.unacked) for worker in self.workers]
        return {"jobs": jobs, "unacked": unacked, "queue": self.queue.lists}

    def _prompt(self, row: Row) -> str:
        expected = self.expected.get(row["id"])
        return expected.prompt if expected else "a stranger"


def _refuses(table: str, row: Row) -> bool:
    """Whether Postgres would refuse a row: its metadata, or its response."""
    if table == "jobs":
        return UNSTORABLE in (row.get("metadata") or {})
    choices = (row.get("response") or {}).get("choices", []) if table == "results" else []
    return any(UNSTORABLE in choice["text"] for choice in choices)
