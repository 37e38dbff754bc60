"""Who is guilty of a dead engine: found by halves, and nobody else is charged."""

from __future__ import annotations

import datetime as dt
import math
from itertools import chain
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.bench.poison import max_runs
from app.jobs import ALONE_AFTER, MAX_SUSPECTS, SUSPECT_AFTER, CloseReason
from app.requests.prepare import Prepared
from app.worker.batcher import Limits
from app.worker.engine.wire import Broken
from app.worker.suspects import KILLS_ALONE, Suspects, verdict
from app.worker.work import Batch, Job, Run

CRASH = Broken("it ended with exit status 70")
LIMITS = Limits(max_batch_size=64, max_batch_tokens=100_000, max_wait_ns=0)
ROWS = {"one": 64, "two": 64}


def job(model: str = "one", losses: int = 0, num_sequences: int = 1) -> Job:
    ticket: Any = SimpleNamespace(job_id=uuid4())
    made = Job(
        ticket=ticket,
        model=model,
        request=cast(Any, SimpleNamespace(num_sequences=num_sequences)),
        prepared=Prepared(((1, 2),), 8),
        priority=0,
        deadline=None,
        tenant="default",
        losses=losses,
        arrived_ns=0,
        registered_ns=0,
    )
    batch = Batch(uuid4(), model, CloseReason.SIZE, 0)
    now = dt.datetime.now(dt.UTC)
    made.run = Run(uuid4(), 1, batch, now, now, 0, [None])
    return made


def try_all(jobs: list[Job], poisons: set[UUID]) -> tuple[set[UUID], int]:
    """Run jobs as the runner does; returns who was found guilty, and the number of runs."""
    suspects = Suspects({"one": LIMITS, "two": LIMITS})
    guilty: set[UUID] = set()
    group: list[Job] | None = jobs
    runs = 0
    while group:
        going = [each for each in group if each.id not in guilty]
        runs += bool(going)
        if poisons & {each.id for each in going}:
            for each in going:
                each.claimed_run.deaths += 1
            if len(going) == 1 and verdict(going[0].claimed_run, CRASH):
                guilty.add(going[0].id)
            suspects.split(going)
        group = suspects.next_claimed(ROWS)
    return guilty, runs


@given(size=st.integers(1, 200), data=st.data())
def test_exactly_the_poisons_are_found_guilty(size: int, data: st.DataObject) -> None:
    jobs = [job(data.draw(st.sampled_from(["one", "two"]))) for _ in range(size)]
    poisons = {each.id for each in jobs if data.draw(st.booleans())}

    guilty, _ = try_all(jobs, poisons)

    assert guilty == poisons


@given(size=st.integers(1, 300), data=st.data())
def test_one_poison_costs_no_more_runs_than_the_bound(size: int, data: st.DataObject) -> None:
    jobs = [job() for _ in range(size)]
    poison = data.draw(st.sampled_from(jobs)).id

    guilty, runs = try_all(jobs, {poison})

    assert guilty == {poison}
    assert runs <= 2 * math.ceil(math.log2(size)) + 1


@given(number=st.integers(1, 8), data=st.data())
def test_several_poisons_cost_at_most_a_path_down_the_tree_each(
    number: int, data: st.DataObject
) -> None:
    jobs = [job() for _ in range(64)]
    poisons = {each.id for each in data.draw(st.permutations(jobs))[:number]}

    guilty, runs = try_all(jobs, poisons)

    assert guilty == poisons
    assert runs <= max_runs(number)


@pytest.mark.parametrize(
    "broken",
    [Broken("x", was_killed=True), Broken("x", was_stuck=True), Broken("x", was_ended=True)],
)
def test_a_job_whose_engine_was_killed_by_others_or_was_slow_gets_more_chances(
    broken: Broken,
) -> None:
    run = job().claimed_run
    verdicts = []
    for _ in range(KILLS_ALONE):
        run.deaths += 1
        verdicts.append(verdict(run, broken))

    *first, last = verdicts
    assert first == [None] * (KILLS_ALONE - 1)
    assert last is not None
    assert last.code == ("out_of_memory" if broken.was_killed else "engine_crash")


def test_the_verdict_gives_the_evidence() -> None:
    run = job().claimed_run
    run.deaths = 4

    ending = verdict(run, CRASH)

    assert ending is not None
    assert ending.code == "engine_crash"
    assert ending.message == (
        "The engine process was lost 4 times while it ran this job, 1 of them alone: "
        "it ended with exit status 70."
    )


def test_jobs_lost_with_their_workers_are_claimed_in_small_groups_and_then_alone() -> None:
    suspects = Suspects({"one": LIMITS})
    few = [job(losses=SUSPECT_AFTER) for _ in range(MAX_SUSPECTS + 1)]
    alone = [job(losses=ALONE_AFTER) for _ in range(2)]
    for each in (*few, *alone):
        suspects.add(each)

    groups = []
    while suspects:
        groups.append(suspects.next_unclaimed(ROWS))

    assert groups[0] == few[:MAX_SUSPECTS]
    assert all(len(group) == 1 for group in groups if group[0] in alone or group[-1] in alone)
    assert list(chain.from_iterable(groups)) == [*few, *alone]


def test_what_is_claimed_comes_before_what_is_not_and_a_removed_job_never() -> None:
    suspects = Suspects({"one": LIMITS})
    gone, dropped = job(losses=SUSPECT_AFTER), [job(), job()]
    suspects.add(gone)
    suspects.split(dropped)
    suspects.remove(gone.id)

    assert [suspects.next_claimed(ROWS), suspects.next_claimed(ROWS)] == [
        [each] for each in dropped
    ]
    assert not suspects
    assert suspects.next_unclaimed(ROWS) == []


@given(
    sizes=st.lists(st.tuples(st.sampled_from(["one", "two"]), st.integers(1, 100)), max_size=20),
    claimed=st.integers(0, 20),
    rows=st.fixed_dictionaries({"one": st.integers(1, 64), "two": st.integers(1, 64)}),
)
def test_no_suspect_waits_for_ever_behind_one_that_does_not_fit(
    sizes: list[tuple[str, int]], claimed: int, rows: dict[str, int]
) -> None:
    # given suspects of any sizes, some claimed before they came here
    jobs = [job(model, SUSPECT_AFTER, size) for model, size in sizes]
    suspects = Suspects({"one": LIMITS, "two": LIMITS})
    suspects.split(jobs[:claimed])
    for each in jobs[claimed:]:
        suspects.add(each)

    # when they are asked for until none is left
    seen = suspects.misfits(rows)
    for _ in range(len(jobs)):
        if not suspects:
            break
        group = suspects.next_claimed(rows) or suspects.next_unclaimed(rows)
        assert group
        assert sum(each.num_sequences for each in group) <= rows[group[0].model]
        seen += group

    # then each was given once: to run if it fits, and else to fail
    assert sorted(each.id for each in seen) == sorted(each.id for each in jobs)
