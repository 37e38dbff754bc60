"""What Redis answers when it does not do what it is asked, in words that are safe to show.

Any error reply means that the broker is away for now: a demoted or cut-off server (READONLY,
NOREPLICAS, MASTERDOWN), one that cannot save (MISCONF) or still loads (LOADING), a user without a
right (NOPERM), and whatever a later version may say. Redis and redis-py quote the command in some
of their texts, and so a message with a prompt in it: only code and sentence pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from kombu.exceptions import KombuError
from redis import exceptions

from app.errors import Unavailable

_QUOTED: Final = re.compile(r"Command # \d+ \(.*?\) of pipeline caused error: ", re.DOTALL)
_ARGUMENTS: Final = re.compile(r"(, with args beginning with|, subcommand|: ?['`\"]).*", re.DOTALL)
_MAX_LENGTH: Final = 200

CLUSTER: Final = (exceptions.AskError, exceptions.ClusterCrossSlotError)  # MOVED is an ASK, too
"""Only a Redis Cluster answers so."""
IS_CLUSTER: Final = "it is a Redis Cluster; broker.url must lead to one server, or to Sentinels."


def reply_of(error: BaseException | None) -> exceptions.RedisError | None:
    """The error reply of a server that this exception is, or was made from."""
    while error is not None:
        if isinstance(error, exceptions.ResponseError) or (
            isinstance(error, exceptions.RedisError) and getattr(error, "status_code", None)
        ):
            return error
        error = error.__cause__
    return None


def said(error: BaseException) -> str:
    """`Redis refuses: READONLY You can't write against a read only replica.`, or what else is."""
    reply = reply_of(error)
    if reply is None:
        while error.__cause__ is not None:
            error = error.__cause__
        return f"Redis does not answer ({type(error).__name__})."
    if isinstance(reply, CLUSTER):
        return f"Redis refuses: {IS_CLUSTER}"
    text = _ARGUMENTS.sub("", _QUOTED.sub("", str(reply)))[:_MAX_LENGTH].strip().rstrip(".")
    code = getattr(reply, "status_code", None)
    if code and not text.startswith(code):
        text = f"{code} {text}"
    return f"Redis refuses: {text}."


@contextmanager
def as_unavailable() -> Iterator[None]:
    """Turn what redis-py and kombu raise when the server is away or refuses into `Unavailable`."""
    try:
        yield
    except (KombuError, exceptions.RedisError, OSError) as error:
        raise Unavailable(said(error)) from error
