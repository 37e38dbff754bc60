"""One try of one request at one upstream."""

from __future__ import annotations

import functools
import ssl
from datetime import UTC, datetime
from typing import Any, Final

import httpx

from app.engines.openai.answer import MAX_LINE, Answer, Lost, Unreachable, events, judge, parsed
from app.engines.openai.options import Upstream

CONNECT_S: Final = 5.0


@functools.cache
def tls() -> ssl.SSLContext:
    """To read the system's certificates takes a while, so all connections share them."""
    return httpx.create_ssl_context()


def client_of(upstream: Upstream, timeout_s: float, most: int) -> httpx.AsyncClient:
    """Connections to one upstream. The key is in them and nowhere else."""
    key = upstream.key()
    return httpx.AsyncClient(
        base_url=upstream.url.rstrip("/"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        verify=tls(),
        timeout=httpx.Timeout(timeout_s, connect=CONNECT_S, pool=None),
        limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
    )


async def ask(
    client: httpx.AsyncClient, path: str, body: dict[str, Any], answer: Answer, logprobs: int
) -> None:
    """Send a request and fill `answer` as its answer comes; a cancelled call closes the connection,
    by which servers know that nobody waits any more.

    Raises `Unreachable`, `Overloaded`, `Denied`, `Refused`, or `Lost`.
    """
    try:
        async with client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                content = await _bounded(response)
                after = response.headers.get("Retry-After")
                judge(response.status_code, content, after, datetime.now(UTC))
            if "text/event-stream" in response.headers.get("Content-Type", ""):
                await _read(response, answer, logprobs)
            else:
                answer.take(parsed(await _bounded(response)), logprobs=logprobs)
    except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
        raise Unreachable(type(error).__name__) from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
        raise Lost(type(error).__name__) from None
    if answer.end is None and answer.embedding is None:
        raise Lost("its answer ended before its end")


async def _read(response: httpx.Response, answer: Answer, logprobs: int) -> None:
    rest = b""
    async for piece in response.aiter_bytes():
        lines, newline, rest = (rest + piece).rpartition(b"\n")
        if len(rest) > MAX_LINE:
            raise Lost("its answer has a line without end")
        for event in events(lines if newline else b""):
            if event is None:
                return
            answer.take(event, logprobs=logprobs)


async def _bounded(response: httpx.Response) -> bytes:
    content = b""
    async for piece in response.aiter_bytes():
        content += piece
        if len(content) > MAX_LINE:
            raise Lost("its answer is too long")
    return content
