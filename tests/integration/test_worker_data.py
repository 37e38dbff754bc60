"""Data neither ends a worker nor keeps others from running, on a real worker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from celery import Celery

from app.config.settings import Settings
from app.jobs import SUSPECT_AFTER, Kind
from app.store.database import Database
from tests.rescues import running_rescue
from tests.rows import insert, new_job
from tests.waiting import eventually
from tests.workers import results, rows, running_worker

SIZE = 4


@pytest.fixture
def config(make_settings: Callable[..., Settings], database_url: str, redis_url: str) -> Settings:
    stub = {
        "source": "stub",
        "engine": "stub",
        "default": True,
        "max_batch_size": SIZE,
        "max_wait_ms": 20,
    }
    return make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 4, "heartbeat_s": 0.5},
        rescue={"sweep_ms": 200, "lost_after_s": 1},
        models={"stub": {**stub, "kind": "generate"}, "embed": {**stub, "kind": "embed"}},
    )


def ended(config: Settings, ids: list[str]) -> dict[str, dict[str, Any]]:
    found = eventually(lambda: (all_ := results(config)).keys() >= set(ids) and all_, 60)
    return {id_: found[id_] for id_ in ids}


def test_a_request_larger_than_the_workers_limits_fails_and_nobody_waits_behind_it(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given a message that asks for one sequence more than a batch may have
    with running_worker(config, tmp_path / "worker") as worker:
        texts = [f"text {n}" for n in range(SIZE + 1)]
        doomed = str(producer.send_task("inference.embed", kwargs={"input": texts}).id)
        # when others come behind it
        mates = [
            str(producer.send_task("inference.embed", kwargs={"input": f"mate {n}"}).id)
            for n in range(3 * SIZE)
        ]
        found = ended(config, [doomed, *mates])
        assert not worker.has_ended

    # then it has failed with the reason, without an engine, and they have completed
    assert (found[doomed]["state"], found[doomed]["error_code"]) == ("failed", "invalid_request")
    assert "at most 4" in found[doomed]["error_message"]
    assert found[doomed]["device_ns"] == 0
    assert {found[id_]["state"] for id_ in mates} == {"completed"}


def test_doomed_jobs_that_were_lost_before_do_not_wedge_the_suspects(
    config: Settings, database: Database, producer: Celery, tmp_path: Path
) -> None:
    # given rows of an API with larger limits, which were lost with workers before
    prompts = [f"prompt {n}" for n in range(SIZE + 1)]
    request = {"prompt": prompts}
    doomed = [
        str(id_)
        for id_ in insert(database, *(new_job(model="stub", request=request) for _ in range(3)))
    ]
    rows(config, f"UPDATE open_jobs SET losses = {SUSPECT_AFTER} RETURNING id")

    # when a worker gets their messages, and others
    with (
        running_worker(config, tmp_path / "worker") as worker,
        running_rescue(config, tmp_path / "rescue"),
    ):
        mates = [
            str(producer.send_task("inference.generate", kwargs={"prompt": f"mate {n}"}).id)
            for n in range(SIZE)
        ]
        found = ended(config, [*doomed, *mates])
        assert not worker.has_ended

    # then each ends as it must
    assert {found[id_]["state"] for id_ in doomed} == {"failed"}
    assert {found[id_]["state"] for id_ in mates} == {"completed"}


def test_rows_that_were_written_by_hand_are_run_and_those_that_cannot_end_harm_nobody(
    config: Settings, producer: Celery, tmp_path: Path
) -> None:
    # given rows without a fingerprint, and rows whose counters are at the end of their columns
    def write(**columns: object) -> str:
        request = columns.pop("request", '{"prompt": "flour"}')
        columns = {"model": "stub", **columns}
        names, marks = ", ".join(columns), ", ".join(["%s"] * len(columns))
        query = f"""
            WITH key AS (
                INSERT INTO job_keys (id, created_at) VALUES (gen_random_uuid(), now()) RETURNING *
            ), asked AS (
                INSERT INTO requests (job_id, created_at, request)
                SELECT id, created_at, body FROM key, CAST(%s AS jsonb) AS body
                WHERE body IS NOT NULL
            )
            INSERT INTO open_jobs (
                id, kind, source, state, not_before, created_at, queued_at, {names}
            )
            SELECT id, 'generate', 'api', 'queued', now(), created_at, now(), {marks} FROM key
            RETURNING id
        """
        return str(rows(config, query, request, *columns.values())[0]["id"])

    plain = write()
    endless = [
        write(attempt=2**31 - 1),
        write(attempt=2**31 - 1, request=None),  # cannot run, and cannot be said to have failed
        write(attempts_charged=2**31 - 1),
        write(attempts_charged=2**31 - 1, request=None),
    ]

    # when a worker gets their messages, and others
    with (
        running_worker(config, tmp_path / "worker") as worker,
        running_rescue(config, tmp_path / "rescue"),
    ):
        eventually(
            lambda: all(
                rows(config, "SELECT FROM jobs WHERE id = %s AND enqueued_at IS NOT NULL", each)
                for each in endless
            ),
            60,
        )
        mates = [
            str(producer.send_task("inference.generate", kwargs={"prompt": f"mate {n}"}).id)
            for n in range(SIZE)
        ]
        found = ended(config, [plain, *mates])
        eventually(lambda: worker.log.count("row was refused") >= len(endless), 60)
        assert not worker.has_ended

    # then those that can run have run
    assert {found[id_]["state"] for id_ in (plain, *mates)} == {"completed"}


def test_a_row_of_a_later_version_is_left_to_its_workers_and_this_one_goes_on(
    config: Settings, database: Database, producer: Celery, tmp_path: Path
) -> None:
    # given a row in a format that is not known here, and one that is just wrong
    request = {"prompt": "x", "mood": "calm"}
    later, wrong = insert(
        database,
        new_job(model="stub", request=request, format=99, kind=Kind.GENERATE),
        new_job(model="stub", request=request),
    )

    with running_worker(config, tmp_path / "worker") as worker:
        for job_id in (later, wrong):
            producer.send_task("inference.generate", task_id=str(job_id))
        mate = str(producer.send_task("inference.generate", kwargs={"prompt": "mate"}).id)
        found = ended(config, [str(wrong), mate])
        eventually(
            lambda: rows(config, "SELECT FROM jobs WHERE id = %s AND received_by IS NULL", later)
        )
        assert not worker.has_ended

    assert found[str(wrong)]["state"] == "failed"
    assert found[mate]["state"] == "completed"
    assert [
        each["state"] for each in rows(config, "SELECT state FROM jobs WHERE id = %s", later)
    ] == ["queued"]
