"""Faults 32 to 35: servers that answer and take nothing, a pooler in between, a full tmpfs."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from app.local.ports import free_port
from tests.chaos.faults.broker import (
    expect_both_consume,
    expect_clear_answers,
    expect_same_workers,
    submit_for,
)
from tests.chaos.scene import NotPossible, Scene, fault
from tests.chaos.world import PARTS, WORKERS, eventually
from tests.postgres_parts import PGBOUNCER, PgBouncer, Standby

TMPFS_BYTES = 8 << 20


@fault(32, "Redis refuses: READONLY, then NOREPLICAS", checks=("I7",), extra_s=5.0)
def redis_refuses(scene: Scene) -> None:
    """As after a demotion: all that is there can be read, and nothing can be written."""
    lasts_s = 10.0 if scene.is_full else 4.0
    with expect_same_workers(scene), scene.world.redis_client() as client:
        client.replicaof("127.0.0.1", str(free_port()))
        try:
            _expect_api(scene, "degraded")
            submit_for(scene, lasts_s)
        finally:
            client.replicaof("NO", "ONE")
        expect_both_consume(scene)
        client.config_set("min-replicas-to-write", 1)
        try:
            submit_for(scene, lasts_s)
        finally:
            client.config_set("min-replicas-to-write", 0)
        expect_both_consume(scene)
    _expect_api(scene, "ready")
    scene.afterwards(partial(expect_clear_answers, scene))


@fault(
    33, "Postgres reads only: a standby in its place, then the setting", checks=("I7",),
    ends=WORKERS, extra_s=5.0,
)  # fmt: skip
def postgres_reads_only(scene: Scene) -> None:
    world, lasts_s = scene.world, 10.0 if scene.is_full else 4.0
    standby = Standby(world.folder / f"standby-{scene.rng.getrandbits(32):x}", world.postgres)
    with standby, world.postgres_replaced(standby.url):
        _expect_api(scene, "unavailable")
        time.sleep(lasts_s)
    _expect_api(scene, "ready")
    expect_both_consume(scene)
    world.sql("ALTER SYSTEM SET default_transaction_read_only = on")
    try:
        world.sql("SELECT pg_reload_conf()")
        _expect_api(scene, "unavailable")
        time.sleep(lasts_s)
    finally:
        world.sql("ALTER SYSTEM RESET default_transaction_read_only")
        world.sql("SELECT pg_reload_conf()")
    _expect_api(scene, "ready")
    expect_both_consume(scene)
    scene.afterwards(partial(expect_clear_answers, scene))


@fault(
    34, "PgBouncer in transaction mode, paused and restarted", checks=("I7",),
    ends=WORKERS, extra_s=5.0,
)  # fmt: skip
def pooler(scene: Scene) -> None:
    if PGBOUNCER is None:
        raise NotPossible("pgbouncer is not installed.")
    folder = scene.world.folder / f"pgbouncer-{scene.rng.getrandbits(32):x}"
    bouncer = PgBouncer(folder, scene.world.postgres.url, "transaction", pool_size=20)
    with bouncer, scene.world.postgres_replaced(bouncer.url):
        submit_for(scene, 3.0)
        expect_both_consume(scene)
        bouncer.send_signal(signal.SIGUSR1)  # PAUSE
        scene.pause(1.0, 2.0)
        bouncer.send_signal(signal.SIGUSR2)  # RESUME
        submit_for(scene, 2.0)
        for _ in range(3 if scene.is_full else 1):
            bouncer.stop()
            scene.pause(0.2, 1.0)
            bouncer.start()
            submit_for(scene, 2.0)
        expect_both_consume(scene)
    expect_both_consume(scene)
    scene.afterwards(partial(expect_clear_answers, scene))


def _expect_api(scene: Scene, readiness: str) -> None:
    def says_so() -> bool:
        return scene.world.api_readiness() == readiness

    scene.expect_soon(says_so, 15, "I9", f"the API said that it is {readiness}")


# ── 35: a full tmpfs ────────────────────────────────────────────────────────────────────────────


@fault(35, "temporary files and marks of health on a full, then read-only tmpfs", checks=("I7",))
def tmpfs_full(scene: Scene) -> None:
    """Engine processes have to be started meanwhile: what they share with theirs needs room."""
    world = scene.world
    with _parts_on_tmpfs(scene) as folder, expect_same_workers(scene):
        rescue = world.pid("rescue")
        filler = folder / "filler"
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(4096)):
                pass
        _kill_engines(scene)
        submit_for(scene, 3.0)
        _mount("-o", "remount,ro", str(folder))
        _kill_engines(scene)
        submit_for(scene, 10.0 if scene.is_full else 4.0)
        _mount("-o", "remount,rw", str(folder))
        filler.unlink()
        expect_both_consume(scene)
        scene.expect(world.pid("rescue") == rescue, "I13", "Rescue had to be started again.")


def _kill_engines(scene: Scene) -> None:
    for part in WORKERS:
        pid = eventually(lambda part=part: scene.world.engine_pid(part), 60, f"engine of {part}")
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextlib.contextmanager
def _parts_on_tmpfs(scene: Scene) -> Iterator[Path]:
    """All parts keep their temporary files and what they cache on a small file system."""
    world, folder = scene.world, scene.world.folder / "small"
    folder.mkdir(exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={TMPFS_BYTES},mode=0700", "tmpfs", str(folder))
    try:
        for part in PARTS:
            world.environment[part] |= {
                "TMPDIR": str(folder),
                "GRISTMILL_CACHE_DIR": str(folder / "cache"),
            }
            world.restart(part)
        yield folder
    finally:
        for part in PARTS:
            for name in ("TMPDIR", "GRISTMILL_CACHE_DIR"):
                world.environment[part].pop(name, None)
            world.restart(part)
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
    if done.returncode:
        raise NotPossible(f"no tmpfs can be mounted here ({done.stderr.strip()}).")
