"""Signals of the tests and of their child processes, whoever runs them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_RESTORE = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execvp(sys.argv[1], sys.argv[1:])
"""

HEEDING_SIGNALS: Final = (sys.executable, "-c", _RESTORE)
"""Before a command: it heeds Ctrl-C, which a shell's job in the background ignores, and with it
every process that it starts."""


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Inside, this process heeds them as a program that somebody starts in a terminal."""
    handlers = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
