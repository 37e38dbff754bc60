"""Ports of this machine: which can be had."""

from __future__ import annotations

import socket
from typing import Final

from app.errors import ConfigError, Unavailable

LOOPBACK: Final = "127.0.0.1"


def free_port(preferred: int = 0, host: str = LOOPBACK) -> int:
    """The preferred TCP port if it can be had, else any free one.

    Raises `ConfigError` if the host is no address of this machine.
    """
    try:
        return _bound(host, preferred)
    except OSError:
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
    try:
        return _bound(host, 0)
    except OSError as error:
        raise ConfigError(f"Nothing can listen on {host}: {error.strerror}.") from None


def _bound(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        return int(probe.getsockname()[1])
