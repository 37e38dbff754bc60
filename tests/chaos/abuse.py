"""Everything that a few clients can do to all others: `python -m tests.chaos.abuse URL`.

Each bad request is small work when it is met as it should be, so their number is such that they
take a part of a core together; it is what each of them holds and holds up that is put to the test.

A process of its own, so that it takes nothing from the clients that are measured. Goes on until
its standard input ends; then prints, as JSON, how often each was answered with which status. None
of it is a job that may be accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Final
from urllib.parse import urlsplit

TRANSFER_BYTES: Final = 65_536
_LOST: Final = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError)

HUGE_PROMPT: Final = json.dumps({"body": {"prompt": "mill " * 380_000}}).encode()
MINUS_ONES: Final = json.dumps({"body": {"prompt": [-1] * 480_000}}).encode()
UNKNOWN_KEYS: Final = json.dumps({f"k{number}": 0 for number in range(150_000)}).encode()
_BAD: Final = {"body": {"prompt": "mill " * 400, "max_tokens": -1}}
BAD_BULK: Final = json.dumps({"jobs": [_BAD] * 5_000}).encode()


class Abuse:
    """All of it, against one API."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        assert parts.hostname and parts.port
        self._address = (parts.hostname, parts.port)
        self.answers: defaultdict[str, Counter[str]] = defaultdict(Counter)

    async def run(self, ended: asyncio.Event) -> None:
        kinds: tuple[tuple[int, float, Callable[[], Awaitable[None]]], ...] = (
            (3, 2.0, self._post("huge prompts", HUGE_PROMPT)),
            (1, 2.0, self._post("arrays of -1", MINUS_ONES)),
            (1, 2.0, self._post("unknown keys", UNKNOWN_KEYS)),
            (2, 2.0, self._post("slow bulks", BAD_BULK, "/v1/jobs/bulk", bytes_per_s=2_000_000)),
            (16, 1.0, self._stand_still("silent bulks", "/v1/jobs/bulk", 1_000_000, b"")),
            (150, 10.0, self._stand_still("unfinished bodies", "/v1/jobs", 1_999_999, HUGE_PROMPT)),
            (50, 10.0, self._not_read),
            (150, 5.0, self._probe),
        )
        going = [
            asyncio.create_task(self._again_and_again(do, pause_s))
            for number, pause_s, do in kinds
            for _ in range(number)
        ]
        await ended.wait()
        for each in going:
            each.cancel()
        await asyncio.gather(*going, return_exceptions=True)

    async def _again_and_again(self, do: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            with contextlib.suppress(*_LOST):
                await do()
            await asyncio.sleep(pause_s)

    def _post(
        self, name: str, body: bytes, path: str = "/v1/jobs", bytes_per_s: float = 0
    ) -> Callable[[], Awaitable[None]]:
        async def do() -> None:
            async with self._connected() as (reader, writer):
                writer.write(_head("POST", path, len(body)))
                for start in range(0, len(body), TRANSFER_BYTES):
                    writer.write(body[start : start + TRANSFER_BYTES])
                    await writer.drain()
                    if bytes_per_s:
                        await asyncio.sleep(TRANSFER_BYTES / bytes_per_s)
                await self._note(name, reader)

        return do

    def _stand_still(
        self, name: str, path: str, length: int, sent: bytes
    ) -> Callable[[], Awaitable[None]]:
        """Of a body that is `length` long no more is sent than this."""

        async def do() -> None:
            async with self._connected() as (reader, writer):
                writer.write(_head("POST", path, length) + sent[:1_600_000])
                await self._note(name, reader)

        return do

    async def _not_read(self) -> None:
        """Asks for far more than the system holds, and reads nothing until it is cut off."""
        async with self._connected(window=4_096) as (_, writer):
            writer.write(_head("GET", "/openapi.json") * 200)
            while True:
                await asyncio.sleep(0.5)
                writer.write(b"\r\n")
                try:
                    await asyncio.wait_for(writer.drain(), 60)
                except _LOST:
                    self.answers["unread answers"]["cut off"] += 1
                    raise

    async def _probe(self) -> None:
        for path in ("/readyz", "/metrics"):
            async with self._connected() as (reader, writer):
                writer.write(_head("GET", path))
                await self._note("probes", reader)

    @contextlib.asynccontextmanager
    async def _connected(
        self, window: int = TRANSFER_BYTES
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """`window` is what the system, and twice that what the reader takes of an answer."""
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
        await asyncio.get_running_loop().sock_connect(sock, self._address)
        reader, writer = await asyncio.open_connection(sock=sock, limit=window)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    async def _note(self, name: str, reader: asyncio.StreamReader) -> None:
        """Wait for the whole answer, and count it by its status."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except _LOST:
            self.answers[name]["none"] += 1
            raise
        self.answers[name][head[9:12].decode()] += 1
        while await reader.read(TRANSFER_BYTES):
            pass


def _head(method: str, path: str, length: int | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    if length is not None:
        lines.append(f"Content-Length: {length}")
    if path != "/openapi.json":
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode()


async def main(url: str) -> None:
    ended, abuse = asyncio.Event(), Abuse(url)
    asyncio.get_running_loop().add_reader(sys.stdin.fileno(), ended.set)
    print("begun", flush=True)
    await abuse.run(ended)
    print(json.dumps(abuse.answers))


if __name__ == "__main__":
    os.nice(5)  # of this machine's cores, the system under test comes first
    asyncio.run(main(sys.argv[1]))
