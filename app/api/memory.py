"""Memory that is free goes back to the system."""

from __future__ import annotations

import ctypes
from typing import Final

_MMAP_THRESHOLD: Final = -3  # the names are those of glibc's malloc.h
_TRIM_THRESHOLD: Final = -1
_ARENA_MAX: Final = -8
_LARGE_BYTES: Final = 131_072


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
