"""Handlers of signals, for as long as something lasts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, Any], Any]
) -> Iterator[None]:
    """Within this, `handler` takes the signals; afterwards those do that did before.

    For the main thread alone, as Python has it.
    """
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
