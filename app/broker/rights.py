"""The least rights of a Redis user, by what it is for, and which of them one lacks.

`rules` are the words of ACL SETUSER. `missing` tries each command on its keys without running one:
Redis looks at rights when a transaction takes a command, and this one never comes to its EXEC.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from typing import Final
from uuid import UUID

import redis
from redis.exceptions import NoPermissionError, ResponseError

from app.broker import cancels, streams
from app.broker.queues import NO_LIST, Layout, queues_of, served_models
from app.config.broker_url import database_of
from app.config.settings import Settings


class Role(StrEnum):
    """Who connects. `gristmill up` and `doctor` need what a worker does."""

    WORKER = "worker"  #: workers, Flower, health checks and Celery's own commands
    SENDER = "sender"  #: the API and rescue
    PRODUCER = "producer"  #: a service that sends messages by itself


_CONNECT: Final = ("hello", "ping", "select", "client|setinfo", "client|setname")
_CELERY: Final = (
    *("brpop", "rpop", "lpush", "rpush", "llen"),  # queues, answers to remote control
    *("multi", "exec", "watch", "unwatch", "hset", "hget", "hdel", "zadd", "zrem", "zrange"),
    *("zrevrangebyscore", "zrangebyscore"),
    *("set", "get", "del", "evalsha", "script|load", "script|exists", "time"),  # locks
    *("sadd", "srem", "smembers", "exists", "pexpire"),  # bindings
    *("eval", "zscore", "zcard", "zremrangebyscore", "hincrby"),  # turns of tenants
    *("xadd", "xread", "xrange"),  # streams of jobs
    *("publish", "subscribe", "psubscribe", "unsubscribe", "punsubscribe"),
)
_SEND: Final = (
    *("lpush", "lpushx", "llen", "publish"),
    *("lrange", "evalsha", "script|load"),  # rescue looks for lost messages
    *("eval", "zscore", "zcard", "zrange", "zadd", "zrem", "hget", "hset", "del"),  # and of tenants
    *("multi", "exec"),
    *("get", "set", "pttl", "rename", "exists", "incrby"),  # calls of tenants are counted
    *("xread", "xrange", "xadd", "pexpire"),  # the API reads streams of jobs
)
_LOOK: Final = ("info", "scan", "lindex")
"""For `doctor` and the metric of messages that nobody reads; without them they say less."""

COMMANDS: Final = {
    Role.WORKER: (*_CONNECT, *_CELERY, *_LOOK),
    Role.SENDER: (*_CONNECT, *_SEND, *_LOOK),
    Role.PRODUCER: (*_CONNECT, "lpush"),
}


def rules(settings: Settings, role: Role) -> list[str]:
    """The words of `ACL SETUSER NAME on >PASSWORD …` for a user of this role."""
    prefix = settings.broker.key_prefix
    queues = ("gristmill.*", f"{settings.broker.default_queue}*")
    own = ("unacked*", "_kombu.*", "celeryev.*", "*.celery.pidbox*")
    keys = queues + (own if role is Role.WORKER else ())
    words = ["resetkeys", *(f"~{prefix}{key}" for key in keys), "resetchannels"]
    words += [f"&{channel}" for channel in _channels(settings, role)]
    return [*words, "-@all", *(f"+{command}" for command in COMMANDS[role])]


def _channels(settings: Settings, role: Role) -> list[str]:
    """Remote control and events, by the name that is subscribed to, and news of cancels."""
    prefix = settings.broker.key_prefix
    before = f"{prefix}/{database_of(settings.broker.url)}."
    control = [f"{before}celery.pidbox", f"{before}celeryev/*"] if role is Role.WORKER else []
    news = [] if role is Role.PRODUCER else [prefix + cancels.CHANNELS]
    return control + news


def missing(settings: Settings, client: redis.Redis, role: Role) -> list[str]:
    """What a worker or a sender may not do of what it needs to: `BRPOP on gristmill.x`."""
    connection = client.connection_pool.get_connection()
    lacking = []
    try:
        for command, *arguments in [("MULTI",), *_samples(settings, role)]:
            if command.lower() not in COMMANDS[role]:
                continue
            connection.send_command(command, *arguments)  # type: ignore[no-untyped-call]
            try:
                connection.read_response()
            except NoPermissionError:
                key = () if command in ("EVAL", "EVALSHA", "XREAD") else arguments[:1]
                lacking.append(" on ".join([command, *key]))
            except ResponseError:
                pass  # not taken by a transaction, or unknown to this server: no matter of rights
    finally:
        connection.disconnect()  # type: ignore[no-untyped-call]  # ends the transaction
        client.connection_pool.release(connection)
    return lacking


def _samples(settings: Settings, role: Role) -> Iterator[tuple[str, ...]]:
    """Each command with the keys that it is used on, the first one telling most."""
    prefix, layout = settings.broker.key_prefix, Layout.of(settings)
    queues = [*queues_of(served_models(settings)), settings.broker.default_queue]
    lists = [layout.key(queue, step) for queue in queues for step in layout.steps]
    unacked, index, lock = (f"{prefix}unacked{end}" for end in ("", "_index", "_mutex"))
    bindings = f"{prefix}_kombu.binding.celery.pidbox"
    for key in lists:
        yield "BRPOP", key, "0"
        yield from (("RPOP", key), ("LPUSH", key, ""), ("RPUSH", key, ""), ("LLEN", key))
        yield "LRANGE", key, "0", "0"
    yield "LPUSHX", prefix + NO_LIST, ""
    tags, fair = f"{lists[0]}{layout.sep}tags", f"{lists[0]}{layout.sep}fair"
    yield from (("ZADD", tags, "0", ""), ("ZREM", tags, ""), ("ZRANGE", tags, "0", "0"))
    yield from (("ZSCORE", tags, ""), ("ZCARD", tags), ("ZREMRANGEBYSCORE", tags, "0", "0"))
    yield from (("HSET", fair, "", ""), ("HGET", fair, ""), ("HINCRBY", fair, "", "0"))
    yield from (("DEL", fair), ("EVAL", "", "0"), ("EVALSHA", "0" * 40, "0"))
    stream = streams.key_of(UUID(int=0), prefix)
    yield from (("XADD", stream, "1-0", "e", ""), ("XRANGE", stream, "-", "+"))
    yield from (("XREAD", "STREAMS", stream, "0"), ("PEXPIRE", stream, "1"))
    rate = f"{prefix}gristmill.rates/x"
    yield from (("PTTL", rate), ("RENAME", rate, rate), ("INCRBY", rate, "1"), ("EXISTS", rate))
    yield from (("GET", rate), ("SET", rate, ""))
    for channel in _channels(settings, role):
        yield "PUBLISH", channel, ""
        yield "PSUBSCRIBE", channel
    if role is not Role.WORKER:
        return
    yield "LPUSH", f"{prefix}x.reply.celery.pidbox", ""
    yield from (("HSET", unacked, "", ""), ("HGET", unacked, ""), ("HDEL", unacked, ""))
    yield from (("ZADD", index, "0", ""), ("ZREM", index, ""), ("ZRANGE", index, "0", "0"))
    yield from (("WATCH", unacked), ("SET", lock, ""), ("GET", lock), ("DEL", lock))
    yield ("TIME",)
    yield from (("SADD", bindings, ""), ("SREM", bindings, ""), ("SMEMBERS", bindings))
