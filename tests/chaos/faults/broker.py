"""Faults 15 to 19: Redis is emptied, killed, frozen, cut off and full."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http import HTTPStatus
from typing import Final

import psutil

from tests.chaos.evidence import Evidence
from tests.chaos.scene import Scene, fault
from tests.chaos.world import PARTS, WORKERS, eventually

CLEAR: Final = {HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.SERVICE_UNAVAILABLE}


@fault(15, "Redis FLUSHALL", checks=("I7",))
def redis_emptied(scene: Scene) -> None:
    for _ in range(3):
        with scene.world.redis_client() as client:
            client.flushall()
        scene.pause(0.3, 1.0)


@fault(16, "Redis SIGKILL and restart, with its file and without", checks=("I7",))
def redis_killed(scene: Scene) -> None:
    _kill_redis(scene)  # appendfsync everysec, the server's default
    scene.pause(0.2, 0.5)
    scene.world.redis.start()
    scene.pause(1.0, 2.0)
    _kill_redis(scene)
    for file in (scene.world.folder / "redis").glob("*.aof"):
        file.unlink()  # as a server without persistence comes back
    scene.world.redis.start()


@fault(17, "Redis SIGSTOP, then SIGCONT", checks=("I7",), extra_s=5.0)
def redis_frozen(scene: Scene) -> None:
    frozen_s = 60.0 if scene.is_full else 8.0  # longer than every time-out of ours
    server = psutil.Process(_redis_pid(scene))
    with expect_same_workers(scene):
        server.suspend()
        try:
            slowest_s = submit_for(scene, frozen_s)
        finally:
            server.resume()
        scene.note(f"Frozen for {frozen_s:.0f} s; the slowest submission took {slowest_s:.2f} s.")
        expect_both_consume(scene)
    scene.afterwards(partial(expect_clear_answers, scene))


@fault(18, "connections to Redis reset every 200 ms", checks=("I7",))
def redis_reset_storm(scene: Scene) -> None:
    proxies = [scene.world.proxies[part, "redis"] for part in PARTS]
    before = sum(proxy.counts.reset for proxy in proxies)
    with expect_same_workers(scene):
        for proxy in proxies:
            proxy.reset_every(0.2)
        try:
            submit_for(scene, 20.0 if scene.is_full else 4.0)
        finally:
            for proxy in proxies:
                proxy.heal()
        expect_both_consume(scene)
    resets = sum(proxy.counts.reset for proxy in proxies) - before
    scene.note(f"{resets} connections were reset.")
    scene.afterwards(partial(expect_clear_answers, scene))


@fault(19, "Redis full: noeviction, then allkeys-lru", checks=("I7",))
def redis_full(scene: Scene) -> None:
    with expect_same_workers(scene), scene.world.redis_client() as client:
        try:
            for policy in ("noeviction", "allkeys-lru"):
                client.config_set("maxmemory-policy", policy)
                client.config_set("maxmemory", 1)
                scene.pause(2.0, 3.0)
            evicted = client.info("stats")["evicted_keys"]
        finally:
            client.config_set("maxmemory", 0)
            client.config_set("maxmemory-policy", "noeviction")
    scene.note(f"{evicted} keys were evicted.")
    scene.afterwards(partial(expect_clear_answers, scene))


def _redis_pid(scene: Scene) -> int:
    with scene.world.redis_client() as client:
        return int(client.info("server")["process_id"])


def _kill_redis(scene: Scene) -> None:
    os.kill(_redis_pid(scene), signal.SIGKILL)
    eventually(lambda: scene.world.redis.exit_code is not None, 10, "Redis ended")


def submit_for(scene: Scene, duration_s: float) -> float:
    """Submit now and again for a while; the longest time until a job was accepted."""
    slowest_s = 0.0
    until = time.monotonic() + duration_s
    while time.monotonic() < until:
        began = time.monotonic()
        scene.load.submit(scene.load.make())
        slowest_s = max(slowest_s, time.monotonic() - began)
        scene.pause(0.2, 0.6)
    return slowest_s


@contextmanager
def expect_same_workers(scene: Scene) -> Iterator[None]:
    """The workers of the beginning are those of the end."""
    before = {part: scene.world.pid(part) for part in WORKERS}
    yield
    after = {part: scene.world.pid(part) for part in WORKERS}
    scene.expect(after == before, "I7", "A worker had to be started again.")


def expect_both_consume(scene: Scene, within_s: float = 30.0) -> None:
    """Every worker takes messages again, by itself; the time is noted."""
    began, since = time.monotonic(), scene.world.now()
    left = set(WORKERS)
    while left and time.monotonic() - began < within_s:
        scene.load.submit(*(scene.load.make("sleep 50") for _ in range(40)), way="bulk")
        left -= {part for part in left if _has_claimed(scene, part, since)}
    for part in left:
        scene.expect(False, "I7", f"{part} took nothing for {within_s:.0f} s after healing.")
    scene.note(f"Both workers took jobs again after {time.monotonic() - began:.1f} s.")


def _has_claimed(scene: Scene, part: str, since: str) -> bool:
    return bool(
        scene.world.rows(
            "SELECT FROM attempts JOIN workers ON workers.id = worker_id"
            " WHERE claimed_at > %s AND pid = %s LIMIT 1",
            since,
            scene.world.pid(part),
        )
    )


def expect_clear_answers(scene: Scene, evidence: Evidence) -> None:
    """Every submission over HTTP was answered, and with yes or a clear no."""
    answers = [e for e in evidence.events if e.way in ("http", "bulk") and e.phase != "invoke"]
    statuses = Counter(event.status or event.detail for event in answers)
    scene.note(f"Answers to submissions: {dict(statuses)}.")
    wrong = statuses.keys() - CLEAR
    scene.expect(not wrong, "I8", f"Submissions were answered with {wrong}.")
