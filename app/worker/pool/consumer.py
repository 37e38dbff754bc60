"""Celery's consumer with our check in front of it; set as `worker_consumer`.

It runs on the hub thread: kombu takes a message from Redis, `arrivals` reads it, and a good one
goes on to Celery and so to the pool.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, Final

from celery.worker import state as celery_state
from celery.worker.consumer.consumer import Consumer as CeleryConsumer
from kombu.message import Message
from redis.exceptions import NoPermissionError

from app import telemetry
from app.broker.client import connected
from app.broker.message import TASKS
from app.broker.queues import queue_name
from app.broker.refusal import as_unavailable, reply_of, said
from app.broker.rights import Role, missing
from app.broker.settling import Bundle
from app.config.settings import Settings
from app.errors import GristmillError, RequestError, Unavailable
from app.jobs import Kind, job_id_of
from app.worker.pool.acks import Acks
from app.worker.pool.arrivals import Refusal, identify, read, scrub, tenant_of
from app.worker.pool.control import REFUSED
from app.worker.pool.envelope import reader

log = logging.getLogger(__name__)

EVENTS_EVERY_S: Final = 0.5
MIN_PAUSE_S: Final = 0.5
MAX_PAUSE_S: Final = 5.0
"""Longest pause between two tries while the broker is away."""


telemetry.say_once(logging.getLogger(CeleryConsumer.__module__))


class Consumer(CeleryConsumer):  # type: ignore[misc]
    """Celery's consumer with the check in front; set as `worker_consumer`."""

    acks: Acks  #: of this connection

    _events_leave_at = 0.0  #: by the monotonic clock

    _pause_s = 0.0  #: before the next try to connect
    _paused_until = 0.0  #: by the monotonic clock

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        if self.controller.autoscale:
            sys.exit(f"--autoscale: {REFUSED['autoscale']}")

    def ensure_connected(self, conn: Any) -> Any:
        """Try until it works, or the worker is told to stop."""
        conn.ensure_connection(
            self._cannot_connect,
            interval_start=MIN_PAUSE_S,
            interval_step=MIN_PAUSE_S,
            interval_max=MAX_PAUSE_S,
            callback=celery_state.maybe_shutdown,
        )
        self.first_connection_attempt = False
        return conn

    def _cannot_connect(self, error: Exception, _: float) -> None:
        self.pool.note_broker_trouble()
        super().on_connection_error_before_connected(self._trouble(error))

    def on_connection_error_before_connected(self, exc: Exception) -> None:
        self._cannot_connect(exc, 0.0)
        self._pause()

    def on_connection_error_after_connected(self, exc: Exception) -> None:
        self.pool.note_broker_trouble()
        super().on_connection_error_after_connected(self._trouble(exc))
        self._pause()

    def _trouble(self, error: Exception) -> Unavailable:
        """What Redis said, and where it is about rights, which are missing."""
        text = said(error)
        if isinstance(reply_of(error), NoPermissionError):
            settings: Settings = self.app.settings
            with suppress(Unavailable), connected(settings) as client, as_unavailable():
                if lacking := missing(settings, client, Role.WORKER):
                    text += f" The user lacks {', '.join(lacking)}: see docs/redis.md."
        return Unavailable(text)

    def _pause(self) -> None:
        """A server that is there and refuses is connected to at once, and refuses at once."""
        now = time.monotonic()
        is_new = now - self._paused_until > 2 * MAX_PAUSE_S
        self._pause_s = MIN_PAUSE_S if is_new else min(2 * self._pause_s, MAX_PAUSE_S)
        self._paused_until = now + self._pause_s
        while time.monotonic() < self._paused_until:
            celery_state.maybe_shutdown()
            time.sleep(0.1)

    def on_send_event_buffered(self) -> None:
        """Events for Flower go out in groups: Celery would send a message at each turn of its hub.

        Called by the runner too, and only the hub's own thread may touch its timer.
        """
        now = time.monotonic()
        if self.hub and now >= self._events_leave_at:
            self._events_leave_at = now + EVENTS_EVERY_S
            self.hub.call_soon(self.hub.call_later, EVENTS_EVERY_S, self._flush_events)

    def stop(self) -> None:
        self._flush_events()
        super().stop()

    def connect(self) -> Any:
        """Called again after every reconnect, with a new channel each time."""
        connection = super().connect()
        self.acks = Acks(self)
        settings: Settings = self.app.settings
        read = reader(settings.worker.max_request_bytes, self._refuse_raw)
        connection.default_channel.read = read
        connection.default_channel.tally = self.pool.tally
        connection.transport.after_turn = self.pool.wake_runner
        connection.transport.end_wait = self.pool.wake_hub
        return connection

    def _refuse_raw(self, task_id: str | None, error: RequestError) -> None:
        """What kombu could not parse: it never sees it, so there is nothing to ack."""
        if task_id is None:
            self._drop(error)
        else:
            tenant = self.app.settings.broker.tenant
            refusal = Refusal(job_id_of(task_id), Kind.GENERATE, error, lambda: None, tenant)
            self.pool.refuse(refusal)

    def _drop(self, error: RequestError) -> None:
        log.warning("A message was dropped: %s", error, extra={"action": "message_dropped"})
        self.pool.note_nameless()

    def create_task_handler(self, *_: Any, **__: Any) -> Callable[[Message], object]:
        settings: Settings = self.app.settings

        def on_message(message: Message) -> object:
            try:
                task_id, name = identify(message, settings)
            except RequestError as error:
                self._drop(error)
                return message.ack_log_error(log, self.connection_errors)  # type: ignore[no-untyped-call]
            try:
                arrival = read(message, task_id, name, settings)
            except GristmillError as error:
                acknowledge = partial(
                    self.acks.add, message.ack_log_error, log, self.connection_errors
                )
                return self.pool.refuse(
                    Refusal(
                        job_id_of(task_id),
                        TASKS.get(name, Kind.GENERATE),
                        error,
                        acknowledge,
                        tenant_of(message, settings.broker),
                    )
                )
            if arrival.model and not message.channel.keeps(message, queue_name(arrival.model)):
                return None
            scrub(message)
            take = self.strategies[name]
            if not arrival.more:
                return take(task_id, arrival, message)
            bundle = Bundle(message, 1 + len(arrival.more))
            for each_id, each in [(task_id, arrival), *arrival.others()]:
                take(each_id, each, bundle.piece())
            return None

        return on_message
