"""Clock, Postgres and Redis as the simulated processes find them: there, away, or failing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

from app.broker.lanes import Length
from app.broker.message import Message as WakeUp
from app.broker.publisher import bundled
from app.broker.queues import Layout, queue_name, queues_of
from app.errors import Unavailable
from app.requests import bodies
from app.store import claims
from app.store.database import Sent
from tests.simulation.effects import Effect
from tests.simulation.engine import MODELS
from tests.simulation.settings import SETTINGS
from tests.simulation.versions import LATER, PRESENT

if TYPE_CHECKING:
    from tests.simulation.world import World

ROLLED_BACK, UNKNOWN, DIES_BEFORE, DIES_AFTER = range(4)
"""What may happen to a transaction: its commit fails, or its answer is lost; or the process dies
before or after the commit."""


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
        self.cut_off_ns = 0  #: for how long nothing gets through after a fault
        self.back_ns = 0  #: until when nothing gets through
        self._taken: set[UUID] = set()  #: batches

    @contextmanager
    def begin(self) -> Iterator[Any]:
        if self._world.clock.ns < max(self._world.postgres_back_ns, self.back_ns):
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
    def autocommit(self, then: Sent | None = None) -> Iterator[Any]:
        yield _Autocommit(self, then)

    def _next_fault(self) -> int | None:
        if self.fault is None or self.fault_in > 0:
            self.fault_in -= 1
            return None
        fault, self.fault = self.fault, None
        self.back_ns, self.cut_off_ns = self._world.clock.ns + self.cut_off_ns, 0
        return fault

    def note(self, statement: Any, given: Any = None) -> None:
        """What a process does that no row shows."""
        if statement is claims._TAKE:
            is_new = given["id"] not in self._taken
            self._world.note(Effect.TAKEN if is_new else Effect.TAKEN_AGAIN)
            self._taken.add(given["id"])

    def heal(self) -> None:
        self.fault, self.cut_off_ns, self.back_ns = None, 0, 0


class _Autocommit:
    """A connection on which every statement is a transaction of its own."""

    def __init__(self, database: ProcessDatabase, then: Sent | None) -> None:
        self._database = database
        self._then = then

    def __getattr__(self, name: str) -> Any:
        def run(*given: Any) -> Any:
            self._database.note(*given)
            with self._database.begin() as connection:
                answer = getattr(connection, name)(*given)
            if self._then:
                with self._database.begin() as connection:
                    connection.execute(*self._then)
            return answer

        return run


@dataclass(frozen=True, slots=True)
class Message:
    job_id: UUID | None  #: None: it is none of ours
    body: str | None  #: the prompt, if the message brings the request
    model: str
    eta: datetime | None = None
    expires: datetime | None = None
    time_limit_s: float | None = None
    priority: int = 0
    is_unstorable: bool = False  #: the store refuses what it would write of it
    format: int = PRESENT  #: of the request
    queue: str = ""  #: the one that it was sent to; its model's if left out
    more: tuple[UUID, ...] = ()  #: further jobs that it wakes

    @property
    def job_ids(self) -> tuple[UUID, ...]:
        return () if self.job_id is None else (self.job_id, *self.more)

    def __post_init__(self) -> None:
        if not self.queue:
            object.__setattr__(self, "queue", queue_name(self.model, self.format))


DEFAULT: Final = "celery"
"""The queue of messages that name none."""


class Queue:
    """Redis: a list for each queue, with all priorities in it. Also plays the publisher of
    whatever version asks."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.layout = Layout()
        self.lists: dict[str, list[Message]] = {
            **{queue_name(model, format): [] for format in (PRESENT, LATER) for model in MODELS},
            DEFAULT: [],
        }

    def put(self, message: Message) -> None:
        self.lists[message.queue].append(message)

    def most_urgent(self, queues: Iterable[str]) -> str | None:
        """Of queues with messages the first of those with the most urgent ones."""
        steps = {
            name: min(_step(message.priority) for message in self.lists[name])
            for name in queues
            if self.lists[name]
        }
        return min(steps, key=steps.__getitem__, default=None)

    def pop(self, queue: str) -> Message:
        """The first of the most urgent list that has any."""
        messages = self.lists[queue]
        return messages.pop(messages.index(min(messages, key=lambda each: _step(each.priority))))

    def send(self, message: WakeUp) -> None:
        self.send_many([message])

    def send_many(self, messages: Iterable[WakeUp]) -> None:
        self._reach()
        for first, *more in bundled(messages, self.bundle_size):
            self.put(
                Message(
                    first.job_id,
                    None,
                    first.model,
                    priority=first.priority,
                    format=bodies.FORMAT,
                    more=tuple(each.job_id for each in more),
                )
            )

    def bundle_size(self, model: str) -> int:
        return SETTINGS.models[model].max_batch_size

    def list_lengths(self, models: Iterable[str], _: str = "") -> dict[str, list[Length]]:
        self._reach()
        steps = {
            model: [_step(each.priority) for each in self.lists[queue_name(model, bodies.FORMAT)]]
            for model in models
        }
        return {
            model: [Length(found.count(step), found.count(step), 0) for step in _STEPS]
            for model, found in steps.items()
        }

    def set_weights(self, weights: Mapping[str, float]) -> None:
        self._reach()

    def ring(self, models: Iterable[str]) -> None:
        self._reach()

    def without_message(self, models: Mapping[UUID, str]) -> set[UUID]:
        self._reach()
        return {id for id, model in models.items() if not self._has_message(id, model)}

    def _has_message(self, job_id: UUID, model: str) -> bool:
        queues = [*queues_of([model], bodies.FORMAT), DEFAULT]
        return any(job_id in message.job_ids for name in queues for message in self.lists[name])

    def queue_lengths(self, models: Iterable[str]) -> dict[str, int]:
        return {
            model: sum(each.all for each in lengths)
            for model, lengths in self.list_lengths(models).items()
        }

    def _reach(self) -> None:
        if self._world.clock.ns < self._world.redis_back_ns:
            raise Unavailable("Redis is away.")


_STEPS = Layout().steps


def _step(priority: int) -> int:
    """Of the list that messages of a priority are in."""
    return max(step for step in _STEPS if step <= priority)
