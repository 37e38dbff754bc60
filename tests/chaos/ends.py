"""Whether batches ended as they have to, and who asked for it was told of each end; pure."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from app.batches import FINAL, BatchState
from app.jobs import FINAL_STATES
from tests.chaos.evidence import Evidence, Violation, job_of_nonce
from tests.chaos.history import Event

# ── I14: a batch ends with one answer to each line, and its counts add up at any time ────────────

ORDER: Final = (
    *(BatchState.VALIDATING, BatchState.IN_PROGRESS, BatchState.FINALIZING, BatchState.COMPLETED),
)


def batches_whole(evidence: Evidence) -> list[Violation]:
    lines: dict[str, list[Event]] = defaultdict(list)
    seen: dict[str, list[Event]] = defaultdict(list)
    for event in evidence.events:
        if event.action == "submit" and event.batch:
            lines[event.batch].append(event)
        elif event.action == "batch" and event.counts:
            seen[event.nonce].append(event)
    return [
        Violation("I14", f"Batch {nonce}: {text}")
        for nonce, events in lines.items()
        for text in _wrong_with_batch(seen[nonce], events)
    ]


def _wrong_with_batch(seen: Sequence[Event], lines: Sequence[Event]) -> Iterator[str]:
    asked = [event.nonce for event in lines if event.phase == "invoke"]
    answered = Counter(event.nonce for event in lines if event.phase == "ok")
    if len({event.job_id for event in seen}) != 1:
        yield f"it was accepted as {len({event.job_id for event in seen})} batches."
        return
    if strange := [event.state for event in seen if event.state not in ORDER]:
        yield f"it is {strange[0]}."
        return
    for before, after in pairwise(seen):
        if ORDER.index(BatchState(after.state or "")) < ORDER.index(BatchState(before.state or "")):
            yield f"it was {before.state}, and then {after.state}."
        if any(b > a for b, a in zip(before.counts, after.counts, strict=True)):
            yield f"it had {before.counts} lines, and then {after.counts}."
    for total, completed, failed in (event.counts for event in seen):
        if completed + failed > total:
            yield f"{completed} and {failed} of {total} lines are over."
    if seen[-1].state != BatchState.COMPLETED:
        yield f"it never ended: it is {seen[-1].state}."
    elif seen[-1].counts != (len(asked), len(asked), 0):
        yield f"it ended with {seen[-1].counts} of {len(asked)} lines."
    elif answered != Counter(asked):
        yield f"{len(answered)} of {len(asked)} lines have {answered.total()} answers."


# ── I15: who asked for it is told of each end, and told the truth ───────────────────────────────


def ends_told(evidence: Evidence) -> list[Violation]:
    jobs = job_of_nonce(evidence)
    hooked = {event.nonce for event in evidence.events if event.is_hooked}
    ends = {row["id"]: f"job.{row['state']}" for nonce in hooked if (row := jobs.get(nonce))}
    for event in evidence.events:
        if event.action == "batch" and event.counts and event.job_id:
            ends[event.job_id] = f"batch.{event.state}"
    told: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for hook in evidence.hooks:
        told[hook["data"]["id"]].add((hook["id"], hook["type"]))
    found = []
    for name, end in ends.items():
        if end.partition(".")[2] not in {*FINAL_STATES, *FINAL}:
            continue  # I1 and I14 tell of it
        if not told[name]:
            found.append(f"Nobody was told of {name}.")
        elif len(told[name]) > 1 or {kind for _, kind in told[name]} != {end}:
            found.append(f"{name} is {end}, and told was {sorted(told[name])}.")
    return [Violation("I15", text) for text in found]
