"""Every statement finds its rows by an index, at four hundred thousand jobs.

The store's own functions run, and Postgres explains each of their statements with the parameters
that it is sent with.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Connection, event, text

from app.jobs import AttemptOutcome, JobState
from app.store import (
    cancellation,
    claims,
    counts,
    delivery,
    lists,
    purging,
    reads,
    releases,
    retention,
    stored_chats,
    submissions,
    sweeps,
    workers,
)
from app.store.claims import Member
from app.store.database import Database
from app.store.lists import Filter
from app.store.submissions import Incoming
from tests.rows import MODEL, Worker, completed, end_lease, new_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

# A service with a history: 300,000 finished jobs of four models, and 100,000 open ones.
_HISTORY = (
    """
    CREATE TEMPORARY TABLE history AS
    SELECT
        n, gen_random_uuid() AS id, now() - n * interval '1 s' AS made,
        (ARRAY['smollm2', 'other', 'rare', 'embed'])[1 + n % 4] AS model,
        CASE WHEN n % 20 = 0 THEN
            jsonb_build_object('customer', CAST(n % 3000 AS text), 'source', 'crm')
            ELSE '{}' END AS metadata,
        CASE WHEN n % 5 = 0 THEN 'key ' || n END AS idempotency_key,
        CASE WHEN n <= 200 THEN 'running' WHEN n <= 100000 THEN 'queued'
            ELSE coalesce((ARRAY['failed', 'cancelled', 'expired'])[n % 97], 'completed')
            END AS state
    FROM generate_series(1, 400000) AS n
    """,
    """
    INSERT INTO job_keys (id, idempotency_key, created_at)
    SELECT id, idempotency_key, made FROM history
    """,
    """
    INSERT INTO requests (job_id, created_at, request)
    SELECT id, made, '{"prompt": "A mill"}' FROM history
    """,
    """
    INSERT INTO open_jobs (
        id, model, kind, metadata, source, state, not_before, deadline, created_at, queued_at,
        enqueued_at, attempt_id, worker_id, batch_id
    )
    SELECT
        id, model, 'generate', metadata, 'api', state, made,
        CASE WHEN n % 10 = 0 THEN made + interval '30 days' END, made, made,
        CASE WHEN n % 7 > 0 THEN made END,
        CASE state WHEN 'running' THEN gen_random_uuid() END,
        CASE WHEN state = 'running' OR (n % 500 = 1 AND n % 7 > 0)
            THEN CAST(:worker_id AS uuid) END,
        CASE state WHEN 'running' THEN gen_random_uuid() END
    FROM history WHERE n <= 100000
    """,
    """
    INSERT INTO results (
        job_id, model, kind, metadata, source, state, not_before, created_at, queued_at,
        finished_at, total_ms, response, stored
    )
    SELECT id, model, 'generate', metadata, 'api', state, made, made, made, made, 1,
        CASE WHEN n % 10 = 0 THEN CAST('{}' AS jsonb) END, n % 100 = 0
    FROM history WHERE n > 100000
    """,
    """
    INSERT INTO attempts (id, created_at, job_id, number, worker_id, batch_id, claimed_at)
    SELECT gen_random_uuid(), made, id, 1, gen_random_uuid(), gen_random_uuid(), made
    FROM history WHERE n > 100000 AND n % 5 = 0
    """,
    """
    INSERT INTO batches (
        id, worker_id, model, kind, engine, close_reason, num_jobs, num_sequences, wait_ms,
        opened_at, claimed_at
    )
    SELECT batch_id, worker_id, 'smollm2', 'generate', 'stub', 'size', 1, 1, 0, claimed_at,
        claimed_at
    FROM attempts
    """,
    """
    INSERT INTO webhook_deliveries (
        id, event_id, type, object_id, url, origin, state, created_at, since, ended_at
    )
    SELECT gen_random_uuid(), id, 'job.completed', id, 'https://mill.test/', 'https://mill.test',
        'delivered', made, made, made
    FROM history WHERE n > 100000 AND n % 10 = 0
    """,
    "DROP TABLE history",
    "ANALYZE",
)


_PARTITIONS = "SELECT relname FROM pg_class WHERE relispartition AND relkind = 'r'"
_OF_PARTITIONS = """
    SELECT part.relname, whole.relname FROM pg_inherits
    JOIN pg_class AS part ON part.oid = inhrelid JOIN pg_class AS whole ON whole.oid = inhparent
    WHERE part.relkind = 'i'
