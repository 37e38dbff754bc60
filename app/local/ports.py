"""Ports of this machine: which can be had."""

from __future__ import annotations

import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Final

from app.errors import ConfigError, Unavailable

LOOPBACK: Final = "127.0.0.1"

_LENT: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST: Final = 10_000
_TRIES: Final = 64


def free_port(preferred: int = 0, host: str = LOOPBACK) -> int:
    """The preferred TCP port if it can be had, else any free one.

    Raises `ConfigError` if the host is no address of this machine.
    """
    if preferred:
        with suppress(OSError):
            return _bound(host, preferred)
    return _any_port(host)


def require_port(host: str, port: int, whose: str) -> int:
    """The port, or any free one for 0; raises `Unavailable` if somebody else has it."""
    if not port:
        return _any_port(host)
    try:
        return _bound(host, port)
    except OSError as error:
        raise Unavailable(
            f"{whose} cannot have port {port} of {host}: {error.strerror}. `ss -ltnp` shows whose "
            "it is."
        ) from None


def _any_port(host: str) -> int:
    """One below those that the kernel lends to outgoing connections: between this look and the
    server's start, a port that the kernel chose is often given to a connection of somebody else.
    """
    for _ in range(_TRIES):
        with suppress(OSError):
            return _bound(host, random.randrange(_LOWEST, _first_lent()))
    try:
        return _bound(host, 0)
    except OSError as error:
        raise ConfigError(f"Nothing can listen on {host}: {error.strerror}.") from None


def _first_lent() -> int:
    with suppress(OSError):  # no Linux
        return max(int(_LENT.read_text().split()[0]), _LOWEST + 1)
    return 32_768


def _bound(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])
