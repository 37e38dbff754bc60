"""A world in one thread: the product's own runner, ledger, registrar, lease keeper and rescue on a
simulated clock, broker, database and engine.

`World` is driven by moves: plain methods that take whole numbers, so that a list of them is a
schedule that can be written down and played again. After every commit, every word to Celery and
every move the invariants are checked; `heal` ends all faults and waits for every job to end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from app import broker, requests
from app.config import ModelSettings, PriceSettings, Settings
from app.engines.base import Kind
from app.engines.catalog import CatalogModel
from app.engines.tokenizer import StubTokenizer
from app.errors import EngineError, JobStateConflict, LeaseLost, RequestError, Unavailable
from app.jobs import ALONE_AFTER, AttemptOutcome, JobState, can_move
from app.rescue import Rescue
from app.store import cancellation, intake
from app.store.intake import NewJob
from app.store.notices import CANCEL
from app.store.workers import NewWorker
from app.worker.batcher import Batcher, Limits
from app.worker.commands import Command, Drain, Flush, Revoked
from app.worker.intake import Arrival, Refusal
from app.worker.lease import LeaseKeeper
from app.worker.ledger import Ledger
from app.worker.registrar import Registrar
from app.worker.runner import Runner
from app.worker.settlement import Settlement
from app.worker.suspects import KILLS_ALONE
from app.worker.ticket import JobFailed, Ticket
from app.worker.wire import Load, ServedModel
from tests.memory_store import MemoryConnection, MemoryDatabase, Row
from tests.simulation.engine import MAX_ROWS, MODELS, SimulatedHost, answer_to

SETTINGS: Final = Settings.model_validate(
    {
        "models": {
            name: ModelSettings(
                source="stub",
                kind="generate",
                engine="stub",
                max_batch_size=MAX_ROWS,
                max_batch_tokens=160,
                default_max_tokens=16,
                max_wait_ms=100,
                default=name == "static",
            )
            for name in MODELS
        },
        "prices": {"cpu": PriceSettings(per_device_hour=Decimal("0.036"), currency="EUR")},
        "worker": {"lease_s": 10, "heartbeat_s": 3, "step_timeout_s": 4, "load_timeout_s": 20},
        "rescue": {"sweep_ms": 1000, "lost_after_s": 5, "page_size": 3},
    }
)
CATALOG: Final = {
    name: CatalogModel(model, Path(), StubTokenizer(model))
    for name, model in SETTINGS.models.items()
}
SERVED: Final = (("static", "joins"), ("static",), ("static", "joins"))
"""Models of each worker: what one does not serve it has to pass on."""

PREFETCHED: Final = 2 * MAX_ROWS
MAX_JOBS: Final = 24
HEAL_S: Final = 300
"""Longest time from the end of all faults to the end of all jobs. Most of it is for messages that
were lost several times: the wait for one doubles with each."""

HEAL_STEPS: Final = 50_000
"""A busy loop, in which no time passes, is no progress either."""

PROMPTS: Final = (
    "good 1", "good 2", "good 4", "good 9", "good 3", "good 30", "nan 2", "poison 1", "poison 3",
    "oom 2", "oom 0", "hang 2",
)  # fmt: skip
ROLLED_BACK, UNKNOWN, DIES_BEFORE, DIES_AFTER = range(4)
"""What may happen to a transaction: its commit fails, or its answer is lost; or the process dies
before or after the commit."""


class Broken(AssertionError):
    """An invariant does not hold."""


class Died(BaseException):
    """kill -9 at this point of the code."""


class Clock:
    """One clock for all: only differences count, and each process measures its own."""

    def __init__(self) -> None:
        self.ns = 1_000_000_000

    def now_ns(self) -> int:
        return self.ns

    def now_s(self) -> float:
        return self.ns / 1e9

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(microseconds=self.ns // 1_000)


class ProcessDatabase:
    """A process's pool: it may find Postgres away, and one of its transactions may go wrong."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.fault: int | None = None
        self.fault_in = 0  #: transactions that go well before the fault

    @contextmanager
    def begin(self) -> Iterator[Any]:
        if self._world.clock.ns < self._world.postgres_back_ns:
            raise Unavailable("Postgres is away.")
        fault = self._next_fault()
        with self._world.store.begin() as connection:
            yield connection
            if fault == ROLLED_BACK:
                raise Unavailable("The commit failed.")
            if fault == DIES_BEFORE:
                raise Died
        if fault == UNKNOWN:
            raise Unavailable("The answer to the commit was lost.")
        if fault == DIES_AFTER:
            raise Died

    @contextmanager
    def autocommit(self) -> Iterator[Any]:
        yield _Autocommit(self)

    def _next_fault(self) -> int | None:
        if self.fault is None or self.fault_in > 0:
            self.fault_in -= 1
            return None
        fault, self.fault = self.fault, None
        return fault


