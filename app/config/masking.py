"""Settings as they may be shown: whoever looks over a shoulder, or reads a log, learns no password.

What is shown of a URL is put together anew from the parts in which no secret can be. Where a
character of the password has torn it into other parts, or anything else is odd, nothing is shown.
"""

from __future__ import annotations

import re
from typing import Any, Final
from urllib.parse import parse_qsl, urlsplit

MASK: Final = "***"

_SECRETS: Final = ("password", "token", "key", "secret")
_HOSTS: Final = re.compile(r"[\w.,:%\[\]-]*")
_PATH: Final = re.compile(r"[\w./-]*")
_SHOWN: Final = frozenset(
    (
        *("host", "hostaddr", "port", "dbname", "user", "sslmode", "sslrootcert", "sslcert"),
        *("sslkey", "sslcrl", "target_session_attrs", "connect_timeout", "application_name"),
        *("load_balance_hosts", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_cert_reqs"),
        *("ssl_check_hostname", "db", "virtual_host"),
    )
)
"""Parameters that hold no secret, of Postgres' and of Redis' URLs."""


def shown(name: str, value: Any) -> Any:
    """The value of a setting as it may be shown; `name` is the last part of its name."""
    match value:
        case dict():
            return {key: shown(key, each) for key, each in value.items()}
        case list() | tuple():
            return [shown(name, each) for each in value]
    if not value or not isinstance(value, str):
        return value
    if name.endswith(_SECRETS):
        return MASK
    return masked(value) if name.endswith("url") or "://" in value else value


def masked(url: str) -> str:
    """A URL without its password; of one that cannot be read only how it begins."""
    scheme, separator, rest = url.partition("://")
    if not separator or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        return MASK
    several = rest.split(";sentinel://") if scheme == "sentinel" else [rest]
    parts = [_masked(f"{scheme}://{each}") for each in several]
    return f"{scheme}://{MASK}" if None in parts else ";".join(map(str, parts))


def _masked(url: str) -> str | None:
    """The part of one server; None if it is not certain where its password is."""
    try:
        parts = urlsplit(url)
        options = parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        return None
    user, at, hosts = parts.netloc.rpartition("@")
    is_torn = parts.fragment or "@" in parts.path + parts.query or hosts.startswith(":")
    is_plain = _HOSTS.fullmatch(hosts) and _PATH.fullmatch(parts.path) and url.isprintable()
    if is_torn or not is_plain or not hosts + parts.path:
        return None
    told = "&".join(f"{name}={value if name in _SHOWN else MASK}" for name, value in options)
    begin = f"{parts.scheme}://{_user(parts.scheme, user)}{at}{hosts}{parts.path}"
    return f"{begin}?{told}" if told else begin


def _user(scheme: str, given: str) -> str:
    """To Postgres what comes first is a name; to Redis it may be meant as the password, or as its
    beginning, for a password may have a colon."""
    name, colon, _ = given.partition(":")
    told = name if scheme.startswith("postgres") or not name else MASK
    return f"{told}:{MASK}" if colon else told
