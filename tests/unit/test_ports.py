"""Ports of this machine: what is taken, or not ours to take, is told."""

from __future__ import annotations

import socket

import pytest

from app.errors import ConfigError, Unavailable
from app.local.ports import free_port, require_port

needs_ipv6 = pytest.mark.skipif(
    not socket.has_ipv6 or not socket.has_dualstack_ipv6(), reason="no IPv6 here"
)


@pytest.fixture(params=["127.0.0.1", "localhost", pytest.param("::1", marks=needs_ipv6)])
def host(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def _server(host: str, port: int = 0) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


def test_a_taken_port_is_replaced_by_a_free_one_on_every_loopback_address(host: str):
    port = free_port(host=host)
    assert free_port(port, host) == port

    with _server(host, port):
        assert free_port(port, host) != port


def test_a_foreign_server_on_a_port_that_is_needed_is_told(host: str):
    with _server(host) as foreign:
        port = foreign.getsockname()[1]

        with pytest.raises(Unavailable, match=f"Flower cannot have port {port} of .*in use"):
            require_port(host, port, "Flower")

    assert require_port(host, port, "Flower") == port


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "2001:db8::1"])
def test_a_host_that_is_no_address_of_this_machine_is_refused_by_name(host: str):
    with pytest.raises(ConfigError, match=f"Nothing can listen on {host}: "):
        free_port(8000, host)


def test_a_free_port_is_none_that_the_kernel_gives_to_others_meanwhile() -> None:
    with socket.socket() as outgoing:
        outgoing.bind(("127.0.0.1", 0))
        lent = outgoing.getsockname()[1]

    ports = {free_port() for _ in range(50)}

    assert max(ports) < lent
    assert len(ports) > 40, "two who ask at once are hardly given the same one"
