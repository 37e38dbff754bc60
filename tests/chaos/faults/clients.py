"""Faults 28 and 29: more work than there is room for, and clients that behave badly."""

from __future__ import annotations

import contextlib
import gzip
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any, Final

import httpx

from app.local.ports import LOOPBACK
from tests.chaos.burden import compare, p99
from tests.chaos.evidence import Evidence
from tests.chaos.scene import Scene, fault
from tests.chaos.spec import Spec
from tests.chaos.world import MODELS, World

OVERLOAD: Final = 3
LEAST_GOODPUT: Final = 0.9
NUM_QUEUED: Final = 40
"""Jobs that the API lets wait during the overload, beside some six batches that the workers hold:
about three seconds of work."""
JOB_MS: Final = 500
"""A batch takes this long whatever its size, so that not this machine's cores are the capacity."""
PATIENCE_S: Final = 8.0
"""A job's deadline: most are in time if the queue is kept short."""
HURRIED_S: Final = 2.0
"""The deadline of every fifth: not all of them are in time."""
MOST_GROWTH: Final = 150 << 20


# ── 28: overload ────────────────────────────────────────────────────────────────────────────────


@fault(28, "overload, three times the capacity, with clients that try again", extra_s=15.0)
def overload(scene: Scene) -> None:
    lasts_s = 30.0 if scene.is_full else 10.0
    world = scene.world
    with scene.load.held():
        peak = _goodput_when_just_full(scene, lasts_s)
        with _bounded_queue(world):
            before = sum(world.rss().values())
            goodput, offered = _goodput_when_overloaded(scene, peak, lasts_s)
            grown = sum(world.rss().values()) - before
    scene.note(
        f"Peak {peak:.1f} jobs/s; with {offered:.1f} jobs/s offered {goodput:.1f}, "
        f"{100 * goodput / peak:.0f} %. Memory grew by {grown >> 20} MiB."
    )
    scene.expect(goodput >= LEAST_GOODPUT * peak, "I8", f"Goodput fell to {goodput / peak:.2f}.")
    scene.expect(grown < MOST_GROWTH, "I8", f"Memory grew by {grown >> 20} MiB.")
    scene.afterwards(lambda evidence: _look_at_overload(scene, evidence))


@contextmanager
def _bounded_queue(world: World) -> Iterator[None]:
    world.environment["api"]["GRISTMILL_API__MAX_QUEUED_JOBS"] = str(NUM_QUEUED)
    world.restart("api")
    try:
        yield
    finally:
        del world.environment["api"]["GRISTMILL_API__MAX_QUEUED_JOBS"]
        world.restart("api")


def _goodput_when_just_full(scene: Scene, lasts_s: float) -> float:
    """Jobs per second when there is always work, and never much too much."""
    with _counting(scene) as goodput:
        until = time.monotonic() + lasts_s
        while time.monotonic() < until:
            if scene.world.value("SELECT count(*) FROM jobs WHERE finished_at IS NULL") < 150:
                scene.load.submit(*(_long_job(scene) for _ in range(20)), way="bulk")
            time.sleep(0.1)
    return goodput[0]


def _goodput_when_overloaded(scene: Scene, peak: float, lasts_s: float) -> tuple[float, float]:
    """Goodput, and how much was offered: new jobs come on a schedule, whatever becomes of them."""
    size = 10
    every_s = size / (OVERLOAD * peak)
    groups = [[_long_job(scene) for _ in range(size)] for _ in range(int(lasts_s / every_s))]
    with ThreadPoolExecutor(24) as clients, _counting(scene) as goodput:
        began = time.monotonic()
        for number, group in enumerate(groups):
            time.sleep(max(0.0, began + number * every_s - time.monotonic()))
            clients.submit(scene.load.submit, *group, way="bulk", give_up_s=PATIENCE_S)
        offered = size * len(groups) / (time.monotonic() - began)
        time.sleep(max(0.0, began + lasts_s - time.monotonic()))
        clients.shutdown(wait=False, cancel_futures=True)
    return goodput[0], offered


def _long_job(scene: Scene) -> Spec:
    is_hurried = scene.rng.randrange(5) == 0
    return scene.load.make(
        f"sleep {JOB_MS}",
        model=MODELS[0],
        deadline_s=HURRIED_S if is_hurried else PATIENCE_S,
        expect=("completed", "expired"),
    )


@contextmanager
def _counting(scene: Scene) -> Iterator[list[float]]:
    """Completed jobs per second of the block, once it has ended; its first part does not count."""
    found: list[float] = []
    time.sleep(2 * JOB_MS / 1000)
    since, began = scene.world.now(), time.monotonic()
    yield found
    completed = scene.world.value(
        "SELECT count(*) FROM jobs WHERE state = 'completed' AND finished_at > %s", since
    )
    found.append(completed / (time.monotonic() - began))


