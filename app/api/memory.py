"""Memory that is free goes back to the system, and what stays is not looked through again."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from app.threads import Background

_MMAP_THRESHOLD: Final = -3  # the names are those of glibc's malloc.h
_TRIM_THRESHOLD: Final = -1
_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 131_072

TRIM_S: Final = 5.0
"""Between two looks for pages that are free in the middle of the heap."""


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


@contextmanager
def kept_small() -> Iterator[None]:
    """Inside, free pages between blocks in use go back, too: a storm of requests leaves many."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; lets other threads run
    stop = threading.Event()

    def trim_again_and_again() -> None:
        while trim is not None and not stop.wait(TRIM_S):
            trim(0)

    thread = Background("trim", trim_again_and_again, stop)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def settle() -> None:
    """Say that what is there now stays: libraries, models of requests, tokenizers.

    Python's collector would look through all of it again whenever some ten thousand objects came
    and went, and hold every thread for a tenth of a second.
    """
    gc.collect()
    gc.freeze()
