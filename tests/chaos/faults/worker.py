"""Faults 2 to 7 and 27: the worker process is killed, frozen, asked to end, and lied to."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from app.broker.message import MORE_HEADER
from app.broker.queues import Layout
from tests.chaos.evidence import Evidence
from tests.chaos.proxy import LOST
from tests.chaos.scene import Scene, fault
from tests.chaos.world import GRACE_S, MODELS, WORKERS, NotInTime, eventually

KILLS: Final = 6
EXIT_S: Final = GRACE_S + 40.0
"""The grace period, and time to give back and to say goodbye on a very busy machine."""


@fault(2, "worker and engine process SIGKILL", checks=("I7",), ends=WORKERS)
def group_killed(scene: Scene) -> None:
    for part in WORKERS:
        scene.world.wait_running(part)
        scene.world.kill_group(part, signal.SIGKILL)


@fault(3, "SIGKILL after the model, before the commit", checks=("I7",), ends=WORKERS)
def killed_before_commit(scene: Scene) -> None:
    """A lock on one running job holds the worker inside the statement that commits its batch."""
    world, part = scene.world, scene.rng.choice(WORKERS)
    for _ in range(2):
        job_id = _lock_until_commit(scene, part)
        scene.afterwards(lambda found, job_id=job_id: _ran_twice_billed_once(scene, found, job_id))
        eventually(lambda: world.worker_id(part), 60, f"{part} again")


def _lock_until_commit(scene: Scene, part: str) -> str:
    """Kill the worker between the model's last token and the commit; returns a job of the batch."""
    world = scene.world
    waits = (
        "SELECT pid FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND application_name <> 'chaos' AND query LIKE '%populate_recordset(NULL::results%'"
    )
    while True:
        world.wait_running(part)
        with world.admin(autocommit=False) as connection:
            row = connection.execute(
                "SELECT job.id FROM open_jobs AS job JOIN workers ON workers.id = worker_id"
                " WHERE state = 'running' AND pid = %s LIMIT 1 FOR UPDATE OF job SKIP LOCKED",
                (world.pid(part),),
            ).fetchone()
            deadline = time.monotonic() + 1.0
            while row is not None and time.monotonic() < deadline:
                if stuck := world.rows(waits):
                    world.kill_group(part, signal.SIGKILL)
                    for each in stuck:  # else Postgres would commit for the dead
                        world.rows("SELECT pg_terminate_backend(%s)", each["pid"])
                    return str(row["id"])
                time.sleep(0.01)


def _ran_twice_billed_once(scene: Scene, evidence: Evidence, job_id: str) -> None:
    [job] = [each for each in evidence.jobs if each["id"] == job_id]
    if job["state"] in ("cancelled", "expired"):  # its client has cancelled it meanwhile, say
        return
    attempts = [each for each in evidence.attempts if each["job_id"] == job_id]
    billed = [each for each in attempts if each["outcome"] == "succeeded"]
    scene.expect(
        len(attempts) >= 2 and len(billed) == 1,
        "I2",
        f"{job_id} has {len(attempts)} attempts, {len(billed)} of them succeeded.",
    )


@fault(4, "SIGKILL after the commit, before the ack", checks=("I7",), ends=WORKERS)
def killed_before_ack(scene: Scene) -> None:
    """Acks vanish on their way to Redis; the messages of ended jobs are delivered again."""
    world, part = scene.world, scene.rng.choice(WORKERS)
    world.wait_running(part)
    worker_id = world.worker_id(part)
    world.proxies[part, "redis"].flow(to_server=LOST)
    before = len(_ended_by(scene, worker_id))
    eventually(lambda: len(_ended_by(scene, worker_id)) > before, 60, "a commit without an ack")
    world.kill_group(part, signal.SIGKILL)
    world.proxies[part, "redis"].heal()
    attempts = _deliver_ended_again(scene, _ended_by(scene, worker_id))
    scene.expect(bool(attempts), "I2", "No message of an ended job was left to deliver again.")
    scene.note(f"{len(attempts)} messages of ended jobs delivered again")

    def no_new_attempts(evidence: Evidence) -> None:
        for job in evidence.jobs:
            if job["attempt"] > attempts.get(job["id"], job["attempt"]):
                scene.expect(False, "I2", f"{job['id']} ran again though it had ended.")

    scene.afterwards(no_new_attempts)


def _ended_by(scene: Scene, worker_id: str | None) -> dict[str, int]:
    """Attempts of jobs that a worker ended, by job id."""
    rows = scene.world.rows(
        "SELECT jobs.id, attempt FROM jobs JOIN attempts ON job_id = jobs.id"
        " WHERE finished_at IS NOT NULL AND attempts.worker_id = %s",
        worker_id,
    )
    return {str(row["id"]): row["attempt"] for row in rows}


def _deliver_ended_again(scene: Scene, ended: dict[str, int]) -> dict[str, int]:
    """Put back what kombu would put back when the visibility timeout is over."""
    sent: dict[str, int] = {}
    with scene.world.redis_client() as client:
        for raw in client.hgetall("unacked").values():
            message, _, queue = json.loads(raw)
            headers = message["headers"]
            woken = {headers["id"], *(headers.get(MORE_HEADER) or [])} & ended.keys()
            if woken:
                key = Layout().key(queue, message["properties"].get("priority") or 0)
                client.lpush(key, json.dumps(message))
                sent |= {job_id: ended[job_id] for job_id in woken}
    return sent


