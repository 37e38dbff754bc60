"""A plain Celery worker that writes one row a result, to compare with: nothing of ours is in it.

    celery -A app.bench.plain_celery worker --pool prefork --concurrency 2

It acknowledges late, as ours does. `PLAIN_BROKER` and `PLAIN_DATABASE` lead to its servers.
"""

from __future__ import annotations

import os
import threading
from typing import Any, Final

import psycopg
from celery import Celery

TABLE: Final = "plain_results"
TASK: Final = "plain.echo"
PREFIX: Final = "plain:"

app = Celery("plain", broker=os.environ.get("PLAIN_BROKER", "memory://"), set_as_current=False)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    broker_transport_options={"global_keyprefix": PREFIX},
    broker_connection_retry_on_startup=True,
)
_own = threading.local()


@app.task(name=TASK, bind=True)  # type: ignore[untyped-decorator]
def echo(self: Any, **request: Any) -> None:
    """Does no work, and commits its row."""
    if not hasattr(_own, "connection"):
        _own.connection = psycopg.connect(os.environ["PLAIN_DATABASE"], autocommit=True)
    _own.connection.execute(
        f"INSERT INTO {TABLE} (id, response) VALUES (%s, %s)",
        (self.request.id, '{"text": "x"}'),
    )
