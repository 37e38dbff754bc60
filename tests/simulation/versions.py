"""Code of a later version in this one: processes that know one more format of requests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from app.requests import bodies
from app.store.submissions import NewJob

PRESENT: Final = bodies.FORMAT
LATER: Final = PRESENT + 1


@contextmanager
def speaking(format: int) -> Iterator[None]:
    """Run what is inside as code whose latest format of requests is this one."""
    defaults = NewJob.__init__.__kwdefaults__
    before = bodies.FORMAT
    bodies.FORMAT = defaults["format"] = format  # type: ignore[misc]
    try:
        yield
    finally:
        bodies.FORMAT = defaults["format"] = before  # type: ignore[misc]
