"""Faults 22 to 26: Postgres cuts connections, crashes, is cut off, full and busy."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import IO, Final

import psycopg

from tests.chaos.evidence import Evidence
from tests.chaos.faults.broker import expect_clear_answers, submit_for
from tests.chaos.proxy import HELD, LOST, PASS, Flow
from tests.chaos.scene import NotPossible, Scene, fault
from tests.chaos.world import LEASE_S, WORKERS, eventually

TERMINATE_PER_S: Final = 10
MIB: Final = 1 << 20


@fault(22, "pg_terminate_backend, ten a second", checks=("I7",))
def backends_terminated(scene: Scene) -> None:
    ended = 0
    until = time.monotonic() + (30.0 if scene.is_full else 5.0)
    with scene.world.admin() as connection:
        while time.monotonic() < until:
            found = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND application_name <> 'chaos'"
            ).fetchall()
            if found:
                pid = scene.rng.choice([row["pid"] for row in found])
                connection.execute("SELECT pg_terminate_backend(%s)", [pid])
                ended += 1
            time.sleep(1 / TERMINATE_PER_S)
    scene.note(f"{ended} backends terminated.")


@fault(23, "Postgres immediate stop and start", checks=("I7", "I9"))
def postgres_crashes(scene: Scene) -> None:
    for _ in range(3 if scene.is_full else 1):
        os.kill(_postmaster(scene), signal.SIGQUIT)  # as pg_ctl stop -m immediate
        eventually(lambda: scene.world.postgres.exit_code is not None, 20, "Postgres ended")
        _expect_api(scene, "unavailable")
        scene.pause(0.5, 1.5)
        scene.world.postgres.start()
        _expect_api(scene, "ready")
        scene.pause(1.0, 2.0)


def _expect_api(scene: Scene, readiness: str) -> None:
    def says_so() -> bool:
        return scene.world.api_readiness() == readiness

    scene.expect_soon(says_so, 10, "I9", f"the API said that it is {readiness}")


@fault(24, "worker cut off from Postgres, one way and both", checks=("I7",), ends=WORKERS)
def partitioned(scene: Scene) -> None:
    """Longer than a lease: others run the jobs, and the late result is discarded."""
    ways: list[dict[str, Flow]] = [
        {"to_server": HELD, "to_client": PASS},
        {"to_server": PASS, "to_client": HELD},
        {"to_server": HELD, "to_client": HELD},
        {"to_server": LOST, "to_client": LOST},
    ]
    stolen: list[str] = []
    for flows in ways:
        part = scene.rng.choice(WORKERS)
        scene.load.submit(*(scene.load.make("sleep 700") for _ in range(16)), way="bulk")
        scene.world.wait_running(part)
        proxy = scene.world.proxies[part, "postgres"]
        proxy.flow(**flows)
        try:
            held = _running(scene, part)
            eventually(lambda held=held: _attempts_over(scene, held), 10 * LEASE_S, "leases lost")
            stolen += _lost(scene, held)
        finally:
            proxy.heal()
    scene.note(f"{len(stolen)} attempts were lost to a partition.")

    def look(evidence: Evidence) -> None:
        late = [row for row in evidence.attempts if row["id"] in stolen]
        won = [row["id"] for row in late if row["outcome"] == "succeeded"]
        scene.expect(not won, "I2", f"{len(won)} attempts won after their lease was lost.")
        scene.expect(bool(late), "I2", "No attempt was lost: the partition did not bite.")

    scene.afterwards(look)


def _running(scene: Scene, part: str) -> list[str]:
    """Attempts that a worker runs now."""
    found = scene.world.rows(
        "SELECT attempt_id FROM jobs JOIN workers ON workers.id = worker_id"
        " WHERE state = 'running' AND pid = %s",
        scene.world.pid(part),
    )
    return [str(row["attempt_id"]) for row in found]


def _attempts_over(scene: Scene, attempt_ids: list[str]) -> bool:
    left = scene.world.value(
        "SELECT count(*) FROM attempts WHERE id = ANY(CAST(%s AS uuid[])) AND outcome IS NULL",
        attempt_ids,
    )
    return int(left) == 0


def _lost(scene: Scene, attempt_ids: list[str]) -> list[str]:
    """Those that rescue has ended; one whose commit still got through within the lease has won."""
    found = scene.world.rows(
        "SELECT id FROM attempts WHERE id = ANY(CAST(%s AS uuid[])) AND outcome = 'lost'",
        attempt_ids,
    )
    return [str(row["id"]) for row in found]


# ── 25: disk full ───────────────────────────────────────────────────────────────────────────────


@fault(25, "disk full under Postgres' data", checks=("I7",), extra_s=10.0, ends=WORKERS)
def disk_full(scene: Scene) -> None:
    with _data_on_tmpfs(scene) as data:
        submit_for(scene, 1.0)
        filler = data / "filler"
        until = time.monotonic() + (15.0 if scene.is_full else 6.0)
        with filler.open("wb") as file:
            while time.monotonic() < until:
                _take_all_space(file)  # also what a crash and its recovery set free
                time.sleep(0.1)
        filler.unlink()
        crashed = scene.world.postgres.exit_code is not None
        if crashed:
            scene.world.postgres.start()
        eventually(lambda: scene.world.value("SELECT 1"), 30, "Postgres serves again")
        scene.note(f"Postgres {'ended and was started again' if crashed else 'went on by itself'}.")
        submit_for(scene, 1.0)
    scene.afterwards(partial(expect_refusals, scene))


def _take_all_space(file: IO[bytes]) -> None:
    """Grow a file until the file system holds no more."""
    for step in (MIB, 4096):
        with suppress(OSError):
            while True:
                os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, step)


@contextmanager
def _data_on_tmpfs(scene: Scene) -> Iterator[Path]:
    """Postgres' data on a small file system of its own, and back on the disk afterwards."""
    server = scene.world.postgres
    data = scene.world.folder / "postgres" / "data"
    beside = data.with_name("data.disk")
    server.stop()
    used = sum(file.stat().st_size for file in data.rglob("*") if file.is_file())
    data.rename(beside)
    data.mkdir()
    try:
        with _tmpfs(data, size=used + 40 * MIB):
            _copy(beside, data)
            server.start()
            yield data
            server.stop()
            shutil.rmtree(beside)
            _copy(data, beside)
    finally:
        data.rmdir()
        beside.rename(data)
        server.start()


