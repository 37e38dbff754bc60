"""Fault 36: a hundred good clients beside a few that do everything bad at once."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Final, Self

from tests.chaos.burden import compare, p99
from tests.chaos.scene import Scene, fault
from tests.chaos.world import World

NUM_CLIENTS: Final = 100
THINKS_S: Final = 5.0
"""Pause of a good client between two jobs."""
GIVE_UP_S: Final = 30.0
"""A submission that is not accepted for so long counts as one that took so long."""
MOST_SLOWER: Final = 3.0
MOST_GROWTH: Final = (256 + 64 + 180) << 20
"""Of the API meanwhile: `max_held_bytes`, `max_unread_bytes`, and what it is working on."""
MOST_KEPT: Final = 100 << 20
BACK_S: Final = 60.0


@fault(36, "a hundred good clients beside everything bad at once", extra_s=10.0)
def front_door(scene: Scene) -> None:
    lasts_s = 20.0 if scene.is_full else 10.0
    with scene.load.held(), ThreadPoolExecutor(NUM_CLIENTS) as clients:
        _p99_ms(scene, clients, THINKS_S)  # connections are made, code is warm
        with _Memory(scene.world) as memory:
            compare(
                scene,
                "everything bad",
                lambda: _p99_ms(scene, clients, lasts_s),
                lambda: _everything_bad(scene),
                is_well=lambda quiet, noisy: noisy <= MOST_SLOWER * quiet,
            )
            grown = memory.most - memory.before
            scene.note(f"The API grew by {grown >> 20} MiB meanwhile.")
            scene.expect(grown <= MOST_GROWTH, "I8", f"The API grew by {grown >> 20} MiB.")
            scene.expect_soon(memory.is_back, BACK_S, "I8", "the API's memory was back")


def _p99_ms(scene: Scene, clients: ThreadPoolExecutor, lasts_s: float) -> float:
    """Of submissions, until they are accepted, and of looks at their jobs."""
    until = time.monotonic() + lasts_s
    took_ms: list[float] = []

    def be_good(number: int) -> None:
        time.sleep(THINKS_S * number / NUM_CLIENTS)
        while time.monotonic() < until:
            spec = scene.load.make()
            took_ms.append(_ms(partial(scene.load.submit, spec, give_up_s=GIVE_UP_S)))
            if spec.nonce in scene.load.accepted:
                took_ms.append(_ms(partial(scene.load.poll, spec.nonce)))
            time.sleep(THINKS_S)

    list(clients.map(be_good, range(NUM_CLIENTS)))
    return p99(took_ms)


def _ms(ask: Callable[[], object]) -> float:
    began = time.perf_counter()
    ask()
    return 1000 * (time.perf_counter() - began)


@contextmanager
def _everything_bad(scene: Scene) -> Iterator[None]:
    """Inside, `tests.chaos.abuse` goes on; then its answers are looked at."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.chaos.abuse", scene.world.api_url],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout and process.stdout.readline()
        time.sleep(2.0)  # all of it has begun
        yield
    finally:
        told, _ = process.communicate(timeout=60)
    answers = json.loads(told)
    scene.note(f"The bad ones were answered: {told.strip()}")
    statuses = {status for found in answers.values() for status in found}
    scene.expect(not statuses & {"202", "500"}, "I8", "One was accepted, or met a bug.")


class _Memory:
    """Of the API, in resident bytes; drawn while the block runs."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.before = self.most = self._now()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def is_back(self) -> bool:
        return self._now() <= self.before + MOST_KEPT

    def _now(self) -> int:
        return self._world.rss()["api"]

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.most = max(self.most, self._now())