class _Autocommit:
    """A connection on which every statement is a transaction of its own."""

    def __init__(self, database: ProcessDatabase) -> None:
        self._database = database

    def __getattr__(self, name: str) -> Any:
        def run(*given: Any) -> Any:
            with self._database.begin() as connection:
                return getattr(connection, name)(*given)

        return run


@dataclass(frozen=True, slots=True)
class Message:
    job_id: UUID
    body: str | None  #: the prompt, if the message brings the request
    model: str
    eta: datetime | None = None
    expires: datetime | None = None
    time_limit_s: float | None = None


class Queue:
    """Redis: a list a model. Also plays the product's publisher."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.lists: dict[str, list[Message]] = {name: [] for name in MODELS}

    def put(self, message: Message) -> None:
        self.lists[message.model].append(message)

    def send(self, message: broker.Message) -> None:
        self.send_many([message])

    def send_many(self, messages: Iterable[broker.Message]) -> None:
        if self._world.clock.ns < self._world.redis_back_ns:
            raise Unavailable("Redis is away.")
        for message in messages:
            self.put(Message(message.job_id, None, message.model))

    def list_lengths(self, models: Iterable[str]) -> dict[str, list[int]]:
        """All of the simulation's messages have the first priority."""
        rest = [0] * (len(broker.PRIORITY_STEPS) - 1)
        return {model: [length, *rest] for model, length in self.queue_lengths(models).items()}

    def queue_lengths(self, models: Iterable[str]) -> dict[str, int]:
        if self._world.clock.ns < self._world.redis_back_ns:
            raise Unavailable("Redis is away.")
        return {model: len(self.lists[model]) for model in models}


