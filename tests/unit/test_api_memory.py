"""Memory that large bodies took goes back to the system."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable

import pytest

from app.api.app import create_app
from app.api.jobs import calls as jobs
from app.config.settings import Settings
from app.errors import RequestError

BODIES = """
from app.api.wire import memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

memory.give_back()
before, small = resident(), []
for _ in range(2):
    bodies = [bytearray() for _ in range(100)]
    for _ in range(50):
        for body in bodies:
            body += bytes(32_768)
    small.append([bytes(700) for _ in range(2_000)])  # lies among them, and stays
    del bodies, body
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_what_a_hundred_and_sixty_megabytes_of_bodies_took_is_given_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BODIES], capture_output=True, text=True, check=True
    )

    assert int(done.stdout) < 20_000_000


SCATTERED = """
import time
from app.api.wire import memory
from app.threads import beside

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

memory.TRIM_S = 0.01
memory.give_back()
with beside("trim", memory.keep_small):
    before = resident()
    blocks = [bytearray(4_000) for _ in range(40_000)]
    kept = blocks[::400]  # the last of the heap among them: its end cannot go back
    grown = resident() - before
    del blocks
    deadline = time.monotonic() + 30
    while resident() - before > grown / 4 and time.monotonic() < deadline:
        time.sleep(0.01)
print((resident() - before) / grown)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc")
def test_free_memory_between_blocks_in_use_is_given_back_as_well() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCATTERED], capture_output=True, text=True, check=True
    )

    assert float(done.stdout) < 0.5


def test_what_was_there_at_the_start_is_not_looked_through_by_the_collector() -> None:
    settled = (
        "import gc; from app.api.wire import memory; import app.api.app; memory.settle();"
        "print(gc.get_freeze_count(), len(gc.get_objects()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", settled], capture_output=True, text=True, check=True
    )

    frozen, looked_through = map(int, done.stdout.split())
    assert frozen > 100_000 and looked_through < frozen / 100


OLD = """
import gc, time, weakref
from app.api.wire import memory
from app.threads import beside

class Circle:
    def __init__(self):
        self.me = self

memory.settle()
held = [Circle() for _ in range(200_000)]
old = weakref.ref(held[0])
gc.collect(1)
looks = []
gc.callbacks.append(lambda phase, about: looks.append(about["generation"]))
young = [[] for _ in range(200_000)]
print(looks.count(2))
del held
memory.TRIM_S = memory.COLLECT_S = 0.01
with beside("trim", memory.keep_small):
    while old():
        time.sleep(0.01)
print("collected")
"""


def test_old_objects_are_looked_through_once_in_a_while_and_not_for_young_ones() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OLD], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.split() == ["0", "collected"]


def test_what_is_refused_of_a_bulk_keeps_nothing_of_what_was_sent(
    make_settings: Callable[..., Settings],
) -> None:
    app = create_app(
        make_settings(
            database={"url": "postgresql://nobody@127.0.0.1:1/none"},
            broker={"url": "redis://127.0.0.1:1/0"},
        )
    )
    raw = bytearray(json.dumps({"body": {"prompt": "mill", "max_tokens": -1}}), "ascii")

    refused = jobs._check_item(app.state.services, "default", raw, 0)

    assert isinstance(refused, RequestError)
    assert (refused.__traceback__, refused.__context__, refused.__cause__) == (None, None, None)
