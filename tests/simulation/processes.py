"""Processes of the product on simulated servers, from start to end: its own runner, lease keeper
and rescue, with Celery and the threads played."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from app.books.energy import PowerModel
from app.broker.settling import Bundle, Piece
from app.config.settings import ModelSettings
from app.errors import EngineError, LeaseLost, RequestError, Unavailable
from app.jobs import DEFAULT_TENANT, JobState, Kind
from app.requests import bodies
from app.rescue import Rescue
from app.store.workers import NewWorker
from app.worker.account import Account
from app.worker.batcher import Batcher, Limits
from app.worker.commands import Command, Nameless, Revoked
from app.worker.energy.meter import EnergyMeter
from app.worker.energy.source import Source
from app.worker.engine.wire import LoadModels, ServedModel
from app.worker.lease import LeaseKeeper
from app.worker.ledger import Ledger
from app.worker.pool.arrivals import Arrival, Refusal
from app.worker.pool.ticket import JobFailed, Ticket
from app.worker.registrar import Registrar
from app.worker.runner import Runner
from app.worker.settlement import Settlement
from app.worker.streams import TokenStreams
from tests.simulation.broken import Broken, expect
from tests.simulation.channel import SimulatedChannel
from tests.simulation.effects import Effect
from tests.simulation.engine import SimulatedHost
from tests.simulation.prompts import UNSTORABLE, request_of
from tests.simulation.servers import Died, Message, ProcessDatabase
from tests.simulation.settings import SETTINGS, catalog
from tests.simulation.versions import speaking

if TYPE_CHECKING:
    from tests.simulation.world import World


class SimulatedWorker:
    """A worker process from its start to its end; plays Celery and the runner's thread."""

    def __init__(self, world: World, settings: dict[str, ModelSettings], format: int) -> None:
        """`format` is the latest one of requests that its version knows."""
        now_ns = world.clock.now_ns
        self.id = world.new_id()
        self.format = format
        self.models = models = tuple(settings)
        self.database = ProcessDatabase(world)
        self.unacked: dict[int, Message] = {}  #: of each job by its slot
        self._bundles: dict[int, tuple[Bundle, Piece]] = {}  #: of jobs that share a message
        self.shared: dict[int, Message] = {}  #: these messages, by the slot of the first job
        self.revoked: set[UUID] = set()  #: what Celery drops when it comes
        self.is_alive, self.is_registered, self.is_drained = True, False, False
        self.paused_until_ns = self.turn_ns = self.beat_ns = 0
        self.acks_until_death: int | None = None
        self.host = SimulatedHost(
            LoadModels(tuple(ServedModel(n, Path(), settings[n], "") for n in models), "cpu", 1),
            load_timeout_s=SETTINGS.worker.load_timeout_s,
            step_timeout_s=SETTINGS.worker.step_timeout_s,
            now_ns=now_ns,
            frozen_with=world.given_up,
            thawed=lambda: world.note(Effect.THAWED_ENGINE),
        )
        world.hosts[self.id] = self.host
        served = catalog(settings)
        price = SETTINGS.prices["cpu"].per_device_hour
        power = Source("model", "device", "as set", (), PowerModel(30_000, 250_007))
        self.host.meter = meter = EnergyMeter(power, self.host.hours, now_ns)
        self.account = account = Account(self.id, self.host.hours, meter, price, now_ns)
        settlement = Settlement("cpu", SETTINGS.prices, served, self.host.meter)
        shared: dict[str, Any] = {"worker_id": self.id, "database": self.database, "now_ns": now_ns}
        self.runner = Runner(
            models=models,
            registrar=Registrar(publisher=world.queue, served=served, max_attempts=3, **shared),
            batcher=Batcher({name: Limits.of(settings[name]) for name in models}),
            ledger=Ledger(
                engines=dict.fromkeys(models, "stub"),
                settlement=settlement,
                account=account,
                **shared,
            ),
            host=self.host,
            streams=TokenStreams(lambda _: None),
            now_ns=now_ns,
        )
        self.lease = LeaseKeeper(
            worker=_new_worker(self.id, models),
            database=self.database,
            hear_cancels=lambda _: iter(()),
            runner=self,
            account=account,
            lease_s=SETTINGS.worker.lease_s,
            heartbeat_s=SETTINGS.worker.heartbeat_s,
            now_ns=now_ns,
        )
        self._world = world
        self._settings = settings
        self._connect()
        self._slots = 0
        self._wrong: Broken | None = None  #: what Celery was told before it was so
        self.runner.start()

    def _connect(self) -> None:
        self.channel = SimulatedChannel(self._world.queue, self._settings, self.format)

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
        return is_up and len(self.unacked) < self.channel.prefetched and not self.is_paused

    def turn(self) -> None:
        with self._one_life(), speaking(self.format):
            self.runner.turn()
            self.turn_ns = self._world.clock.ns + int(self.runner.next_turn_s() * 1e9)
            if self.runner.is_drained:
                self.end()

    def beat(self) -> None:
        """The lease thread; its first round is what `Assembly.start` does."""
        with self._one_life(), speaking(self.format):
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
            with speaking(self.format):
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
        for message in self.held_messages():
            self._world.queue.put(message)
        for held in (self.unacked, self._bundles, self.shared):
            held.clear()
        self._connect()

    def held_messages(self) -> list[Message]:
        """The messages that are not acknowledged."""
        alone = [each for slot, each in self.unacked.items() if slot not in self._bundles]
        return [*alone, *self.shared.values()]

    @contextmanager
    def _one_life(self) -> Iterator[None]:
        try:
            yield
            if self._wrong:
                raise self._wrong
        except Died:
            self.die(given_back=False)
        except (EngineError, LeaseLost):
            self.end()
        except Broken:
            raise
        except Exception as error:
            raise Broken(f"I11: a worker would end: {type(error).__name__}: {error}") from error

    # ── Celery ───────────────────────────────────────────────────────────────────────────────

    def take_next(self, queue: str) -> None:
        """The next message of a queue is delivered: `Consumer.on_message`."""
        slot = self._next_slot()
        message = self.channel.take(queue, slot)
        if message.job_id is None:
            self._world.note(Effect.GARBAGE)
            self.channel.settled(slot)
            self.post(Nameless())
        elif message.more:
            self._take_bundle(message, slot)
        elif message.job_id in self.revoked:  # Celery acknowledges it, and tells the pool
            self._drop_revoked(message.job_id)
            self.channel.settled(slot)
        elif message.body is None or self.channel.keeps_here(message, slot):
            self.take(message, slot)
        else:
            self._world.note(Effect.PASSED_ON)

    def _take_bundle(self, message: Message, tag: int) -> None:
        """Celery gets a piece for each job."""
        self.shared[tag] = message
        bundle = Bundle(_Delivered(self, tag), len(message.job_ids))
        for job_id in message.job_ids:
            slot, piece = self._next_slot(), bundle.piece()
            if job_id in self.revoked:
                self._drop_revoked(job_id)
                piece.ack()
            else:
                self._bundles[slot] = bundle, piece
                self.take(replace(message, job_id=job_id, more=()), slot)

    def _drop_revoked(self, job_id: UUID) -> None:
        self._world.note(Effect.REVOKED_UNREAD)
        self.post(Revoked(job_id))
        self._world.must_have_row(job_id, self)

    def _next_slot(self) -> int:
        self._slots += 1
        return self._slots

    def take(self, message: Message, slot: int = 0) -> None:
        """A message becomes a ticket: `EnginePool.take`."""
        slot = slot or self._next_slot()
        assert message.job_id is not None
        self.unacked[slot] = message
        with speaking(self.format):
            is_readable = message.body is not None and bodies.readable(message.format)
        request = request_of(message.body) if message.body is not None and is_readable else None
        row = self._world.store.tables["jobs"].get(message.job_id)
        if row is not None and row["format"] > self.format:
            self._world.note(Effect.LATER_LEFT)
        ticket = Ticket(
            slot,
            Arrival(
                message.job_id,
                request,
                message.model if request else None,
                message.priority,
                message.eta,
                message.expires,
                {UNSTORABLE: "yes"} if message.is_unstorable else {},
                message.time_limit_s,
                queue=message.queue,
            ),
            accept=lambda slot, _: self._hear(self._told_start, slot),
            end=lambda news: self._hear(self._told_end, slot, *news),
            time_out=lambda *_: self._hear(self._told_time_out, slot),
            time_limit_s=message.time_limit_s,
            revoke=lambda job_id: self.post(Revoked(job_id)),
        )
        self.post(ticket)

    def refuse(self, job_id: UUID) -> None:
        """A message that cannot run: `EnginePool.refuse`."""
        slot = self._next_slot()
        self.unacked[slot] = Message(job_id, None, self.models[0])

        def acknowledge() -> None:
            expect(job_id in self._world.store.tables["jobs"], "acked before the row")
            self._ack(slot)

        self.post(Refusal(job_id, Kind.GENERATE, RequestError("Bad."), acknowledge, DEFAULT_TENANT))

    def _hear(self, told: Callable[..., None], *news: Any) -> None:
        """The ticket would only log that it was wrong."""
        try:
            told(*news)
        except Broken as error:
            self._wrong = error

    def _told_start(self, slot: int) -> None:
        message = self.unacked.get(slot)
        if message is not None:
            row = self._world.store.tables["jobs"][message.job_id]
            expect(row["attempt"] > 0, "Celery heard of a start before the claim")

    def _told_end(self, slot: int, failed: int, value: Any, _: float) -> None:
        if failed and not isinstance(value.exception, JobFailed):
            self._ack(slot)  # dropped: the row is not ours to tell of
        else:
            self._told_final(slot, "completed" if not failed else None)

    def _told_time_out(self, slot: int) -> None:
        if message := self.unacked.get(slot):
            by_row = message.time_limit_s is None
            self._world.note(Effect.TIMED_OUT_BY_ROW if by_row else Effect.TIMED_OUT)
        self._told_final(slot, "failed")

    def _told_final(self, slot: int, state: str | None) -> None:
        if (message := self.unacked.get(slot)) is not None:
            row = self._world.store.tables["jobs"][message.job_id]
            is_so = row["state"] == state if state else JobState(row["state"]).is_final
            expect(is_so, f"acked before the commit: Celery heard {state or 'failed'}")
            self._ack(slot)

    def _ack(self, slot: int) -> None:
        if self.acks_until_death is not None:
            self.acks_until_death -= 1
            if self.acks_until_death < 0:
                raise Died
        if not self.unacked.pop(slot, None):  # after a reconnect it is another's
            return
        if shared := self._bundles.pop(slot, None):
            self._world.note(Effect.SHARED)
            shared[1].ack()
        else:
            self.channel.settled(slot)


class _Delivered:
    """A message of several jobs as the transport gives it to the consumer."""

    def __init__(self, worker: SimulatedWorker, tag: int) -> None:
        self._worker = worker
        self.delivery_tag, self.delivery_info = str(tag), {}
        self.channel = worker.channel

    def ack(self) -> None:
        expect(self._worker.shared.pop(int(self.delivery_tag), None), "acked twice")
        self.channel.settled(int(self.delivery_tag))


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


class SimulatedRescue:
    """A rescue process: sweeps until it dies."""

    def __init__(self, world: World, format: int) -> None:
        self.database = ProcessDatabase(world)
        self.format = format
        self.is_alive = True
        self.sweep_ns = 0
        self._rescue = Rescue(SETTINGS, self.database, world.queue, world.clock.now_s)
        self._world = world

    def sweep(self) -> None:
        try:
            with suppress(Unavailable), speaking(self.format):
                self._rescue.sweep()
        except Died:
            self.is_alive = False
        self.sweep_ns = self._world.clock.ns + SETTINGS.rescue.sweep_ms * 1_000_000