class SimulatedWorker:
    """A worker process from its start to its end; plays Celery and the runner's thread."""

    def __init__(self, world: World, models: tuple[str, ...]) -> None:
        now_ns = world.clock.now_ns
        self.id = world.new_id()
        self.models = models
        self.database = ProcessDatabase(world)
        self.unacked: dict[int, Message] = {}
        self.is_alive, self.is_registered, self.is_drained = True, False, False
        self.paused_until_ns = self.turn_ns = self.beat_ns = 0
        self.acks_until_death: int | None = None
        self.host = SimulatedHost(
            Load(tuple(ServedModel(n, Path(), SETTINGS.models[n]) for n in models), "cpu", 1),
            load_timeout_s=SETTINGS.worker.load_timeout_s,
            step_timeout_s=SETTINGS.worker.step_timeout_s,
            now_ns=now_ns,
        )
        served = {name: CATALOG[name] for name in models}
        settlement = Settlement("cpu", SETTINGS.prices["cpu"], served)
        shared: dict[str, Any] = {"worker_id": self.id, "database": self.database, "now_ns": now_ns}
        self.runner = Runner(
            models=models,
            registrar=Registrar(publisher=world.queue, served=served, max_attempts=3, **shared),
            batcher=Batcher({name: Limits.of(SETTINGS.models[name]) for name in models}),
            ledger=Ledger(engines=dict.fromkeys(models, "stub"), settlement=settlement, **shared),
            host=self.host,
            now_ns=now_ns,
        )
        self.lease = LeaseKeeper(
            worker=_new_worker(self.id, models),
            database=self.database,
            database_url="",
            runner=self,
            lease_s=SETTINGS.worker.lease_s,
            heartbeat_s=SETTINGS.worker.heartbeat_s,
            now_ns=now_ns,
        )
        self._world = world
        self._slots = 0
        self.runner.start()

    # ── what the runner's thread is to others ────────────────────────────────────────────────

    @property
    def turned_ns(self) -> int:
        return self.runner.turned_ns

    def post(self, command: Command) -> None:
        self.runner.post(command)
        self.turn_ns = 0

    def fail(self, error: Any) -> None:
        self.runner.fail(error)
        self.turn_ns = 0

    # ── what is due ──────────────────────────────────────────────────────────────────────────

    @property
    def is_paused(self) -> bool:
        return self._world.clock.ns < self.paused_until_ns

    @property
    def next_turn_ns(self) -> int:
        said = self.host.connection is not None and self.host.connection.poll()
        return max(0 if said else self.turn_ns, self.paused_until_ns)

    @property
    def wants_messages(self) -> bool:
        is_up = self.is_alive and self.is_registered and not self.is_drained
        return is_up and len(self.unacked) < PREFETCHED and not self.is_paused

    def turn(self) -> None:
        with self._one_life():
            self.runner.turn()
            self.turn_ns = self._world.clock.ns + int(self.runner.next_turn_s() * 1e9)
            if self.runner.is_drained:
                self.end()

    def beat(self) -> None:
        """The lease thread; its first round is what `Assembly.start` does."""
        with self._one_life():
            if self.is_registered:
                self.lease.beat()
            elif self.runner.ready.is_set():
                with suppress(Unavailable):  # a real worker would end, and be started again
                    self.lease.register()
                    self.is_registered = True
        self.beat_ns = self._world.clock.ns + int(SETTINGS.worker.heartbeat_s * 1e9)

    def end(self) -> None:
        """Say goodbye; Celery gives back what is not acknowledged."""
        try:
            self.runner.stop()
            self.lease.stop()
        except Died:
            self.die(given_back=False)
        else:
            self._is_gone(given_back=True)

    def die(self, given_back: bool) -> None:
        """kill -9. Redis gives back its messages much later; `given_back`: at once."""
        if self.host.process is not None:
            self.host.process.kill()
        self._is_gone(given_back)

    def _is_gone(self, given_back: bool) -> None:
        self.is_alive = False
        if given_back:
            self.give_back()

    def give_back(self) -> None:
        for message in self.unacked.values():
            self._world.queue.put(message)
        self.unacked.clear()

    @contextmanager
    def _one_life(self) -> Iterator[None]:
        try:
            yield
        except Died:
            self.die(given_back=False)
        except (EngineError, LeaseLost):
            self.end()

    # ── Celery ───────────────────────────────────────────────────────────────────────────────

    def take(self, message: Message) -> None:
        """A message is delivered: `EnginePool.on_apply`."""
        self._slots += 1
        slot = self._slots
        self.unacked[slot] = message
        request = _request(message.body) if message.body is not None else None
        ticket = Ticket(
            slot,
            Arrival(
                message.job_id,
                request,
                message.model if request else None,
                0,
                message.eta,
                message.expires,
                {},
            ),
            accept=lambda slot, _: self._told_start(slot),
            end=lambda news: self._told_end(slot, *news),
            time_out=lambda *_: self._told_time_out(slot),
            time_limit_s=message.time_limit_s,
            detach=lambda _: None,
            revoke=lambda job_id: self.post(Revoked(job_id)),
        )
        self.post(ticket)

    def refuse(self, job_id: UUID) -> None:
        """A message that cannot run: `EnginePool.refuse`."""
        self._slots += 1
        slot = self._slots
        self.unacked[slot] = Message(job_id, None, self.models[0])

        def acknowledge() -> None:
            self._world.expect(job_id in self._world.store.tables["jobs"], "acked before the row")
            self._ack(slot)

        self.post(Refusal(job_id, Kind.GENERATE, RequestError("Bad."), acknowledge))

    def _told_start(self, slot: int) -> None:
        message = self.unacked.get(slot)
        if message is not None:
            row = self._world.store.tables["jobs"][message.job_id]
            self._world.expect(row["attempt"] > 0, "Celery heard of a start before the claim")

    def _told_end(self, slot: int, failed: int, value: Any, _: float) -> None:
        if failed and not isinstance(value.exception, JobFailed):
            self._ack(slot)  # dropped: the row is not ours to tell of
        else:
            self._told_final(slot, "completed" if not failed else None)

    def _told_time_out(self, slot: int) -> None:
        self._told_final(slot, "failed")

    def _told_final(self, slot: int, state: str | None) -> None:
        if (message := self.unacked.get(slot)) is not None:
            row = self._world.store.tables["jobs"][message.job_id]
            is_so = row["state"] == state if state else JobState(row["state"]).is_final
            self._world.expect(is_so, f"acked before the commit: Celery heard {state or 'failed'}")
            self._ack(slot)

    def _ack(self, slot: int) -> None:
        if self.acks_until_death is not None:
            self.acks_until_death -= 1
            if self.acks_until_death < 0:
                raise Died
        self.unacked.pop(slot, None)  # after a reconnect it is another's


