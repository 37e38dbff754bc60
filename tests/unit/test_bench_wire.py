"""The wire between namespaces, with pipes in place of devices."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from app.bench.wire import Wire

HERE, NEAR, OTHER, FAR = (f"10.77.0.{number}" for number in range(1, 5))


class Net:
    """A wire whose devices are the ends of pipes."""

    def __init__(self) -> None:
        pipes = {address: os.pipe() for address in (HERE, NEAR, OTHER, FAR)}
        self._read_ends = {address: ends[0] for address, ends in pipes.items()}
        self._files = [file for ends in pipes.values() for file in ends]
        for file in self._read_ends.values():
            os.set_blocking(file, False)
        devices = {socket.inet_aton(address): ends[1] for address, ends in pipes.items()}
        self.wire = Wire(devices, socket.inet_aton(HERE))

    def send(self, source: str, target: str, now_s: float = 0.0) -> None:
        addresses = socket.inet_aton(source) + socket.inet_aton(target)
        self.wire.take(b"\x45" + bytes(11) + addresses, now_s)

    def got(self, address: str) -> bool:
        try:
            return bool(os.read(self._read_ends[address], 100))
        except BlockingIOError:
            return False

    def close(self) -> None:
        for file in self._files:
            os.close(file)


@pytest.fixture
def net() -> Iterator[Net]:
    net = Net()
    yield net
    net.close()


def test_a_packet_to_what_is_far_arrives_when_its_time_has_come(net: Net) -> None:
    net.wire.set(f"25 0 {FAR}")

    net.send(NEAR, FAR, now_s=1.0)
    net.send(FAR, NEAR, now_s=1.01)

    assert net.wire.pause_s(1.0) == pytest.approx(0.025)
    net.wire.give(1.024)
    assert not net.got(FAR)
    net.wire.give(1.026)
    assert net.got(FAR) and not net.got(NEAR)
    net.wire.give(1.036)
    assert net.got(NEAR)


def test_what_is_near_and_this_machine_itself_are_concerned_by_nothing(net: Net) -> None:
    net.wire.set(f"25 1 {FAR}")

    for source, target in ((NEAR, OTHER), (HERE, FAR), (FAR, HERE)):
        net.send(source, target)
        assert net.got(target)


def test_without_an_address_each_is_far_from_each(net: Net) -> None:
    net.wire.set("25 0")

    net.send(NEAR, OTHER, now_s=0.0)

    assert not net.got(OTHER)
    net.wire.give(0.03)
    assert net.got(OTHER)


def test_a_share_of_the_packets_is_lost_and_so_is_what_nobody_is_to_get(net: Net) -> None:
    net.wire.set(f"0 1 {FAR}")

    net.send(NEAR, FAR)
    net.send(NEAR, "10.77.0.99")
    net.wire.give(1.0)

    assert not net.got(FAR)
    assert net.wire.pause_s(0.0) == 1.0
