"""A TCP proxy that misbehaves on demand, to stand between our processes and Postgres or Redis.

    with Proxy(upstream_port) as proxy:
        proxy.flow(to_server=HELD)      # a partition, one way
        proxy.reset_every(0.2)          # a storm of resets
        proxy.heal()

It runs in a thread of its own; its methods may be called from any thread, and have taken effect
when they return. There is no mode that doubles bytes: TCP never does that to a program. What may
come twice is a message, and that is done by sending it twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, Final, Literal, Self, TypeVar

from app.local.ports import LOOPBACK

T = TypeVar("T")
Direction = Literal["to_server", "to_client"]

PIECE_BYTES: Final = 65_536
TICK_S: Final = 0.05
"""How finely a drip is spread."""
CALL_TIMEOUT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class Flow:
    """How the bytes of one direction pass.

    Held bytes come late, as TCP sends them again after a partition: the receiver may act on them
    long after the sender has given up. Lost bytes are gone: the sender sees a connection that
    takes everything and answers nothing (half-open), and it is reset at healing.
    """

    delay_s: float = 0.0  #: added to every piece of up to 64 KiB
    bytes_per_s: float = 0.0  #: 0 is as fast as it goes
    held: bool = False
    lost: bool = False


PASS: Final = Flow()
HELD: Final = Flow(held=True)
LOST: Final = Flow(lost=True)


@dataclass(slots=True)
class Counts:
    """Since the start, but for `open`: connections now."""

    accepted: int = 0
    open: int = 0
    reset: int = 0
    to_server_bytes: int = 0
    to_client_bytes: int = 0


@dataclass(eq=False, slots=True)
class _Link:
    """One client and its connection to the server."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    task: asyncio.Task[None]
    lost_bytes: bool = False

    def reset(self) -> None:
        """RST to both sides, whatever was under way."""
        _reset(self.client)
        _reset(self.server)
        self.task.cancel()


class Proxy:
    """Listens on `port` for as long as it runs, also while it refuses: nobody can take it."""

    def __init__(self, upstream_port: int, upstream_host: str = LOOPBACK) -> None:
        self._upstream = (upstream_host, upstream_port)
        self._reserved = socket.socket()  # never listens; keeps the port ours
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._reserved.bind((LOOPBACK, 0))
        self.port: int = self._reserved.getsockname()[1]
        self.counts = Counts()
        self._flows: dict[Direction, Flow] = {"to_server": PASS, "to_client": PASS}
        self._links: set[_Link] = set()
        self._listener: asyncio.Server | None = None
        self._storm: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)

    # ── what others call ────────────────────────────────────────────────────────────────────────

    def start(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(CALL_TIMEOUT_S)
        self._loop.close()
        self._reserved.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def flow(self, *, to_server: Flow = PASS, to_client: Flow = PASS) -> None:
        """From now on bytes pass like this, on old connections and on new ones."""
        self._call(self._set_flows({"to_server": to_server, "to_client": to_client}))

    def reset(self) -> int:
        """Reset every open connection; returns how many there were. New ones are accepted."""
        return self._call(self._reset_all())

    def reset_every(self, seconds: float) -> None:
        """Reset every open connection now and again after each interval, until healed."""
        self._call(self._start_storm(seconds))

    def refuse(self) -> None:
        """Reset every open connection, and refuse new ones as a port without a listener does."""
        self._call(self._refuse())

    def redirect(self, upstream_port: int) -> None:
        """From now on another server is behind it; open connections are reset."""
        self._call(self._redirect(upstream_port))

    def heal(self) -> None:
        """Pass everything, and accept. Connections that have lost bytes are reset."""
        self._call(self._heal())

    # ── in the loop's thread ────────────────────────────────────────────────────────────────────

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    async def _listen(self) -> None:
        if self._listener is None:
            self._listener = await asyncio.start_server(
                self._serve, LOOPBACK, self.port, reuse_port=True, backlog=1024
            )

    async def _set_flows(self, flows: dict[Direction, Flow]) -> None:
        self._flows = flows
        self._changed.set()  # wakes what is held; it looks again
        self._changed = asyncio.Event()

    async def _reset_all(self) -> int:
        links = list(self._links)
        for link in links:
            link.reset()
        await asyncio.gather(*(link.task for link in links), return_exceptions=True)
        self.counts.reset += len(links)
        return len(links)

    async def _start_storm(self, seconds: float) -> None:
        async def storm() -> None:
            while True:
                await self._reset_all()
                await asyncio.sleep(seconds)

        self._end_storm()
        self._storm = self._loop.create_task(storm())

    def _end_storm(self) -> None:
        if self._storm:
            self._storm.cancel()
            self._storm = None

    async def _refuse(self) -> None:
        if self._listener:
            self._listener.close()
            self._listener = None
        await self._reset_all()

    async def _redirect(self, upstream_port: int) -> None:
        self._upstream = (self._upstream[0], upstream_port)
        await self._reset_all()

    async def _heal(self) -> None:
        self._end_storm()
        for link in list(self._links):
            if link.lost_bytes:
                link.reset()
        await self._set_flows({"to_server": PASS, "to_client": PASS})
        await self._listen()

    async def _close(self) -> None:
        self._end_storm()
        await self._refuse()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*tasks, return_exceptions=True)

    # ── one connection ──────────────────────────────────────────────────────────────────────────

    async def _serve(self, from_client: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        self.counts.accepted += 1
        try:
            from_server, server = await asyncio.open_connection(*self._upstream)
        except OSError:
            _reset(client)
            return
        task = asyncio.current_task()
        assert task is not None
        link = _Link(client, server, task)
        self._links.add(link)
        self.counts.open = len(self._links)
        try:
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link, from_client, server, "to_server"))
                both.create_task(self._pump(link, from_server, client, "to_client"))
        except* OSError:  # one side has reset; so does the other
            _reset(client)
            _reset(server)
        except* asyncio.CancelledError:  # ours
            pass
        finally:
            self._links.discard(link)
            self.counts.open = len(self._links)
            client.close()
            server.close()

    async def _pump(
        self,
        link: _Link,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        direction: Direction,
    ) -> None:
        """Everything one side sends, its end included, to the other."""
        while piece := await reader.read(PIECE_BYTES):
            while piece := await self._some_of(piece, link, writer, direction):
                pass
        while self._flows[direction].held or self._flows[direction].lost:
            link.lost_bytes |= self._flows[direction].lost
            await self._changed.wait()
        if writer.can_write_eof():
            writer.write_eof()

    async def _some_of(
        self, piece: bytes, link: _Link, writer: asyncio.StreamWriter, direction: Direction
    ) -> bytes:
        """Pass as much of a piece as the flow allows now; returns the rest."""
        flow = self._flows[direction]
        if flow.held:
            await self._changed.wait()
            return piece
        if flow.lost:
            link.lost_bytes = True
            return b""
        if flow.delay_s:
            await asyncio.sleep(flow.delay_s)
        size = max(1, int(flow.bytes_per_s * TICK_S)) if flow.bytes_per_s else len(piece)
        writer.write(piece[:size])
        await writer.drain()
        passed = min(size, len(piece))
        if direction == "to_server":
            self.counts.to_server_bytes += passed
        else:
            self.counts.to_client_bytes += passed
        if flow.bytes_per_s:
            await asyncio.sleep(passed / flow.bytes_per_s)
        return piece[size:]


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST in place of FIN: no lingering."""
    with contextlib.suppress(OSError):
        sock: socket.socket = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
