"""One attempt to hand a webhook to its receiver.

The host is resolved once, every address it has is checked, and the connection goes to one of these
very addresses: a name that answers otherwise a moment later leads nowhere else. The name stays in
Host and in TLS. What the receiver answers beyond status and headers is not read, redirects are not
followed, proxies of the environment are not asked, and all of it has one deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from ipaddress import ip_address
from typing import Any, Final

import certifi
import httpcore

from app.errors import WebhookRefused
from app.webhooks.addresses import Address, Reach
from app.webhooks.urls import HookUrl

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]

MAX_RESOLVING: Final = 64
"""Names that are resolved at once: one whose servers are silent keeps a thread for long."""
MAX_ADDRESSES: Final = 4
"""Of one host that are tried."""
_GONE: Final = 410


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an attempt."""

    status: int | None  #: of the answer; None: there was none
    error: str | None  #: why it failed, a word for programs; None: it was delivered
    took_ms: float
    retry_after_s: float | None = None

    @property
    def is_delivered(self) -> bool:
        return self.error is None

    @property
    def is_gone(self) -> bool:
        """The receiver wants no more of them."""
        return self.status == _GONE


class SystemResolver:
    """Asks the system for the addresses of a name, in threads of its own."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(MAX_RESOLVING, thread_name_prefix="resolve")

    async def __call__(self, host: str, port: int) -> list[Address]:
        ask = lambda: socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)  # noqa: E731
        found = await asyncio.get_running_loop().run_in_executor(self._threads, ask)
        return list(dict.fromkeys(ip_address(each[4][0]) for each in found))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class NotResolved(Exception):
    """The name of the host has no address now."""


class _Pinned(httpcore.AsyncNetworkBackend):
    """Connects to the host of one URL, and to addresses that were checked."""

    def __init__(self, url: HookUrl, reach: Reach, resolve: Resolve) -> None:
        self._url = url
        self._reach = reach
        self._resolve = resolve
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        failure: Exception | None = None
        for address in (await self._addresses())[:MAX_ADDRESSES]:
            try:
                return await self._inner.connect_tcp(
                    str(address), self._url.port, timeout, local_address, socket_options
                )
            except httpcore.NetworkError as error:
                failure = error
        assert failure is not None
        raise failure

    async def _addresses(self) -> Sequence[Address]:
        if self._url.address is not None:
            found: Sequence[Address] = [self._url.address]
        else:
            try:
                found = await self._resolve(self._url.host, self._url.port)
            except (OSError, ValueError) as error:
                raise NotResolved from error
        self._reach.check(self._url, found)
        return found


class Postman:
    """Sends webhooks, many at once, in one event loop."""

    def __init__(
        self,
        reach: Reach,
        timeout_s: float,
        resolve: Resolve,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self._reach = reach
        self._timeout_s = timeout_s
        self._resolve = resolve
        self._context = context or ssl.create_default_context(cafile=certifi.where())

    async def post(self, url: HookUrl, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Raises nothing that comes of the receiver, whatever it does."""
        began_s = time.monotonic()
        status, error, retry_after_s = None, None, None
        try:
            async with asyncio.timeout(self._timeout_s):
                status, retry_after_s = await self._answer(url, headers, body)
        except TimeoutError:
            error = "timeout"
        except WebhookRefused:
            error = "address_refused"
        except NotResolved:
            error = "not_resolved"
        except ssl.SSLError:
            error = "tls_failed"
        except httpcore.ConnectError as failure:
            error = "tls_failed" if _is_tls(failure) else "not_connected"
        except (httpcore.ProtocolError, ValueError):
            error = "bad_answer"
        except (httpcore.NetworkError, httpcore.TimeoutException, OSError):
            error = "cut_off"
        if status is not None and not 200 <= status < 300:
            error = "redirect" if 300 <= status < 400 else "refused_by_receiver"
        return Outcome(status, error, 1e3 * (time.monotonic() - began_s), retry_after_s)

    async def _answer(
        self, url: HookUrl, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, float | None]:
        target = httpcore.URL(
            scheme=url.scheme.encode(),
            host=url.host.encode(),
            port=url.port,
            target=url.path.encode(),
        )
        sent = {
            "Host": url.origin.partition("://")[2],
            "User-Agent": "Gristmill",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            "Accept": "*/*",
            "Connection": "close",
            **headers,
        }
        async with contextlib.AsyncExitStack() as held:
            connection = httpcore.AsyncHTTPConnection(
                origin=target.origin,
                ssl_context=self._context,
                network_backend=_Pinned(url, self._reach, self._resolve),
            )
            held.push_async_callback(connection.aclose)
            fields = [(name.encode(), value.encode()) for name, value in sent.items()]
            request = httpcore.Request("POST", target, headers=fields, content=body)
            response = await connection.handle_async_request(request)
            return response.status, _retry_after_s(dict(response.headers), datetime.now(UTC))


def _is_tls(failure: BaseException) -> bool:
    cause: BaseException | None = failure
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _retry_after_s(headers: Mapping[bytes, bytes], now: datetime) -> float | None:
    """Seconds, or a date; None for anything else.

    https://www.rfc-editor.org/rfc/rfc9110#name-retry-after"""
    given = {name.lower(): value for name, value in headers.items()}.get(b"retry-after")
    if given is None or len(given) > 64:
        return None
    text = given.decode("latin-1").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        at = parsedate_to_datetime(text)
        at = at if at.tzinfo else at.replace(tzinfo=UTC)
        return max(0.0, (at - now).total_seconds())
    return None
