"""Batches that are claimed as their messages come, while something goes wrong."""

from __future__ import annotations

from typing import Final

import pytest

from app.jobs import SUSPECT_AFTER
from tests.memory_store import Row
from tests.simulation.effects import Effect
from tests.simulation.engine import MAX_ROWS
from tests.simulation.prompts import PROMPTS
from tests.simulation.servers import DIES_AFTER, DIES_BEFORE, ROLLED_BACK, UNKNOWN, Message
from tests.simulation.world import World

STATIC: Final = 1  #: a way to submit: row and message, to the model whose engine nobody joins
FAULTS: Final = (ROLLED_BACK, UNKNOWN)


class Came:
    """A worker that messages for a full batch came to, and that has not looked at them yet."""

    def __init__(self, *prompts: str) -> None:
        self.world = World()
        self.world.workers[1].die(given_back=False)
        self.worker = self.world.workers[0]
        self.world.go(60, 0)  # the worker is registered
        for prompt in prompts or ("good 2",) * MAX_ROWS:
            self.world.submit(PROMPTS.index(prompt), STATIC, 0)
        self.ids = list(self.world.expected)
        self.world.flush_redis()
        for job_id in self.ids:
            self.worker.take(Message(job_id, None, "static"))

    def rows(self) -> list[Row]:
        return [self.world.store.tables["jobs"][job_id] for job_id in self.ids]

    def states(self) -> set[str]:
        return {row["state"] for row in self.rows()}

    def fail(self, fault: int, after: int = 0) -> None:
        self.worker.database.fault, self.worker.database.fault_in = fault, after

    def attempts(self) -> list[Row]:
        return self.world.store.rows("attempts")

    def pass_time(self, seconds: float) -> None:
        self.world.clock.ns += int(seconds * 1e9)

    @property
    def taken(self) -> tuple[int, int]:
        """Batches that were taken, and statements that repeated it."""
        return self.world.seen[Effect.TAKEN], self.world.seen[Effect.TAKEN_AGAIN]


def test_a_full_batch_is_claimed_in_one_statement_and_received_by_it() -> None:
    came = Came()

    came.worker.turn()

    assert came.taken == (1, 0)
    assert came.states() == {"running"}
    assert all(row["received_at"] == row["claimed_at"] for row in came.rows())
    came.world.heal()
    assert came.states() == {"completed"}
    assert len(came.attempts()) == MAX_ROWS
    [batch] = came.world.store.rows("batches")
    assert (batch["num_jobs"], batch["num_sequences"]) == (MAX_ROWS, MAX_ROWS)
    results = came.world.store.rows("results")
    assert {(each["batch_size"], each["batch_wait_ms"]) for each in results} == {(MAX_ROWS, 0)}


def test_messages_that_fill_no_batch_are_registered_and_wait_for_company() -> None:
    came = Came(*("good 2",) * (MAX_ROWS - 1))

    came.worker.turn()

    assert came.taken == (0, 0)
    assert {row["received_by"] for row in came.rows()} == {came.worker.id}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_take_whose_answer_is_lost_is_repeated_and_finds_what_it_got(fault: int) -> None:
    came = Came()
    came.fail(fault)
    came.worker.turn()
    assert came.worker.runner.facts()["held"]

    came.pass_time(1)
    came.worker.turn()

    assert came.taken == (1, 1)
    assert came.states() == {"running"}
    came.world.heal()
    assert came.states() == {"completed"}
    assert {row["attempt"] for row in came.rows()} == {1}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_forgets_its_messages_keeps_those_that_it_may_have_claimed(
    fault: int,
) -> None:
    # given a take of unknown fate, and a lost connection
    came = Came()
    came.fail(fault)
    came.worker.turn()
    came.world.disconnect(0)
    came.world.flush_redis()

    came.pass_time(1)
    came.worker.turn()

    assert came.states() == {"running"}
    came.world.heal()
    assert came.states() == {"completed"}
    assert {row["attempt"] for row in came.rows()} == {1}


@pytest.mark.parametrize("fault", FAULTS)
def test_messages_that_come_again_under_a_take_of_unknown_fate_bring_no_second_job(
    fault: int,
) -> None:
    came = Came()
    came.fail(fault)
    came.worker.turn()
    came.world.redeliver(0)

    came.world.heal()

    assert came.states() == {"completed"}
    assert len(came.attempts()) == MAX_ROWS


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_worker_has_taken_without_knowing_is_given_back_when_it_drains(fault: int) -> None:
    came = Came()
    came.fail(fault)
    came.worker.turn()
    came.world.drain(0, 29)

    came.pass_time(1)
    while came.worker.is_alive:
        came.worker.turn()
        came.pass_time(0.1)

    assert came.states() == {"queued"}
    assert {each["outcome"] for each in came.attempts()} <= {"released"}
    assert not any(each["charged"] for each in came.attempts())
    came.world.heal()
    assert came.states() == {"completed"}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_worker_has_taken_without_knowing_is_given_back_when_it_ends_at_once(
    fault: int,
) -> None:
    came = Came()
    came.fail(fault)
    came.worker.turn()
    came.pass_time(1)

    came.worker.end()

    assert came.states() == {"queued"}
    assert {each["outcome"] for each in came.attempts()} <= {"released"}
    came.world.heal()
    assert came.states() == {"completed"}


