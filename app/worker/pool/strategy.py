"""What Celery does with a message that is read and checked: its strategy of our tasks.

Celery's default one finds out what can be in a message: another protocol, `eta`, `expires`, rate
limits, stamps. None of it is left in an arrival, and a message may bring a hundred of them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.signals import task_received
from celery.worker import state as celery_state

from app.worker.pool.arrivals import Arrival
from app.worker.pool.request import Request

log = logging.getLogger("celery.worker.strategy")

Take = Callable[[str, Arrival, Any], None]
"""Takes a job by its task id, its arrival and what is to be settled once it is over."""


def strategy(task: Any, app: Any, consumer: Any) -> Take:
    """To be named as the `Strategy` of a task."""
    made = Request.of(task, app, consumer)
    reserved, revoked = celery_state.task_reserved, celery_state.revoked

    def take(task_id: str, arrival: Arrival, message: Any) -> None:
        request = made(task_id, arrival, message)
        if log.isEnabledFor(logging.INFO):
            log.info("Task %s[%s] received", task.name, task_id)
        if task_id in revoked and request.revoked():
            return
        task_received.send(sender=consumer, request=request)
        if request.is_heard:
            _tell_received(request)
        reserved(request)
        for callback in consumer.on_task_message:
            callback(request)
        consumer.on_task_request(request)

    return take


def _tell_received(request: Request) -> None:
    request.send_event(
        "task-received",
        name=request.name,
        args=request.argsrepr,
        kwargs=request.kwargsrepr,
        root_id=request.root_id,
        parent_id=None,
        retries=0,
        eta=None,
        expires=None,
    )