@fault(5, "zombie: SIGSTOP longer than the lease, then SIGCONT", checks=("I7",), ends=WORKERS)
def zombie(scene: Scene) -> None:
    world = scene.world
    for part in scene.rng.sample(WORKERS, 2):
        eventually(lambda part=part: world.worker_id(part), 60, f"{part} up")
        world.wait_running(part)
        world.freeze(part)
        held = world.num_running(part)
        eventually(lambda part=part: not world.num_running(part), 60, "its jobs taken away")
        scene.pause(0.0, 1.0)
        world.resume(part)
        scene.note(f"{part} froze with {held} jobs")


SLOW_S: Final = 2 * GRACE_S
"""Of a job that is given back: it outlasts the grace period, and may run again behind a batch of
others like it."""


@fault(6, "SIGTERM mid-batch, and SIGTERM twice", extra_s=GRACE_S + 4, checks=("I7",))
def asked_to_end(scene: Scene) -> None:
    world = scene.world
    ended: list[str | None] = []
    for times, part in enumerate(WORKERS, start=1):
        _wait_slow_running(scene, part)
        scene.pause(0.0, 0.3)
        ended.append(world.worker_id(part))
        with world.unkept(part):
            began = time.monotonic()
            for _ in range(times):
                world.send_signal(part, signal.SIGTERM)
                time.sleep(0.2)
            eventually(lambda part=part: not world.is_up(part), EXIT_S, f"the end of {part}")
            scene.note(f"SIGTERM × {times}: ended in {time.monotonic() - began:.1f} s")

    def nothing_charged(evidence: Evidence) -> None:
        outcomes = [a["outcome"] for a in evidence.attempts if a["worker_id"] in ended]
        released = outcomes.count("released")
        scene.note(f"{released} jobs given back, {outcomes.count('lost')} lost")
        for attempt in evidence.attempts:
            if attempt["outcome"] == "released" and attempt["charged"]:
                scene.expect(False, "I6", f"{attempt['job_id']} was charged for a shutdown.")
        scene.expect(released > 0, "I7", "No job was given back.")

    scene.afterwards(nothing_charged)


def _wait_slow_running(scene: Scene, part: str) -> None:
    """Return when the part runs a job that takes far longer than the grace period."""
    ids: list[str] = []

    def is_so() -> bool:
        running = "SELECT count(*) FROM jobs JOIN workers ON workers.id = worker_id"
        running += " WHERE state = 'running' AND pid = %s AND jobs.id = ANY(%s::uuid[])"
        return bool(scene.world.value(running, scene.world.pid(part), ids))

    for _ in range(5):
        slow = [
            scene.load.make(f"sleep {SLOW_S * 1000:.0f}", model=scene.rng.choice(MODELS))
            for _ in range(8)
        ]
        ids += scene.load.submit(*slow, way="bulk")
        with contextlib.suppress(NotInTime):
            eventually(is_so, 10, f"a slow job of {part}")
            return
    raise NotInTime(f"{part} ran no slow job.")


@fault(7, f"a kill every few seconds, {KILLS} times", checks=("I7",), ends=WORKERS)
def killed_often(scene: Scene) -> None:
    """Not sooner than a worker needs to come back: else nothing could ever run."""
    world = scene.world
    began, before = time.monotonic(), _num_completed(scene)
    for number in range(KILLS):
        part = WORKERS[number % 2]
        eventually(lambda part=part: world.worker_id(part), 60, f"{part} up")
        scene.pause(0.5, 2.0)
        world.kill_group(part, signal.SIGKILL)
    took_s, done = time.monotonic() - began, _num_completed(scene) - before
    scene.note(f"goodput under kills: {done / took_s:.0f} jobs/s for {took_s:.0f} s")
    scene.expect(done > 0, "I7", "Nothing was completed between the kills.")


def _num_completed(scene: Scene) -> int:
    return int(scene.world.value("SELECT count(*) FROM jobs WHERE state = 'completed'"))


@fault(27, "wall clock jumps by ±1 h; monotonic clock a day ahead", checks=("I7",))
def clocks_jump(scene: Scene) -> None:
    """One worker's wall clock jumps while it runs; the other's monotonic clock is another."""
    world = scene.world
    jumps = _with_fake_clock(scene, WORKERS[0], world.folder / "clock")
    if shutil.which("unshare") and os.geteuid() == 0:
        world.prefix[WORKERS[1]] = ["unshare", "--time", "--monotonic", "86400"]
    else:
        scene.note("no time namespace here: the monotonic clock was left alone")
    try:
        for part in WORKERS:
            world.restart(part)
        for jump in (*jumps, *jumps):
            world.wait_running(WORKERS[0])
            (world.folder / "clock").write_text(jump)
            scene.pause(1.0, 2.0)
        scene.afterwards(lambda evidence: _stamps_in_order(scene, evidence))
    finally:
        world.prefix[WORKERS[1]] = []
        world.environment[WORKERS[0]].clear()
        for part in WORKERS:
            world.restart(part)


def _with_fake_clock(scene: Scene, part: str, file: Path) -> tuple[str, ...]:
    """Have a part's wall clock follow a file; returns the jumps that can be made."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if (package := find_spec("libfaketime")) and package.origin:  # of PyPI: it brings one
        found += sorted(Path(package.origin).parent.glob("**/libfaketime.so.1"))
    if not found:
        scene.note("libfaketime is not installed: the wall clock was left alone")
        return ("+0",)
    file.write_text("+0")
    scene.world.environment[part] |= {
        "LD_PRELOAD": str(found[0]),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    return ("+3600", "-3600")


def _stamps_in_order(scene: Scene, evidence: Evidence) -> None:
    """Stamps are on the database's clock, whatever the worker's says."""
    names = ("created_at", "claimed_at", "started_at", "first_token_at", "finished_at")
    for row in evidence.results:
        stamps: list[Any] = [row[name] for name in names if row.get(name) is not None]
        scene.expect(stamps == sorted(stamps), "I5", f"{row['job_id']}: stamps out of order.")
