"""A world in one thread: the product's own runner, ledger, registrar, lease keeper and rescue on a
simulated clock, broker, database and engine.

`World` is driven by moves: plain methods that take whole numbers, so that a list of them is a
schedule that can be written down and played again. After every commit, every word to Celery and
every move the invariants are checked; `heal` ends all faults and waits for every job to end.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID

from app.broker.queues import queue_name
from app.jobs import JobState
from app.worker.commands import Drain, Flush
from tests.memory_store import MemoryDatabase, Row
from tests.simulation import books
from tests.simulation.broken import Broken
from tests.simulation.effects import Effect
from tests.simulation.engine import MODELS, SimulatedHost
from tests.simulation.invariants import after_commit, ends, when_all_have_ended
from tests.simulation.patience import Patience
from tests.simulation.processes import SimulatedRescue, SimulatedWorker
from tests.simulation.producers import Producers
from tests.simulation.prompts import (
    UNSTORABLE,
    Expected,
)
from tests.simulation.servers import DEFAULT, UNKNOWN, Clock, Message, Queue
from tests.simulation.settings import SERVED
from tests.simulation.versions import LATER, PRESENT

LONG_NS: Final = 1_000_000_000_000
"""Enough for engines to come to rest."""
BABBLE_NS: Final = 500_000_000
MAX_BABBLE: Final = 60
HEAL_S: Final = 300
"""Longest time from the end of all faults to the end of all jobs. Most of it is for messages that
were lost several times: the wait for one doubles with each."""

HEAL_STEPS: Final = 50_000
"""A busy loop, in which no time passes, is no progress either."""


class World(Producers):
    """All processes, and what must be true of them."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.store = MemoryDatabase(self.clock.now)
        self.told: set[UUID] = set()  #: jobs of whose end those who wait heard
        self.store.on_commit, self.store.on_told = after_commit, self.told.add
        self.store.refuses = _refuses
        self.queue = Queue(self)
        self.postgres_back_ns = self.redis_back_ns = 0
        self.expected: dict[UUID, Expected] = {}
        self.deaf = False  #: notices of cancels are lost
        self._ids = random.Random(0)
        self.seen: Counter[Effect] = Counter()
        self._flooded, self._flood_size = "", 0  #: the model whose queue is so long, and how long
        self.babble_ns: int | None = None  #: when somebody else writes into our lists next
        self._noisy: str = DEFAULT  #: the list that he writes into
        self._owed_rows: list[tuple[UUID, SimulatedWorker]] = []
        self.formats = [PRESENT] * len(SERVED)  #: that the version of each worker knows
        self.hosts: dict[UUID, SimulatedHost] = {}  #: of all workers that there were
        self.workers = [SimulatedWorker(self, models, PRESENT) for models in SERVED]
        self.rescuers = [SimulatedRescue(self, PRESENT), SimulatedRescue(self, PRESENT)]

    def new_id(self) -> UUID:
        return UUID(int=self._ids.getrandbits(128), version=4)

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

    def misplace_message(self, queue: int, to: int) -> None:
        """A message lies in another list than its own, perhaps where other versions read."""
        messages, lists = self._list(queue), list(self.queue.lists.values())
        if messages:
            lists[to % len(lists)].append(messages.pop())

    def babble(self, queue: int, number: int) -> None:
        """Somebody else's messages lie in a list, and more come until the end of days."""
        names = list(self.queue.lists)
        self._noisy, self.babble_ns = names[queue % len(names)], self.clock.ns
        for _ in range(number % 50):
            self._babble()

    def _babble(self) -> None:
        self.babble_ns = self.clock.ns + BABBLE_NS
        if len(self.queue.lists[self._noisy]) < MAX_BABBLE:
            self.queue.put(Message(None, None, MODELS[0], queue=self._noisy))

    def redeliver(self, worker: int) -> None:
        """The visibility timeout: what is being worked on comes again."""
        for message in self._worker(worker).held_messages():
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
            self.workers[place] = SimulatedWorker(self, SERVED[place], self.formats[place])

    def deploy(self, process: int, version: int) -> None:
        """A process is replaced by one of another version, or of a version of before again."""
        place, format = process // 2 % 2, (PRESENT, LATER)[version % 3 > 0]
        if process % 2:
            self.rescuers[place] = SimulatedRescue(self, format)
            return
        self.formats[place] = format
        if self.workers[place].is_alive:
            self.workers[place].end()
        self.start_worker(place)

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
        place = rescuer % len(self.rescuers)
        self.rescuers[place] = SimulatedRescue(self, self.rescuers[place].format)

    def start_rescue(self, rescuer: int) -> None:
        if not self.rescuers[rescuer % len(self.rescuers)].is_alive:
            self.restart_rescue(rescuer)

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
        self._end_deploy()
        patience = Patience(self.store, self.expected)
        if self._flooded and patience.waits_beside(self._flooded):
            self.note(Effect.BESIDE_FLOOD)
        healed_at = self.store.now()
        self.run_until_quiet()
        patience.check()
        when_all_have_ended(self.store, self.expected, healed_at)
        self.clock.ns += LONG_NS
        living = {worker.id for worker in self.workers if worker.is_alive}
        for worker in self.workers:
            if worker.is_alive and worker.is_registered:
                worker.account.close()
                worker.account.write(worker.database)
        books.check(self.store, self.expected, self.hosts, living)
        self.seen.update(ends(self.store, self.expected))

    def _end_deploy(self) -> None:
        """Where there was anything of a later version, there is a worker for each model, and a
        rescue process; beside them others of before may go on."""
        versions = {*self.formats, *(rescuer.format for rescuer in self.rescuers)}
        rows = {row["format"] for row in self.store.rows("jobs")}
        if LATER in versions | rows:
            for process in range(2):
                self.deploy(process, 1)

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
            if worker.wants_messages and (queue := worker.channel.next_queue()):
                yield 0, lambda w=worker, name=queue: w.take_next(name)
        for rescuer in self.rescuers:
            if rescuer.is_alive:
                yield rescuer.sweep_ns, rescuer.sweep
        if self.babble_ns is not None:
            yield self.babble_ns, self._babble

    # ── helpers ──────────────────────────────────────────────────────────────────────────────

    def _some_job(self, number: int) -> UUID | None:
        ids = list(self.expected)
        return ids[number % len(ids)] if ids else None

    def _worker(self, number: int) -> SimulatedWorker:
        return self.workers[number % len(self.workers)]

    def _list(self, number: int) -> list[Message]:
        """One with messages, if there is any."""
        lists = [messages for messages in self.queue.lists.values() if messages] or [[]]
        return lists[number % len(lists)]

    def note(self, effect: Effect) -> None:
        self.seen[effect] += 1

    def given_up(self, prompts: set[str]) -> None:
        """A frozen engine was given up with these inside."""
        self.note(Effect.STOPPED_ENGINE)
        self.killed_with(prompts)

    def killed_with(self, prompts: set[str]) -> None:
        """A fault ended an engine that held these."""
        for expected in self.expected.values():
            expected.kills_alone += {expected.prompt} == prompts

    def _is_quiet(self) -> bool:
        is_over = all(JobState(row["state"]).is_final for row in self.store.rows("jobs"))
        return (
            is_over
            and not self._without_row()
            and not any(map(self._has_ours, self._lists_to_read()))
            and not any(worker.unacked for worker in self.workers if worker.is_alive)
        )

    def _without_row(self) -> list[UUID]:
        """Jobs that were revoked and have no row yet, as far as who heard of it lives."""
        rows = self.store.tables["jobs"]
        return [id for id, worker in self._owed_rows if worker.is_alive and id not in rows]

    def _lists_to_read(self) -> list[str]:
        """All but those of a later version, if no worker is of it."""
        formats = range(PRESENT, max(self.formats) + 1)
        return [DEFAULT, *(queue_name(model, each) for model in MODELS for each in formats)]

    def _has_ours(self, queue: str) -> bool:
        return any(message.job_id for message in self.queue.lists[queue])

    def _open(self) -> dict[str, Any]:
        jobs = {
            str(row["id"])[:8]: (self._prompt(row), row["state"], row["received_by"])
            for row in self.store.rows("jobs")
            if not JobState(row["state"]).is_final
        }
        unacked = [len(worker.unacked) for worker in self.workers]
        return {
            "jobs": jobs,
            "rowless": self._without_row(),
            "unacked": unacked,
            "queue": self.queue.lists,
        }

    def _prompt(self, row: Row) -> str:
        expected = self.expected.get(row["id"])
        return expected.prompt if expected else "a stranger"


def _refuses(table: str, row: Row) -> bool:
    """Whether Postgres would refuse a row: its metadata, or its response."""
    if table == "jobs":
        return UNSTORABLE in (row.get("metadata") or {})
    choices = (row.get("response") or {}).get("choices", []) if table == "results" else []
    return any(UNSTORABLE in choice["text"] for choice in choices)
