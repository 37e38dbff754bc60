"""One answer of the API, after as many tries as patience allows."""

from __future__ import annotations

import base64
import ipaddress
import itertools
import json
import math
import os
import random
import ssl
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, Generic, TypedDict, TypeVar, Unpack

import httpx

from gristmill_client.errors import (
    GristmillError,
    QueueFull,
    RequestError,
    RequestTooLarge,
    Unavailable,
    error_of,
)

RETRIED: Final = frozenset({408, 429, 502, 503, 504})
MAX_PAUSE_S: Final = 60.0
"""Longest pause that a Retry-After is heeded for: a wrong one must not put the caller to sleep."""
PATIENCE_S: Final = 120.0
MAX_TIMEOUT_S: Final = 86_400

LIMITS: Final = httpx.Limits(
    max_connections=500, max_keepalive_connections=20, keepalive_expiry=60.0
)
"""More than httpx's own: each wait for a job holds one. They are kept open from one look at a job
to the next, and for less time than the API keeps them (75 s): whoever connects anew waits behind
others who do."""

_OURS: Final = (httpx.LocalProtocolError, httpx.UnsupportedProtocol)
"""Nothing was sent."""

COME_BACK: Final = (Unavailable, QueueFull)
"""Refusals of the service itself, not of what was asked: everything else would meet them too."""

T = TypeVar("T")
Outcome = httpx.Response | httpx.RequestError | None
Flow = Generator[httpx.Request | float, Outcome, T]
"""Yields requests, answered by a response or the error that came instead, and pauses in seconds."""


class ExchangeOptions(TypedDict, total=False):
    """How the API is spoken to.

    key: an API key, sent as `Authorization: Bearer`.
    headers: sent with every request.
    timeout_s: longest wait for a connection and for an answer; a long poll has its own on top.
    patience_s: how long a request is tried again while the API is away or says come back later,
        counted from the first sign of that; 0 tries once, `math.inf` for ever.
    on_pause: told of every pause between two tries: why, and its seconds.
    """

    key: str | None
    headers: Mapping[str, str]
    timeout_s: float
    patience_s: float
    on_pause: Callable[[GristmillError, float], None]


class Query(TypedDict, total=False):
    """What goes with a request.

    params: of its query.
    hold_s: how long the server may take on purpose, in seconds.
    """

    params: Mapping[str, Any] | None
    hold_s: float


class Connections(Generic[T]):
    """Those of this process. After a fork a child makes its own: two that read from one connection
    would get each other's answers."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._kept = os.getpid(), make()

    def get(self) -> T:
        if self._kept[0] != os.getpid():
            self._kept = os.getpid(), self._make()
        return self._kept[1]


class Patience:
    """How much longer an API that is away is asked again. Any answer renews it.

    `ends_at`, by the monotonic clock, holds whatever the answers.
    """

    def __init__(self, seconds: float, ends_at: float = math.inf) -> None:
        self._seconds = seconds
        self._ends_at = ends_at
        self._away_since: float | None = None

    def allows(self, pause_s: float) -> bool:
        """Whether another try after such a pause is within it."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
        return now + pause_s <= min(self._away_since + self._seconds, self._ends_at)

    def renew(self) -> None:
        self._away_since = None

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self._ends_at