def _new_worker(worker_id: UUID, models: tuple[str, ...]) -> NewWorker:
    return NewWorker(
        id=worker_id,
        name="worker@mill",
        host="mill",
        pid=1,
        models=models,
        device="cpu",
        price_id="cpu",
        currency="EUR",
        price_per_device_hour=Decimal("0.036"),
    )


@cache
def _request(prompt: str) -> requests.Request:
    return requests.parse({"prompt": prompt})


class SimulatedRescue:
    """A rescue process: sweeps until it dies."""

    def __init__(self, world: World) -> None:
        self.database = ProcessDatabase(world)
        self.is_alive = True
        self.sweep_ns = 0
        self._rescue = Rescue(SETTINGS, self.database, world.queue, world.clock.now_s)
        self._world = world

    def sweep(self) -> None:
        try:
            with suppress(Unavailable):
                self._rescue.sweep()
        except Died:
            self.is_alive = False
        self.sweep_ns = self._world.clock.ns + SETTINGS.rescue.sweep_ms * 1_000_000


@dataclass(slots=True)
class Expected:
    """What a job may become, whatever happens to it."""

    prompt: str
    states: set[str] = field(default_factory=set)
    kills_alone: int = 0  #: times that a fault killed the engine while it ran nothing else

    @property
    def is_unlucky(self) -> bool:
        """Faults hit it as often as its own guilt would have."""
        return self.kills_alone >= KILLS_ALONE

    @property
    def verb(self) -> str:
        return self.prompt.split()[0]


OUTCOMES: Final = {
    "good": "completed",
    "nan": "failed",
    "poison": "failed",
    "hang": "failed",
}


