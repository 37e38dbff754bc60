"""Messages become rows in groups, and what is wrong with one is its own affair."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from app.config.settings import ModelSettings
from app.engines.catalog import CatalogModel
from app.engines.text.tokenizer import StubTokenizer
from app.errors import Unavailable
from app.jobs import Kind
from app.requests import bodies
from app.store import submissions
from app.store.database import Database
from app.worker.pool.arrivals import Arrival, Refusal
from app.worker.registrar import Registrar
from app.worker.work import Doomed, Job
from tests.rows import column, insert, new_job

MODEL = ModelSettings(source="stub", kind=Kind.GENERATE, engine="stub", max_batch_size=4)


class BrokenTokenizer(StubTokenizer):
    def encode_text(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        if "panic" in text:
            raise BaseException(text)  # as a panic in the tokenizer's own language is
        return super().encode_text(text)


class Unanswered:
    """A database that commits a statement, and the answer is lost on the way."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.lost_in = 0  #: statements

    @contextmanager
    def autocommit(self) -> Iterator[Any]:
        with self._database.autocommit() as connection:
            yield connection
        self.lost_in -= 1
        if self.lost_in == 0:
            raise Unavailable("The answer was lost.")


class Scene:
    """A registrar, and the tickets whose messages were acknowledged."""

    def __init__(self, database: Database) -> None:
        self.dropped: list[UUID] = []
        self.registrar = Registrar(
            worker_id=uuid4(),
            database=database,
            publisher=cast(Any, None),
            served={"stub": CatalogModel(MODEL, Path(), BrokenTokenizer(MODEL))},
            max_attempts=3,
        )

    def arrive(
        self, prompt: str | None, job_id: UUID | None = None, model: str = "stub", **changes: Any
    ) -> UUID:
        request = bodies.parse({"prompt": prompt}) if prompt else None
        values = {
            "job_id": job_id or uuid4(),
            "request": request,
            "model": model if request else None,
            "priority": 0,
            "not_before": None,
            "deadline": None,
            "metadata": {},
            **changes,
        }
        arrival = Arrival(**values)
        ticket: Any = SimpleNamespace(
            job_id=arrival.job_id,
            arrival=arrival,
            time_limit_s=None,
            dropped=lambda: self.dropped.append(arrival.job_id),
        )
        self.registrar.add(ticket)
        return arrival.job_id

    def register(self) -> dict[UUID, Job | Doomed]:
        return {job.id: job for job in self.registrar.register({})}


@pytest.fixture
def scene(database: Database) -> Scene:
    return Scene(database)


def test_a_value_that_the_store_cannot_hold_refuses_its_own_message_alone(
    scene: Scene, database: Database
) -> None:
    # given a message with a priority that no column holds, among good ones
    good = [scene.arrive(f"good {n}") for n in range(5)]
    bad = scene.arrive("bad", priority=1 << 40)
    good += [scene.arrive(f"good {n}") for n in range(5)]

    # when all are registered together
    found = scene.register()

    # then the good ones are jobs, and the bad one has failed and says why
    assert found.keys() == set(good)
    assert column(database, bad, "state") == "failed"
    assert scene.dropped == [bad]
    assert not scene.registrar.has_work