class Exchange:
    """The API at one address, as flows: nothing is sent here.

    Raises `ValueError` for an address, a key or a time that is none.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30.0,
        patience_s: float = PATIENCE_S,
        on_pause: Callable[[GristmillError, float], None] | None = None,
    ) -> None:
        url = _url(base_url)
        if key and not all("!" <= letter <= "~" for letter in key):
            raise ValueError("A key has visible ASCII characters alone.")
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ValueError(f"timeout_s is more than 0, and {MAX_TIMEOUT_S} at most.")
        if not patience_s >= 0:
            raise ValueError("patience_s is 0 or more.")
        self.base_url = str(url.copy_with(userinfo=b""))
        self._host = url.host
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._on_pause = on_pause
        self._headers = httpx.Headers(
            {"Accept": "application/json", "User-Agent": "gristmill-client"}
        )
        if url.userinfo:  # not in an address, which httpx logs
            self._headers["Authorization"] = _basic(url)
        self._headers.update(headers or {})
        if key:
            self._headers["Authorization"] = f"Bearer {key}"

    @property
    def heeds_proxies(self) -> bool:
        """Whether HTTP_PROXY and its like count: prompts for this machine do not leave it."""
        return not stays_here(self._host)

    def ask(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        patience: Patience | None = None,
        **query: Unpack[Query],
    ) -> Flow[dict[str, Any]]:
        """The JSON object that a request is answered with.

        Raises the error that the API tells of, or `Unavailable` if it is away for longer than
        `patience`.
        """
        patience = patience or Patience(self.patience_s)
        request = self.request(method, path, body, **query)
        for tries in itertools.count(1):
            outcome = yield request
            if isinstance(outcome, httpx.Response) and outcome.is_success:
                patience.renew()
                return self._object(outcome) if outcome.content else {}
            yield self.pause_s(outcome, tries, patience)
        raise AssertionError("unreachable")

    def request(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        *,
        params: Mapping[str, Any] | None = None,
        hold_s: float = 0,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Request:
        """Raises `RequestError` if something in it cannot be written."""
        timeout = httpx.Timeout(self._timeout_s, read=self._timeout_s + hold_s)
        all_headers = httpx.Headers(self._headers)
        try:
            if body:
                all_headers["Content-Type"] = "application/json"
            all_headers.update(headers or {})
            return httpx.Request(
                method,
                self.base_url + path,
                params=params,
                content=body,
                headers=all_headers,
                extensions={"timeout": timeout.as_dict()},
            )
        except UnicodeError:
            raise RequestError("The request has text that HTTP cannot carry.") from None

    def pause_s(self, outcome: Outcome, tries: int, patience: Patience) -> float:
        """How long to wait before the next try; raises what went wrong if there is none."""
        if isinstance(outcome, httpx.PoolTimeout) and not patience.is_over:
            return 0.0  # it is we who have all connections in use: the API is not away
        failure = self._failure(outcome)
        if not _may_pass(outcome):
            patience.renew()
            raise failure
        pause_s = _pause_s(outcome, tries)
        if not patience.allows(pause_s):
            raise failure
        if self._on_pause:
            self._on_pause(failure, pause_s)
        return pause_s

    def _object(self, response: httpx.Response) -> dict[str, Any]:
        try:
            value = response.json()
        except ValueError:
            value = None
        if isinstance(value, dict):
            return value
        raise GristmillError(
            f"{self.base_url} answered {response.status_code} with something else than a JSON "
            "object: is it the address of Gristmill's API?"
        )

    def _failure(self, outcome: Outcome) -> GristmillError:
        if not isinstance(outcome, httpx.Response):
            if isinstance(outcome, _OURS):  # whose text may quote a header
                return RequestError(f"The request cannot be sent ({type(outcome).__name__}).")
            return Unavailable(f"The API at {self.base_url} does not answer ({_why(outcome)}).")
        try:
            error = error_of(outcome.json())
            if isinstance(error, QueueFull):
                error.retry_after = math.ceil(_pause_s(outcome, 1))
            return error
        except (ValueError, TypeError, KeyError):
            what = f"{self.base_url} answered {outcome.status_code} without a reason."
        if outcome.has_redirect_location:
            where = outcome.headers["location"]
            what = f"{self.base_url} answered {outcome.status_code}: it is at {where} now."
        if outcome.status_code == 413:  # of a proxy on the way
            return RequestTooLarge(what)
        kind = Unavailable if outcome.status_code in RETRIED else GristmillError
        return kind(what)


def _url(address: str) -> httpx.URL:
    """An address, which may end with the /v1 that other clients want."""
    try:
        url = httpx.URL(address.rstrip("/").removesuffix("/v1"))
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("The API's address must begin with http:// or https:// and a host.")
    if url.query or url.fragment:
        raise ValueError("The API's address ends with a host or a path: no ? or # is in it.")
    return url


def _basic(url: httpx.URL) -> str:
    told = f"{url.username}:{url.password}".encode()
    return f"Basic {base64.b64encode(told).decode()}"


def stays_here(host: str) -> bool:
    """Whether what is sent there stays on this machine: to 0.0.0.0 it does, too. Looks nothing up:
    `localhost` and what ends with it are kept for this machine (RFC 6761)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        name = host.lower().rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def encode(value: object) -> bytes:
    """A value as JSON. Raises `RequestError` if it is none."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        why = type(error).__name__  # its text may quote the value
        raise RequestError(f"The submission cannot be written as JSON ({why}).") from None
    try:
        return text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair: the API says what it thinks of it
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _may_pass(outcome: Outcome) -> bool:
    """Whether another try may fare better."""
    if not isinstance(outcome, httpx.Response):
        is_vain = isinstance(outcome, _OURS) or _is_untrusted(outcome)
        return isinstance(outcome, httpx.TransportError) and not is_vain
    return (
        outcome.status_code in RETRIED and outcome.headers.get("x-should-retry", "true") != "false"
    )


def _is_untrusted(error: BaseException | None) -> bool:
    return any(isinstance(each, ssl.SSLCertVerificationError) for each in _causes(error))


def _why(error: BaseException | None) -> str:
    """What kept a request from being answered, without anything that was asked."""
    if _is_untrusted(error):
        return "its TLS certificate is not trusted"
    of_the_system = (each.strerror for each in _causes(error) if isinstance(each, OSError))
    return ": ".join(filter(None, (type(error).__name__, next(of_the_system, None))))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _pause_s(outcome: Outcome, tries: int) -> float:
    """Until the next try: what the server says, or longer each time and never in step."""
    if isinstance(outcome, httpx.Response):
        told_s = _retry_after_s(outcome.headers.get("retry-after", ""))
        if told_s is not None:
            return min(told_s, MAX_PAUSE_S)
    return min(0.25 * 2.0 ** min(tries, 10), 8.0) * random.uniform(0.75, 1.0)


def _retry_after_s(text: str) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
