"""What waits, told by rungs: exact where it is short, within a hundredth where it is long."""

from __future__ import annotations

from datetime import timedelta

from app.intake.outlook import _Lane
from app.jobs import Kind, new_id
from app.store import outlook, submissions
from app.store.database import Database
from app.store.submissions import NewJob

STEPS = (0, 3, 6, 9)


def write(database: Database, number: int, **given: object) -> list[NewJob]:
    jobs = [
        NewJob(
            id=new_id(),
            url="/v1/completions",
            kind=Kind.GENERATE,
            fingerprint="",
            source="api",
            input_tokens=2,
            max_output_tokens=3,
            request={},
            **({"model": "m"} | given),  # type: ignore[arg-type]
        )
        for _ in range(number)
    ]
    with database.begin() as connection:
        submissions.insert_jobs(connection, jobs)
    return jobs


def lanes(database: Database) -> dict[tuple[str, int], list[outlook.Rung]]:
    found: dict[tuple[str, int], list[outlook.Rung]] = {}
    with database.autocommit() as connection:
        for rung in outlook.ladder(connection, STEPS):
            found.setdefault((rung.model, rung.step), []).append(rung)
    return found


def test_jobs_that_wait_are_told_by_model_and_step_in_the_order_they_came(
    database: Database,
) -> None:
    urgent = write(database, 3) + write(database, 2, priority=2)
    write(database, 4, priority=9)
    write(database, 1, model="other")
    write(database, 1, not_before=database.now() + timedelta(days=1))

    found = lanes(database)

    assert {key: rungs[-1].jobs for key, rungs in found.items()} == {
        ("m", 0): 5,
        ("m", 3): 4,
        ("other", 0): 1,
    }
    assert [rung.id for rung in found["m", 0]] == [job.id for job in urgent]
    last = found["m", 0][-1]
    assert (last.input_tokens, last.max_output_tokens, last.of_last_minute) == (10, 15, 5)


def test_a_place_in_a_long_queue_is_right_to_a_hundredth(database: Database) -> None:
    jobs = write(database, 1_000)

    rungs = lanes(database)["m", 0]
    lane = _Lane.of(rungs)

    assert len(rungs) <= 101
    created_at = rungs[0].created_at
    for place, job in enumerate(jobs):
        before = lane.before(created_at, job.id)
        assert before is not None
        assert abs(before.jobs - place) <= 10
    assert lane.before(created_at + timedelta(seconds=1), jobs[0].id) is None


def test_a_short_queue_has_exact_places(database: Database) -> None:
    jobs = write(database, 90)

    lane = _Lane.of(lanes(database)["m", 0])

    places = [lane.before(lane.keys[0][0], job.id) for job in jobs]
    assert [before.jobs for before in places if before] == list(range(90))
