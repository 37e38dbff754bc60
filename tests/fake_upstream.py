"""A small HTTP server that speaks OpenAI's protocol, and breaks it as it is told to.

It answers a prompt of token ids with the same ids from the last to the first, as text "7 6 5", and
a text or a chat with its last word. What it does with each request is asked of `plan`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Self

KEY = "sk-a-very-secret-key"


@dataclass(frozen=True, slots=True)
class Does:
    """What becomes of a request; by default it is answered."""

    status: int = 200
    headers: tuple[str, ...] = ()
    whole: bool = False  #: one JSON answer, no stream
    cut_after: int | None = None  #: pieces, and then a reset
    hangs: bool = False
    raw: bytes | None = None  #: the body, whatever it is
    content_type: str = "text/event-stream"
    end: str = "stop"
    usage: bool = True
    cost: float | None = None


Plan = Callable[[int, dict[str, Any]], Does]
"""Called with the number of the request, from 0 on, and its body."""


@dataclass(slots=True)
class Seen:
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    inside: int = 0
    most_inside: int = 0
    hung_up: int = 0  #: requests whose client went away before the answer
    answered: int = 0


class FakeUpstream:
    """Listens on a free port of the loopback while it is entered."""

    def __init__(self, plan: Plan = lambda number, body: Does(), *, key: str = "") -> None:
        self.plan = plan
        self.seen = Seen()
        self.port = 0
        self._key = key
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()
        self._call(self._drain())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def listen(self) -> None:
        """Listen on the port of before, after `die`."""
        self._call(self._listen())

    def die(self) -> None:
        """Stop listening and reset all connections, as a process that is killed does."""
        self._call(self._die())

    def _call(self, work: Any) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _die(self) -> None:
        if self._server is not None:
            # A connection that asyncio has half accepted would stay open for ever: first no more
            # are accepted, then those that are get a turn, then they are reset.
            for sock in self._server.sockets:
                self._loop.remove_reader(sock.fileno())
            for _ in range(3):
                await asyncio.sleep(0)
            self._server.close()
        for writer in list(self._connections):
            _reset(writer)
        self._connections.clear()

    async def _drain(self) -> None:
        for _ in range(3):  # those that have just come begin
            await asyncio.sleep(0)
        rest = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
        for _ in range(3):  # their connections close
            await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._request(reader, writer):
                    pass
        finally:
            self._connections.discard(writer)
            writer.close()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        method, path, _ = head.split(" ", 2)
        headers = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        length = int(headers.get("content-length", 0))
        body = json.loads(await reader.readexactly(length)) if length else {}
        key = headers.get("authorization", "").removeprefix("bearer ")
        self.seen.keys.add(key)
        if self._key and key != self._key:
            return await self._send(writer, 401, b"{}")
        if method == "get":
            return await self._send(writer, 200, b'{"data": []}')
        number = len(self.seen.bodies)
        self.seen.bodies.append(body)
        self.seen.paths.append(path)
        self.seen.inside += 1
        self.seen.most_inside = max(self.seen.most_inside, self.seen.inside)
        try:
            does = self.plan(number, body)
            if does.hangs:
                await reader.read(1)  # returns when the client goes
                self.seen.hung_up += 1
                return False
            return await self._answer(writer, path, body, does)
        except ConnectionError:
            self.seen.hung_up += 1
            raise
        finally:
            self.seen.inside -= 1

    async def _answer(
        self, writer: asyncio.StreamWriter, path: str, body: dict[str, Any], does: Does
    ) -> bool:
        if does.status != 200:
            error = json.dumps(
                {"error": {"message": "no: " + json.dumps(body), "code": "some_code"}}
            )
            return await self._send(writer, does.status, error.encode(), does.headers)
        if does.raw is not None:
            return await self._send(writer, 200, does.raw, kind=does.content_type)
        if path.endswith("/embeddings"):
            vector = [float(len(body["input"][0])), 0.5]
            usage = {"prompt_tokens": len(body["input"][0])}
            answer = {"data": [{"embedding": vector}], "usage": usage}
            return await self._send(writer, 200, json.dumps(answer).encode())
        pieces, num_input = _answer_of(body)
        pieces = pieces[: body.get("max_tokens", len(pieces))]
        usage: dict[str, Any] = {"prompt_tokens": num_input, "completion_tokens": len(pieces)}
        usage["prompt_tokens_details"] = {"cached_tokens": 1}
        if does.cost is not None:
            usage["cost"] = does.cost
        is_chat = path.endswith("/chat/completions")
        if does.whole:
            text = "".join(pieces)
            choice: dict[str, Any] = {"message": {"content": text}} if is_chat else {"text": text}
            answer = {"choices": [choice | {"finish_reason": does.end}], "usage": usage}
            return await self._send(writer, 200, json.dumps(answer).encode())
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
        )
        for place, piece in enumerate([*pieces, ""]):
            if place == does.cut_after:
                await writer.drain()
                _reset(writer)
                return False
            await asyncio.sleep(0)
            choice = {"delta": {"content": piece}} if is_chat else {"text": piece}
            choice["finish_reason"] = does.end if place == len(pieces) else None
            writer.write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            await writer.drain()
        if does.usage:
            last = {"choices": [], "usage": usage}
            writer.write(b"data: " + json.dumps(last).encode() + b"\n\n")
        writer.write(b"data: [DONE]\n\n")
        await writer.drain()
        self.seen.answered += 1
        return False

    async def _send(
        self,
        writer: asyncio.StreamWriter,
        status: int,
        body: bytes,
        headers: tuple[str, ...] = (),
        kind: str = "application/json",
    ) -> bool:
        lines = [f"HTTP/1.1 {status} X", f"Content-Type: {kind}", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, *headers, "", ""]).encode() + body)
        await writer.drain()
        return True


def _answer_of(body: dict[str, Any]) -> tuple[list[str], int]:
    prompt = body.get("prompt")
    if isinstance(prompt, list):
        return [f"{token} " for token in reversed(prompt)], len(prompt)
    text = prompt if isinstance(prompt, str) else body["messages"][-1]["content"]
    return [text.split()[-1]], len(text.split())


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    writer.transport.abort()
