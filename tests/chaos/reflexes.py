"""How soon somebody hears of an end, and how soon a cancel acts: both have a slow second way."""

from __future__ import annotations

import contextlib
import time
from typing import Any, Final

import httpx

from app.jobs import FINAL_STATES
from tests.chaos.load import Load
from tests.chaos.world import NotInTime, World, eventually

TRIES: Final = 3
"""The best counts: a busy machine is slow now and then, a thread that is gone always."""
WAIT_S: Final = 20


def measure(world: World, load: Load) -> dict[str, float]:
    """Seconds from a job's end to the answer of who waits for it, and from a cancel to the end."""
    with httpx.Client(base_url=world.api_url, timeout=WAIT_S + 10, trust_env=False) as client:
        polls = [_poll_s(world, load, client) for _ in range(TRIES)]
        cancels = [_cancel_s(world, load, client) for _ in range(TRIES)]
    return {"a long poll": min(polls), "a cancel": min(cancels)}


def _poll_s(world: World, load: Load, client: httpx.Client) -> float:
    [job_id] = load.submit(load.make("sleep 300"))
    client.get(f"/v1/jobs/{job_id}", params={"wait": WAIT_S})
    since = "SELECT extract(epoch FROM clock_timestamp() - finished_at)::float8 FROM jobs"
    late_s = world.value(f"{since} WHERE id = %s", job_id)
    return WAIT_S if late_s is None else float(late_s)


def _cancel_s(world: World, load: Load, client: httpx.Client) -> float:
    [job_id] = load.submit(load.make("sleep 20000", expect=("completed", "cancelled")))

    def state() -> Any:
        return world.value("SELECT state FROM jobs WHERE id = %s", job_id)

    with contextlib.suppress(NotInTime):
        eventually(lambda: state() != "queued", WAIT_S, "a job runs")
    began = time.monotonic()
    client.post(f"/v1/jobs/{job_id}/cancel")
    with contextlib.suppress(NotInTime):
        eventually(lambda: state() in FINAL_STATES, WAIT_S, "a cancelled job ended")
    return time.monotonic() - began
