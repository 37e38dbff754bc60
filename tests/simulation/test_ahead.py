"""The next batch of an engine that nobody can join is claimed while one runs, and no more; of one
that is joined a few jobs more than it has room for."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Final
from uuid import UUID

import pytest

from app.broker.queues import queue_name
from app.jobs import ALONE_AFTER, JobState
from app.worker.engine.wire import Admit
from app.worker.runner import GATHER_NS
from app.worker.work import Job
from tests.memory_store import Row
from tests.simulation.engine import MAX_ROWS, STEP_NS
from tests.simulation.producers import MAX_JOBS
from tests.simulation.prompts import PROMPTS
from tests.simulation.world import World

STATIC: Final = 1  #: a way to submit: row and message, to the model whose engine nobody joins
MS: Final = 1_000_000
JOINED: Final = 7  #: the same, to the model whose engine takes more between its steps


class Ahead:
    """One worker with a batch that runs and the next one claimed."""

    def __init__(
        self,
        *runs: str,
        next_: tuple[str, ...] = ("good 2",) * MAX_ROWS,
        times: int = 0,
        way: int = STATIC,
    ):
        self.world, self.way = World(), way
        self.world.workers[1].die(given_back=False)
        self.worker = self.world.workers[0]
        self._submit(("good 1",) * MAX_ROWS)  # so that it is known how long batches take
        self._go_until(lambda: self.worker.host.num_runs > 0)
        self.running = self._submit(runs or ("good 9",) * MAX_ROWS)
        self.next = self._submit(next_, times)
        self._go_until(lambda: self._are(self.next, JobState.RUNNING))
        assert self._are(self.running, JobState.RUNNING)
        assert way == JOINED or self.worker.host.num_runs == 2

    def _submit(self, prompts: tuple[str, ...], times: int = 0) -> list[UUID]:
        before = set(self.world.expected)
        for prompt in prompts:
            self.world.submit(PROMPTS.index(prompt), self.way, times)
        return [job_id for job_id in self.world.expected if job_id not in before]

    def _go_until(self, is_so: Callable[[], bool]) -> None:
        for _ in range(5_000):
            if is_so():
                return
            self.world.go(1, 0)
        raise AssertionError("it never came to that")

    def _are(self, job_ids: list[UUID], state: JobState) -> bool:
        jobs = self.world.store.tables["jobs"]
        return all(id in jobs and jobs[id]["state"] == state for id in job_ids)

    def until(self, job_ids: list[UUID], state: JobState) -> None:
        self._go_until(lambda: self._are(job_ids, state))

    def attempts(self, job_ids: list[UUID]) -> list[Row]:
        return [each for each in self.world.store.rows("attempts") if each["job_id"] in job_ids]

    def results(self, job_ids: list[UUID]) -> list[Row]:
        return [self.world.store.tables["results"][job_id] for job_id in job_ids]


def test_a_claimed_batch_begins_when_the_one_before_is_over_though_nobody_is_there() -> None:
    # given a worker that stands still, and no Postgres
    ahead = Ahead()
    ahead.world.pause_worker(0, 90)
    ahead.world.postgres_away(90)

    # when the batch that runs is over
    ahead._go_until(lambda: ahead.worker.host.num_runs == 3)

    # then the device does not wait for either
    assert ahead.worker.is_paused
    assert ahead._are(ahead.running, JobState.RUNNING)  # their end is not written yet
    ahead.world.heal()
    first, then = ahead.results(ahead.running), ahead.results(ahead.next)
    ended = max(each["first_token_at"] for each in first)  # of a padded batch all end at once
    assert {each["started_at"] for each in then} == {ended}


def test_no_more_than_one_batch_is_claimed_beside_the_one_that_runs() -> None:
    # given one more full batch in the worker, beside what its queues bring
    ahead = Ahead()
    more = ahead._submit(("good 2",) * MAX_ROWS)
    for message in ahead.world.queue.lists[queue_name("static")]:
        ahead.worker.take(message)

    ahead.worker.turn()

    assert {ahead.world.store.tables["jobs"][id]["received_by"] for id in more} == {ahead.worker.id}
    assert not ahead.attempts(more)


def test_an_urgent_job_goes_before_all_that_are_not_claimed() -> None:
    ahead = Ahead()
    patient = ahead._submit(("good 2",) * MAX_ROWS, times=9)  # priority 9
    urgent = ahead._submit(("good 3",))

    ahead.until(urgent, JobState.COMPLETED)

    assert not ahead._are(patient, JobState.COMPLETED)


def test_who_is_claimed_is_no_suspect_when_the_engine_dies_of_the_batch_before() -> None:
    ahead = Ahead("poison 3", *("good 9",) * (MAX_ROWS - 1))
    host, jobs = ahead.worker.host, ahead.worker.runner._jobs

    ahead._go_until(lambda: bool(host.lost_with))

    assert {jobs[job_id].claimed_run.deaths for job_id in ahead.running} == {1}
    assert {jobs[job_id].claimed_run.deaths for job_id in ahead.next} == {0}
    ahead.world.heal()
    prompts = {ahead.world.expected[job_id].prompt for job_id in ahead.next}
    assert host.lost_with and not any(prompts & inside for inside in host.lost_with)
    assert {each["outcome"] for each in ahead.attempts(ahead.next)} == {"succeeded"}
    batches = {each["batch_id"] for each in ahead.attempts(ahead.next)}
    sent = [each for each in host.began if UUID(each.batch_id) in batches]
    assert [len(each.sequences) for each in sent] == [MAX_ROWS]  # and it runs whole


@pytest.mark.parametrize("way", [STATIC, JOINED])
def test_what_ended_is_written_before_a_suspect_goes_in_of_which_the_worker_may_die(
    way: int,
) -> None:
    # given jobs that were lost with their workers, and are to run alone
    world = World()
    world.workers[1].die(given_back=False)
    runner, unwritten = world.workers[0].runner, list[int]()
    run = runner._executor.run

    def noted(jobs: list[Job]) -> None:
        unwritten.append(len(runner._over))
        run(jobs)

    runner._executor.run = noted  # type: ignore[method-assign]
    for _ in range(4):
        world.submit(PROMPTS.index("good 2"), way, 0)
    for job_id in world.expected:
        world.store.tables["jobs"][job_id]["losses"] = ALONE_AFTER

    # when each has run
    world.heal()

    # then each went in when what had ended before was in its row
    assert len(unwritten) > 1
    assert not any(unwritten)


def test_a_shutdown_gives_back_at_once_and_uncharged_what_is_claimed_and_does_not_run() -> None:
    ahead = Ahead()

    ahead.world.drain(0, 29)
    ahead.until(ahead.next, JobState.QUEUED)

    assert ahead._are(ahead.running, JobState.RUNNING)
    assert [each["outcome"] for each in ahead.attempts(ahead.next)] == ["released"] * MAX_ROWS
    assert not any(each["charged"] for each in ahead.attempts(ahead.next))
    ahead.until(ahead.running, JobState.COMPLETED)
    ahead.world.heal()


def test_a_claimed_job_that_is_cancelled_before_it_runs_ends_at_once_and_costs_nothing() -> None:
    ahead = Ahead()
    gone, *others = ahead.next

    ahead.world.cancel(list(ahead.world.expected).index(gone))
    ahead.until([gone], JobState.CANCELLED)

    assert ahead._are(ahead.running, JobState.RUNNING)
    [result] = ahead.results([gone])
    assert (result["device_ns"], result["cost"], result["started_at"]) == (0, 0, None)
    ahead.world.heal()
    assert ahead._are(others, JobState.COMPLETED)


def test_a_claimed_job_whose_deadline_passes_before_it_runs_expires_at_once() -> None:
    ahead = Ahead(*("good 30",) * MAX_ROWS, times=2)  # a deadline of a second

    ahead.until(ahead.next, JobState.EXPIRED)

    assert ahead._are(ahead.running, JobState.RUNNING)
    assert {each["device_ns"] for each in ahead.results(ahead.next)} == {0}
    ahead.world.heal()


def test_a_time_limit_counts_from_the_run_and_not_from_the_claim() -> None:
    # given jobs that may run for a second, behind a batch that takes longer
    ahead = Ahead(*("good 30",) * MAX_ROWS)
    for job_id in ahead.next:
        ahead.worker.runner._jobs[job_id].time_limit_s = 1.0

    ahead.world.heal()

    assert ahead._are(ahead.next, JobState.COMPLETED)


def test_what_a_claimed_batch_waits_for_the_engine_is_no_wait_for_company() -> None:
    ahead = Ahead(*("good 30",) * MAX_ROWS)

    ahead.world.heal()

    for result in ahead.results(ahead.next):
        waited_ms = (result["started_at"] - result["claimed_at"]).total_seconds() * 1e3
        assert waited_ms > 20 * STEP_NS / 1e6
        assert result["batch_wait_ms"] + waited_ms <= result["queue_ms"] + 1


def test_a_batch_behind_one_that_takes_long_is_claimed_only_when_it_can_run() -> None:
    # given batches that take three seconds
    world = World()
    world.workers[1].die(given_back=False)
    for _ in range(MAX_JOBS // 2):
        world.submit(PROMPTS.index("good 60"), STATIC, 0)

    # when one after the other runs
    running = set()
    while not all(row["state"] == "completed" for row in world.store.rows("jobs")):
        world.go(1, 0)
        running.add(sum(row["state"] == "running" for row in world.store.rows("jobs")))

    # then no other is claimed meanwhile, which would make the urgent ones wait for it
    assert max(running) == MAX_ROWS


def test_of_a_claimed_batch_goes_in_what_fits_since_memory_ran_out() -> None:
    ahead = Ahead("oom 2", *("good 9",) * (MAX_ROWS - 1))

    ahead.world.heal()

    sent = [len(each.sequences) for each in ahead.worker.host.began if _is_of(ahead, each)]
    assert sum(sent) == MAX_ROWS
    assert max(sent) <= MAX_ROWS // 2


def _is_of(ahead: Ahead, admit: Admit) -> bool:
    return UUID(admit.batch_id) in {each["batch_id"] for each in ahead.attempts(ahead.next)}


def test_what_batches_took_is_known_to_a_batcher_that_asks() -> None:
    ahead = Ahead()
    batcher = ahead.worker.runner._dispatcher._batcher
    assert batcher.cost("static") is None  # the policy is fixed

    noted: list[tuple[str, int, int]] = []
    batcher.note_ran = lambda *ran: noted.append(ran)  # type: ignore[method-assign]
    ahead.world.heal()

    device_ns = [
        sum(result["device_ns"] for result in ahead.results(jobs))
        for jobs in (ahead.running, ahead.next)
    ]
    assert noted == [("static", MAX_ROWS, each) for each in device_ns]


def test_a_job_claimed_before_there_is_room_begins_though_postgres_is_away() -> None:
    # given an engine that is joined, full and asked for more
    ahead = Ahead("good 9", *("good 60",) * (MAX_ROWS - 1), next_=("good 3",), way=JOINED)
    more = ahead._submit(("good 2",) * 2)
    ahead.world.go(1, 0)
    assert ahead._are(more, JobState.QUEUED)

    # when a row becomes free and nothing can be claimed
    ahead.world.postgres_away(90)
    ahead._go_until(lambda: ahead.worker.runner._jobs[ahead.next[0]].claimed_run.is_over)

    # then it was not idle
    assert ahead._are(ahead.running + ahead.next, JobState.RUNNING)
    ahead.world.heal()
    assert ahead._are(ahead.running + ahead.next + more, JobState.COMPLETED)


def test_what_a_batch_took_is_known_once_though_a_part_of_it_waited_for_room() -> None:
    ahead = Ahead(*("good 1", "good 9") * 2, next_=("good 2",), way=JOINED)
    jobs = ahead.running + ahead.next + ahead._submit(("good 1", "good 9", "good 4") * 4)
    noted: list[tuple[str, int, int]] = []
    batcher = ahead.worker.runner._dispatcher._batcher
    batcher.note_ran = lambda *ran: noted.append(ran)  # type: ignore[method-assign]

    ahead.world.heal()

    assert sum(rows for _, rows, _ in noted) == len(jobs)
    assert sum(took for *_, took in noted) == sum(each["device_ns"] for each in ahead.results(jobs))


def test_while_claimed_jobs_wait_for_room_ends_are_written_together() -> None:
    ahead = Ahead("good 2", *("good 9",) * (MAX_ROWS - 1), next_=("good 2",), way=JOINED)
    behind = ahead._submit(("good 3", "good 4", "good 9") * 4)

    ahead.until(behind, JobState.COMPLETED)

    results = ahead.results(behind)
    is_full_until = max(each["started_at"] for each in results)
    ends = sorted({each["finished_at"] for each in results if each["finished_at"] < is_full_until})
    pauses = [(b - a).total_seconds() for a, b in pairwise(ends)]
    assert len(pauses) > 1
    assert min(pauses) >= GATHER_NS / 1e9 > STEP_NS / 1e9
    ahead.world.heal()


def test_what_ended_in_time_is_an_answer_though_it_was_written_late() -> None:
    # given a job that may run for as long as it takes, and others beside it
    ahead = Ahead("good 2", "good 9", way=JOINED, next_=("good 9",))
    [first, *_] = ahead.running
    ahead.worker.runner._jobs[first].time_limit_s = 2 * STEP_NS / 1e9

    # when nobody writes its end until its time is long over
    ahead.world.postgres_away(30)
    ahead.world.heal()

    # then it is no failure
    assert ahead._are([first], JobState.COMPLETED)


def test_what_ended_in_time_is_an_answer_though_it_was_told_late() -> None:
    # given jobs of three seconds that began soon after each other
    ahead = Ahead("good 60", way=JOINED, next_=("good 60",))
    ahead.world.go(1, 0)
    [second] = ahead._submit(("good 60",))
    ahead.until([second], JobState.RUNNING)
    ahead.worker.runner._jobs[second].time_limit_s = 60 * STEP_NS / 1e9
    ahead.world.go(1, 0)
    ahead._submit(("good 60",))

    # when the second is told later, because the first was told just now, and its worker looks at
    # limits before that
    process = ahead.worker.host.process
    assert process is not None
    ahead._go_until(lambda: bool(process._held))
    ahead.world.clock.ns += 4 * MS
    ahead.worker.turn()
    ahead.until([second], JobState.COMPLETED)

    # then it had all of its time, and was told after it
    [result] = ahead.results([second])
    held_ms = (result["finished_at"] - result["started_at"]).total_seconds() * 1e3
    assert held_ms >= result["inference_ms"] + STEP_NS / 1e6
    assert result["inference_ms"] <= 60 * STEP_NS / 1e6


def test_what_ended_late_is_none() -> None:
    ahead = Ahead("good 4", "good 9", way=JOINED, next_=("good 9",))
    [first, *_] = ahead.running
    ahead.worker.runner._jobs[first].time_limit_s = 2 * STEP_NS / 1e9
    ahead.until([first], JobState.FAILED)
