"""I5: what jobs are billed, what attempts took, and what engines say that they gave."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from uuid import UUID

from app.books.cost import device_cost
from app.jobs import AttemptOutcome
from tests.memory_store import MemoryDatabase, Row
from tests.simulation.broken import expect
from tests.simulation.engine import SimulatedHost
from tests.simulation.prompts import Expected, num_sequences

PARTS = ("load", "busy", "idle", "waste", "overhead", "open")
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
    _check_windows(store, hosts, living)


def _check_windows(
    store: MemoryDatabase, hosts: Mapping[UUID, SimulatedHost], living: Collection[UUID]
) -> None:
    """Each window has what its attempts say; a worker that has told all has nothing open."""
    of_window: defaultdict[tuple[UUID, int | None], list[Row]] = defaultdict(list)
    for attempt in store.rows("attempts"):
        of_window[attempt["worker_id"], attempt["window_number"]].append(attempt)
    of_worker: defaultdict[UUID, list[Row]] = defaultdict(list)
    for window in sorted(store.rows("windows"), key=lambda each: each["number"]):
        _check_window(window, of_window[window["worker_id"], window["number"]])
        of_worker[window["worker_id"]].append(window)
    for worker_id, windows in of_worker.items():
        numbers = [window["number"] for window in windows]
        expect(numbers == list(range(1, len(numbers) + 1)), f"I5: windows {numbers}")
        has_told_all = windows[-1]["is_last"] or worker_id in living
        open_ns = sum(window["open_ns"] for window in windows)
        is_settled = open_ns == -windows[-1]["owed_ns"]
        expect(is_settled or not has_told_all, f"I5: {open_ns} ns are open at the end")
        open_nj = sum(window["open_nj"] for window in windows)
        expect(open_nj >= 0, f"I5: {open_nj} nJ are open at the end")
        expect(open_nj == 0 or not has_told_all, f"I5: {open_nj} nJ are open at the end")
        if has_told_all:
            up_ns = sum(window["up_ns"] for window in windows)
            expect(up_ns == hosts[worker_id].hours.read().up, "I5: windows are not the up-time")
            energy_nj = sum(window["energy_nj"] for window in windows)
            drawn_nj = hosts[worker_id].meter.joules().parts.up
            expect(energy_nj == drawn_nj, "I5: windows are not the energy")


def _check_window(window: Row, attempts: Collection[Row]) -> None:
    billed = [attempt["device_ns"] for attempt in attempts]
    wasted_ns = sum(attempt["wasted_ns"] for attempt in attempts)
    parts = {name: window[f"{name}_ns"] for name in PARTS}
    expect(window["up_ns"] == sum(parts.values()), f"I5: a window of {parts}")
    expect(parts["busy"] == sum(billed), f"I5: {billed} billed in a window of {parts}")
    expect(
        parts["waste"] == wasted_ns + window["stray_ns"],
        f"I5: {wasted_ns} ns wasted in a window of {parts}, {window['stray_ns']} of it stray",
    )
    joules = {name: window[f"{name}_nj"] for name in PARTS}
    took_nj = sum(attempt["energy_nj"] or 0 for attempt in attempts)
    wasted_nj = sum(attempt["wasted_nj"] or 0 for attempt in attempts)
    expect(window["energy_nj"] == sum(joules.values()), f"I5: a window of {joules} nJ")
    expect(joules["busy"] == took_nj, f"I5: {took_nj} nJ paid in a window of {joules}")
    expect(
        joules["waste"] == wasted_nj + window["stray_nj"],
        f"I5: {wasted_nj} nJ wasted in a window of {joules}, {window['stray_nj']} of it stray",
    )
    is_told = window["stray_ns"] > 0 or window["stray_nj"] == 0
    expect(is_told, f"I5: {window['stray_nj']} nJ are stray, and no time is")
    costs = [device_cost(ns, window["price"]) for ns in billed]
    costs += [device_cost(ns, window["price"]) for name, ns in parts.items() if name != "busy"]
    price = sum(costs, window["rounding"])
    expect(price == device_cost(window["up_ns"], window["price"]), "I5: money does not add up")


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
    spent, joules = Counter[UUID](), Counter[UUID]()
    for attempt in attempts:
        spent[attempt["worker_id"]] += attempt["device_ns"] + attempt["wasted_ns"]
        joules[attempt["worker_id"]] += (attempt["energy_nj"] or 0) + (attempt["wasted_nj"] or 0)
    for worker_id, host in hosts.items():
        totals = host.hours.read()
        gave, told = totals.busy + totals.waste, spent[worker_id]
        if worker_id not in living:  # nothing follows in which it could be counted
            gave += host.owed_ns
        expect(
            told == gave if worker_id in living else told <= gave,
            f"I5: an engine gave {gave} ns, the attempts say {told}",
        )
        parts = host.meter.joules().parts
        took_nj, told_nj = parts.busy + parts.waste, joules[worker_id]
        expect(
            told_nj == took_nj if worker_id in living else told_nj <= took_nj,
            f"I5: a device took {took_nj} nJ to compute, the attempts say {told_nj}",
        )
