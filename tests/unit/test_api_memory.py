"""Memory that large bodies took goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

BODIES = """
from app.api import memory

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
