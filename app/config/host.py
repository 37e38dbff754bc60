"""Names and addresses of hosts, as they stand in URLs and headers; nothing is looked up."""

from __future__ import annotations

import ipaddress
from functools import lru_cache


@lru_cache(maxsize=1_000)  # asked of each request's Host
def is_address(host: str) -> bool:
    """Whether it is an IP address, which nobody can make a name of theirs lead to."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_localhost(host: str) -> bool:
    """Whether it is a name that browsers and resolvers keep for this machine (RFC 6761)."""
    return host == "localhost" or host.endswith(".localhost")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    if is_address(host):
        return ipaddress.ip_address(host).is_loopback
    return is_localhost(host.lower().rstrip("."))
