"""Fault 31: odd data, without end, beside good jobs."""

from __future__ import annotations

import json
import time
from typing import Any, Final
from uuid import UUID

import httpx

from app.broker.queues import queue_name
from app.jobs import job_id_of
from app.worker.pool.envelope import task_id_in
from tests import odd_data
from tests.chaos.checker import ANY
from tests.chaos.evidence import Evidence
from tests.chaos.faults.broker import expect_same_workers
from tests.chaos.scene import Scene, fault
from tests.chaos.world import MODELS

PER_S: Final = 40.0
SETTLED: Final = """
    SELECT id, idempotency_key, finished_at, not_before > now() AS is_later, format
    FROM jobs WHERE created_at >= %s
"""


@fault(31, "odd messages and requests, without end", checks=("I7",), extra_s=10.0)
def odd_stream(scene: Scene) -> None:
    """Each becomes a row or a refusal; good jobs beside them go on at their pace."""
    since, counts = scene.world.now(), dict.fromkeys(("messages", "requests", "accepted"), 0)
    named: set[UUID] = set()
    until = time.monotonic() + (30.0 if scene.is_full else 6.0)
    with (
        expect_same_workers(scene),
        scene.world.redis_client() as client,
        httpx.Client(base_url=scene.world.api_url, timeout=30, trust_env=False) as api,
    ):
        while time.monotonic() < until:
            queue = queue_name(scene.rng.choice(MODELS))
            item = odd_data.message(scene.rng, UUID(int=scene.rng.getrandbits(128)), queue)
            client.lpush(queue, item)
            counts["messages"] += 1
            if b'"task":' in item and (task_id := task_id_in(item)):
                named.add(job_id_of(task_id))
            counts["requests"] += 1
            counts["accepted"] += _post(scene, api, odd_data.submission(scene.rng))
            time.sleep(1 / PER_S)
        scene.note(", ".join(f"{number:,} {what}" for what, number in counts.items()) + ".")
        what = "all that have a name had a row"
        scene.expect_soon(lambda: not _without_a_row(scene, named), 60, "I11", what)
        scene.expect_soon(lambda: not _open(scene, since), 60, "I12", "all of them had ended")
    for job_id in _odd_jobs(scene, since):
        scene.load.note_message(job_id, expect=ANY, prompt=None)

    def look(evidence: Evidence) -> None:
        for place, text in evidence.texts.items():
            shown = odd_data.SECRET in text
            scene.expect(not shown, "I10", f"An odd prompt is in {place}.")

    scene.afterwards(look)


def _post(scene: Scene, api: httpx.Client, submission: dict[str, Any]) -> bool:
    body = json.dumps(submission)
    answer = api.post(
        "/v1/jobs", content=body.encode(), headers={"Content-Type": "application/json"}
    )
    scene.expect(answer.status_code < 500, "I11", f"{answer.status_code} for {body[:300]}")
    return answer.is_success


def _without_a_row(scene: Scene, job_ids: set[UUID]) -> set[UUID]:
    query = "SELECT id FROM jobs WHERE id = ANY(%s)"
    return job_ids - {row["id"] for row in scene.world.rows(query, list(job_ids))}


def _open(scene: Scene, since: str) -> list[str]:
    """Odd jobs that are due and have not ended. One of a later format waits for who can read it."""
    return [
        str(row["id"])
        for row in scene.world.rows(SETTLED, since)
        if row["finished_at"] is None
        and not row["is_later"]
        and row["format"] == 1
        and not scene.load.is_own(str(row["id"]), row["idempotency_key"])
    ]


def _odd_jobs(scene: Scene, since: str) -> list[str]:
    """All odd jobs. Those that are due in a thousand years are cancelled: nobody waits for them."""
    rows = [
        row
        for row in scene.world.rows(SETTLED, since)
        if not scene.load.is_own(str(row["id"]), row["idempotency_key"])
    ]
    for row in rows:
        if row["finished_at"] is None:
            httpx.post(f"{scene.world.api_url}/v1/jobs/{row['id']}/cancel", timeout=30)
    return [str(row["id"]) for row in rows]
