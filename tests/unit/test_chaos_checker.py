"""The chaos checker finds what is wrong: a good run, and that run with one thing made bad."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.chaos import history
from tests.chaos.checker import check, doubled, lost
from tests.chaos.evidence import Evidence, Recovery
from tests.chaos.history import Event, History

PROMPT = "canary-77 n1 x"
OTHER = "canary-77 n2 x"


def events(nonce: str, job_id: str, prompt: str, **given: Any) -> list[Event]:
    """A job that was submitted and then asked for."""

    def event(number: int, phase: str, action: str, **more: Any) -> Event:
        return Event(number, phase, action, number, "1", nonce, **more)

    expect = given.get("expect", ("completed",))
    return [
        event(1, "invoke", "submit", way="http", prompt=prompt, expect=expect),
        event(1, "ok", "submit", way="http", job_id=job_id, status=202),
        event(2, "invoke", "poll", job_id=job_id),
        event(2, "ok", "poll", job_id=job_id, status=200, state="completed", text=prompt),
    ]


def line_of_batch(nonce: str, job_id: str, prompt: str) -> list[Event]:
    """The same job as the one line of a batch that is followed to its end."""

    def event(number: int, phase: str, action: str, nonce: str = "b1", **more: Any) -> Event:
        return Event(number, phase, action, number, "1", nonce, **more)

    line: dict[str, Any] = {"nonce": nonce, "way": "batch", "batch": "b1"}
    followed = [("validating", (0, 0, 0)), ("in_progress", (1, 0, 0)), ("completed", (1, 1, 0))]
    return [
        event(10, "invoke", "submit", prompt=prompt, expect=("completed",), **line),
        *(
            event(11, "ok", "batch", state=state, counts=counts, job_id="batch_1", status=200)
            for state, counts in followed
        ),
        event(10, "ok", "submit", job_id=job_id, **line),
    ]


def rows(job_id: str, nonce: str, prompt: str) -> dict[str, dict[str, Any]]:
    """What the tables hold of a job that completed at its first attempt."""
    return {
        "jobs": {
            "id": job_id,
            "idempotency_key": nonce,
            "state": "completed",
            "request": {"prompt": prompt},
            "attempt": 1,
            "attempts_charged": 1,
            "max_attempts": 3,
        },
        "attempts": {
            "id": f"a-{job_id}",
            "job_id": job_id,
            "number": 1,
            "worker_id": "w",
            "batch_id": "b",
            "outcome": "succeeded",
            "charged": True,
            "error_code": None,
            "device_ns": 1_000_000,
            "wasted_ns": 0,
            "cost": Decimal("0.000000010"),
        },
        "results": {
            "job_id": job_id,
            "attempt_id": f"a-{job_id}",
            "state": "completed",
            "error_code": None,
            "response": {"choices": [{"text": prompt}]},
            "device_ns": 1_000_000,
            "cost": Decimal("0.000000010"),
            "currency": "USD",
            "total_ms": 12.5,
        },
    }


def good_run() -> Evidence:
    first, second = rows("j1", "n1", PROMPT), rows("j2", "n2", OTHER)
    hooked = dataclasses.replace(events("n1", "j1", PROMPT)[0], is_hooked=True)
    moves = [(None, "queued"), ("queued", "running"), ("running", "completed")]
    return Evidence(
        events=[
            *(hooked, *events("n1", "j1", PROMPT)[1:]),
            *line_of_batch("n2", "j2", OTHER),
            *events("n2", "j2", OTHER),
        ],
        hooks=[hook("evt_1", "job.completed", "j1"), hook("evt_2", "batch.completed", "batch_1")],
        **{name: [first[name], second[name]] for name in first},  # type: ignore[arg-type]
        batches=[{"id": "b", "worker_id": "w", "device_ns": 2_000_000}],
        workers=[
            {
                "id": "w",
                "price_per_device_hour": Decimal("0.036"),
                "started_at": "2026-11-25T10:00:00+00:00",
                "heartbeat_at": "2026-11-25T10:01:00+00:00",
            }
        ],
        transitions=[
            {"job_id": job_id, "before": before, "after": after}
            for job_id in ("j1", "j2")
            for before, after in moves
        ],
        texts={"worker-1.log": "Task received"},
        canary="canary-77",
        recovery=Recovery(seconds=2.0, bound_s=5.0),
        rss={"api": [1 << 20]},
        connections={"postgres": [7]},
        max_rss=1 << 30,
        max_connections={"postgres": 60},
    )


def hook(id: str, kind: str, name: str) -> dict[str, Any]:
    return {"id": id, "type": kind, "data": {"id": name}}


def followed(**values: Any) -> Callable[[Evidence], Evidence]:
    """The last look at the batch with other values."""

    def change(run: Evidence) -> Evidence:
        changed = [
            dataclasses.replace(event, **values)
            if event.action == "batch" and event.state == "completed"
            else event
            for event in run.events
        ]
        return dataclasses.replace(run, events=changed)

    return change


def changed(table: str, **values: Any) -> Callable[[Evidence], Evidence]:
    """The first row of a table with other values."""

    def change(run: Evidence) -> Evidence:
        first, *others = getattr(run, table)
        return dataclasses.replace(run, **{table: [{**first, **values}, *others]})

    return change


def added(table: str, **values: Any) -> Callable[[Evidence], Evidence]:
    """One more row, like the first but for these values."""

    def change(run: Evidence) -> Evidence:
        all_ = getattr(run, table)
        return dataclasses.replace(run, **{table: [*all_, {**all_[0], **values}]})

    return change


def without(table: str) -> Callable[[Evidence], Evidence]:
    return lambda run: dataclasses.replace(run, **{table: getattr(run, table)[1:]})


def with_(**values: Any) -> Callable[[Evidence], Evidence]:
    return lambda run: dataclasses.replace(run, **values)


def told(**values: Any) -> Callable[[Evidence], Evidence]:
    """One more answer to the client, like the last of job 2 but for these values."""

    def change(run: Evidence) -> Evidence:
        event = dataclasses.replace(run.events[-1], **values)
        return dataclasses.replace(run, events=[*run.events, event])

    return change


def told_that(*, ready: bool) -> Callable[[Evidence], Evidence]:
    """Ten seconds in which each submission fails, and the API says this of itself."""

    def change(run: Evidence) -> Evidence:
        more = []
        for number in range(100, 110):
            at_ns = number * 1_000_000_000
            more.append(Event(number, "unknown", "submit", at_ns, "1", "n1", way="http"))
            phase = "ok" if ready else "fail"
            more.append(Event(number, phase, "ready", at_ns, "1", "", status=200 if ready else 503))
        return dataclasses.replace(run, events=[*run.events, *more])

    return change


IN_BASE64 = base64.b64encode(b'x{"prompt": "canary-77"}').decode()

BAD = [
    ("I14", "a batch that never ends", followed(state="finalizing")),
    ("I14", "a batch that fails", followed(state="failed")),
    ("I14", "a batch whose counts go back", followed(counts=(0, 0, 0))),
    ("I14", "a batch whose counts do not add up", followed(counts=(1, 1, 1))),
    ("I14", "a batch that counts another line", followed(counts=(2, 2, 0))),
    ("I14", "a batch that became two", followed(job_id="batch_2")),
    (
        "I14",
        "a line with two answers",
        lambda run: with_(events=[*run.events, *line_of_batch("n2", "j2", OTHER)[-1:]])(run),
    ),
    (
        "I14",
        "a line without an answer",
        lambda run: with_(
            events=[each for each in run.events if not (each.batch and each.phase == "ok")]
        )(run),
    ),
    ("I15", "an end that nobody was told of", without("hooks")),
    ("I15", "an end that is told with two ids", added("hooks", id="evt_9")),
    ("I15", "an end that is told as another", changed("hooks", type="job.failed")),
    ("I1", "an accepted job that has no row", without("jobs")),
    ("I1", "a job that never ends", changed("jobs", state="running")),
    ("I1", "a good job that fails", changed("jobs", state="failed")),
    ("I1", "a job that nobody submitted", added("jobs", id="j9", idempotency_key=None)),
    ("I2", "a final job without a result", without("results")),
    ("I2", "two results", added("results")),
    ("I2", "a key that became two jobs", told(action="submit", job_id="j3", state=None)),
    ("I2", "two attempts that succeeded", added("attempts", id="a9", number=2)),
    ("I2", "a result by an attempt that was lost", changed("attempts", outcome="lost")),
    ("I2", "an attempt left open", added("attempts", id="a9", number=2, outcome=None)),
    ("I2", "a result that says otherwise than its job", changed("results", state="failed")),
    ("I2", "an answer that changes", told(text="another")),
    ("I3", "a way back", added("transitions", before="completed", after="queued")),
    ("I3", "a step left out", changed("transitions", job_id="j1", before=None, after="running")),
    ("I3", "a client that sees a final state change", told(state="running", text=None)),
    ("I3", "an attempt number left out", changed("attempts", number=2)),
    ("I4", "another prompt's answer", changed("results", response={"choices": [{"text": OTHER}]})),
    ("I4", "another prompt in the row", changed("jobs", request={"prompt": OTHER})),
    ("I4", "a client that is told another's answer", told(text=PROMPT)),
    ("I5", "a nanosecond too much", changed("batches", device_ns=2_000_001)),
    ("I5", "a nanosecond too little", changed("attempts", device_ns=999_999)),
    ("I5", "a batch without its members' waste", changed("attempts", wasted_ns=1)),
    ("I5", "a wrong price", changed("results", cost=Decimal("0.000000012"))),
    ("I5", "a worker busy for longer than it was up", changed("batches", device_ns=10**12)),
    ("I5", "a charge without an attempt", changed("results", attempt_id=None)),
    (
        "I5",
        "a row that the audit names",
        with_(audit=[{"rule": "billed", "row": "window 1", "difference": 1}]),
    ),
    ("I5", "a negative duration", changed("results", total_ms=-0.1)),
    ("I6", "an innocent that failed for a crash", changed("results", error_code="engine_crash")),
    ("I6", "an innocent that was charged", changed("attempts", error_code="engine_crash")),
    ("I6", "a charge that is not counted", changed("jobs", attempts_charged=0)),
    ("I7", "a recovery that takes too long", with_(recovery=Recovery(5.1, 5.0))),
    ("I8", "a refusal without Retry-After", told(phase="fail", status=503, state=None)),
    ("I8", "a server error", told(phase="fail", status=500, state=None)),
    ("I8", "memory out of bounds", with_(rss={"api": [2 << 30]})),
    ("I8", "connections out of bounds", with_(connections={"postgres": [61]})),
    ("I9", "ready while nothing is taken", told_that(ready=True)),
    ("I12", "a long poll that is slow from then on", with_(reflexes=[{"it": 0.1}, {"it": 9.0}])),
    ("I13", "a worker that ended by itself", with_(ended={"worker-1": 1})),
    ("I13", "a thread that ended", with_(logs={"api": "x\nException in thread y\nValueError: z"})),
    ("I10", "a prompt in a log", with_(texts={"api.log": "failed: canary-77 n1"})),
    ("I10", "a prompt in base64", with_(texts={"redis": IN_BASE64})),
]


def test_a_good_run_has_no_violations() -> None:
    assert check(good_run()) == []
    assert not lost(good_run()) and not doubled(good_run())


@pytest.mark.parametrize(
    ("invariant", "break_it"), [(each[0], each[2]) for each in BAD], ids=[each[1] for each in BAD]
)
def test_the_checker_finds(invariant: str, break_it: Callable[[Evidence], Evidence]) -> None:
    found = check(break_it(good_run()))

    assert invariant in {violation.invariant for violation in found}


def test_a_fault_may_end_its_own_parts_and_an_api_may_say_that_it_takes_nothing() -> None:
    run = with_(ended={"worker-1": 1}, may_end=frozenset({"worker-1"}))(good_run())

    assert check(told_that(ready=False)(run)) == []


def test_a_prompt_is_found_in_base64_wherever_it_begins() -> None:
    for before in range(3):
        text = base64.b64encode(b"." * before + b"canary-77 and more").decode()
        assert check(with_(texts={"redis": text})(good_run()), ["I10"])


def test_a_poison_that_completes_is_found() -> None:
    run = good_run()
    poison = [dataclasses.replace(each, expect=("engine_crash",)) for each in run.events[:1]]

    found = check(dataclasses.replace(run, events=[*poison, *run.events[1:]]), ["I6"])

    assert [each.invariant for each in found] == ["I6"]


def test_an_accepted_job_without_a_final_row_counts_as_lost() -> None:
    assert lost(without("jobs")(good_run())) == {"n1"}
    assert lost(changed("jobs", state="queued")(good_run())) == {"n1"}


def test_a_job_that_succeeded_twice_counts_as_doubled() -> None:
    assert doubled(added("attempts", id="a9", number=2)(good_run())) == {"n1"}


def test_a_submission_without_a_clear_answer_may_be_there_or_not() -> None:
    run = good_run()
    unsure = [
        dataclasses.replace(each, phase="unknown", job_id=None) if each.phase == "ok" else each
        for each in run.events
        if each.action == "submit" and each.nonce == "n1"
    ]
    rest = [each for each in run.events if each.nonce in ("n2", "b1")]

    assert check(dataclasses.replace(run, events=[*unsure, *rest])) == []
    assert check(without("jobs")(dataclasses.replace(run, events=[*unsure, *rest])), ["I1"]) == []


def test_a_history_reads_back_as_it_was_written(tmp_path: Path) -> None:
    with History(tmp_path / "history.jsonl") as written:
        written.fault = "3"
        number = written.invoke("submit", "n1", way="http", prompt=PROMPT, expect=("completed",))
        written.end(number, "ok", "submit", "n1", way="http", job_id="j1", status=202)

    assert list(history.read(tmp_path / "history.jsonl")) == written.events()
