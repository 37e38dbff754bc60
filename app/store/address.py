"""A database URL: what libpq is told, and what the server is told on every connection.

libpq reads the URL, so whatever it takes is taken here: several hosts, sockets, certificates,
`target_session_attrs`. Settings in its `options` live beside those of Gristmill.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Self

import psycopg
from psycopg.conninfo import conninfo_to_dict

from app.errors import ConfigError

DEFAULTS: Final[dict[str, str]] = {
    # Of several hosts the one that takes writes; one that only reads is as good as away.
    "target_session_attrs": "read-write",
    "connect_timeout": "3",
    # These notice a silent server within about ten seconds.
    "keepalives": "1",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
"""libpq's parameters, unless the URL has others."""

_URL: Final = re.compile(r"(?P<backend>[a-z]+)(\+\w+)?://(?P<rest>.*)", re.DOTALL)
_UNKNOWN: Final = re.compile(r'invalid URI query parameter: "(\w{1,40})"')
_SETTING: Final = re.compile(r"(?:-c|--)([\w.-]+)=(.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Address:
    """Where Postgres is, as whom to go there, and what to tell it."""

    libpq: Mapping[str, str]  #: libpq's parameters without `options`
    settings: Mapping[str, str] = field(default_factory=dict)  #: of the server, by name
    other_options: tuple[str, ...] = ()  #: of `options`, for whoever stands before the server

    @classmethod
    def of(cls, url: str, name: str = "database.url") -> Self:
        """Raises `ConfigError`, which never quotes what may be a part of the password."""
        match = _URL.fullmatch(url)
        if match is None:
            raise ConfigError(f"{name} is not a URL, as in postgresql://host/database.")
        if match["backend"] not in ("postgres", "postgresql"):
            raise ConfigError(f"{name} does not begin with postgresql://.")
        try:
            given = conninfo_to_dict(f"postgresql://{match['rest']}")
        except psycopg.Error as error:
            raise ConfigError(f"{name} {_what_is_wrong(url, str(error))}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{name} holds bytes, percent-encoded, that are no UTF-8.") from None
        libpq = {key: str(value) for key, value in given.items()}
        _check(libpq, name)
        settings, others = _split_options(libpq.pop("options", ""))
        return cls(DEFAULTS | libpq, settings, others)

    def with_settings(self, settings: Mapping[str, str]) -> Self:
        """The same with these settings of the server, which win over those in the URL."""
        return replace(self, settings={**self.settings, **settings})

    def with_defaults(self, **libpq: str) -> Self:
        """The same with these parameters of libpq where the URL leaves them open."""
        is_open = {
            key: value
            for key, value in libpq.items()
            if key not in self.libpq or self.libpq[key] == DEFAULTS.get(key)
        }
        return replace(self, libpq={**self.libpq, **is_open})

    @property
    def options(self) -> str:
        """libpq's `options` with all settings."""
        settings = (f"-c {_escape(name)}={_escape(it)}" for name, it in self.settings.items())
        return " ".join([*map(_escape, self.other_options), *settings])

    @property
    def begin(self) -> str:
        """SQL that begins a transaction with these settings in force until it ends."""
        if not self.settings:
            return "BEGIN"
        calls = (f"set_config({quote(name)}, {quote(it)}, true)" for name, it in self._ordered)
        return "BEGIN; SELECT " + ", ".join(calls)

    @property
    def _ordered(self) -> list[tuple[str, str]]:
        return sorted(self.settings.items())


def _what_is_wrong(url: str, message: str) -> str:
    encode = "write other characters of user and password percent-encoded, as %40 for @."
    unknown = _UNKNOWN.search(message)
    if unknown and "@" not in url.partition("?")[2]:  # else it may be a part of the password
        return (
            f"has the parameter {unknown[1]}, which Postgres' client library does not know: "
            "leave it out."
        )
    if "percent-encoded" in message:
        return f"has a % that encodes nothing: {encode}"
    return f"cannot be read: it is postgresql://user:password@host:5432/database; {encode}"


def _check(libpq: Mapping[str, str], name: str) -> None:
    """Refuse what a character in the password that means something else has made."""
    ports = libpq.get("port", "").split(",")
    is_torn = any("@" in libpq.get(key, "") for key in ("host", "dbname"))
    if is_torn or any(port and not port.isdecimal() for port in ports):
        raise ConfigError(
            f"{name} cannot be read: its port is no number, or its password holds a character "
            "that has to be percent-encoded, as %40 for @, %3A for : and %2F for /."
        )


def _split_options(options: str) -> tuple[dict[str, str], tuple[str, ...]]:
    """Settings, and what else there is: words apart by space, a backslash before one keeps it."""
    words = [
        re.sub(r"\\(.)", r"\1", word, flags=re.DOTALL)
        for word in re.findall(r"(?:\\.|[^\s\\])+", options, re.DOTALL)
    ]
    settings: dict[str, str] = {}
    others = []
    waiting = iter(words)
    for word in waiting:
        given = word + next(waiting, "") if word == "-c" else word
        if match := _SETTING.fullmatch(given):
            settings[match[1].replace("-", "_").lower()] = match[2]
        else:
            others.append(given)
    return settings, tuple(others)


def _escape(word: str) -> str:
    return re.sub(r"([\s\\])", r"\\\1", word)


def quote(value: str) -> str:
    """A literal of SQL."""
    return "'" + value.replace("'", "''") + "'"
