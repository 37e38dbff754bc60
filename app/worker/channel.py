"""Kombu's Redis channel, made to outlive its connection.

When Redis goes away kombu closes the connection's channels one by one and stops at the first that
fails. The consumer's own channel may be left open, on a transport that has forgotten where its
server is: giving back the unacknowledged messages, or acknowledging one later, is then an
AttributeError, which Celery takes for the end of the worker.
"""

from __future__ import annotations

import functools
from typing import Any


def outlive_connection(channel: Any) -> None:
    """Let a channel remember how to reach Redis. Call this while it is open.

    What it does after its connection is gone then either works or is a connection error, which
    Celery logs; rescue sends again what could not be given back.
    """
    channel._connparams = functools.cache(channel._connparams)
    channel._connparams(asynchronous=False)
