"""Memory that is free goes back to the system; what stays is not looked through again and again."""

from __future__ import annotations

import ctypes
import gc
import threading
import time
from typing import Final

from app.collector import keep_what_is_there

_MMAP_THRESHOLD: Final = -3  # the names are those of glibc's malloc.h
_TRIM_THRESHOLD: Final = -1
_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 131_072

TRIM_S: Final = 5.0
"""Between two looks for pages that are free in the middle of the heap."""

COLLECT_S: Final = 60.0
"""Between two looks through all objects for circles of them that nobody holds. Large bodies are
hundreds of thousands, and every thread waits for 50 ms. By itself Python would do it whenever a
quarter more has come: every few seconds, while there are such bodies."""

_NEVER: Final = 2**31 - 1


def give_back() -> None:
    """Let glibc give large blocks back as soon as they are free. Others' malloc is left alone.

    By itself it learns from the first large body that such blocks come again, and keeps them and
    all around them: a process that held 240 MB of bodies for a moment then has 200 MB for good.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE_BYTES)
        mallopt(_TRIM_THRESHOLD, _LARGE_BYTES)
        mallopt(_ARENA_MAX, 2)  # each of the threads that parse would have one of its own


def keep_small(stop: threading.Event) -> None:
    """Until it is to stop, free pages between blocks in use go back, too: storms leave many.

    Not on the event loop; lets other threads run, but while it collects.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # glibc's
    collect_at = time.monotonic() + COLLECT_S
    while not stop.wait(TRIM_S):
        if time.monotonic() >= collect_at:
            gc.collect()
            collect_at = time.monotonic() + COLLECT_S
        trim(0)


def settle() -> None:
    """Say that what is there now stays. Of what comes, young objects are the collector's own
    affair, old ones that of `keep_small`."""
    keep_what_is_there()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)
