"""Whether the invariants held, from what clients saw and what the tables say; pure and offline.

Each function returns violations. One violation names one job or one place, so that it can be
looked up; `check` runs those that a fault asks for.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from decimal import Decimal
from http import HTTPStatus
from typing import Final

from app.jobs import FINAL_STATES, AttemptOutcome, JobState, can_move
from tests.chaos.ends import batches_whole, ends_told
from tests.chaos.evidence import Evidence, Row, Rows, Violation, job_of_nonce
from tests.chaos.history import Event

HOUR_NS: Final = 3_600_000_000_000
NANO: Final = Decimal("1e-9")
ANY: Final = ("any",)  #: of a job of which nothing but its end is known


def check(evidence: Evidence, invariants: Iterable[str] = ()) -> list[Violation]:
    """The violations of these invariants, or of all."""
    asked = set(invariants) or set(CHECKS)
    run = [function for name, function in CHECKS.items() if name in asked]
    return [violation for function in run for violation in function(evidence)]


# ── I1: every accepted job is in exactly one state, and a final one in the end ──────────────────


def conservation(evidence: Evidence) -> list[Violation]:
    rows = job_of_nonce(evidence)
    found = []
    for nonce, events in evidence.submissions().items():
        expect = next(each.expect for each in events if each.phase == "invoke")
        accepted = any(each.phase == "ok" and each.job_id for each in events)
        row = rows.get(nonce)
        if row is None:
            if accepted:
                found.append(Violation("I1", f"{nonce} was accepted and is lost."))
            continue
        if row["state"] not in FINAL_STATES:
            found.append(Violation("I1", f"{nonce} never ended: it is {row['state']}."))
        elif not _is_expected(row, evidence, expect):
            found.append(Violation("I1", f"{nonce} ended {_ending(row, evidence)}, not {expect}."))
    known = {row["id"] for row in rows.values()}
    strangers = [row["id"] for row in evidence.jobs if row["id"] not in known]
    return found + [Violation("I1", f"Nobody submitted the job {job_id}.") for job_id in strangers]


def lost(evidence: Evidence) -> set[str]:
    """Nonces that were accepted and have no final row."""
    rows = job_of_nonce(evidence)
    return {
        nonce
        for nonce, events in evidence.submissions().items()
        if any(each.phase == "ok" and each.job_id for each in events)
        and (nonce not in rows or rows[nonce]["state"] not in FINAL_STATES)
    }


def _is_expected(row: Row, evidence: Evidence, expect: tuple[str, ...]) -> bool:
    if expect == ANY:
        return True
    if row["state"] == JobState.FAILED:
        return _error_code(row, evidence) in expect
    return row["state"] in expect


def _ending(row: Row, evidence: Evidence) -> str:
    code = _error_code(row, evidence)
    return f"{row['state']} ({code})" if code else str(row["state"])


def _error_code(row: Row, evidence: Evidence) -> str | None:
    codes = [each.get("error_code") for each in evidence.results if each["job_id"] == row["id"]]
    return codes[0] if codes else None


# ── I2: exactly one result, by one attempt; late attempts change nothing ────────────────────────


def one_result(evidence: Evidence) -> list[Violation]:
    found = [
        Violation("I2", f"{nonce} was accepted as several jobs.") for nonce in doubled(evidence)
    ]
    results = Counter(row["job_id"] for row in evidence.results)
    result_of = {row["job_id"]: row for row in evidence.results}
    attempts = _by(evidence.attempts, "job_id")
    for row in evidence.jobs:
        is_final = row["state"] in FINAL_STATES
        if results[row["id"]] != int(is_final):
            found.append(
                Violation("I2", f"{row['id']} is {row['state']} with {results[row['id']]} results.")
            )
        elif is_final:
            found += _attempts_fit(row, result_of[row["id"]], attempts[row["id"]])
    return [*found, *_answers_changed(evidence)]


def doubled(evidence: Evidence) -> set[str]:
    """Nonces that became more than one job, or whose job succeeded more than once."""
    several = {
        nonce
        for nonce, events in evidence.submissions().items()
        if len({each.job_id for each in events if each.job_id}) > 1
    }
    nonces = {row["id"]: nonce for nonce, row in job_of_nonce(evidence).items()}
    wins = Counter(row["job_id"] for row in evidence.attempts if row["outcome"] == "succeeded")
    return several | {nonces.get(job_id, job_id) for job_id, number in wins.items() if number > 1}


def _attempts_fit(job: Row, result: Row, attempts: Rows) -> list[Violation]:
    found = []
    if result["state"] != job["state"]:
        found.append(f"{job['id']} is {job['state']}, its result {result['state']}.")
    for attempt in attempts:
        won = attempt["outcome"] == "succeeded"
        answered = job["state"] == JobState.COMPLETED and attempt["id"] == result["attempt_id"]
        if won != answered:
            found.append(f"{job['id']}: attempt {attempt['number']} is {attempt['outcome']}.")
        if attempt["outcome"] is None:
            found.append(f"{job['id']} is final, its attempt {attempt['number']} is open.")
    if job["state"] == JobState.COMPLETED and result["attempt_id"] not in {
        attempt["id"] for attempt in attempts
    }:
        found.append(f"{job['id']} was completed by no attempt.")
    return [Violation("I2", text) for text in found]


def _answers_changed(evidence: Evidence) -> list[Violation]:
    """A client that was told an answer is never told another."""
    told: dict[str, set[str]] = defaultdict(set)
    for event in evidence.events:
        if event.action == "poll" and event.state == JobState.COMPLETED:
            told[event.nonce].add(event.text or "")
    return [
        Violation("I2", f"{nonce} had two answers.")
        for nonce, all_ in told.items()
        if len(all_) > 1
    ]


# ── I3: states move only along the drawn lines ──────────────────────────────────────────────────


def forward_only(evidence: Evidence) -> list[Violation]:
    found = []
    state_of: dict[str, str] = {}
    for row in evidence.transitions:
        before, after = row["before"], row["after"]
        if state_of.get(row["job_id"], before) != before:
            found.append(f"{row['job_id']} was {state_of[row['job_id']]}, then left {before}.")
        if before is not None and not can_move(JobState(before), JobState(after)):
            found.append(f"{row['job_id']} went from {before} to {after}.")
        state_of[row["job_id"]] = after
    ended: dict[str, str] = {}
    for event in evidence.events:
        if event.action == "poll" and event.state:
            before = ended.get(event.nonce, event.state)
            if before != event.state:
                found.append(f"A client saw {event.nonce} {before}, and then {event.state}.")
            if event.state in FINAL_STATES:
                ended[event.nonce] = event.state
    for job_id, attempts in _by(evidence.attempts, "job_id").items():
        numbers = sorted(attempt["number"] for attempt in attempts)
        if numbers != list(range(1, len(numbers) + 1)):
            found.append(f"{job_id} has the attempts {numbers}.")
    return [Violation("I3", text) for text in found]


# ── I4: the answer to a prompt is the answer to that prompt ─────────────────────────────────────


def no_cross_talk(evidence: Evidence) -> list[Violation]:
    prompts = {
        event.nonce: event.prompt
        for event in evidence.events
        if event.action == "submit" and event.prompt is not None
    }
    results = {row["job_id"]: row for row in evidence.results}
    found = []
    for nonce, row in job_of_nonce(evidence).items():
        if nonce not in prompts:
            continue
        request = row.get("request") or {}
        if request.get("prompt", prompts[nonce]) != prompts[nonce]:
            found.append(Violation("I4", f"The row of {nonce} holds another prompt."))
        result = results.get(row["id"])
        if row["state"] == JobState.COMPLETED and result is not None:
            text = result["response"]["choices"][0]["text"] if result["response"] else None
            if text != prompts[nonce]:
                found.append(Violation("I4", f"{nonce} was answered with another text."))
    for event in evidence.events:
        is_answer = event.action == "poll" and event.state == JobState.COMPLETED
        if is_answer and event.nonce in prompts and event.text != prompts[event.nonce]:
            found.append(Violation("I4", f"A client asked for {event.nonce} and got another."))
    return found


# ── I5: the books balance ───────────────────────────────────────────────────────────────────────


def books_balance(evidence: Evidence) -> list[Violation]:
    texts = [*_wrong_bills(evidence), *_wrong_batches(evidence), *_too_busy(evidence)]
    texts += ["{row} breaks {rule} by {difference}.".format_map(row) for row in evidence.audit]
    return [Violation("I5", text) for text in texts]


def _wrong_bills(evidence: Evidence) -> Iterator[str]:
    attempts = {row["id"]: row for row in evidence.attempts}
    prices = {row["id"]: Decimal(row["price_per_device_hour"]) for row in evidence.workers}
    for result in evidence.results:
        attempt = attempts.get(result["attempt_id"])
        billed, cost = result["device_ns"], Decimal(result["cost"])
        if billed < 0 or cost < 0:
            yield f"{result['job_id']} is charged less than nothing."
        if attempt is None or result["currency"] is None or attempt["outcome"] in WASTED:
            if cost or billed or (attempt and (attempt["device_ns"] or attempt["cost"])):
                yield f"{result['job_id']} is charged without an attempt that ended it."
            continue
        if attempt["device_ns"] != billed or Decimal(attempt["cost"]) != cost:
            yield f"{result['job_id']} is charged another time than its attempt."
        exact = billed * prices[attempt["worker_id"]] / HOUR_NS
        if abs(exact - cost) > NANO:
            yield f"{result['job_id']} is charged {cost}, not {exact}."


def _wrong_batches(evidence: Evidence) -> Iterator[str]:
    of_batch = _by(evidence.attempts, "batch_id")
    for batch in evidence.batches:
        members = of_batch[batch["id"]]
        spent = sum((each["device_ns"] or 0) + (each["wasted_ns"] or 0) for each in members)
        # What a worker died with was never told, though its batch may have said so before.
        all_known = all(each["outcome"] not in (None, AttemptOutcome.LOST) for each in members)
        if spent > batch["device_ns"] or (all_known and spent != batch["device_ns"]):
            yield f"Batch {batch['id']} took {batch['device_ns']} ns, its jobs {spent}."


def _too_busy(evidence: Evidence) -> Iterator[str]:
    of_worker = _by(evidence.batches, "worker_id")
    for worker in evidence.workers:
        busy_s = sum(each["device_ns"] for each in of_worker[worker["id"]]) / 1e9
        up_s = (_time(worker["heartbeat_at"]) - _time(worker["started_at"])).total_seconds()
        if busy_s > up_s + SLACK_S:
            yield f"Worker {worker['id']} was busy {busy_s:.1f} s in {up_s:.1f} s."


WASTED: Final = frozenset({AttemptOutcome.LOST, AttemptOutcome.RELEASED})
"""What these took is noted, if it ever becomes known, and on nobody's bill."""

