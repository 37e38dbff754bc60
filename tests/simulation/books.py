"""I5: what jobs are billed, what attempts took, and what engines say that they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from uuid import UUID

from app.jobs import AttemptOutcome
from tests.memory_store import MemoryDatabase, Row
from tests.simulation.broken import expect
from tests.simulation.engine import SimulatedHost
from tests.simulation.prompts import Expected, num_sequences

ENDED = (AttemptOutcome.SUCCEEDED, AttemptOutcome.FAILED)


def check(
    store: MemoryDatabase,
    jobs: Mapping[UUID, Expected],
    hosts: Mapping[UUID, SimulatedHost],
    living: Collection[UUID],
) -> None:
    """`hosts` of all workers that there were. Those that live have told all."""
    attempts = store.tables["attempts"]
    for attempt in attempts.values():
        _check_attempt(attempt)
    for result in store.rows("results"):
        _check_bill(result, attempts.get(result["attempt_id"]))
        if result["job_id"] in jobs:
            _check_answers(result, jobs[result["job_id"]], hosts.values())
    _check_batches(store)
    _check_engines(attempts.values(), hosts, living)


def _check_attempt(attempt: Row) -> None:
    told = [attempt[name] for name in ("device_ns", "wasted_ns", "cost")]
    expect(None not in told, "I5: an attempt ended without its time")
    if attempt["outcome"] not in ENDED:
        expect(told[0] == told[2] == 0, f"I5: {told} billed for an attempt without a result")


def _check_bill(result: Row, attempt: Row | None) -> None:
    """A job is billed what the attempt that ended it is, and nothing without one."""
    is_billed = attempt is not None and attempt["outcome"] in ENDED
    names = ("device_ns", "wasted_ns", "cost") if is_billed else ("device_ns", "cost")
    took = [attempt[name] if attempt else 0 for name in names]
    billed = [result[name] for name in names]
    expect(billed == took, f"I5: billed {billed}, took {took}")


def _check_answers(result: Row, expected: Expected, hosts: Iterable[SimulatedHost]) -> None:
    """It is billed the answers that it got, which came from one process, and nothing else."""
    size, billed = num_sequences(expected.prompt), result["device_ns"]
    sums = {sum(group) for each in hosts for group in _answers(each, expected.prompt, size)}
    expect(
        billed in sums or (billed == 0 and result["state"] != "completed"),
        f"I5: {expected.prompt!r} is billed {billed} ns; its answers took {sums}",
    )


def _answers(host: SimulatedHost, prompt: str, size: int) -> Iterator[list[int]]:
    """What a job's answers took, each time that it got all of them."""
    for answered in host.answered:
        took = [device_ns for other, device_ns in answered if other == prompt]
        for begin in range(len(took) - size + 1):
            yield took[begin : begin + size]


def _check_batches(store: MemoryDatabase) -> None:
    """A batch took what its attempts did. A worker that died has not told what they took that it
    had; then the batch may have taken more."""
    spent, untold = Counter[UUID](), set[UUID]()
    for attempt in store.rows("attempts"):
        spent[attempt["batch_id"]] += attempt["device_ns"] + attempt["wasted_ns"]
        if attempt["outcome"] == AttemptOutcome.LOST:
            untold.add(attempt["batch_id"])
    for batch in store.rows("batches"):
        took, sum_ = batch["device_ns"], spent[batch["id"]]
        balances = sum_ <= took if batch["id"] in untold else sum_ == took
        expect(balances, f"I5: a batch took {took} ns, its attempts {sum_}")


def _check_engines(
    attempts: Iterable[Row], hosts: Mapping[UUID, SimulatedHost], living: Collection[UUID]
) -> None:
    """All that an engine gave or wasted is some attempt's."""
    spent = Counter[UUID]()
    for attempt in attempts:
        spent[attempt["worker_id"]] += attempt["device_ns"] + attempt["wasted_ns"]
    for worker_id, host in hosts.items():
        totals = host.hours.read()
        gave, told = totals.busy + totals.waste, spent[worker_id]
        if worker_id not in living:  # nothing follows in which it could be counted
            gave += host.hours.owed_ns
        expect(
            told == gave if worker_id in living else told <= gave,
            f"I5: an engine gave {gave} ns, the attempts say {told}",
        )
