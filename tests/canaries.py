"""Canaries: words that say whose they are and what they were given as, so that wherever one is
found it is known whether it may be there. And whoever looks for them: in every column of every
table, every value of Redis, what both tell as it happens, processes and files."""

from __future__ import annotations

import base64
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import psutil
import psycopg
import redis

from app.broker.events import Tokens, decode

_CANARY: Final = re.compile(r"canary([a-z]+)0([a-z]+)0[0-9a-f]{32}", re.IGNORECASE)
_SIGN: Final = b"canary"


@dataclass(frozen=True, order=True)
class Seen:
    """A canary at a place."""

    place: str
    tenant: str
    kind: str


@dataclass
class Cage:
    """What has been seen of all canaries."""

    seen: set[Seen] = field(default_factory=set)

    def look(self, place: str, text: str | bytes) -> None:
        """Take in all that are in a text, also in base64 or hexadecimal."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        for each in (text, *_decoded(text)):
            self.seen |= {Seen(place, *match.groups()) for match in _CANARY.finditer(each)}

    def places(self, kind: str, tenant: str) -> set[str]:
        return {each.place for each in self.seen if (each.kind, each.tenant) == (kind, tenant)}


def canary(tenant: str, kind: str) -> str:
    """A new one. Letters and digits alone: it looks the same in a URL, in JSON and in SQL."""
    return f"canary{tenant}0{kind}0{uuid4().hex}"


def _in_base64(sign: bytes) -> Iterator[str]:
    """At each of the three places that it may begin at, without what depends on its neighbours."""
    for before, first in ((0, 0), (1, 2), (2, 3)):
        code = base64.b64encode(bytes(before) + sign).decode().rstrip("=")
        yield code[first : -1 if (before + len(sign)) % 3 else None]


_CODES: Final = (*_in_base64(_SIGN), _SIGN.hex())


def _decoded(text: str) -> Iterator[str]:
    for code in re.findall(r"[\w+/-]{12,}", text) if any(each in text for each in _CODES) else ():
        if re.fullmatch(r"x?([0-9a-f]{2})+", code):
            yield bytes.fromhex(code.lstrip("x")).decode("utf-8", "replace")
        elif len(code) % 4 != 1:
            data = code.translate({ord("-"): "+", ord("_"): "/"}) + "=" * (-len(code) % 4)
            yield base64.b64decode(data).decode("utf-8", "replace")


_TABLES: Final = """
    SELECT format('%I.%I', nspname, relname), relname
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE relkind IN ('r', 'm') AND nspname NOT IN ('pg_catalog', 'information_schema')
        AND nspname NOT LIKE 'pg_toast%'
"""
# Values as JSON shows them: what is bytes is hexadecimal.
_WORDS: Final = """
    SELECT key, value FROM {} AS row, jsonb_each_text(to_jsonb(row))
    WHERE value LIKE '%canary%' OR value LIKE '%63616e617279%'
"""


def look_in_postgres(cage: Cage, url: str) -> None:
    """Places are named TABLE.COLUMN, that of a partition as its table."""
    with psycopg.connect(url) as connection:
        for table, name in connection.execute(_TABLES).fetchall():
            words = connection.execute(_WORDS.format(table)).fetchall()  # type: ignore[arg-type]
            for column, text in words:
                cage.look(f"{_MONTH.sub('', name)}.{column}", text)
        for (query,) in connection.execute("SELECT query FROM pg_stat_activity").fetchall():
            cage.look("pg_stat_activity", query or "")


_MONTH: Final = re.compile(r"_(default|\d{4}_\d\d)$")


def look_in_redis(cage: Cage, url: str) -> None:
    """Places are named by their keys, without what tells one from another of the same kind."""
    with redis.Redis.from_url(url) as client:
        for database in range(int(client.config_get("databases")["databases"])):
            client.execute_command("SELECT", database)
            for key in client.scan_iter(count=1_000):
                name = _ID.sub("ID", key.decode())
                cage.look(f"names in Redis: {name}", key)
                cage.look(f"Redis: {name}", _value(client, key))


_ID: Final = re.compile(r"[0-9a-f]{8}-[0-9a-f-]{27}|[0-9a-f]{32}")


def _value(client: redis.Redis, key: bytes) -> str:
    read: dict[bytes, Any] = {
        b"string": client.get,
        b"list": lambda key: client.lrange(key, 0, -1),
        b"hash": client.hgetall,
        b"set": client.smembers,
        b"zset": lambda key: client.zrange(key, 0, -1, withscores=True),
        b"stream": lambda key: _told(client.xrange(key)),
    }
    kind = client.type(key)
    return "" if kind == b"none" else repr(read[kind](key))  # else a kind that nobody looks into


def _told(entries: list[tuple[bytes, dict[bytes, bytes]]]) -> tuple[str, object]:
    """What the events of a job say together, for a word may be in two of them; and all as it is."""
    told = [decode(event[b"e"]) for _, event in entries if b"e" in event]
    return "".join(each.text for each in told if isinstance(each, Tokens)), entries


@contextmanager
def overheard(cage: Cage, database_url: str, redis_url: str, channel: str) -> Iterator[None]:
    """All that is told meanwhile: notifications of Postgres, and every channel of Redis."""
    stopping = threading.Event()
    client = redis.Redis.from_url(redis_url)
    heard = client.pubsub()
    heard.psubscribe("*")

    def listen_to_redis() -> None:
        while not stopping.is_set():
            if message := heard.get_message(timeout=0.1):
                cage.look("channels of Redis", repr(message))

    def listen_to_postgres() -> None:
        with psycopg.connect(database_url, autocommit=True) as connection:
            connection.execute(f"LISTEN {channel}")  # type: ignore[arg-type]
            while not stopping.is_set():
                for told in connection.notifies(timeout=0.1):
                    cage.look("notifications of Postgres", told.payload)

    threads = [threading.Thread(target=each) for each in (listen_to_redis, listen_to_postgres)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        for thread in threads:
            thread.join()
        heard.close()
        client.close()


def look_in_files(cage: Cage, folder: Path) -> None:
    """Places are named by the first two parts of their paths."""
    for file in folder.rglob("*"):
        if file.is_file():
            place = "/".join(file.relative_to(folder).parts[:2])
            cage.look(f"file {place}", file.read_bytes())


def look_in_processes(cage: Cage, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            cage.look("command lines", " ".join(process.cmdline()))
            cage.look("environments", str(process.environ()))