SLACK_S: Final = 10.0
"""A worker's row says when its last heartbeat was, not when it ended."""


# ── I6: only poisons fail for crashing the engine, and attempts are bounded ─────────────────────

CRASH_CODES: Final = frozenset({"engine_crash", "out_of_memory"})


def guilt(evidence: Evidence) -> list[Violation]:
    poisons = set()
    for nonce, events in evidence.submissions().items():
        expect = {code for each in events for code in each.expect}
        if CRASH_CODES & expect and "completed" not in expect:
            poisons.add(nonce)
    nonces = {row["id"]: nonce for nonce, row in job_of_nonce(evidence).items()}
    found = []
    failed = {
        nonces.get(row["job_id"], row["job_id"])
        for row in evidence.results
        if row["error_code"] in CRASH_CODES
    }
    found += [f"{nonce} is innocent and failed for a crash." for nonce in failed - poisons]
    found += [f"{nonce} is a poison and did not fail for it." for nonce in poisons - failed]
    for row in evidence.attempts:
        nonce = nonces.get(row["job_id"], row["job_id"])
        if row["charged"] and row["error_code"] in CRASH_CODES and nonce not in poisons:
            found.append(f"{nonce} is innocent and was charged for a crash.")
    charged = Counter(row["job_id"] for row in evidence.attempts if row["charged"])
    for row in evidence.jobs:
        if charged[row["id"]] > row["max_attempts"]:
            found.append(f"{row['id']} was charged {charged[row['id']]} attempts.")
        if charged[row["id"]] != row["attempts_charged"]:
            found.append(f"{row['id']} counts {row['attempts_charged']} charged attempts wrongly.")
    return [Violation("I6", text) for text in found]


