"""Messages of ours in lists that nobody here reads.

A producer with other `priority_steps`, another `sep` or `global_keyprefix`, with an exchange and
queue of its own, or of an older version, gets no error: its messages lie in a list of another name.
"""

from __future__ import annotations

import base64
from typing import Final

import redis

from app.broker.message import TASKS
from app.broker.queues import Layout, queues_of
from app.config.settings import Settings

MAX_PAGES: Final = 20
PAGE: Final = 500
MAX_LISTS: Final = 100
"""Keys and lists looked at: Redis may hold millions of other apps'."""

_REPLIES: Final = b".reply.celery.pidbox"


def unread(settings: Settings, client: redis.Redis) -> dict[str, int]:
    """How many messages lie in each such list, by its key as it may be shown.

    `client` takes whole keys. Lists whose next message is not for one of our tasks are others'.
    """
    layout = Layout.of(settings)
    queues = [*queues_of(settings.models), settings.broker.default_queue]
    read = {(layout.prefix + queue + end).encode() for queue in queues for end in layout.ends}
    of = f"{layout.sep}of{layout.sep}".encode()
    found = [
        key
        for key in _lists(client)
        if key.partition(of)[0] not in read and not key.endswith(_REPLIES)
    ]
    pipe = client.pipeline(transaction=False)
    for key in found[:MAX_LISTS]:
        pipe.llen(key)
        pipe.lindex(key, -1)
    answers = pipe.execute()
    return {
        repr(key)[2:-1]: length
        for key, length, item in zip(found, answers[::2], answers[1::2], strict=False)
        if item and _is_ours(item)
    }


def _lists(client: redis.Redis) -> list[bytes]:
    keys: list[bytes] = []
    cursor = 0
    for _ in range(MAX_PAGES):
        cursor, page = client.scan(cursor, count=PAGE, _type="list")
        keys += [key if isinstance(key, bytes) else key.encode() for key in page]
        if cursor == 0:
            break
    return keys


def _is_ours(item: bytes) -> bool:
    """Whether one of our tasks is named, in the open or, in protocol 1, in the body's base64."""
    names = [name.encode() for name in TASKS]
    coded = [base64.b64encode(name[shift:])[:-4] for name in names for shift in range(3)]
    return any(text in item for text in (*names, *coded))
