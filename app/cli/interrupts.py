"""Signals that end what runs in a terminal, or in the background of one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from app.local.signals import handled


def how_to_stop() -> str:
    """A shell's job in the background does not get Ctrl-C."""
    return "Ctrl-C" if is_heeded(signal.SIGINT) else f"`kill {os.getpid()}`"


@contextmanager
def signals_interrupt(tell: Callable[[str], None]) -> Iterator[None]:
    """Take SIGTERM and a closed terminal as Ctrl-C, so that everything is stopped in order.

    Under nohup a terminal may be closed.
    """

    def interrupt(number: int, _: object) -> NoReturn:
        tell(f"{signal.Signals(number).name}: everything is being stopped.")
        raise KeyboardInterrupt

    with handled(filter(is_heeded, (signal.SIGTERM, signal.SIGHUP)), interrupt):
        yield


def is_heeded(number: signal.Signals) -> bool:
    """Whether whoever started us left this signal to us: nohup and shells ignore some for us."""
    return signal.getsignal(number) is not signal.SIG_IGN
