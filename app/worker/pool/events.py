"""Task events, for Flower: kept in memory by whoever has news, and sent by the hub's thread alone.

Celery's own dispatcher sends a full buffer from the thread that filled it. That would be the
runner's, which must not wait: a Redis that does not answer would keep it for a socket's timeout.

While nobody listens none are made: each job has three, which a small one notices. The heartbeat,
which goes out in any case, tells when somebody does.
"""

from __future__ import annotations

import math
from typing import Any, Final

from celery.events.dispatcher import EventDispatcher as CeleryDispatcher
from celery.events.event import group_from

MAX_EVENTS: Final = 10_000
"""Most events kept while Redis is away; the oldest are forgotten. The rows are the truth."""


class EventDispatcher(CeleryDispatcher):  # type: ignore[misc]
    """Celery's, but only `flush` sends; `Consumer.on_send_event_buffered` sees to that."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.is_heard = True  #: as far as is known
        super().__init__(*args, **options | {"buffer_limit": math.inf})

    def send(self, type: str, *args: Any, **fields: Any) -> None:
        if not self.is_heard and group_from(type) in self.buffer_group:
            return
        super().send(type, *args, **fields)
        for events in self._group_buffer.values():
            del events[:-MAX_EVENTS]

    def _publish(self, event: Any, producer: Any, *args: Any, **options: Any) -> None:
        super()._publish(event, producer, *args, **options)
        if producer is not None:
            self.is_heard = producer.channel.num_heard > 0