@contextmanager
def _tmpfs(place: Path, size: int) -> Iterator[None]:
    options = f"size={size},mode=0700"
    done = _run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place))
    if done.returncode:
        raise NotPossible(f"no tmpfs can be mounted here ({done.stderr.strip()}).")
    try:
        yield
    finally:
        _run("umount", "--lazy", str(place)).check_returncode()


def _copy(source: Path, target: Path) -> None:
    target.mkdir(mode=0o700, exist_ok=True)
    _run("cp", "-a", f"{source}/.", str(target)).check_returncode()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _postmaster(scene: Scene) -> int:
    text = (scene.world.folder / "postgres" / "data" / "postmaster.pid").read_text()
    return int(text.partition("\n")[0])


# ── 26: busy ────────────────────────────────────────────────────────────────────────────────────


@fault(
    26, "connections used up; idle in a transaction; a lock on jobs", checks=("I7",), ends=WORKERS
)
def database_busy(scene: Scene) -> None:
    hold_s = 10.0 if scene.is_full else 3.5  # longer than the lock time-out
    with _submitting(scene), _all_connections_taken(scene) as taken:
        scene.note(f"{taken} connections were taken.")
        time.sleep(hold_s)
    submit_for(scene, 0.5)
    with scene.world.admin(autocommit=False) as idle:
        rows = idle.execute("SELECT id FROM open_jobs LIMIT 50 FOR UPDATE").fetchall()
        idle.execute("SELECT txid_current()")
        scene.note(f"{len(rows)} rows were held by an idle transaction.")
        time.sleep(hold_s)
        idle.rollback()
    with _submitting(scene), scene.world.admin(autocommit=False) as holder:
        holder.execute("LOCK TABLE open_jobs IN ACCESS EXCLUSIVE MODE")
        time.sleep(hold_s)
        holder.rollback()
    scene.afterwards(partial(expect_refusals, scene))


@contextmanager
def _submitting(scene: Scene) -> Iterator[None]:
    """Meanwhile a client tries to submit; all of its jobs are accepted in the end."""
    specs = [scene.load.make() for _ in range(5)]
    client = threading.Thread(target=scene.load.submit, args=specs)
    client.start()
    yield
    client.join()


@contextmanager
def _all_connections_taken(scene: Scene) -> Iterator[int]:
    """Take each connection that Postgres has, those of the parts as well."""
    with ExitStack() as held:
        admin = held.enter_context(scene.world.admin())
        taken = 0
        for _ in range(3):
            admin.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE backend_type = 'client backend' AND application_name <> 'chaos'"
            )
            with suppress(psycopg.OperationalError):  # there are no more
                while True:
                    held.enter_context(scene.world.admin())
                    taken += 1
        yield taken


def expect_refusals(scene: Scene, evidence: Evidence) -> None:
    """The fault was felt: some submissions were refused.

    That refusals say when to come again is checked for all faults.
    """
    refused = sum(event.status == HTTPStatus.SERVICE_UNAVAILABLE for event in evidence.events)
    scene.note(f"{refused} answers were 503.")
    scene.expect(refused > 0, "I8", "Nothing was refused: the fault did not bite.")
    expect_clear_answers(scene, evidence)
