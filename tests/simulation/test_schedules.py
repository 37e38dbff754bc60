"""Random schedules of faults, each of which must end with every job where it belongs."""

from __future__ import annotations

from collections import Counter
from datetime import timedelta

import pytest

from app.broker.queues import queue_name
from app.store import submissions, sweeps
from app.store.submissions import Incoming
from tests.simulation.effects import Effect
from tests.simulation.engine import answer_to
from tests.simulation.prompts import PROMPTS
from tests.simulation.schedules import cut_down, drawn, failure_of, play
from tests.simulation.servers import ROLLED_BACK, UNKNOWN, Message
from tests.simulation.world import World

SEEDS_EACH = 25
STATIC = queue_name("static")


@pytest.mark.parametrize("first", range(0, 200, SEEDS_EACH))
def test_every_invariant_holds_on_random_schedules(first: int) -> None:
    for seed in range(first, first + SEEDS_EACH):
        if failure := failure_of(drawn(seed)):
            pytest.fail(f"seed {seed}: make simulate SEED={seed} SCHEDULES=1\n{cut_down(failure)}")


def test_everything_that_the_simulation_is_for_happens_in_it() -> None:
    seen = Counter[Effect]()

    for seed in range(1_000, 1_400):
        assert failure_of(drawn(seed), seen) is None
        if seen.keys() == set(Effect):
            break

    assert not set(Effect) - seen.keys()


def test_a_schedule_plays_the_same_way_each_time() -> None:
    first, second = play(drawn(7)), play(drawn(7))

    assert first.clock.ns == second.clock.ns
    assert [row["state"] for row in first.store.rows("jobs")] == [
        row["state"] for row in second.store.rows("jobs")
    ]


def test_a_world_without_faults_answers_every_good_prompt_and_tells_those_who_wait() -> None:
    world = World()
    for number in range(8):
        world.submit(PROMPTS.index("good 3"), 1 + 6 * (number % 2), 0)

    world.heal()

    assert {row["state"] for row in world.store.rows("jobs")} == {"completed"}
    assert {row["attempt"] for row in world.store.rows("jobs")} == {1}
    assert world.told == {row["id"] for row in world.store.rows("jobs")}


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


@pytest.mark.parametrize("place", range(3))
def test_healthy_jobs_are_never_beside_the_suspects_of_a_crash(place: int) -> None:
    world = World()
    world.workers[1].die(given_back=False)
    host = world.workers[0].host
    prompts = ["good 9", "good 9"]
    prompts.insert(place, "poison 3")
    for prompt in prompts:
        world.submit(PROMPTS.index(prompt), 7, 0)  # in the model whose engine lets others join
    while not host.lost_with:
        world.go(1, 0)
    [suspects] = host.lost_with
    for _ in range(4):
        world.submit(PROMPTS.index("good 3"), 7, 0)

    world.heal()

    assert len(suspects) == 3
    # Together, in a half, alone; the last of them is a half alone, behind which no suspect waits.
    assert len(host.lost_with) == [3, 3, 2][place]
    assert all(lost < suspects for lost in host.lost_with[1:])


def test_a_bare_wake_up_and_the_message_with_the_request_may_come_together() -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 0, 0)  # a bare message: there is no row yet
    [worker, _] = world.workers
    message = world.queue.lists[STATIC].pop()
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
    for message in (world.queue.lists[STATIC].pop(0), world.queue.lists[STATIC].pop(0)):
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
    worker.take(world.queue.lists[STATIC].pop())
    worker.turn()
    assert [row["received_by"] for row in world.store.rows("jobs")] == [worker.id]
    world.disconnect(0)
    world.flush_redis()

    worker.turn()  # it lets go at once, and not with its next heartbeat

    assert [row["received_by"] for row in world.store.rows("jobs")] == [None]
    world.heal()
    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_message_that_was_registered_and_forgotten_is_sent_again() -> None:
    # given a registration that was committed, and whose answer was lost
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)  # the worker is registered
    world.submit(PROMPTS.index("good 3"), 1, 0)
    [worker, _] = world.workers
    worker.take(world.queue.lists[STATIC].pop())
    worker.database.fault, worker.database.fault_in = UNKNOWN, 0
    worker.turn()
    [row] = world.store.rows("jobs")
    assert row["received_by"] == worker.id

    # when the worker is told to forget what it had, and Redis forgets it, too
    world.disconnect(0)
    world.flush_redis()

    world.heal()
    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_job_that_was_taken_from_its_worker_is_free_while_the_late_run_goes_on() -> None:
    # given a job that a worker runs, and that was taken from it
    world = World()
    world.workers[1].die(given_back=False)
    world.submit(PROMPTS.index("good 60"), 1, 0)
    while not world.store.rows("attempts"):
        world.go(1, 0)
    [worker, _], [job_id] = world.workers, world.store.tables["jobs"]
    lease = world.store.tables["workers"][worker.id]
    with world.store.begin() as connection:
        connection.update("workers", worker.id, lease_expires_at=world.clock.now())
        sweeps.expire_leases(connection, [job_id])
        connection.update("workers", worker.id, lease_expires_at=lease["lease_expires_at"])

    # when its next message comes to the same worker
    worker.take(Message(job_id, None, "static"))
    worker.turn()
    worker.turn()

    # then others may have it at once
    [row] = world.store.rows("jobs")
    assert (row["state"], row["received_by"]) == ("queued", None)
    assert worker.host.busy
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
    message = world.queue.lists[STATIC].pop()
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