def test_a_bug_in_a_statement_for_a_group_fails_nobodys_job(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    # given code that fails whatever it is given
    def broken(*_: object) -> None:
        raise TypeError

    monkeypatch.setattr(submissions, "receive", broken)
    for n in range(3):
        scene.arrive(f"good {n}")

    # when messages are registered, then the bug ends the worker and not each of them in turn
    with pytest.raises(TypeError):
        scene.register()
    assert scene.registrar.has_work
    assert scene.dropped == []


def test_a_refusal_that_the_store_refuses_does_not_take_the_others_with_it(
    scene: Scene, database: Database
) -> None:
    acknowledged: list[UUID] = []
    ids = [uuid4(), uuid4(), uuid4()]
    for job_id, kind in zip(ids, ("generate", "neither", "embed"), strict=True):
        error = bodies.RequestError("It is wrong.")
        noted = partial(acknowledged.append, job_id)
        refusal = Refusal(job_id, cast(Any, kind), error, noted, "mill")
        scene.registrar.refuse(refusal)

    scene.register()

    assert acknowledged == ids
    assert [column(database, id_, "state") for id_ in ids] == ["failed", None, "failed"]
    assert column(database, ids[0], "tenant") == "mill"


def test_a_prompt_that_the_tokenizer_cannot_stand_dooms_its_own_job_alone(scene: Scene) -> None:
    good, bad = scene.arrive("good"), scene.arrive("do not panic")

    found = scene.register()

    assert isinstance(found[good], Job)
    assert isinstance(found[bad], Doomed)
    assert found[bad].ending.code == "invalid_request"  # type: ignore[union-attr]


def test_a_row_that_this_version_cannot_read_dooms_its_job_or_is_given_back(
    scene: Scene, database: Database
) -> None:
    # given rows with a field that is not known here, one of them of a later format
    wrong, later, good = insert(
        database,
        new_job(model="stub", request={"prompt": "x", "mood": "calm"}),
        new_job(model="stub", request={"prompt": "x", "mood": "calm"}, format=bodies.FORMAT + 1),
        new_job(model="stub"),
    )

    # when their messages come
    for job_id in (wrong, later, good):
        scene.arrive(None, job_id)
    found = scene.register()

    # then the wrong one is to fail, and the later one is nobody's again
    assert found.keys() == {wrong, good}
    assert isinstance(found[wrong], Doomed)
    scene.register()
    assert scene.dropped == [later]
    assert column(database, later, "received_by") is None
    assert column(database, later, "state") == "queued"


def test_a_job_is_held_to_the_limits_of_its_rows_model_and_not_of_its_messages(
    scene: Scene, database: Database
) -> None:
    # given a row of a model served here, and a message that names another
    request = bodies.parse({"prompt": "wheel"})
    [job_id] = insert(
        database, new_job(model="stub", request=request.raw, fingerprint=request.fingerprint)
    )
    scene.arrive("wheel", job_id, model="unknown")

    [job] = scene.register().values()

    assert isinstance(job, Job)
    assert job.prepared.num_input_tokens == 5


def test_the_time_limit_of_a_job_comes_from_its_row(scene: Scene, database: Database) -> None:
    with_limit = scene.arrive("first", time_limit_s=7.5)
    scene.register()
    again = Scene(database)
    again.arrive(None, with_limit)  # the message that rescue sends brings none

    [job] = again.register().values()

    assert isinstance(job, Job)
    assert job.time_limit_s == 7.5


@pytest.mark.parametrize("kind", list(Kind))
def test_a_revoked_message_that_nobody_had_read_is_a_cancelled_job_of_its_kind(
    scene: Scene, database: Database, kind: Kind
) -> None:
    job_id = uuid4()

    scene.registrar.revoke(job_id, kind)
    scene.registrar.register({})

    assert column(database, job_id, "state") == "cancelled"
    assert column(database, job_id, "kind") == kind


def test_what_was_received_without_an_answer_and_then_forgotten_is_freed(
    scene: Scene, database: Database
) -> None:
    # given a group that was registered, and nobody heard of it
    kept = scene.arrive("kept")
    known = scene.register()
    forgotten = scene.arrive("forgotten")
    scene.registrar._database = unanswered = cast(Any, Unanswered(database))
    unanswered.lost_in = 1  # to receive is the first statement: there is nothing to let go of
    with pytest.raises(Unavailable):
        scene.register()
    assert column(database, forgotten, "received_by") is not None

    # when the broker takes its messages back, and the next one comes
    scene.registrar.forget_waiting()
    assert scene.registrar.has_work
    scene.registrar.register(cast(Any, known))

    # then the row is nobody's, and what is known here is still held
    assert column(database, forgotten, "received_by") is None
    assert column(database, kept, "received_by") is not None
    assert not scene.registrar.has_work
