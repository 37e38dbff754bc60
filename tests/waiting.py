"""Waiting on events with a deadline, in place of sleep-and-hope."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")


def eventually(predicate: Callable[[], T], timeout_s: float = 10.0) -> T:
    """The first true answer of `predicate`; fails with its last answer after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not so within {timeout_s:g} s; last answer: {answer!r}")
        time.sleep(0.01)