# ── I7: all good jobs end soon after healing ────────────────────────────────────────────────────


def progress(evidence: Evidence) -> list[Violation]:
    recovery = evidence.recovery
    if recovery is None or recovery.seconds <= recovery.bound_s:
        return []
    text = f"Recovery took {recovery.seconds:.1f} s; the bound is {recovery.bound_s:.1f} s."
    return [Violation("I7", text)]


# ── I8: bounded, and refusals are clear ─────────────────────────────────────────────────────────

CLEAR: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})


def bounded(evidence: Evidence) -> list[Violation]:
    found = []
    for event in evidence.events:
        if event.status is None or event.phase == "ok":
            continue
        asks = event.action in ("submit", "poll", "batch")
        if event.status in CLEAR and not event.retry_after and asks:
            found.append(f"{event.action} {event.nonce}: {event.status} without Retry-After.")
        if event.status >= 500 and event.status not in CLEAR:
            found.append(f"{event.action} {event.nonce}: {event.status}.")
    if evidence.max_rss:
        for part, samples in evidence.rss.items():
            if samples and max(samples) > evidence.max_rss:
                found.append(f"{part} took {max(samples) >> 20} MiB.")
    for server, limit in evidence.max_connections.items():
        most = max(evidence.connections.get(server, ()), default=0)
        if most > limit:
            found.append(f"{most} connections to {server}; the limit is {limit}.")
    return [Violation("I8", text) for text in found]


# ── I9: the API says that it is ready if, and only if, it takes jobs ────────────────────────────

REFUSED_S: Final = 3.0
"""While nothing was accepted for so long, somebody must have said so."""
NOTICED_S: Final = 1.5
"""Until it says so."""


