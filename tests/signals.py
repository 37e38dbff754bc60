"""Signals of child processes, whoever runs the tests."""

from __future__ import annotations

import sys
from typing import Final

_RESTORE = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""

HEEDING_SIGNALS: Final = (sys.executable, "-c", _RESTORE)
"""Before a command: it heeds Ctrl-C, which a shell's job in the background ignores, and with it
every process that it starts."""
