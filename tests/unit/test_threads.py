"""Threads that a process cannot do without."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading

import pytest

from app.threads import Background


def test_a_thread_that_fails_is_started_again(caplog: pytest.LogCaptureFixture) -> None:
    # given work that fails twice and then does what it is for
    calls, done = [0], threading.Event()

    def work() -> None:
        calls[0] += 1
        if calls[0] < 3:
            raise RuntimeError("PROMPT".lower())
        done.set()

    # when it runs in the background
    thread = Background("needed", work, restart_s=0.001)
    thread.start()

    # then it is called until it returns, and the log says where it failed, and no more
    assert done.wait(10)
    thread.join()
    assert calls == [3]
    assert "The thread needed failed: RuntimeError in test_threads.py" in caplog.text
    assert "prompt" not in caplog.text  # an exception may quote one


def test_a_thread_that_fails_time_after_time_ends_its_process() -> None:
    program = """
import time
from app.threads import Background
Background("needed", lambda: 1 / 0, restart_s=0.001).start()
time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )

    assert done.returncode == os.EX_SOFTWARE
    assert "The process ends: the thread needed failed 8 times in a row." in done.stderr


def test_a_thread_that_is_told_to_stop_is_not_started_again() -> None:
    stopping, calls = threading.Event(), [0]

    def work() -> None:
        calls[0] += 1
        stopping.set()
        raise SystemExit

    thread = Background("needed", work, stopping)
    logging.disable(logging.CRITICAL)
    try:
        thread.start()
        thread.join(10)
    finally:
        logging.disable(logging.NOTSET)

    assert (thread.is_alive(), calls) == (False, [1])
