"""The broker's URL: what may be in it, and the same in kombu's words.

redis://[user]:password@host:6379/0                 one server
rediss://…?ssl_ca_certs=/ca.pem&ssl_certfile=…      the same with TLS; certificates are checked
unix://[user]:password@/run/redis.sock?db=0         a socket; redis+socket:// is the same
sentinel://:password@one:26379;sentinel://two:26379/0   whoever is master now; with ssl_… in the
                                                    query by TLS
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

from app.config.host import is_address

SCHEMES: Final = ("redis", "rediss", "unix", "redis+socket", "sentinel")
_FILES: Final = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_CHOICES: Final = {
    "ssl_cert_reqs": ("required", "optional", "none"),
    "ssl_check_hostname": ("true", "false"),
}
_QUOTE: Final = "in a user or password write / as %2F, : as %3A, @ as %40, # as %23 and ? as %3F"


def problem_in(url: str, sentinel_master: str) -> str | None:
    """What is wrong with a URL, as the end of a sentence that begins with the setting's name."""
    return next(_problems(url, sentinel_master), None)


def _problems(url: str, sentinel_master: str) -> Iterator[str]:
    scheme = url.partition("://")[0] if "://" in url else ""
    if "cluster" in scheme.lower():
        yield (
            "must not be a Redis Cluster: the keys of one message would lie on several servers. "
            "Use one server, or several behind Sentinel (sentinel://)."
        )
    elif scheme not in SCHEMES:
        yield "must begin with redis://, rediss:// (TLS), unix:// (a socket) or sentinel://."
    elif scheme == "sentinel":
        for part in url.split(";"):
            yield from _part_problems(part, ("sentinel",))
        if not sentinel_master:
            yield "names Sentinels, so broker.sentinel_master must name the master that they watch."
    else:
        if ";" in url or ("," in url.partition("://")[2].partition("/")[0].rpartition("@")[2]):
            yield "names several servers: use one, or sentinel://, which knows the master."
        yield from _part_problems(url, (scheme,))
        if sentinel_master:
            yield "must begin with sentinel://, for broker.sentinel_master is set."


def _part_problems(url: str, schemes: tuple[str, ...]) -> Iterator[str]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        yield f"is not a URL: its host or port cannot be read; {_QUOTE}."
        return
    is_socket = parts.scheme in ("unix", "redis+socket")
    if parts.scheme not in schemes:
        yield f"must begin each of its parts with {schemes[0]}://."
    elif parts.fragment or "@" in parts.query or re.search(r"[\s\x00-\x1f]", url):
        yield f"has a character that ends a URL; {_QUOTE}."
    elif is_socket and not (parts.path.strip("/") and not parts.hostname):
        yield "must name a socket's path after three slashes, as in unix:///run/redis.sock."
    elif not is_socket and not parts.hostname:
        yield "names no host."
    elif not is_socket and not _is_host(parts.hostname or ""):
        yield f"names a host that cannot be one; {_QUOTE}."
    elif port == 0:
        yield "names port 0."
    elif not is_socket and not re.fullmatch(r"/?[0-9]*", parts.path):
        yield f"must end in the number of a database, as in /0; {_QUOTE}."
    else:
        yield from _query_problems(parts, is_socket)


def _is_host(name: str) -> bool:
    """Whether it can be asked for: an address, or a name whose parts are neither empty nor long."""
    if ":" in name:  # stood in brackets
        return is_address(name.partition("%")[0])
    try:
        name.encode("idna")
    except UnicodeError:
        return False
    return re.fullmatch(r"[\w.-]+", name) is not None


def _query_problems(parts: SplitResult, is_socket: bool) -> Iterator[str]:
    given = dict(parse_qsl(parts.query, keep_blank_values=True))
    if is_socket:
        known: tuple[str, ...] = ("db", "virtual_host")
    else:
        known = () if parts.scheme == "redis" else (*_FILES, *_CHOICES)
    for name, value in given.items():
        if name.startswith("ssl_") and parts.scheme == "redis":
            yield f"has {name}, so it must begin with rediss://."
        elif name not in known:
            yield f"has {name}, which is none of {', '.join(known) or 'its options: it has none'}."
        elif is_socket and not value.isdecimal():
            yield f"must have a number as {name}."
        elif name in _FILES and not Path(value).is_file():
            yield f"names {value} as {name}, and there is no such file."
        elif name in _CHOICES and value not in _CHOICES[name]:
            yield f"must have one of {', '.join(_CHOICES[name])} as {name}."


def for_kombu(url: str) -> str:
    """The URL as kombu reads it. Each Sentinel gets what stands with the first alone: kombu takes
    user, password and database from whichever it happens to ask."""
    if url.startswith(("unix://", "redis+socket://")):
        parts = urlsplit("unix" + url[url.index("://") :])
        query = dict(parse_qsl(parts.query))
        query["virtual_host"] = query.pop("db", query.get("virtual_host", "0"))
        return f"redis+socket://{parts.netloc}{parts.path}?{urlencode(query)}"
    if not url.startswith("sentinel://"):
        return url
    several = [urlsplit(part) for part in url.split(";")]
    first = several[0]
    user = first.netloc.rpartition("@")[0] or several[-1].netloc.rpartition("@")[0]
    path = first.path.strip("/") or several[-1].path.strip("/")
    query_text = first.query or several[-1].query
    return ";".join(
        "sentinel://"
        + (f"{user}@" if user else "")
        + part.netloc.rpartition("@")[2]
        + f"/{path}"
        + (f"?{query_text}" if query_text else "")
        for part in several
    )


def tls_of(url: str) -> dict[str, str] | None:
    """The ssl_ options of a URL by their names; None if it is not encrypted."""
    query = dict(parse_qsl(urlsplit(for_kombu(url).split(";")[0]).query))
    given = {name: value for name, value in query.items() if name.startswith("ssl_")}
    if url.startswith("rediss://") or given:
        return given
    return None


def database_of(url: str) -> int:
    """The number of the database that a URL names."""
    parts = urlsplit(for_kombu(url).split(";")[0])
    number = dict(parse_qsl(parts.query)).get("virtual_host") or parts.path.strip("/")
    return int(number) if number.isdecimal() else 0
