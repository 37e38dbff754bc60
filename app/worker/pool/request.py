"""Celery's request of a job, made of its arrival: what Celery makes of a message it need not read.

Celery's own keeps what a message says, decodes it once more and makes two promises for an
acknowledgement. Of a job here all this is known, and the same for each but its id, so it is made
when somebody asks (`inspect`, a signal, an event).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Final
from weakref import ref

from celery.worker.request import Request as CeleryRequest

from app.worker.pool.acks import Acks
from app.worker.pool.arrivals import EMPTY_BODY, Arrival


class Request(CeleryRequest):  # type: ignore[misc]
    """One job in Celery's eyes. Nothing in it shows a prompt; `of` gives it the rest."""

    _acks: Acks  #: and all that `of` sets: the same for all jobs of a task

    _body = EMPTY_BODY
    _content_type, _content_encoding = "application/json", "utf-8"
    _payload: Final[tuple[list[Any], dict[str, Any], dict[str, Any]]] = ([], {}, {})
    _args, _kwargs, _ = _payload
    _argsrepr = "()"
    _decoded = _utc = _ignore_result = True
    _parent_id = _eta = _expires = None
    stamped_headers: Final = ()

    def __init__(self, task_id: str, arrival: Arrival, message: Any) -> None:
        """`message` is to be settled once the job is over."""
        self.id = task_id
        self.arrival = arrival
        self._message = message
        if arrival.time_limit_s:
            self.time_limits = arrival.time_limit_s, None

    @classmethod
    def of(cls, task: Any, app: Any, consumer: Any) -> type[Request]:
        """The requests of a task that come by this connection."""
        same = {
            "name": task.name,
            "_type": task.name,
            "_task": task,
            "_app": app,
            "_acks": consumer.acks,
            "_hostname": consumer.hostname,
            "_eventer": consumer.event_dispatcher,
            "_connection_errors": consumer.connection_errors,
        }
        return type(cls.__name__, (cls,), same)

    @property
    def root_id(self) -> str:
        task_id: str = self.id
        return task_id

    @property
    def _kwargsrepr(self) -> str:
        return f"(model={self.arrival.model})" if self.arrival.model else "()"

    @property
    def delivery_info(self) -> dict[str, Any]:
        given = self._message.delivery_info
        return {
            "exchange": given.get("exchange"),
            "routing_key": given.get("routing_key"),
            "priority": self.arrival.priority,
            "redelivered": given.get("redelivered", False),
        }

    @cached_property
    def _request_dict(self) -> dict[str, Any]:
        return {
            "lang": "py",
            "task": self.name,
            "id": self.id,
            "root_id": self.id,
            "parent_id": None,
            "retries": 0,
            "timelimit": list(self.time_limits),
            "argsrepr": self._argsrepr,
            "kwargsrepr": self._kwargsrepr,
            "ignore_result": True,
            "properties": {"priority": self.arrival.priority},
            "reply_to": None,
            "correlation_id": None,
            "hostname": self._hostname,
            "delivery_info": self.delivery_info,
            "args": [],
            "kwargs": {},
        }

    @property
    def is_heard(self) -> bool:
        """Whether anybody listens to the job's events."""
        return self._eventer is not None and self._eventer.is_heard

    def send_event(self, type: str, **fields: Any) -> None:
        if self.is_heard:
            super().send_event(type, **fields)

    def execute_using_pool(self, pool: Any, **_: Any) -> None:
        self._apply_result = ref(pool.take(self))

    def on_success(self, ended: tuple[int, Any, float], **_: Any) -> None:
        """Celery's, with a result that is made for listeners alone."""
        failed, told, runtime_s = ended
        if not failed:
            told = told() if self.is_heard else None
        super().on_success((failed, told, runtime_s))

    def _on_ack(self, log: object, errors: Any) -> None:
        self._acks.add(self._message.ack_log_error, log, errors)

    def _on_reject(self, log: object, errors: Any, requeue: bool) -> None:
        self._acks.add(self._message.reject_log_error, log, errors, requeue)
