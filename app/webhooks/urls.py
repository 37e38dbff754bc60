"""The URL of a webhook, read once and strictly: what is checked is what is called.

Readers of URLs differ in what they forgive: a backslash, a control character, a name before an @, a
number for a host. Here nothing is forgiven.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Final, Literal

from app.errors import RequestError

MAX_URL: Final = 2_048

_URL: Final = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,254})"
    r"(?P<port>:[0-9]{1,5})?(?P<path>[/?][!$-;=?-Z_a-z~\[\]%&]*)?",
    re.IGNORECASE | re.ASCII,
)
_LABEL: Final = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
"""A last label like this makes a host a number, of which there are many spellings.

https://url.spec.whatwg.org/#ends-in-a-number-checker"""
_PORTS: Final = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class HookUrl:
    scheme: Literal["http", "https"]
    host: str  #: a name, or an address; in lower case, without brackets
    port: int
    path: str  #: with the query
    address: IPv4Address | IPv6Address | None = None  #: if the host is one

    @property
    def origin(self) -> str:
        """Who receives it: scheme, host and port."""
        host = f"[{self.host}]" if isinstance(self.address, IPv6Address) else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    def __str__(self) -> str:
        return self.origin + self.path


def parse_url(text: str, param: str = "webhook_url") -> HookUrl:
    """Raises `RequestError`, which does not quote it: a URL may hold a password of its owner's."""
    match = _URL.fullmatch(text) if len(text) <= MAX_URL else None
    if match is None:
        raise RequestError(
            f"{param} must be a URL like https://example.com/hook: plain ASCII of at most "
            f"{MAX_URL} characters, without a user name or a fragment.",
            param=param,
        )
    scheme: Literal["http", "https"] = "https" if match["scheme"].lower() == "https" else "http"
    port = int(match["port"][1:]) if match["port"] else _PORTS[scheme]
    host, address = _host(match["host"].lower(), param)
    if not 0 < port < 65_536:
        raise RequestError(f"{param} has a port that there is not.", param=param)
    path = match["path"] or "/"
    return HookUrl(scheme, host, port, path if path.startswith("/") else f"/{path}", address)


def _host(text: str, param: str) -> tuple[str, IPv4Address | IPv6Address | None]:
    name = text.removesuffix(".")
    labels = name.split(".")
    try:
        if text.startswith("["):
            six = IPv6Address(text[1:-1])
            return str(six), six
        if _NUMBER.fullmatch(labels[-1]):
            four = IPv4Address(text)
            return str(four), four
    except ValueError:
        pass
    else:
        if len(name) <= 253 and all(map(_LABEL.fullmatch, labels)):
            return name, None
    raise RequestError(
        f"{param} has a host that is neither a name nor an address in its usual form.", param=param
    )
