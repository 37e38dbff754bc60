"""Faults 20 and 21: messages that nobody sent so, many times over, and messages that are none."""

from __future__ import annotations

import base64
import json
import pickle
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from app.broker.message import raw_message
from app.broker.queues import Layout, queue_name
from app.jobs import Kind
from app.worker.pool.envelope import task_id_in
from tests import bad_messages
from tests.chaos.evidence import Evidence
from tests.chaos.faults.broker import expect_same_workers
from tests.chaos.scene import Scene, fault
from tests.chaos.world import MODELS, eventually

COPIES: Final = 10
REFUSED: Final = ("invalid_request", "request_too_large", "model_not_found")


@fault(20, "wake-ups doubled, shuffled, forged and of unknown ids", extra_s=5.0)
def forged_wake_ups(scene: Scene) -> None:
    """Every kind ten times: bare wake-ups of real jobs, real jobs with another prompt, no jobs."""
    number = 100 if scene.is_full else 20
    slow = scene.load.submit(*(scene.load.make("sleep 300") for _ in range(number)), way="bulk")
    known = [*slow, *scene.rng.sample(_with_a_row(scene), number)]
    unknown = [str(uuid4()) for _ in range(number)]
    asked: list[tuple[str, dict[str, Any]]] = [(each, {}) for each in [*known, *unknown]]
    asked += [(each, {"prompt": "not what was asked", "max_tokens": 3}) for each in known]
    asked *= COPIES
    scene.rng.shuffle(asked)
    with scene.world.redis_client() as client:
        for job_id, request in asked:
            queue, priority = queue_name(scene.rng.choice(MODELS)), scene.rng.randrange(10)
            item = raw_message(job_id, Kind.GENERATE, request, queue=queue, priority=priority)
            client.lpush(Layout().key(queue, priority), item)
    scene.note(f"{len(asked):,} wake-ups beside those of the load.")
    for job_id in unknown:
        scene.load.note_message(job_id, expect=REFUSED)

    def look(evidence: Evidence) -> None:
        run = {row["job_id"] for row in evidence.attempts} & set(unknown)
        scene.expect(not run, "I2", f"{len(run)} jobs ran that nobody had submitted.")

    scene.afterwards(look)


@fault(21, "malformed messages: bad JSON, pickle, huge, of an unknown version", checks=("I7",))
def malformed_messages(scene: Scene) -> None:
    canary_file = scene.world.folder / "unpickled"
    bad = {
        **bad_messages.UNPARSABLE,
        **bad_messages.UNRUNNABLE,
        **bad_messages.NAMELESS,
        "a pickle that acts": _acting_pickle(canary_file),
        "a request of a later version": bad_messages.with_body(
            [[], {"prompt": "x", "schema_version": 99}, {"schema_version": 99}]
        ),
        "huge": bad_messages.message(body="A" * (100_000_000 if scene.is_full else 12_000_000)),
    }
    items = list(bad.values())
    scene.rng.shuffle(items)
    named = sorted({task_id for item in items if (task_id := task_id_in(item))})
    # Their ids are always the same, and they may have been sent into this world before.
    for table, column in (("jobs", "id"), ("chaos.transitions", "job_id")):
        scene.world.sql(f"DELETE FROM {table} WHERE {column} = ANY(CAST(%s AS uuid[]))", named)
    with expect_same_workers(scene), scene.world.redis_client() as client:
        for item in items:
            client.lpush(queue_name(scene.rng.choice(MODELS)), item)
        for task_id in named:
            scene.load.note_message(task_id, expect=REFUSED)
        eventually(lambda: _num_ended(scene, named) == len(named), 60, "every bad message refused")
    scene.note(f"{len(items)} messages, {len(named)} of them with an id.")
    scene.expect(not canary_file.exists(), "I10", "A pickle was unpacked.")

    def look(evidence: Evidence) -> None:
        for place, text in evidence.texts.items():
            shown = bad_messages.PROMPT in text
            scene.expect(not shown, "I10", f"What a bad message held is in {place}.")

    scene.afterwards(look)


class _Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._file,))


def _acting_pickle(file: Path) -> bytes:
    envelope = json.loads(bad_messages.message())
    envelope["body"] = base64.b64encode(pickle.dumps([[], {"prompt": _Touch(file)}, {}])).decode()
    envelope["content-type"] = "application/x-python-serialize"
    envelope["content-encoding"] = "binary"
    return json.dumps(envelope).encode()


def _with_a_row(scene: Scene) -> list[str]:
    """Jobs that are in Postgres: before that, a bare message is worth what its list is worth."""
    found = scene.world.rows(
        "SELECT id FROM jobs WHERE id = ANY(CAST(%s AS uuid[])) ORDER BY id",
        list(scene.load.accepted.values()),
    )
    return [str(row["id"]) for row in found]


def _num_ended(scene: Scene, task_ids: list[str]) -> int:
    return int(
        scene.world.value(
            "SELECT count(*) FROM results WHERE job_id = ANY(CAST(%s AS uuid[]))", task_ids
        )
    )
