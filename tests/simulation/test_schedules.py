"""Random schedules of faults, each of which must end with every job where it belongs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from app.store import submissions
from app.store.submissions import Incoming
from tests.simulation.engine import answer_to
from tests.simulation.prompts import PROMPTS
from tests.simulation.schedules import cut_down, drawn, failure_of, play
from tests.simulation.servers import ROLLED_BACK, UNKNOWN, Message
from tests.simulation.world import World

SEEDS_EACH = 25


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """A fault that the product logs is no news here."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("first", range(0, 200, SEEDS_EACH))
def test_every_invariant_holds_on_random_schedules(first: int) -> None:
    for seed in range(first, first + SEEDS_EACH):
        if failure := failure_of(drawn(seed)):
            pytest.fail(f"seed {seed}: make simulate SEED={seed} SCHEDULES=1\n{cut_down(failure)}")


def test_a_schedule_plays_the_same_way_each_time() -> None:
    first, second = play(drawn(7)), play(drawn(7))

    assert first.clock.ns == second.clock.ns
    assert [row["state"] for row in first.store.rows("jobs")] == [
        row["state"] for row in second.store.rows("jobs")
    ]


def test_a_world_without_faults_answers_every_good_prompt() -> None:
    world = World()
    for number in range(8):
        world.submit(PROMPTS.index("good 3"), 1 + 6 * (number % 2), 0)

    world.heal()

    assert {row["state"] for row in world.store.rows("jobs")} == {"completed"}
    assert {row["attempt"] for row in world.store.rows("jobs")} == {1}


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("num_poisons", [1, 2])
def test_only_poisons_fail_and_the_engine_runs_no_more_often_than_halves_need(
    place: int, num_poisons: int
) -> None:
    world = World()
    world.workers[1].die(given_back=False)  # one worker, so that all share a batch
    kinds = ["good 3"] * 4
    for poison in range(num_poisons):
        kinds[(place + poison) % 4] = "poison 1"
    for kind in kinds:
        world.submit(PROMPTS.index(kind), 1, 0)
    worker = world.workers[0]
    world.go(79, place)

    world.heal()

    jobs = world.store.rows("jobs")
    assert [row["state"] for row in jobs] == [
        "failed" if kind.startswith("poison") else "completed" for kind in kinds
    ]
    assert [row["attempt"] for row in jobs] == [1] * 4
    assert worker.host.num_runs <= 1 + 2 * 2 * num_poisons  # 2⌈log2 B⌉ + 1 for one in a batch of B


def test_healthy_jobs_are_never_beside_the_suspects_of_a_crash() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    host = world.workers[0].host
    for prompt in ("poison 3", "good 9", "good 9"):
        world.submit(PROMPTS.index(prompt), 7, 0)  # in the model whose engine lets others join
    while not host.lost_with:
        world.go(1, 0)
    [suspects] = host.lost_with
    for _ in range(4):
        world.submit(PROMPTS.index("good 3"), 7, 0)

    world.heal()

    assert len(suspects) == 3
    assert len(host.lost_with) == 3  # together, in a half, alone
    assert all(prompts < suspects for prompts in host.lost_with[1:])


def test_a_bare_wake_up_and_the_message_with_the_request_may_come_together() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 0, 0)  # a bare message: there is no row yet
    [worker, _] = world.workers
    message = world.queue.lists["static"].pop()
    assert message.body is not None
    worker.take(Message(message.job_id, None, "static"))
    worker.take(message)
    worker.turn()

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]
    assert not any(worker.unacked for worker in world.workers)


def test_messages_that_arrive_while_postgres_fails_a_revoke_are_not_forgotten() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 1, 0)
    world.submit(PROMPTS.index("good 3"), 1, 0)
    [worker, _] = world.workers
    for message in (world.queue.lists["static"].pop(0), world.queue.lists["static"].pop(0)):
        worker.take(message)
    world.revoke(0, 0)
    worker.database.fault, worker.database.fault_in = ROLLED_BACK, 1  # after the registration
    worker.turn()

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["cancelled", "completed"]


def test_a_job_whose_message_is_lost_after_a_reconnect_is_sent_again() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 1, 0)
    [worker, _] = world.workers
    worker.take(world.queue.lists["static"].pop())
    worker.turn()
    world.disconnect(0)
    world.flush_redis()

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_message_that_was_registered_and_forgotten_is_sent_again() -> None:
    # given a registration that was committed, and whose answer was lost
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 1, 0)
    [worker, _] = world.workers
    worker.take(world.queue.lists["static"].pop())
    worker.database.fault, worker.database.fault_in = UNKNOWN, 0
    worker.turn()
    [row] = world.store.rows("jobs")
    assert row["received_by"] == worker.id

    # when the worker is told to forget what it had, and Redis forgets it, too
    world.disconnect(0)
    world.flush_redis()

    world.heal()
    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_row_that_a_living_worker_holds_without_knowing_is_freed() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)
    world.submit(PROMPTS.index("good 3"), 1, 0)
    [job_id] = world.store.tables["jobs"]
    with world.store.begin() as connection:
        submissions.receive(connection, world.workers[0].id, [Incoming(job_id)])
    world.flush_redis()

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_job_that_is_revoked_before_its_message_is_read_is_cancelled() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)
    world.submit(PROMPTS.index("good 3"), 0, 0)  # a bare message: there is no row yet
    message = world.queue.lists["static"].pop()
    world.revoke(0, 0)
    world.workers[0].turn()

    assert [row["state"] for row in world.store.rows("jobs")] == ["cancelled"]
    world.queue.put(message)
    world.heal()
    assert [row["state"] for row in world.store.rows("jobs")] == ["cancelled"]


def test_of_two_requests_under_one_new_id_the_stored_one_is_answered() -> None:
    world = World()
    job_id = world.new_id()
    for prompt in ("good 1 first", "good 2 second"):
        world.queue.put(Message(job_id, prompt, "static"))

    world.run_until_quiet()

    [row], [result] = world.store.rows("jobs"), world.store.rows("results")
    assert result["response"]["choices"][0]["text"] == answer_to(row["request"]["prompt"])