def _look_at_overload(scene: Scene, evidence: Evidence) -> None:
    refused = sum(event.status == HTTPStatus.TOO_MANY_REQUESTS for event in evidence.events)
    expired = {row["id"]: row["deadline"] for row in evidence.jobs if row["state"] == "expired"}
    late = [
        row
        for row in evidence.attempts
        if row["job_id"] in expired and row["claimed_at"] > expired[row["job_id"]]
    ]
    scene.note(f"{refused} submissions were answered 429; {len(expired)} jobs expired.")
    scene.expect(refused > 0, "I8", "Nothing was refused: there was no overload.")
    scene.expect(not late, "I8", f"{len(late)} jobs were run after they had expired.")


# ── 29: bad clients ─────────────────────────────────────────────────────────────────────────────


@fault(29, "slow, vanished and greedy clients; a poll storm; bombs", extra_s=5.0)
def bad_clients(scene: Scene) -> None:
    number = 2_000 if scene.is_full else 100
    lasts_s = 10.0 if scene.is_full else 5.0
    with _slow_bodies(scene, number // 10):
        _vanish(scene, 50)
        _check_bombs(scene)
        compare(
            scene,
            f"{number} long polls beside {number // 10} slow bodies",
            lambda: _p99_ms(scene, lasts_s),
            lambda: _poll_storm(scene, number),
            is_well=lambda quiet_ms, noisy_ms: noisy_ms < 2 * quiet_ms + 250,
        )


def _p99_ms(scene: Scene, lasts_s: float) -> float:
    """Of a well-behaved client that submits and looks, ten times a second."""
    took_ms: list[float] = []
    until = time.monotonic() + lasts_s
    while time.monotonic() < until:
        took_ms.append(_request_ms(scene))
        time.sleep(0.05)
    return p99(took_ms)


def _request_ms(scene: Scene) -> float:
    spec = scene.load.make()
    began = time.perf_counter()
    scene.load.submit(spec)
    scene.load.poll(spec.nonce)
    return 1000 * (time.perf_counter() - began)


def _connect(scene: Scene) -> socket.socket:
    port = int(scene.world.api_url.rpartition(":")[2])
    return socket.create_connection((LOOPBACK, port), timeout=30)


_HEAD: Final = (
    b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100000\r\n\r\n"
)


@contextmanager
def _slow_bodies(scene: Scene, number: int) -> Iterator[None]:
    """Requests whose headers or body come at a byte a second. One that is given up comes again."""

    def begin(index: int) -> socket.socket:
        client = held.enter_context(_connect(scene))
        client.sendall(_HEAD if index % 2 else _HEAD[:20])
        return client

    def drip() -> None:
        while not ended.wait(1.0):
            for index, each in enumerate(sockets):
                try:
                    each.sendall(b"x")
                except OSError:
                    each.close()
                    with contextlib.suppress(OSError):
                        sockets[index] = begin(index)

    with ExitStack() as held:
        sockets = [begin(index) for index in range(number)]
        ended = threading.Event()
        thread = threading.Thread(target=drip)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()


@contextmanager
def _poll_storm(scene: Scene, number: int) -> Iterator[None]:
    """Long polls of a job that is not due, each on a connection of its own."""
    with ExitStack() as held, httpx.Client(trust_env=False, timeout=30) as client:
        later = {"body": {"prompt": scene.load.canary}, "not_before": "2999-01-01T00:00:00Z"}
        made = client.post(f"{scene.world.api_url}/v1/jobs", json=later).json()["id"]
        request = f"GET /v1/jobs/{made}?wait=60 HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        for _ in range(number):
            held.enter_context(_connect(scene)).sendall(request)
        scene.note(f"{_request_ms(scene):.0f} ms as {number} long polls arrived at once.")
        try:
            yield
        finally:
            client.post(f"{scene.world.api_url}/v1/jobs/{made}/cancel")
            scene.world.sql("DELETE FROM jobs WHERE id = %s", made)


def _vanish(scene: Scene, number: int) -> None:
    """Clients that are gone in the middle of their request, or before their answer."""
    for index in range(number):
        with _connect(scene) as client:
            client.sendall(_HEAD + b'{"body": {"prom' if index % 2 else _HEAD)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _check_bombs(scene: Scene) -> None:
    """Each is refused for what it is, and at once."""
    json_type = {"Content-Type": "application/json"}
    bomb = gzip.compress(b" " * 50_000_000)
    cases: dict[str, tuple[HTTPStatus, dict[str, Any]]] = {
        "a body of 10 MB": (
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            {"content": b" " * 10_000_000, "headers": json_type},
        ),
        "a gzip bomb": (
            HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            {"content": bomb, "headers": json_type | {"Content-Encoding": "gzip"}},
        ),
        "a giant prompt": (
            HTTPStatus.UNPROCESSABLE_ENTITY,
            {"json": {"body": {"prompt": "x" * 1_500_000}}},
        ),
    }
    with httpx.Client(trust_env=False, timeout=30) as client:
        for name, (status, given) in cases.items():
            answer = client.post(f"{scene.world.api_url}/v1/jobs", **given)
            told = f"{name} was answered {answer.status_code}, not {status.value}."
            scene.expect(answer.status_code == status, "I8", told)