@pytest.mark.parametrize("fault", [DIES_BEFORE, DIES_AFTER])
def test_what_a_worker_takes_and_dies_runs_elsewhere(fault: int) -> None:
    came = Came()
    came.fail(fault)
    came.worker.turn()
    assert not came.worker.is_alive

    came.world.heal()

    assert came.states() == {"completed"}


def test_one_that_is_not_granted_is_registered_in_the_same_turn() -> None:
    # given a full batch, one of which is a suspect
    came = Came()
    came.world.store.tables["jobs"][came.ids[1]]["losses"] = SUSPECT_AFTER

    came.worker.turn()

    assert came.taken == (1, 0)
    assert [row["state"] for row in came.rows()] == ["running", "queued", "running", "running"]
    assert came.rows()[1]["received_by"] == came.worker.id
    came.world.heal()
    assert came.states() == {"completed"}


def test_while_suspects_wait_nothing_is_taken() -> None:
    came = Came("good 2")
    came.world.store.tables["jobs"][came.ids[0]]["losses"] = SUSPECT_AFTER
    came.worker.turn()  # it is claimed, and runs apart
    for _ in range(MAX_ROWS):
        came.world.submit(PROMPTS.index("good 2"), STATIC, 0)
    came.world.flush_redis()
    for job_id in list(came.world.expected)[1:]:
        came.worker.take(Message(job_id, None, "static"))

    came.worker.turn()

    assert came.taken == (0, 0)
    came.world.heal()
    assert came.states() == {"completed"}


def test_while_a_batch_is_claimed_and_waits_no_other_is_taken() -> None:
    # given a batch that runs, one that lies ready behind it, and the messages of a third
    came = Came(*("good 9",) * 3 * MAX_ROWS)

    came.worker.turn()

    claimed = [row for row in came.rows() if row["state"] == "running"]
    assert len(claimed) <= 2 * MAX_ROWS
    came.world.heal()
    assert came.states() == {"completed"}


def test_a_job_that_can_run_nowhere_ends_though_it_was_taken() -> None:
    came = Came("good 1 m200", *("good 2",) * (MAX_ROWS - 1))

    came.worker.turn()

    assert came.taken == (1, 0)
    assert [row["state"] for row in came.rows()] == ["failed", "running", "running", "running"]
    came.world.heal()
    assert [row["attempt"] for row in came.rows()] == [1] * MAX_ROWS


def test_of_rows_that_cannot_be_taken_together_the_odd_one_fails_and_the_others_run() -> None:
    # given a row that no statement for several can stand, nor that for it alone at first
    came = Came()
    times = iter([True] * 3)
    came.world.store.refuses = lambda table, row: (
        table == "attempts" and row["job_id"] == came.ids[2] and next(times, False)
    )

    came.worker.turn()

    assert [row["state"] for row in came.rows()] == ["running", "running", "failed", "running"]
    came.world.expected[came.ids[2]].states.add("failed")
    came.world.heal()
    assert [row["attempt"] for row in came.rows()] == [1] * MAX_ROWS


def test_a_job_that_nobody_can_take_into_the_engine_ends_as_a_misfit() -> None:
    # given one that has more sequences than the engine ever takes
    came = Came("good 2", "good 1 x5", "good 2", "good 2")

    came.worker.turn()

    assert came.taken == (1, 0)
    assert [row["state"] for row in came.rows()] == ["running", "failed", "running", "running"]
    came.world.heal()
    assert [row["attempt"] for row in came.rows()] == [1] * MAX_ROWS


def test_a_batch_with_more_sequences_than_fit_at_once_goes_in_by_parts_and_tells_their_number() -> (
    None
):
    came = Came("good 2 x2", "good 3 x3", "good 2", "good 2")

    came.world.heal()

    assert came.taken == (1, 0)
    assert came.states() == {"completed"}
    [batch] = came.world.store.rows("batches")
    assert (batch["num_jobs"], batch["num_sequences"]) == (4, 7)
    assert max(len(each.sequences) for each in came.worker.host.began) <= MAX_ROWS
