"""Machines on one machine: network namespaces, and a wire between them with delay and loss.

Linux' own netem does the same where the kernel has it. This needs the TUN driver and root: each
namespace has a device whose packets come to this process, which hands them on when their time has
come, or not at all.

    python -m app.bench.wire 10.77.0.1= 10.77.0.2=postgres …

An address without a namespace is on this machine itself. Each line of the standard input, as in
`25 0.001 10.77.0.5 10.77.0.6`, sets the delay one way in ms, the share of packets that is lost, and
what is far from all else; without an address each is far from each. Packets from and to this
machine itself are concerned by nothing.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import socket
import struct
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Final

_TUNSETIFF: Final = 0x400454CA
_TUN_WITHOUT_HEADER: Final = 0x0001 | 0x1000
MTU: Final = 1_500
QUEUE: Final = 10_000
"""Packets on the wire at most, as in netem's limit: further ones are lost."""


@dataclass(slots=True)
class Wire:
    """Packets on their way between devices, by address."""

    devices: dict[bytes, int]  #: file descriptors by IPv4 address
    here: bytes  #: the address of this machine itself: its packets are concerned by nothing
    delay_s: float = 0.0
    loss: float = 0.0
    far: frozenset[bytes] = frozenset()
    _under_way: list[tuple[float, int, int, bytes]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def set(self, line: str) -> None:
        delay_ms, loss, *far = line.split()
        self.delay_s, self.loss = float(delay_ms) / 1000, float(loss)
        self.far = frozenset(map(socket.inet_aton, far))

    def take(self, packet: bytes, now_s: float) -> None:
        """A packet came from a device."""
        source, target = packet[12:16], packet[16:20]
        device = self.devices.get(target)
        if device is None or packet[0] >> 4 != 4:
            return
        is_far = not self.far or (source in self.far) != (target in self.far)
        if not is_far or self.here in (source, target):
            _hand_on(device, packet)
        elif random.random() >= self.loss and len(self._under_way) < QUEUE:
            due = (now_s + self.delay_s, next(self._numbers), device, packet)
            heapq.heappush(self._under_way, due)

    def give(self, now_s: float) -> None:
        """Hand on what has arrived by now."""
        while self._under_way and self._under_way[0][0] <= now_s:
            _, _, device, packet = heapq.heappop(self._under_way)
            _hand_on(device, packet)

    def pause_s(self, now_s: float) -> float:
        return max(0.0, self._under_way[0][0] - now_s) if self._under_way else 1.0


def _hand_on(device: int, packet: bytes) -> None:
    with suppress(OSError):  # its queue is full: the packet is lost
        os.write(device, packet)


def main(arguments: list[str]) -> None:
    named = dict(argument.split("=") for argument in arguments)
    devices = {socket.inet_aton(address): _device(address, to) for address, to in named.items()}
    here = next(socket.inet_aton(address) for address, to in named.items() if not to)
    wire = Wire(devices, here)
    print("up", flush=True)
    files = [sys.stdin.fileno(), *devices.values()]
    while True:
        ready, _, _ = select.select(files, [], [], wire.pause_s(time.monotonic()))
        for file in ready:
            if file != sys.stdin.fileno():
                wire.take(os.read(file, MTU), time.monotonic())
            elif line := os.read(file, 4_096).decode():
                wire.set(line)
                print("set", flush=True)
            else:
                return
        wire.give(time.monotonic())


def _device(address: str, namespace: str) -> int:
    """A TUN device with this address, in this namespace; its packets are read from the file."""
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    name = f"gm{address.rpartition('.')[2]}"
    request = struct.pack("16sH14x", name.encode(), _TUN_WITHOUT_HEADER)
    fcntl.ioctl(file, _TUNSETIFF, request)
    inside = ["ip", "netns", "exec", namespace] if namespace else []
    if namespace:
        _run("ip", "link", "set", name, "netns", namespace)
    _run(*inside, "ip", "address", "add", f"{address}/24", "dev", name)
    _run(*inside, "ip", "link", "set", name, "up", "mtu", str(MTU))
    return file


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
