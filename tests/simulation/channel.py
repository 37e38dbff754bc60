"""From which list a worker takes next, by the transport's own rules, without a connection."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from app.broker.queues import queue_name, queues_of
from app.broker.transport import QoS, Turns, _Outliving
from app.config.settings import ModelSettings
from tests.simulation.servers import DEFAULT, Message

if TYPE_CHECKING:
    from tests.simulation.servers import Queue


class _Held(QoS):
    def __init__(self) -> None:
        self.held: Counter[str] = Counter()
        self._held_for: dict[str, list[Any]] = {}


class SimulatedChannel(_Outliving):
    """What a worker holds by queue, and whose turn it is."""

    def __init__(self, queue: Queue, models: dict[str, ModelSettings], format: int) -> None:
        sizes = {
            name: model.max_batch_size
            for model_name, model in models.items()
            for name in queues_of([model_name], format)
        }
        self.queue_budgets = {name: 2 * size for name, size in sizes.items()}
        self.shared_budgets = sizes
        self.prefetched = 3 * sum(model.max_batch_size for model in models.values())
        self.active_queues = [*sizes, DEFAULT]
        self.qos = _Held()
        self._passing = {}
        self._keeps_all = False
        self._queue = queue
        self._format = format
        self._queue_cycle = Turns(self)
        self._queue_cycle.update(self.active_queues)

    def next_queue(self) -> str | None:
        """The queue that Redis would serve this worker from."""
        return self._queue.most_urgent(self._queue_cycle.consume(len(self.active_queues)))

    def take(self, queue: str, slot: int) -> Message:
        message = self._queue.pop(queue)
        self._queue_cycle.rotate(queue)
        self.qos.count(str(slot), message.queue, len(message.job_ids) or 1)
        return message

    def keeps_here(self, message: Message, slot: int) -> bool:
        """Whether it stays in this worker; else it went on to its own queue."""
        told = SimpleNamespace(
            delivery_info={"routing_key": message.queue}, delivery_tag=str(slot), sent=message
        )
        keeps = self.keeps(told, queue_name(message.model, self._format))
        self._pass_on()
        return keeps

    def settled(self, slot: int) -> None:
        self.qos._let_go(str(slot))

    def _pass_on(self) -> None:
        for message, queue in self._passing.values():
            self._queue.put(replace(message.sent, queue=queue))
            self.settled(int(message.delivery_tag))
        self._passing.clear()