def readiness(evidence: Evidence) -> list[Violation]:
    """No time in which every submission over HTTP failed and the API called itself ready."""
    asked = [each for each in evidence.events if each.action == "ready" and each.phase != "invoke"]
    found = []
    for refused in _refused(evidence):
        began, ended = refused[0].at_ns + int(NOTICED_S * 1e9), refused[-1].at_ns
        said = [each.phase == "ok" for each in asked if began <= each.at_ns <= ended]
        if ended - refused[0].at_ns >= REFUSED_S * 1e9 and len(said) >= 2 and all(said):
            seconds = (ended - refused[0].at_ns) / 1e9
            text = f"Ready for {seconds:.1f} s in which {len(refused)} submissions failed."
            found.append(Violation("I9", text))
    return found


def _refused(evidence: Evidence) -> Iterator[list[Event]]:
    """Runs of submissions over HTTP that were not taken, for no fault of theirs."""
    run: list[Event] = []
    for event in evidence.events:
        if event.action != "submit" or event.way not in ("http", "bulk"):
            continue
        if event.phase == "ok" or (event.status is not None and event.status < 500):
            if event.phase != "invoke" and run:
                yield run
                run = []
        elif event.phase != "invoke":
            run.append(event)
    if run:
        yield run


# ── I12: nobody waits longer than before ────────────────────────────────────────────────────────

SLOWER_S: Final = 3.0


def as_quick_as_before(evidence: Evidence) -> list[Violation]:
    """What is slow after a fault lives on by its second way alone: a look now and then."""
    if len(evidence.reflexes) < 2:
        return []
    before, after = evidence.reflexes[0], evidence.reflexes[-1]
    return [
        Violation("I12", f"{what} took {before[what]:.1f} s before and {after[what]:.1f} s after.")
        for what in before
        if after[what] > before[what] + SLOWER_S
    ]


# ── I13: nothing ends, and nothing raises, but for the fault ────────────────────────────────────


def unbroken(evidence: Evidence) -> list[Violation]:
    found = [
        f"{part} ended {times} times by itself."
        for part, times in evidence.ended.items()
        if times and part not in evidence.may_end
    ]
    for part, text in evidence.logs.items():
        signs = ("Exception in thread", "Traceback (most recent call last)")
        found += [f"{part} logged: {_around(text, sign)}" for sign in signs if sign in text]
    return [Violation("I13", text) for text in found]


def _around(text: str, sign: str) -> str:
    """The line before a traceback, and the exception at its end."""
    before, _, after = text.partition(sign)
    line = (before.splitlines() or [""])[-1]
    error = next((each for each in after.splitlines()[1:] if each and each[0] != " "), "")
    return f"{line[:150]} {sign}: {error[:150]}"


# ── I10: no prompt anywhere but in its columns ──────────────────────────────────────────────────


def privacy(evidence: Evidence) -> list[Violation]:
    assert evidence.canary
    needles = [evidence.canary, *_in_base64(evidence.canary)]
    return [
        Violation("I10", f"A prompt is in {place}.")
        for place, text in evidence.texts.items()
        if any(needle in text for needle in needles)
    ]


def _in_base64(text: str) -> list[str]:
    """How base64 shows a text, at each of the three places that it may begin at."""
    shown = []
    for before in range(3):
        code = base64.b64encode(b"\0" * before + text.encode()).decode().rstrip("=")
        first = (0, 2, 3)[before]  # characters that also depend on what comes before
        shown.append(code[first:-2])
    return shown


# ── odds and ends ───────────────────────────────────────────────────────────────────────────────


def durations_not_negative(evidence: Evidence) -> list[Violation]:
    """No clock that jumps makes a duration negative, or an end before its beginning."""
    names = ("queue_ms", "batch_wait_ms", "ttft_ms", "inference_ms", "total_ms")
    return [
        Violation("I5", f"{row['job_id']}: {name} is {row[name]}.")
        for row in evidence.results
        for name in names
        if row.get(name) is not None and row[name] < 0
    ]


def _by(rows: Rows, column: str) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        found[row[column]].append(row)
    return found


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


CHECKS: Final[Mapping[str, Callable[[Evidence], list[Violation]]]] = {
    "I1": conservation,
    "I2": one_result,
    "I3": forward_only,
    "I4": no_cross_talk,
    "I5": lambda evidence: [*books_balance(evidence), *durations_not_negative(evidence)],
    "I6": guilt,
    "I7": progress,
    "I8": bounded,
    "I9": readiness,
    "I10": privacy,
    "I12": as_quick_as_before,
    "I13": unbroken,
    "I14": batches_whole,
    "I15": ends_told,
}
"""By invariant. I11, data is harmless: it is all of these in the faults that send odd data."""
