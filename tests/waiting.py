"""Waiting on events with a deadline, in place of sleep-and-hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

import pytest

T = TypeVar("T")

LEAST_S: Final = 60.0
"""No deadline is shorter, for a machine may be busy: it costs time only where a test fails."""
PAUSE_S: Final = (0.01, 0.05)
"""From the first to the longest between two looks: most ask a database over a new connection, and
what they wait for needs the processor, too."""


def eventually(predicate: Callable[[], T], timeout_s: float = LEAST_S) -> T:
    """The first true answer of `predicate`; fails with its last answer after `timeout_s`."""
    began = time.monotonic()
    timeout_s = max(timeout_s, LEAST_S)
    while True:
        answer = predicate()
        if answer:
            return answer
        waited = time.monotonic() - began
        if waited > timeout_s:
            pytest.fail(f"not so within {timeout_s:g} s; last answer: {answer!r}")
        time.sleep(min(max(PAUSE_S[0], waited / 10), PAUSE_S[1]))
