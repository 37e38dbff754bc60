"""What must be true of the store after every commit, and when all jobs have ended."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from uuid import UUID

from app.errors import RequestError
from app.jobs import ALONE_AFTER, JobState, can_move
from tests.memory_store import MemoryConnection, MemoryDatabase, Row
from tests.simulation.broken import expect
from tests.simulation.effects import Effect
from tests.simulation.engine import MAX_ROWS, STEP_NS, answer_to
from tests.simulation.prompts import Expected, is_doomed, num_sequences
from tests.simulation.versions import LATER

LOOKS_S = 1.0 + 2 * STEP_NS / 1e9
"""A worker looks at time limits so often at the least."""


def after_commit(written: MemoryConnection) -> None:
    """I1, I2, I3: after every single commit."""
    assert written.before is not None
    for table, key in written.written:
        if table == "jobs":
            expect(key in written.jobs, "I1: a job is gone")
            row = written.jobs[key]
            _check_move(written.before["jobs"].get(key), row, written.results.get(key))
        elif table == "results":
            expect(key not in written.before["results"], "I2: a result was changed")


def _check_move(old: Row | None, row: Row, result: Row | None) -> None:
    state = JobState(row["state"])
    expect((result is not None) == state.is_final, f"I2: {state}, result: {result}")
    if result is not None:
        expect(result["state"] == state, f"I2: {state}, but {result['state']} in results")
    if old is not None and old["state"] != state:
        expect(can_move(JobState(old["state"]), state), f"I3: {old['state']} to {state}")
    if old is not None and old["state"] == state == "running":
        expect(old["attempt_id"] == row["attempt_id"], "I3: an attempt was taken over")


def when_all_have_ended(
    store: MemoryDatabase, jobs: Mapping[UUID, Expected], healed_at: datetime
) -> None:
    """I1, I2, I4 and I6 of every job, now that all have ended, some after the faults."""
    attempts: dict[UUID, list[Row]] = {}
    for attempt in store.rows("attempts"):
        attempts.setdefault(attempt["job_id"], []).append(attempt)
    for row in store.rows("jobs"):
        tries = sorted(attempts.get(row["id"], []), key=lambda attempt: attempt["number"])
        numbers = [attempt["number"] for attempt in tries]
        expect(numbers == list(range(1, row["attempt"] + 1)), "I3: attempts have gaps")
        expect(all(attempt["outcome"] for attempt in tries), "I3: an attempt is open")
        charged = sum(bool(attempt["charged"]) for attempt in tries)
        expect(row["attempts_charged"] == charged, "I6: charges do not add up")
        if row["id"] in jobs:
            result = store.tables["results"][row["id"]]
            _check_end(row, result, tries, jobs[row["id"]])
            _check_limit(row, result, jobs[row["id"]], healed_at)
        else:
            expect(row["state"] == "failed", "a stranger's message did not fail")


def _check_end(row: Row, result: Row, tries: list[Row], expected: Expected) -> None:
    what = f"{expected.prompt!r}"
    is_lost_often = row["losses"] > ALONE_AFTER
    allowed = set(expected.states)
    if expected.is_unlucky or is_lost_often:
        allowed.add("failed")
    expect(
        row["state"] in allowed,
        f"I6: {what} ended {row['state']} ({result['error_code']}), not {allowed}",
    )
    if row["state"] == "completed":
        texts = [choice["text"] for choice in result["response"]["choices"]]
        answers = [answer_to(expected.prompt)] * num_sequences(expected.prompt)
        expect(texts == answers, f"I4: {what} got {texts!r}")
    ended_by = [attempt["id"] for attempt in tries if attempt["id"] == result["attempt_id"]]
    charged = [attempt["id"] for attempt in tries if attempt["charged"]]
    if not (expected.is_unlucky or is_lost_often):
        expect(set(charged) <= set(ended_by), f"I6: {what} was charged for others")


def _check_limit(row: Row, result: Row, expected: Expected, healed_at: datetime) -> None:
    """A time limit that came with a message is the row's, whoever runs it after how many messages.

    While there are faults a worker may stand still, and look at it late.
    """
    if expected.limit_s is None or not row["model"]:
        return
    what = f"{expected.prompt!r}"
    expect(row["time_limit_s"] == expected.limit_s, f"I6: the row of {what} has no time limit")
    if result["claimed_at"] is not None and result["claimed_at"] >= healed_at:
        longest_ms = 1_000 * (expected.limit_s + LOOKS_S)
        ran_ms = result["inference_ms"] or 0.0
        is_kept = row["state"] != "completed" or ran_ms <= longest_ms
        expect(is_kept, f"I6: {what} ran for {ran_ms} ms, more than {expected.limit_s} s")


def ends(store: MemoryDatabase, jobs: Mapping[UUID, Expected]) -> Counter[Effect]:
    """What the ends of all jobs show."""
    seen = Counter[Effect]()
    for row in store.rows("jobs"):
        if (expected := jobs.get(row["id"])) is None:
            continue
        number = num_sequences(expected.prompt)
        result, is_answered = store.tables["results"][row["id"]], row["state"] == "completed"
        is_refused = row["state"] == "failed" and result["error_code"] == RequestError.code
        seen[Effect.SEVERAL_SEQUENCES] += is_answered and number > 1
        seen[Effect.DOOMED] += is_refused and is_doomed(expected.prompt)
        seen[Effect.UNEQUAL_LIMITS] += is_refused and 1 < number <= MAX_ROWS
        seen[Effect.LATER_RAN] += is_answered and row["format"] == LATER
    return seen
