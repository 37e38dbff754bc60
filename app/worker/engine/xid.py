"""What the NVIDIA driver says in the kernel's log, and what is to be done about it.

A line `NVRM: Xid (PCI:0000:06:00): 79, …` names a device and a code. The codes' remedies are those
of NVIDIA's catalogue, column "immediate action":
https://docs.nvidia.com/deploy/xid-errors/analyzing-xid-catalog.html
"""

from __future__ import annotations

import enum
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.errors import ConfigError
from app.threads import Background

log = logging.getLogger(__name__)

LOOK_S: Final = 0.2
PIECE_BYTES: Final = 65_536


class Remedy(enum.StrEnum):
    """What a worker does about a code."""

    IGNORE = "ignore"  #: nothing is wrong with the work
    RESTART = "restart"  #: the process has lost the device's context; the device is well
    LEAVE = "leave"  #: the device or its machine needs a hand: take no work there


_RESTART: Final = frozenset(
    {8, 11, 13, 25, 31, 32, 39, 40, 41, 60, 75, 76, 77, 80, 88, 89, 94, 139}
    | {*range(68, 73), *range(82, 87), *range(96, 106), *range(126, 136)}
)
"""RESTART_APP."""

_IGNORE: Final = frozenset(
    {14, 37, 38, 43, 44, 45, 63, 66, 67, 92, 93, 106, 107, 108, 121, 137, 141, 152, 153}
    | {157, 160, 161}
)
"""IGNORE; and 45, which only says that a process was ended while it used the device."""

_LINE: Final = re.compile(r"NVRM: Xid \((?:PCI:)?(?P<device>[0-9A-Fa-f:.]+)[^)]*\): (?P<code>\d+)")


@dataclass(frozen=True, slots=True)
class Xid:
    device: str  #: PCI address as the driver prints it, such as 0000:06:00
    code: int

    @property
    def remedy(self) -> Remedy:
        """All codes that NVIDIA has no simple answer to, and unknown ones, are `LEAVE`."""
        if self.code in _RESTART:
            return Remedy.RESTART
        return Remedy.IGNORE if self.code in _IGNORE else Remedy.LEAVE

    def is_of(self, pci_address: str) -> bool:
        """Whether it is this device's, in any of the usual spellings; all are, of an empty one."""
        return _short(self.device) == _short(pci_address) if pci_address else True


def _short(address: str) -> str:
    """0000:06:00 of 00000000:06:00.0: the domain's leading zeros and the function left out."""
    *domain, bus, device = address.lower().partition(".")[0].split(":")
    return f"{int(domain[0], 16) if domain else 0:x}:{bus}:{device}"


def find(lines: Iterable[str]) -> list[Xid]:
    """The Xid events among lines of a kernel log."""
    return [
        Xid(found["device"], int(found["code"])) for line in lines if (found := _LINE.search(line))
    ]


class XidWatch(Background):
    """Follows a kernel log from its end on: /dev/kmsg, or a file that syslog writes."""

    def __init__(self, path: Path, pci_address: str, on_xid: Callable[[Xid], object]) -> None:
        """`on_xid` is called in this thread, for each event of the device that needs a remedy.

        Raises `ConfigError` if the log cannot be read.
        """
        self._stopping = threading.Event()
        super().__init__("xid", self._follow, self._stopping)
        self._path = path
        self._pci_address = pci_address
        self._on_xid = on_xid
        try:
            self._file = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            raise ConfigError(
                f"worker.kernel_log: {path} cannot be read ({error.strerror})."
            ) from None
        os.lseek(self._file, 0, os.SEEK_END)

    def _follow(self) -> None:
        rest = b""
        while not self._stopping.wait(LOOK_S):
            *lines, rest = (rest + self._read()).split(b"\n")
            for xid in find(line.decode(errors="replace") for line in lines):
                if xid.is_of(self._pci_address):
                    self._tell(xid)

    def stop(self) -> None:
        self._stopping.set()

    def _tell(self, xid: Xid) -> None:
        extra = {"action": "xid", "code": xid.code, "device": xid.device, "remedy": xid.remedy}
        log.error("The NVIDIA driver reported an error of the device.", extra=extra)
        if xid.remedy is not Remedy.IGNORE:
            self._on_xid(xid)

    def _read(self) -> bytes:
        """What is new. A file that was replaced, as logs are, is read from its beginning."""
        pieces = []
        try:
            while piece := os.read(self._file, PIECE_BYTES):
                pieces.append(piece)
            if self._path.stat().st_ino != os.fstat(self._file).st_ino:
                os.close(self._file)
                self._file = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        except (BlockingIOError, FileNotFoundError):  # /dev/kmsg has no more; it is being replaced
            pass
        except OSError as error:  # /dev/kmsg was overwritten before it was read
            log.warning("A part of the kernel's log was not read (%s).", type(error).__name__)
        return b"".join(pieces)