def test_a_row_of_a_later_version_waits_for_a_worker_that_reads_it() -> None:
    # given workers of before, and a message that got into the list that they read
    world = World()
    world.go(60, 0)
    world.submit_later(PROMPTS.index("good 3"), 2, 0)
    world.go(79, 0)
    [row] = world.store.rows("jobs")
    assert world.seen[Effect.LATER_LEFT]
    assert (row["state"], row["received_by"]) == ("queued", None)

    # when one of the later version is started
    world.heal()

    [row] = world.store.rows("jobs")
    assert (row["state"], row["attempt"]) == ("completed", 1)


def test_a_later_version_reads_what_lies_in_the_lists_of_before() -> None:
    world = World()
    world.submit(PROMPTS.index("good 3"), 6, 0)  # for the model that one worker serves
    world.deploy(0, 1)

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["completed"]


def test_a_task_that_was_revoked_while_its_message_lay_in_redis_is_cancelled() -> None:
    world = World()
    world.submit(PROMPTS.index("good 3"), 0, 0)
    world.revoke_unread(0, 3)

    world.heal()

    assert [row["state"] for row in world.store.rows("jobs")] == ["cancelled"]
    assert world.seen[Effect.REVOKED_UNREAD]


def test_a_time_limit_holds_although_the_message_that_brought_it_is_lost() -> None:
    # given a job that is registered, with its limit, and lost with its worker
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)
    world.submit(PROMPTS.index("good 60"), 0, 5)
    while not world.store.rows("jobs"):
        world.go(1, 0)
    world.workers[0].die(given_back=False)

    # when its message is sent again, without a limit
    world.heal()

    [row], [result] = world.store.rows("jobs"), world.store.rows("results")
    assert (row["time_limit_s"], result["error_code"]) == (0.3, "time_limit")
    assert world.seen[Effect.TIMED_OUT_BY_ROW]


def test_messages_of_others_hide_no_lost_one() -> None:
    # given a lost message, in a list with many that nobody takes
    world = World()
    for worker in world.workers:
        worker.die(given_back=False)
    world.submit(PROMPTS.index("good 3"), 1, 0)
    world.lose_message(0, 0)
    world.babble(list(world.queue.lists).index(STATIC), 49)
    assert not any(message.job_id for message in world.queue.lists[STATIC])

    # when rescue looks
    while world.clock.now() < world.store.rows("jobs")[0]["created_at"] + timedelta(seconds=15):
        world.go(1, 0)

    assert [each.job_id for each in world.queue.lists[STATIC] if each.job_id]


def test_a_message_that_lies_behind_a_flood_of_another_model_is_sent_to_its_own_queue() -> None:
    play([("flood", (3113, 6314)), ("misplace_message", (1253, 1980))])


@pytest.mark.parametrize("way", range(4))
@pytest.mark.parametrize("busy", [0, 1])
def test_a_job_of_an_idle_model_does_not_wait_for_a_busy_one(way: int, busy: int) -> None:
    world = World()
    world.workers[1].die(given_back=False)
    world.go(60, 0)
    world.flood(16 + 4 * busy + way, 39)

    world.heal()

    *_, idle = world.expected
    attempts = sorted(world.store.rows("attempts"), key=lambda attempt: attempt["claimed_at"])
    place = [attempt["job_id"] for attempt in attempts].index(idle)
    assert place < len(attempts) / 2


def test_a_worker_does_not_go_in_circles_while_a_batch_that_is_due_has_no_room() -> None:
    # given an engine with room for less than the job that waits
    world = World()
    world.workers[1].die(given_back=False)
    host = world.workers[0].host
    for _ in range(3):
        world.submit(PROMPTS.index("good 60"), 7, 0)  # in the model whose engine lets others join
    world.submit(PROMPTS.index("good 3 x3"), 7, 0)
    turns = Counter[int]()
    turn = world.workers[0].turn

    def count() -> None:
        turns[host.num_runs] += 1
        turn()

    world.workers[0].turn = count  # type: ignore[method-assign]
    world.heal()

    assert turns[1] < 30  # for three seconds, with 60 steps that end no job


def test_a_job_whose_mate_kills_the_engine_is_not_billed_for_the_answers_it_dropped() -> None:
    # given a job of two sequences, one of which is answered before its mate ends the engine
    world = World()
    world.workers[1].die(given_back=False)
    for prompt in ("poison 3", "good 2 x2"):
        world.submit(PROMPTS.index(prompt), 7, 0)  # in the model whose engine lets others join

    # when it runs again
    world.heal()

    # then it pays for the answers that it got, and the others are waste
    dropped, *again = (
        [device_ns for _, device_ns in answered] for answered in world.workers[0].host.answered
    )
    results = {row["state"]: row for row in world.store.rows("results")}
    good, poison = results["completed"], results["failed"]
    assert len(dropped) == 1
    assert good["device_ns"] == sum(map(sum, again))
    assert good["wasted_ns"] > sum(dropped)
    assert (poison["device_ns"], poison["cost"]) == (0, 0)
