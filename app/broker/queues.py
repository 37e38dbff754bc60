"""Queues and the Redis lists that they are made of, by name."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

from app.config.settings import BrokerSettings, Settings
from app.jobs import LIVE_PRIORITY, MAX_PRIORITY
from app.requests.bodies import FORMAT


def queue_name(model: str, format: int = FORMAT) -> str:
    """The queue of a model's messages from this version.

    Each format of requests has its own, so that no worker of before takes the message of a job that
    it cannot read.
    """
    return f"gristmill.{model}" if format == 1 else f"gristmill.{model}@{format}"


NO_LIST: Final = queue_name("readiness-probe:none")
"""For trying whether Redis takes messages: a name that no model can have."""


def queues_of(models: Iterable[str], format: int = FORMAT) -> list[str]:
    """The queues of models' messages from this version and all before: those to take from."""
    return [queue_name(model, each) for model in models for each in range(1, format + 1)]


def served_models(settings: Settings) -> tuple[str, ...]:
    """The models that a worker with these settings takes messages for."""
    return settings.worker.models or tuple(settings.models)


ENVELOPE_BYTES: Final = 2_000
"""Of a message in Redis without its request, the server's own needs included."""


def most_bytes(broker: BrokerSettings) -> int:
    """What a model's queue takes of Redis at most, as far as the API and rescue fill it.

    A request grows by a third as base64, and by up to a quarter in what the server rounds up.
    """
    message = ENVELOPE_BYTES + broker.max_inline_bytes * 5 // 3
    return len(broker.priority_steps) * broker.max_messages * message


LIVE: Final = "live"
"""What follows the name of a queue in that of the lane of calls that are waited for: it is served
before all lists, and holds messages of tenants alone, `DEFAULT_TENANT` among them."""

PATIENT_SHARE: Final = 16
"""One of so many messages that a worker takes is the most patient that waits, and so much of a
queue is kept for each list of it, however many urgent messages there are."""


def room(
    lengths: Sequence[float], step: int, most: int, own: float | None = None, tenants: int = 1
) -> float:
    """How many messages the list of this step of a queue takes yet, or less than 1 if none: those
    that fewer than `most` messages would be served before, and its share in any case.

    Where so many tenants share it, a tenant with `own` messages there has a part of that share.
    """
    share = -(-most // (PATIENT_SHARE * max(1, tenants)))
    mine = lengths[step] if own is None else own
    return max(most - sum(lengths[: step + 1]), share - mine)


@dataclass(frozen=True, slots=True)
class Layout:
    """How Redis keeps a queue: one list for each step of priority, under a key of kombu's making.

    Producers and workers must agree in it, or messages lie where nobody looks.
    """

    steps: tuple[int, ...] = (0, 3, 6, 9)  #: a message goes to the last that is not above it
    sep: str = "\x06\x16"
    prefix: str = ""

    @classmethod
    def of(cls, settings: Settings) -> Self:
        broker = settings.broker
        return cls(broker.priority_steps, broker.sep, broker.key_prefix)

    @property
    def bands(self) -> tuple[range, ...]:
        """The priorities that share each list."""
        ends = [LIVE_PRIORITY, *self.steps[1:], MAX_PRIORITY + 1]
        return tuple(range(*each) for each in pairwise(ends))

    def step(self, priority: int) -> int:
        """The place in `steps` of the list for messages of this priority; -1 for those that are
        put at the front of the first."""
        return bisect_right(self.steps, priority) - 1

    def key(self, queue: str, priority: int = 0) -> str:
        """The whole key of the list that holds a queue's messages of this priority."""
        return self.prefix + self.name(queue, priority)

    def name(self, queue: str, priority: int = 0) -> str:
        """The key for kombu's own client, which puts the prefix in front of it."""
        step = self.steps[max(0, self.step(priority))]
        return f"{queue}{self.sep}{step}" if step else queue

    @property
    def ends(self) -> list[str]:
        """What follows a queue's name in those of its lanes, in the order in which they are
        served."""
        return [f"{self.sep}{LIVE}", *(self.name("", step) for step in self.steps)]

    def lane(self, queue: str, priority: int) -> str:
        """The whole key of the list that the lane for this priority is named after."""
        return self.prefix + queue + self.ends[self.step(priority) + 1]

    def queue(self, key: str) -> str:
        """The queue that the list with this whole key belongs to."""
        name = key.removeprefix(self.prefix)
        queue, _, step = name.rpartition(self.sep)
        return queue if queue and step.isdecimal() else name