class World:
    """All processes, and what must be true of them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryDatabase(self.clock.now)
        self.store.on_commit, self.store.on_notice = self._committed, self._noticed
        self.queue = Queue(self)
        self.postgres_back_ns = self.redis_back_ns = 0
        self.expected: dict[UUID, Expected] = {}
        self.deaf = False  #: notices of cancels are lost
        self._ids = random.Random(0)
        self.workers = [SimulatedWorker(self, models) for models in SERVED[:2]]
        self.rescuers = [SimulatedRescue(self), SimulatedRescue(self)]

    def new_id(self) -> UUID:
        return UUID(int=self._ids.getrandbits(128), version=4)

    def expect(self, is_so: bool, otherwise: str) -> None:
        if not is_so:
            raise Broken(otherwise)

    # ── moves: producers ─────────────────────────────────────────────────────────────────────

    def submit(self, prompt: int, way: int, times: int) -> None:
        """A producer brings a job: a row and a message, or one of them."""
        if len(self.expected) >= MAX_JOBS:
            return None
        words, model = PROMPTS[prompt % len(PROMPTS)], tuple(MODELS)[way // 6 % 2]
        job_id, now = self.new_id(), self.clock.now()
        expected = Expected(f"{words} {len(self.expected)}")
        expected.states.add(OUTCOMES.get(expected.verb) or _of_oom(words))
        eta = now + timedelta(seconds=4) if times % 5 == 1 else None
        expires = now + timedelta(seconds=(1, 8)[times % 2]) if times % 7 in (2, 3) else None
        limit_s = 1.0 if times % 11 == 4 else None
        if expires:
            expected.states.add("expired")
        if limit_s:
            expected.states.add("failed")
        self.expected[job_id] = expected
        message = Message(job_id, expected.prompt, model, eta, expires, limit_s)
        if way % 6 == 0:  # a bare message; the job is accepted once it has a row
            return self.queue.put(message)
        if not self._insert(job_id, expected.prompt, model, eta, expires):
            del self.expected[job_id]
            return None
        if way % 6 in (1, 2, 3) and self.clock.ns >= self.redis_back_ns:
            self.queue.put(message if way % 6 == 1 else Message(job_id, None, model))
            if way % 6 != 3 and self.clock.ns >= self.postgres_back_ns:  # 3: sent, not marked so
                with self.store.begin() as connection:
                    intake.mark_enqueued(connection, [job_id])
        return None

    def submit_again(self, job: int) -> None:
        """The same idempotency key and request once more are the same job."""
        if (job_id := self._some_job(job)) is None:
            return
        row = self.store.tables["jobs"].get(job_id)
        if row is None or row["idempotency_key"] is None:
            return
        again = _new_job(self.new_id(), self.expected[job_id].prompt, row["model"], None, None)
        same = _with_key(again, row["idempotency_key"])
        with self.store.begin() as connection:
            [inserted] = intake.insert_jobs(connection, [same])
        self.expect(inserted.id == job_id and not inserted.created, "one key made two jobs")

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
        model = tuple(MODELS)[way // 4 % 2]
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
        self._killed_with(process.inside)
        process.kill()

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
            worker.database.fault = worker.acks_until_death = None
            self.start_worker(place)
        for place, rescuer in enumerate(self.rescuers):
            rescuer.database.fault = None
            self.start_rescue(place)
        self.run_until_quiet()
        self._check_ends()

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
                        yield 0, lambda w=worker, m=model: w.take(self.queue.lists[m].pop(0))
        for rescuer in self.rescuers:
            if rescuer.is_alive:
                yield rescuer.sweep_ns, rescuer.sweep

    # ── helpers ──────────────────────────────────────────────────────────────────────────────

    def _insert(
        self,
        job_id: UUID,
        prompt: str,
        model: str,
        eta: datetime | None,
        expires: datetime | None,
    ) -> bool:
        """Whether the job was accepted."""
        if self.clock.ns < self.postgres_back_ns:
            return False
        job = _with_key(_new_job(job_id, prompt, model, eta, expires), str(job_id))
        with self.store.begin() as connection:
            intake.insert_jobs(connection, [job])
        return True

    def _some_job(self, number: int) -> UUID | None:
        ids = list(self.expected)
        return ids[number % len(ids)] if ids else None

    def _worker(self, number: int) -> SimulatedWorker:
        return self.workers[number % len(self.workers)]

    def _list(self, number: int) -> list[Message]:
        return self.queue.lists[tuple(MODELS)[number % len(MODELS)]]

    def _killed_with(self, prompts: set[str]) -> None:
        for expected in self.expected.values():
            expected.kills_alone += {expected.prompt} == prompts

    def _noticed(self, channel: str, job_id: UUID) -> None:
        if channel == CANCEL and not self.deaf:
            for worker in self.workers:
                if worker.is_alive:
                    worker.lease.hear_cancel(job_id)

    # ── invariants ───────────────────────────────────────────────────────────────────────────

    def _committed(self, written: MemoryConnection) -> None:
        """I1, I2, I3: after every single commit."""
        assert written.before is not None
        for table, key in written.written:
            if table == "jobs":
                self.expect(key in written.jobs, "I1: a job is gone")
                row = written.jobs[key]
                self._check_move(written.before["jobs"].get(key), row, written.results.get(key))
            elif table == "results":
                self.expect(key not in written.before["results"], "I2: a result was changed")

    def _check_move(self, old: Row | None, row: Row, result: Row | None) -> None:
        state = JobState(row["state"])
        self.expect((result is not None) == state.is_final, f"I2: {state}, result: {result}")
        if result is not None:
            self.expect(result["state"] == state, f"I2: {state}, but {result['state']} in results")
        if old is not None and old["state"] != state:
            self.expect(can_move(JobState(old["state"]), state), f"I3: {old['state']} to {state}")
        if old is not None and old["state"] == state == "running":
            self.expect(old["attempt_id"] == row["attempt_id"], "I3: an attempt was taken over")

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

    def _check_ends(self) -> None:
        """I1, I2, I4, I5 and I6 of every job, now that all have ended."""
        self._check_books()
        attempts: dict[UUID, list[Row]] = {}
        for attempt in self.store.rows("attempts"):
            attempts.setdefault(attempt["job_id"], []).append(attempt)
        for row in self.store.rows("jobs"):
            tries = sorted(attempts.get(row["id"], []), key=lambda attempt: attempt["number"])
            numbers = [attempt["number"] for attempt in tries]
            self.expect(numbers == list(range(1, row["attempt"] + 1)), "I3: attempts have gaps")
            self.expect(all(attempt["outcome"] for attempt in tries), "I3: an attempt is open")
            charged = sum(bool(attempt["charged"]) for attempt in tries)
            self.expect(row["attempts_charged"] == charged, "I6: charges do not add up")
            if row["id"] in self.expected:
                self._check_end(row, tries, self.expected[row["id"]])
            else:
                self.expect(row["state"] == "failed", "a stranger's message did not fail")

    def _check_books(self) -> None:
        """I5: a job is billed what the attempt that ended it took, and nothing for one that was
        lost or given back; a batch took what its attempts did.

        A worker that died has not told what its attempts took; then a batch may have taken more.
        """
        attempts, spent = self.store.tables["attempts"], Counter[UUID]()
        for attempt in attempts.values():
            spent[attempt["batch_id"]] += attempt["device_ns"] or 0
        for result in self.store.rows("results"):
            attempt = attempts.get(result["attempt_id"], {"outcome": None})
            is_billed = attempt["outcome"] in (AttemptOutcome.SUCCEEDED, AttemptOutcome.FAILED)
            took = (attempt["device_ns"], attempt["cost"]) if is_billed else (0, 0)
            billed = (result["device_ns"], result["cost"])
            self.expect(billed == took, f"I5: billed {billed}, took {took}")
        untold = {each["batch_id"] for each in attempts.values() if each["device_ns"] is None}
        for batch in self.store.rows("batches"):
            took, sum_ = batch["device_ns"], spent[batch["id"]]
            balances = sum_ <= took if batch["id"] in untold else sum_ == took
            self.expect(balances, f"I5: a batch took {took} ns, its attempts {sum_}")

    def _check_end(self, row: Row, tries: list[Row], expected: Expected) -> None:
        result, what = self.store.tables["results"][row["id"]], f"{expected.prompt!r}"
        is_lost_often = row["losses"] > ALONE_AFTER
        allowed = set(expected.states)
        if expected.is_unlucky or is_lost_often:
            allowed.add("failed")
        self.expect(
            row["state"] in allowed,
            f"I6: {what} ended {row['state']} ({result['error_code']}), not {allowed}",
        )
        if row["state"] == "completed":
            text = result["response"]["choices"][0]["text"]
            self.expect(text == answer_to(expected.prompt), f"I4: {what} got {text!r}")
        ended_by = [attempt["id"] for attempt in tries if attempt["id"] == result["attempt_id"]]
        charged = [attempt["id"] for attempt in tries if attempt["charged"]]
        if not (expected.is_unlucky or is_lost_often):
            self.expect(set(charged) <= set(ended_by), f"I6: {what} was charged for others")


def _of_oom(words: str) -> str:
    return "failed" if words == "oom 0" else "completed"


def _new_job(
    job_id: UUID, prompt: str, model: str, eta: datetime | None, expires: datetime | None
) -> NewJob:
    request = _request(prompt)
    return NewJob(
        id=job_id,
        model=model,
        kind=request.kind,
        url=request.url,
        request=request.raw,
        fingerprint=request.fingerprint,
        source="api",
        not_before=eta,
        deadline=expires,
    )


def _with_key(job: NewJob, key: str) -> NewJob:
    return NewJob(**{name: getattr(job, name) for name in job.__slots__} | {"idempotency_key": key})
