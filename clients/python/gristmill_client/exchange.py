"""One answer of the API, after as many tries as patience allows."""

from __future__ import annotations

import ipaddress
import itertools
import json
import math
import random
import ssl
import time
from collections.abc import Callable, Generator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypedDict, TypeVar

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

CONNECTIONS: Final = httpx.Limits(
    max_connections=100, max_keepalive_connections=20, keepalive_expiry=60.0
)
"""httpx's own, but kept open from one look at a job to the next, and for less time than the API
keeps them (75 s): whoever connects anew waits behind others who do."""

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


class Exchange:
    """The API at one address, as flows: nothing is sent here.

    Raises `ValueError` for an address or a key that is none.
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
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("A key has visible ASCII characters alone.")
        self._base_url = str(url)
        self.shown_url = str(url.copy_with(userinfo=b""))  #: without a password
        self._host = url.host
        self.patience_s = patience_s
        self._timeout_s = timeout_s
        self._on_pause = on_pause
        self._headers = {"Accept": "application/json", "User-Agent": "gristmill-client"}
        self._headers |= headers or {}
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
        params: Mapping[str, Any] | None = None,
        hold_s: float = 0,
        patience: Patience | None = None,
    ) -> Flow[dict[str, Any]]:
        """The JSON object that a request is answered with.

        `hold_s` is how long the server may take on purpose. Raises the error that the API tells
        of, or `Unavailable` if it is away for longer than `patience`.
        """
        patience = patience or Patience(self.patience_s)
        headers = {"Content-Type": "application/json"} if body else {}
        for tries in itertools.count(1):
            outcome = yield self.request(
                method, path, body, params=params, hold_s=hold_s, headers=headers
            )
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
        headers: Mapping[str, str],
    ) -> httpx.Request:
        timeout = httpx.Timeout(self._timeout_s, read=self._timeout_s + hold_s)
        return httpx.Request(
            method,
            self._base_url + path,
            params=params,
            content=body,
            headers={**self._headers, **headers},
            extensions={"timeout": timeout.as_dict()},
        )

    def pause_s(self, outcome: Outcome, tries: int, patience: Patience) -> float:
        """How long to wait before the next try; raises what went wrong if there is none."""
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
            f"{self.shown_url} answered {response.status_code} with something else than a JSON "
            "object: is it the address of Gristmill's API?"
        )

    def _failure(self, outcome: Outcome) -> GristmillError:
        if not isinstance(outcome, httpx.Response):
            why = "its TLS certificate is not trusted" if _is_untrusted(outcome) else None
            return Unavailable(
                f"The API at {self.shown_url} does not answer ({why or type(outcome).__name__})."
            )
        try:
            error = error_of(outcome.json())
            if isinstance(error, QueueFull):
                error.retry_after = math.ceil(_pause_s(outcome, 1))
            return error
        except (ValueError, TypeError, KeyError):
            what = f"{self.shown_url} answered {outcome.status_code} without a reason."
        if outcome.status_code == 413:  # of a proxy on the way
            return RequestTooLarge(what)
        kind = Unavailable if outcome.status_code in RETRIED else GristmillError
        return kind(what)


def _url(address: str) -> httpx.URL:
    try:
        url = httpx.URL(address.rstrip("/"))
    except httpx.InvalidURL:
        url = httpx.URL()
    if url.scheme not in ("http", "https") or not url.host:
        raise ValueError("The API's address must begin with http:// or https:// and a host.")
    return url


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
        is_ours = isinstance(outcome, httpx.LocalProtocolError | httpx.UnsupportedProtocol)
        return isinstance(outcome, httpx.TransportError) and not (is_ours or _is_untrusted(outcome))
    return (
        outcome.status_code in RETRIED and outcome.headers.get("x-should-retry", "true") != "false"
    )


def _is_untrusted(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _pause_s(outcome: Outcome, tries: int) -> float:
    """Until the next try: what the server says, or longer each time and never in step."""
    if isinstance(outcome, httpx.Response):
        told_s = _retry_after_s(outcome.headers.get("retry-after", ""))
        if told_s is not None:
            return min(told_s, MAX_PAUSE_S)
    return min(0.25 * 2.0 ** min(tries, 10), 8.0) * random.uniform(0.75, 1.0)


def _retry_after_s(text: str) -> float | None:
    """Seconds, or a date (RFC 9110, 10.2.3)."""
    if text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
