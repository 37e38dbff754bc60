"""Faults 1 and 8 to 14: what goes wrong in the engine process and in the device."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

from tests.chaos.evidence import Evidence
from tests.chaos.scene import Scene, fault
from tests.chaos.spec import Spec
from tests.chaos.world import (
    BATCH_SIZE,
    GRACE_S,
    MODELS,
    STEP_TIMEOUT_S,
    WORKERS,
    World,
    eventually,
)

CRASH: Final = ("engine_crash", "out_of_memory")
MOST_CRASHES: Final = math.ceil(math.log2(BATCH_SIZE * len(MODELS))) + 1
"""Of one poison: all that the process holds, a batch of each model, and then halves until it is
alone."""


@fault(1, "engine process SIGKILL mid-batch", checks=("I6", "I7"))
def engine_killed(scene: Scene) -> None:
    for _ in range(3):
        part = scene.rng.choice(WORKERS)
        scene.world.wait_running(part)
        scene.pause(0.0, 0.05)
        if pid := scene.world.engine_pid(part):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        scene.pause(0.2, 0.6)


@fault(
    8, "host out of memory in the engine process", checks=("I6", "I7"), extra_s=15, breaks_code=True
)
def host_out_of_memory(scene: Scene) -> None:
    """A prompt that makes the engine take 600 MB, where 300 are left."""
    with _memory_limit(scene, more_bytes=300 << 20):
        eaters = [scene.load.make("eat 600", expect=CRASH) for _ in range(2)]
        _submit_among_mates(scene, eaters)
        _wait_ended(scene, eaters, timeout_s=90)


@contextlib.contextmanager
def _memory_limit(scene: Scene, more_bytes: int) -> Iterator[None]:
    """Each worker and what it starts may take so much more: by a cgroup, else by prlimit.

    One group for both would be another fault: while the kernel still ends both of their engine
    processes, it takes a worker for the next.
    """
    world = scene.world
    groups = {part: Path(f"/sys/fs/cgroup/memory/chaos-{os.getpid()}-{part}") for part in WORKERS}
    try:
        for group in groups.values():
            group.mkdir()
    except OSError:
        scene.note("no memory cgroup here: prlimit --as in its place")
        with _address_space_limit(world, more_bytes):
            yield
        return
    for part, group in groups.items():
        (group / "memory.limit_in_bytes").write_text(str(more_bytes))
        for process in (psutil.Process(world.pid(part)), *_children(world.pid(part))):
            with contextlib.suppress(OSError):
                (group / "cgroup.procs").write_text(str(process.pid))
    try:
        yield
    finally:
        kills = sum(_num_killed(group) for group in groups.values())
        scene.note(f"the kernel killed {kills} engine processes")
        for part, group in groups.items():  # the new ones are outside of it
            world.restart(part)
            with contextlib.suppress(OSError):
                group.rmdir()


@contextlib.contextmanager
def _address_space_limit(world: World, more_bytes: int) -> Iterator[None]:
    """Each engine process may take so much more than those of now have: the next ones, too, which
    come where one has died of it."""
    now = [pid for part in WORKERS if (pid := world.engine_pid(part))]
    most = max(psutil.Process(pid).memory_info().vms for pid in now) + more_bytes
    done = threading.Event()

    def limit() -> None:
        while not done.wait(0.05):
            for part in WORKERS:
                with contextlib.suppress(psutil.Error):
                    if pid := world.engine_pid(part):
                        psutil.Process(pid).rlimit(psutil.RLIMIT_AS, (most, psutil.RLIM_INFINITY))

    thread = threading.Thread(target=limit)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        for part in WORKERS:  # the new ones are without
            world.restart(part)


def _num_killed(group: Path) -> int:
    return int((group / "memory.oom_control").read_text().split()[-1])


def _children(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@fault(9, "device out of memory above 4 rows", checks=("I6", "I7"), extra_s=5)
def device_out_of_memory(scene: Scene) -> None:
    """On a CPU the stub raises what an engine raises when the device is full."""
    scene.note("the stub engine raises OutOfMemory in the place of a full device")
    heavy = [scene.load.make("oom above 4", model=MODELS[0]) for _ in range(3)]
    _submit_among_mates(scene, heavy)
    _wait_ended(scene, heavy, timeout_s=90)
    halvings = sum(_count_in_log(scene, part, "halved") for part in WORKERS)
    scene.note(f"halved {halvings} times")
    scene.expect(halvings > 0, "I6", "No batch was halved.")
    for part in WORKERS:  # forget the caps
        scene.world.restart(part)


@fault(
    10,
    "device-side assert: the engine raises for ever",
    checks=("I6", "I7", "I9"),
    extra_s=10,
    breaks_code=True,
)
def device_assert(scene: Scene) -> None:
    """The process whose device is broken must be gone at once: nothing else may run in it."""
    pids = {pid for part in WORKERS if (pid := scene.world.engine_pid(part))}
    poison = scene.load.make("assert", expect=CRASH)
    _submit_among_mates(scene, [poison])
    began = time.monotonic()
    eventually(lambda: any(not psutil.pid_exists(pid) for pid in pids), 60, "the engine's end")
    scene.note(f"broken process gone {time.monotonic() - began:.1f} s after the submission")
    _expect_truthful(scene)
    _wait_ended(scene, [poison], timeout_s=90)
    _expect_ready_again(scene)


@fault(11, "hung kernel", checks=("I6", "I7", "I9"), extra_s=MOST_CRASHES * (STEP_TIMEOUT_S + 2))
def hung(scene: Scene) -> None:
    poison = scene.load.make("hang", expect=CRASH)
    before = sum(_count_in_log(scene, part, "no progress") for part in WORKERS)
    began = time.monotonic()
    _submit_among_mates(scene, [poison])
    _expect_truthful(scene)
    eventually(
        lambda: sum(_count_in_log(scene, part, "no progress") for part in WORKERS) > before,
        STEP_TIMEOUT_S + 60,
        "a hung engine killed",
    )
    scene.note(
        f"killed {time.monotonic() - began:.1f} s after the submission; "
        f"the limit of a step is {STEP_TIMEOUT_S:g} s"
    )
    _wait_ended(scene, [poison], timeout_s=90)
    _expect_ready_again(scene)


def _expect_truthful(scene: Scene) -> None:
    """The worker whose engine is hung or gone says that it makes no progress."""
    all_ = len(WORKERS)
    what = "a worker said that it is not ready"
    scene.expect_soon(lambda: scene.world.num_ready() < all_, STEP_TIMEOUT_S + 3, "I9", what)


def _expect_ready_again(scene: Scene) -> None:
    all_ = len(WORKERS)
    scene.expect_soon(lambda: scene.world.num_ready() == all_, 10, "I9", "all said that they are")


@fault(13, "NaN logits; endless generation", checks=("I6", "I7"))
def odd_rows(scene: Scene) -> None:
    bad = [scene.load.make("nan", expect=("not_finite",)) for _ in range(5)]
    endless = [
        scene.load.make(fields={"ignore_eos": True, "max_tokens": 600}, model=model)
        for model in MODELS
    ]
    late = [
        scene.load.make("sleep 30000", deadline_s=2.0, expect=("expired",), model=model)
        for model in MODELS
    ]
    scene.load.submit(*bad, *endless, *late)
    _wait_ended(scene, [*bad, *endless, *late], timeout_s=90)


@fault(
    14,
    "poison crashes the process: 1, 2 and 5 of 32",
    checks=("I6", "I7"),
    extra_s=10,
    breaks_code=True,
)
def poison(scene: Scene) -> None:
    for number in (1, 2, 5):
        before = sum(_count_in_log(scene, part, "engine process is lost") for part in WORKERS)
        poisons = [scene.load.make("crash", expect=CRASH) for _ in range(number)]
        _submit_among_mates(scene, poisons, mates=32 - number)
        _wait_ended(scene, poisons, timeout_s=90)
        crashes = sum(_count_in_log(scene, part, "engine process is lost") for part in WORKERS)
        crashes -= before
        most = number * MOST_CRASHES
        scene.note(f"{number} of 32: {crashes} crashes, at most {most}")
        scene.expect(crashes <= most, "I6", f"{number} poisons took {crashes} crashes.")

    def mates_not_charged(evidence: Evidence) -> None:
        for job in evidence.jobs:
            if job["state"] == "completed" and job["attempts_charged"] != 1:
                text = f"{job['id']} completed with {job['attempts_charged']} charged attempts."
                scene.expect(False, "I6", text)

    scene.afterwards(mates_not_charged)


def _submit_among_mates(scene: Scene, bad: list[Spec], mates: int = 12) -> None:
    """In one transaction, so that they come into the same batches."""
    all_ = [*bad, *(scene.load.make() for _ in range(mates))]
    scene.rng.shuffle(all_)
    scene.load.submit(*all_, way="bulk")


def _wait_ended(scene: Scene, specs: list[Spec], timeout_s: float) -> None:
    ids = [scene.load.accepted[spec.nonce] for spec in specs]

    def ended() -> bool:
        query = "SELECT count(*) FROM jobs WHERE id = ANY(%s) AND finished_at IS NOT NULL"
        return bool(scene.world.value(query, ids) == len(ids))

    eventually(ended, timeout_s, "the bad jobs ended")


def _count_in_log(scene: Scene, part: str, text: str) -> int:
    return (scene.world.logs / f"{part}.log").read_text(errors="replace").count(text)


@fault(
    12,
    "Xid lines: lost context, nothing, device gone",
    checks=("I6", "I7"),
    extra_s=GRACE_S + 4,
    ends=WORKERS,
)
def xid_lines(scene: Scene) -> None:
    """A file in the place of the kernel's log says what the driver would."""
    scene.note("a file in the place of /dev/kmsg")
    world, part = scene.world, WORKERS[0]
    file = world.folder / "kern.log"
    file.touch()
    world.environment[part]["GRISTMILL_WORKER__KERNEL_LOG"] = str(file)
    world.environment[part]["GRISTMILL_WORKER__PCI_ADDRESS"] = "0000:06:00.0"
    world.restart(part)
    worker_id = world.worker_id(part)
    pid, engine_pid = world.pid(part), world.engine_pid(part)

    def say(device: str, code: int) -> None:
        world.wait_running(part)
        with file.open("a") as log:
            log.write(f"NVRM: Xid (PCI:0000:{device}:00): {code}, pid={engine_pid}, name=python\n")

    say("07", 79)  # another's
    say("06", 43)  # to be ignored
    scene.pause(0.5, 1.0)
    scene.expect(world.engine_pid(part) == engine_pid, "I6", "A harmless Xid ended the engine.")
    say("06", 13)
    eventually(lambda: world.engine_pid(part) not in (None, engine_pid), 60, "another engine")
    scene.expect(world.pid(part) == pid, "I6", "Xid 13 ended the whole worker.")
    say("06", 79)
    eventually(lambda: world.pid(part) != pid, 60, "the worker ended and was started again")
    world.environment[part].clear()
    world.restart(part)

    def nothing_charged(evidence: Evidence) -> None:
        for attempt in evidence.attempts:
            if attempt["worker_id"] == worker_id and attempt["outcome"] in ("lost", "released"):
                text = f"{attempt['job_id']} was charged for an error of the device."
                scene.expect(not attempt["charged"], "I6", text)

    scene.afterwards(nothing_charged)