"""

OPEN = [JobState.QUEUED, JobState.RUNNING]


@dataclass
class Explained:
    """What the plans of some statements touch."""

    indexes: set[str] = field(default_factory=set)
    read_whole: set[str] = field(default_factory=set)  #: tables

    def add(self, node: dict[str, Any]) -> None:
        if "Index Name" in node:
            self.indexes.add(node["Index Name"])
        elif node["Node Type"] == "Seq Scan":
            self.read_whole.add(node["Relation Name"])
        for child in node.get("Plans", ()):
            self.add(child)


@dataclass
class Service:
    """The database with its history, a worker of its own, and a few ids."""

    database: Database
    worker: Worker
    finished: UUID
    queued: list[UUID]
    indexes: dict[str, str]  #: of partitions, and of which index each is a part
    empty: set[str]  #: partitions without rows

    def explain(self, call: Callable[[Connection], object], *but: str) -> set[str]:
        """Run a function of the store in a transaction that is undone; the indexes that it uses.

        Fails if a statement reads a table whole, other than the few rows of `workers`, and `but`.
        """
        explained = Explained()

        def before(
            connection: Connection, cursor: Any, statement: str, parameters: Any, *_: object
        ) -> None:
            cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
            explained.add(cursor.fetchone()[0][0]["Plan"])

        with self.database.begin() as connection:
            event.listen(connection, "before_cursor_execute", before)
            call(connection)
            connection.rollback()
        assert explained.read_whole - self.empty <= {"workers", *but}
        return {self.indexes.get(name, name) for name in explained.indexes} - {"workers_pkey"}


@pytest.fixture(scope="module")
def service(empty_databases: Callable[[str], str], migrated_template: str) -> Iterator[Service]:
    url = empty_databases(migrated_template)
    with closing(Database(url, statement_timeout_ms=200_000)) as database:
        worker = Worker.registered(database, lease_s=3600)
        with database.begin() as connection:
            for statement in _HISTORY:
                connection.execute(text(statement), {"worker_id": worker.id})
            indexes = dict(tuple(row) for row in connection.execute(text(_OF_PARTITIONS)))
            empty = {
                name
                for name in connection.scalars(text(_PARTITIONS))
                if not connection.scalar(text(f"SELECT EXISTS (SELECT FROM {name})"))
            }
            pick = text("SELECT id FROM jobs WHERE state = :state AND received_by IS NULL LIMIT 64")
            queued = list(connection.scalars(pick, {"state": "queued"}))
            finished = connection.scalar(pick, {"state": "completed"})
        assert finished is not None
        yield Service(database, worker, finished, queued, indexes, empty)


def test_submitting(service: Service) -> None:
    new = [new_job(idempotency_key=f"new {n}") for n in range(100)]
    known = new_job(idempotency_key="key 5")

    def submit(connection: Connection) -> None:
        sent = [job.id for job in new]
        assert all(row.is_sent for row in submissions.insert_jobs(connection, new, sent))
        assert not submissions.insert_jobs(connection, [known])[0].created
        delivery.not_sent(connection, [job.id for job in new])

    assert service.explain(submit) == {
        "job_keys_pkey",
        "job_keys_idempotency_key",
        "job_keys_replay_of",
        "open_jobs_pkey",
    }


def test_receiving(service: Service) -> None:
    arrivals = [Incoming(id) for id in service.queued] + [
        Incoming(job.id, job) for job in [new_job()]
    ]

    def receive(connection: Connection) -> None:
        assert len(submissions.receive(connection, service.worker.id, arrivals)) == len(arrivals)
        delivery.let_go(connection, service.worker.id, service.queued)

    assert service.explain(receive) >= {"open_jobs_pkey"}


def test_sending_again_and_freeing_what_was_forgotten(service: Service) -> None:
    again = partial(delivery.send_again, ids=service.queued, lost_after_s=10.0)
    forgotten = partial(delivery.free_forgotten, worker_id=service.worker.id, known=service.queued)

    assert service.explain(again) == {"open_jobs_pkey"}
    assert service.explain(forgotten) == {"open_jobs_by_worker", "open_jobs_pkey"}


def test_taking(service: Service) -> None:
    members = [Member(id, uuid4()) for id in service.queued]

    def take(connection: Connection) -> None:
        assert claims.take(connection, service.worker.batch(), members)

    assert service.explain(take) == {"open_jobs_pkey", "requests_pkey"}


def test_claiming_finishing_and_releasing(service: Service) -> None:
    members = [Member(id, uuid4()) for id in service.queued]

    def run(connection: Connection) -> None:
        claimed = claims.claim(connection, service.worker.batch(), members)
        half = len(claimed) // 2
        assert half == 32
        for _ in range(2):  # those that have ended are looked for elsewhere
            claims.finish(connection, [completed(each) for each in claimed[:half]])
        releases.release(
            connection,
            [
                releases.Release(
                    job_id=each.job_id,
                    attempt_id=each.attempt_id,
                    created_at=each.created_at,
                    outcome=AttemptOutcome.LOST,
                    charged=True,
                )
                for each in claimed[half:]
            ],
        )

    assert service.explain(run) >= {
        "open_jobs_pkey",
        "results_pkey",
        "batches_pkey",
    }


def test_the_heartbeat(service: Service) -> None:
    beat = partial(workers.heartbeat, worker_id=service.worker.id, lease_s=3600)

    assert service.explain(beat) == {"open_jobs_by_worker"}


def test_cancelling(service: Service) -> None:
    cancel = partial(cancellation.cancel, job_id=service.queued[0])

    assert service.explain(cancel) == {"open_jobs_pkey"}
    many = partial(cancellation.cancel_free, ids=service.queued)
    assert service.explain(many) == {"open_jobs_pkey"}
    ended = partial(cancellation.cancel_free, ids=[service.finished])
    assert service.explain(ended) == {"open_jobs_pkey", "results_pkey"}


@pytest.mark.parametrize(
    ("call", "index"),
    [
        (partial(delivery.free_lost, page=500), "open_jobs_by_worker"),
        (partial(sweeps.find_late, page=500), "open_jobs_deadline"),
        (delivery.unsent, "open_jobs_unsent"),
        (
            partial(delivery.send_due, model=MODEL, priorities=range(3), page=500),
            "open_jobs_unsent",
        ),
        (partial(delivery.overdue, lost_after_s=10.0, most=500), "open_jobs_sent"),
        (partial(counts.ended, window_s=30.0), "results_finished"),
    ],
)
def test_rescue_and_counts(
    service: Service, call: Callable[[Connection], object], index: str
) -> None:
    indexes = service.explain(call)

    assert index in indexes
    assert indexes <= {index, "open_jobs_pkey"}


def test_counting_the_queue_reads_open_jobs_alone(service: Service) -> None:
    assert service.explain(counts.queued, "open_jobs") == set()
    assert service.explain(counts.queue_depths, "open_jobs") == set()


def test_retention(service: Service) -> None:
    day = {"keep_s": 86_400.0, "page": 50}  # few of what there is
    none = ("job_batches", "job_batch_lines")  # of which there are none here

    assert service.explain(partial(retention.redact_responses, **day), *none) == {
        "results_responses",
        "results_pkey",
    }
    assert service.explain(partial(retention.remove_requests, **day)) == {
        "requests_pkey",
        "results_pkey",
    }
    assert service.explain(partial(retention.delete_jobs, **day), *none) == {
        "results_finished",
        "results_pkey",
        "requests_pkey",
        "attempts_created_at_job_id_number_key",
        "job_keys_pkey",
    }
    assert service.explain(partial(retention.delete_batches, **day)) == {
        "batches_by_age",
        "batches_pkey",
    }


def test_replays(service: Service) -> None:
    new = new_job(replay_of=service.finished)

    def replay(connection: Connection) -> None:
        reads.replayable(connection, service.finished)
        submissions.insert_jobs(connection, [new])
        submissions.insert_jobs(connection, [new_job(replay_of=service.finished)])

    assert service.explain(replay) >= {
        "job_keys_pkey",
        "job_keys_idempotency_key",
        "job_keys_replay_of",
    }


@pytest.mark.parametrize("model", [None, MODEL])
def test_lists_by_error(service: Service, model: str | None) -> None:
    def list_jobs(connection: Connection) -> None:
        reads.list_jobs(
            connection,
            Filter(states=[JobState.FAILED], model=model, error_code="engine_crash"),
            limit=100,
        )

    assert "results_by_error" in service.explain(list_jobs)


@pytest.mark.parametrize("asked", [{}, {"model": MODEL}, {"metadata": {"source": "crm"}}], ids=str)
def test_lists_of_stored_chats_read_no_others(service: Service, asked: dict[str, Any]) -> None:
    def page(connection: Connection) -> None:
        stored_chats.page(connection, **asked, after=service.finished, limit=100)

    assert "results_stored" in service.explain(page)


def test_the_leases(service: Service) -> None:
    end_lease(service.database, service.worker.id)

    def expire(connection: Connection) -> None:
        lost = sweeps.find_lost(connection, 500)
        assert sweeps.expire_leases(connection, lost)
        sweeps.expire_deadlines(connection, service.queued)

    indexes = service.explain(expire)

    service.worker.heartbeat(3600)
    assert indexes - {"attempts_pkey", "attempts_created_at_job_id_number_key"} == {
        "open_jobs_by_worker",
        "open_jobs_pkey",
    }


def test_the_status(service: Service) -> None:
    status = partial(reads.find, ids=[service.finished])

    assert service.explain(status) == {
        "open_jobs_pkey",
        "results_pkey",
        "batches_pkey",
        "job_keys_pkey",
        "attempts_created_at_job_id_number_key",
    }


@pytest.mark.parametrize("state", [None, JobState.FAILED, JobState.QUEUED, JobState.CANCELLED])
@pytest.mark.parametrize("model", [None, "rare", "unknown"])
def test_lists(service: Service, state: JobState | None, model: str | None) -> None:
    def list_jobs(connection: Connection) -> None:
        wanted = Filter(states=[state] if state else list(JobState), model=model)
        reads.list_jobs(connection, wanted, after=service.finished, limit=100)

    by_model = {"open_jobs_by_model", "results_by_model"}
    if model == "rare":  # so are jobs that have failed
        by_model.add("results_by_state")
    by_state = {"open_jobs_by_model", "results_by_state"}
    indexes = {name for name in service.explain(list_jobs) if "_by_" in name}

    assert indexes
    assert indexes <= (by_model if model else by_state) | {"open_jobs_by_worker"}


def test_lists_by_labels_that_many_have_walk_through_open_jobs(service: Service) -> None:
    def list_jobs(connection: Connection) -> None:
        wanted = Filter(states=OPEN, metadata={"source": "crm"}, is_asked=False)
        assert len(reads.list_jobs(connection, wanted, limit=100)) == 100

    assert "open_jobs_by_model" in service.explain(list_jobs)


def test_lists_by_labels_that_few_have_use_the_index_of_labels(service: Service) -> None:
    # given the function that looks for them, which EXPLAIN does not look into
    def look(connection: Connection) -> None:
        source: str = connection.scalar(
            text("SELECT pg_get_function_sqlbody(oid) FROM pg_proc WHERE proname = 'labelled'")
        )
        source = source.removeprefix("BEGIN ATOMIC").removesuffix("END").rstrip(" ;\n")
        for name, value in (
            ("of_tenant", "'default'"),
            ("labels", """CAST('{"customer": "20"}' AS jsonb)"""),
            ("most", "1000"),
        ):
            source = re.sub(rf"(labelled\.)?\b{name}\b", value, source)
        assert connection.exec_driver_sql(source).all()

    wanted = Filter(states=OPEN, metadata={"customer": "20"}, is_asked=False)
    with service.database.begin() as connection:
        assert len(reads.list_jobs(connection, wanted, limit=100)) in (33, 34)

    assert {"open_jobs_by_metadata", "results_by_metadata"} <= service.explain(look, "pg_proc")


def test_a_list_by_key(service: Service) -> None:
    find = partial(lists.newest, given=Filter(idempotency_key="key 5"), limit=100)

    assert service.explain(find) == {
        "job_keys_idempotency_key",
        "open_jobs_pkey",
        "results_pkey",
    }


def test_the_states_of_many(service: Service) -> None:
    assert service.explain(partial(reads.states, ids=service.queued)) == {"open_jobs_pkey"}
    assert service.explain(partial(reads.states, ids=[service.finished])) == {
        "open_jobs_pkey",
        "job_keys_pkey",
        "results_pkey",
    }


def test_purging(service: Service) -> None:
    purge = partial(purging.purge, job_id=service.finished)

    assert service.explain(purge) == {
        "open_jobs_pkey",
        "results_pkey",
        "requests_pkey",
        "job_keys_pkey",
        "webhook_deliveries_event",
    }


def test_the_ages_of_queues(service: Service) -> None:
    ages = partial(counts.oldest_queued_s, models=[MODEL, "other"])
    assert service.explain(ages) == {"open_jobs_by_model"}


def test_prompt_tokens_of_late(service: Service) -> None:
    assert service.explain(counts.prompt_tokens) == {"results_responses"}
