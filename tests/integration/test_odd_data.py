"""Any data becomes a row or a refusal, and whoever took it lives on: so do its neighbours.

Messages, requests over HTTP and rows, good ones bent by chance (`tests.odd_data`), go to a real
worker and a real API, each among good jobs. `make odd` sends many more of them.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any
from uuid import UUID, uuid4

import httpx
import psycopg
import pytest
import redis
from hypothesis import HealthCheck, Phase, given, note
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from app.broker.message import raw_message
from app.broker.queues import queue_name
from app.config.settings import Settings
from app.jobs import Kind, job_id_of
from app.worker.pool.envelope import task_id_in
from tests import odd_data
from tests.apis import running_api
from tests.waiting import eventually
from tests.workers import Worker, rows

EXAMPLES = int(os.environ.get("ODD_EXAMPLES", "20"))
EACH = 10  #: messages, submissions and rows of an example
SECONDS = 40.0  #: that a good job may take on a busy machine

by_chance = hypothesis_settings(
    max_examples=EXAMPLES,
    derandomize="ODD_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # the test finds the guilty by itself
    suppress_health_check=list(HealthCheck),
)


class Mill:
    """A worker and an API; a worker that has ended is replaced, with nothing left to take."""

    def __init__(self, config: Settings, folder: Path, api: httpx.Client) -> None:
        self.api = api
        self._config = config
        self._worker = Worker(config, folder).start()

    def send(self, *items: bytes, queue: str) -> None:
        with redis.Redis.from_url(self._config.broker.url) as client:
            for item in items:
                client.lpush(queue, item)

    def insert(self, body: Any, format: int) -> UUID:
        """A row with this request, and its wake-up."""
        job_id = uuid4()
        text = json.dumps(body, allow_nan=False).replace("\\u0000", "").replace("\\ud", "")
        self.rows(
            "WITH key AS (INSERT INTO job_keys (id, created_at) VALUES (%s, now()) RETURNING *),"
            " asked AS (INSERT INTO requests (job_id, created_at, request)"
            " SELECT id, created_at, %s FROM key)"
            " INSERT INTO open_jobs (id, model, kind, source, state, url, format, not_before,"
            " created_at, queued_at, enqueued_at) SELECT id, 'stub', 'generate', 'api', 'queued',"
            " %s, %s, now(), created_at, now(), now() FROM key RETURNING id",
            job_id,
            text,
            None if job_id.int % 4 == 0 else "/v1/completions",
            format,
        )
        self.send(raw_message(job_id, Kind.GENERATE, {}, queue="x"), queue=queue_name("stub"))
        return job_id

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        return rows(self._config, query, *values)

    def mates_complete(self, *ids: UUID) -> bool:
        """Whether these jobs end well, and the worker is still the same."""

        def ended() -> bool:
            query = "SELECT FROM results WHERE job_id = ANY(%s) AND state = 'completed'"
            return self._worker.has_ended or len(self.rows(query, list(ids))) == len(ids)

        with contextlib.suppress(pytest.fail.Exception):
            eventually(ended, SECONDS)
            return not self._worker.has_ended
        return False

    def is_empty(self) -> bool:
        """Whether no message waits, and none is held."""
        with redis.Redis.from_url(self._config.broker.url) as client:
            waiting = any(map(client.llen, client.scan_iter(_type="list")))
            return not waiting and not client.hlen("unacked")

    def begin_anew(self) -> None:
        self._worker.kill()
        with redis.Redis.from_url(self._config.broker.url) as client:
            client.flushdb()
        with psycopg.connect(self._config.database.url, autocommit=True) as connection:
            connection.execute("TRUNCATE job_keys, requests, open_jobs, results, attempts, batches")
        self._worker.start()

    def end(self) -> None:
        self._worker.kill()

    @property
    def log(self) -> str:
        return self._worker.log


@pytest.fixture
def mill(settings: Settings, tmp_path: Path) -> Iterator[Mill]:
    config = settings.model_copy(
        update={"worker": settings.worker.model_copy(update={"lease_s": 20, "heartbeat_s": 1})}
    )
    with running_api(config) as api:
        mill = Mill(config, tmp_path / "worker", api)
        try:
            yield mill
        finally:
            mill.end()


def _mate(mill: Mill, number: int) -> UUID:
    job_id = uuid4()
    queue = queue_name(("stub", "stub-embed")[number % 2])
    kind, body = ((Kind.GENERATE, {"prompt": "flour"}), (Kind.EMBED, {"input": "flour"}))[
        number % 2
    ]
    mill.send(raw_message(job_id, kind, body, queue=queue), queue=queue)
    return job_id


def _without_a_row(mill: Mill, items: dict[UUID, bytes]) -> list[bytes]:
    known = {row["id"] for row in mill.rows("SELECT id FROM jobs")}
    for job_id in items.keys() & known:
        assert mill.api.get(f"/v1/jobs/{job_id}").status_code == 200, items[job_id]
    return [item for job_id, item in items.items() if job_id not in known]


def _survives(mill: Mill, deeds: list[Callable[[], object]]) -> bool:
    """Whether good jobs sent before, between and after these end well."""
    mates = []
    for number, deed in enumerate(deeds):
        mates.append(_mate(mill, number))
        deed()
    mates += [_mate(mill, 0), _mate(mill, 1)]
    return mill.mates_complete(*mates)


def _judge(mill: Mill, deeds: list[tuple[str, Callable[[], object]]]) -> None:
    """All at once; if not all is well, one by one, to name the guilty."""
    if _survives(mill, [deed for _, deed in deeds]):
        return
    guilty = []
    for name, deed in deeds:
        mill.begin_anew()
        if not _survives(mill, [deed]):
            guilty.append(name)
    mill.begin_anew()
    pytest.fail("These end or block a worker: " + "\n".join(guilty or ["all of them together"]))


@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * EXAMPLES)
def test_no_message_ends_the_worker_or_keeps_others_from_their_end(mill: Mill) -> None:
    @by_chance
    @given(st.integers(0, 2**64))
    def each(seed: int) -> None:
        # given messages bent by chance
        rng, queue = Random(seed), queue_name("stub")
        items = [odd_data.message(rng, UUID(int=rng.getrandbits(128)), queue) for _ in range(EACH)]
        note(f"seed {seed}")

        # when they come among good ones, the good ones are answered by the same worker
        _judge(
            mill,
            [(f"{item!r:.900}", lambda item=item: mill.send(item, queue=queue)) for item in items],
        )

        # then each that says its id has a row that can be read, and none is left in Redis
        eventually(mill.is_empty, SECONDS)
        named = {  # one without a task is no message of Celery's, whatever else it says
            job_id_of(task_id): item
            for item in items
            if b'"task":' in item and (task_id := task_id_in(item))
        }
        with contextlib.suppress(pytest.fail.Exception):
            eventually(lambda: not _without_a_row(mill, named), SECONDS)
        missing = _without_a_row(mill, named)
        assert not missing, f"{missing!r:.2000}\n{mill.log[-3000:]}"

    each()
    assert odd_data.SECRET not in mill.log


@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * EXAMPLES)
def test_no_request_is_answered_with_an_error_of_ours_or_ends_the_worker(mill: Mill) -> None:
    @by_chance
    @given(st.integers(0, 2**64))
    def each(seed: int) -> None:
        rng = Random(seed)
        bodies = [json.dumps(odd_data.submission(rng)) for _ in range(EACH)]
        accepted: list[str] = []

        def post(body: str) -> None:
            kind = {"Content-Type": "application/json"}
            answer = mill.api.post("/v1/jobs", content=body.encode(), headers=kind)
            assert answer.status_code < 500, (answer.status_code, body)
            if answer.is_success:
                accepted.append(answer.json()["id"])

        note(f"seed {seed}")
        _judge(mill, [(body[:900], lambda body=body: post(body)) for body in bodies])

        for job_id in accepted:
            assert mill.api.get(f"/v1/jobs/{job_id}").status_code == 200, job_id
        assert mill.api.get("/v1/jobs?limit=100").status_code == 200

    each()


@pytest.mark.slow
@pytest.mark.timeout(600 + 10 * EXAMPLES)
def test_no_row_ends_the_worker_or_keeps_others_from_their_end(mill: Mill) -> None:
    @by_chance
    @given(st.integers(0, 2**64))
    def each(seed: int) -> None:
        rng = Random(seed)
        stored = [odd_data.stored(rng) for _ in range(EACH)]
        note(f"seed {seed}")

        def insert(body: Any, format: int) -> None:
            with contextlib.suppress(
                ValueError, psycopg.DataError, psycopg.IntegrityError
            ):  # such a row cannot be
                mill.insert(body, format)

        _judge(
            mill,
            [(f"{row!r:.900}", lambda row=row: insert(*row)) for row in stored],
        )

        assert mill.api.get("/v1/jobs?limit=100").status_code == 200
        later = "SELECT FROM jobs WHERE format > 1 AND state <> 'queued'"
        assert mill.rows(later) == [], "A row of a later version was ended here."

    each()
