"""A worker's account: each nanosecond is in one window, and each attempt in the one it names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.books.cost import device_cost
from app.books.energy import PowerModel
from app.errors import NotStorable, Unavailable
from app.store.claims import Settled
from app.store.windows import Window
from app.worker.account import Account, Spent
from app.worker.energy.meter import Joules
from app.worker.energy.source import Source
from app.worker.engine.hours import Look
from app.worker.engine.page import Totals

PRICE = Decimal("0.036")
WATTS = 30


class FakeHours:
    """The clock of an engine process, as a test says."""

    def __init__(self) -> None:
        self.totals = Totals()
        self.owed_ns = 0

    def look(self) -> Look:
        return Look(self.totals, self.owed_ns)


class FakeEnergy:
    """A device that draws as much whatever it does."""

    source = Source("nvml", "gpu", "as a test says", (), PowerModel(WATTS * 1_000, WATTS * 1_000))

    def __init__(self, hours: FakeHours) -> None:
        self._hours = hours

    def joules(self) -> Joules:
        return Joules(Totals(*(ns * WATTS for ns in astuple(self._hours.look().given))))


class Store:
    """Takes windows, or is away."""

    def __init__(self) -> None:
        self.windows: list[dict[str, Any]] = []
        self.is_away = False

    @contextmanager
    def autocommit(self) -> Iterator[Store]:
        if self.is_away:
            raise Unavailable("It is away.")
        yield self

    def execute(self, _: object, given: dict[str, Any]) -> None:
        self.windows.append(given)


@pytest.fixture
def hours() -> FakeHours:
    return FakeHours()


def account(hours: FakeHours, price: Decimal | None = PRICE) -> Account:
    return Account(uuid4(), hours, FakeEnergy(hours), price)  # type: ignore[arg-type]


def spent(ns: int) -> Spent:
    return Spent(ns, ns * WATTS)


def closed(books: Account) -> list[Window]:
    return [window for window, _ in books._unwritten]


def settle(books: Account, attempt: UUID, device_ns: int, wasted_ns: int = 0) -> None:
    with books.settling({attempt: spent(device_ns + wasted_ns)}) as settling:
        took = (device_ns, wasted_ns, device_ns * WATTS, wasted_ns * WATTS)
        settling.rows = [Settled(attempt, *took, counts=True)]


def test_what_is_computed_is_open_until_its_attempt_is_settled(hours: FakeHours) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals = Totals(load=100, busy=70, waste=20)
    books.close()
    settle(books, attempt, 60, 30)
    hours.totals = Totals(load=100, busy=70, waste=20, idle=5)
    books.close(is_last=True)

    first, second = closed(books)
    assert (first.busy_ns, first.waste_ns, first.open_ns, first.up_ns) == (0, 0, 90, 190)
    assert (second.busy_ns, second.waste_ns, second.open_ns, second.up_ns) == (60, 30, -90, 5)
    assert (first.is_last, second.is_last, second.stray_ns) == (False, True, 0)
    assert (first.busy_nj, first.open_nj, first.energy_nj) == (0, 90 * WATTS, 190 * WATTS)
    assert (second.busy_nj, second.waste_nj, second.open_nj) == (1_800, 900, -2_700)


def test_no_window_is_closed_while_the_fate_of_a_commit_is_unknown(hours: FakeHours) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals = Totals(busy=7)
    with pytest.raises(Unavailable), books.settling({attempt: spent(7)}):
        raise Unavailable("The answer was lost.")
    books.close()
    assert closed(books) == []

    settle(books, attempt, 7)
    books.close()

    [window] = closed(books)
    assert (window.busy_ns, window.open_ns) == (7, 0)


def test_an_attempt_is_booked_once_however_often_it_is_committed(hours: FakeHours) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals = Totals(busy=7)
    settle(books, attempt, 7)
    settle(books, attempt, 7)
    books.close()

    assert closed(books)[0].busy_ns == 7


def test_a_refused_record_is_no_doubt_and_what_it_took_is_stray(hours: FakeHours) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals = Totals(busy=9)
    with pytest.raises(NotStorable), books.settling({attempt: spent(9)}):
        raise NotStorable("It is no record.")
    books.refused(attempt, spent(9))
    books.close(is_last=True)

    [window] = closed(books)
    assert (window.waste_ns, window.stray_ns, window.open_ns, window.is_last) == (9, 9, 0, True)
    assert (window.waste_nj, window.stray_nj, window.open_nj) == (270, 270, 0)


def test_what_is_left_over_when_all_attempts_are_settled_is_stray_and_nothing_stays_open(
    hours: FakeHours,
) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals = Totals(busy=9)
    books.close()
    settle(books, attempt, 5)
    books.close(is_last=True)

    _, last = closed(books)
    assert (last.busy_ns, last.waste_ns, last.stray_ns, last.open_ns) == (5, 4, 4, -9)


def test_a_worker_that_leaves_attempts_to_rescue_has_no_last_window(hours: FakeHours) -> None:
    books = account(hours)
    books.opened([uuid4()])
    hours.totals = Totals(busy=9)
    books.close(is_last=True)

    [window] = closed(books)
    assert (window.is_last, window.open_ns, window.stray_ns) == (False, 9, 0)


def test_what_is_billed_before_the_clock_has_it_is_owed(hours: FakeHours) -> None:
    books, attempt = account(hours), uuid4()
    books.opened([attempt])
    hours.totals, hours.owed_ns = Totals(busy=7, idle=1), 3
    settle(books, attempt, 10)
    books.close(is_last=True)

    [window] = closed(books)
    assert (window.busy_ns, window.open_ns, window.owed_ns, window.stray_ns) == (10, -3, 3, 0)
    assert (window.busy_nj, window.open_nj, window.stray_nj) == (300, 0, 0)


def test_windows_wait_while_postgres_is_away_and_a_device_without_a_price_has_no_rounding(
    hours: FakeHours,
) -> None:
    books, store = account(hours, None), Store()
    books.close()
    store.is_away = True
    with pytest.raises(Unavailable):
        books.write(store)  # type: ignore[arg-type]
    books.close()
    store.is_away = False
    books.write(store)  # type: ignore[arg-type]
    books.write(store)  # type: ignore[arg-type]

    assert ['"number":1' in each["window"] for each in store.windows] == [True, False]
    assert all("rounding" not in each["window"] for each in store.windows)


PARTS = st.integers(0, 10**10)


@given(st.lists(st.tuples(PARTS, PARTS, PARTS, PARTS), max_size=8))
def test_windows_add_up_to_all_time_and_money_whatever_was_settled_when(
    steps: list[tuple[int, int, int, int]],
) -> None:
    hours = FakeHours()
    books, costs = account(hours), Decimal(0)
    opened: list[tuple[UUID, int, int]] = []
    for busy, waste, idle, kept in steps:
        device_ns = max(0, busy - kept)
        opened.append((uuid4(), device_ns, busy - device_ns + waste))
        books.opened([opened[-1][0]])
        hours.totals += Totals(load=1, busy=busy, waste=waste, idle=idle, overhead=3)
        if kept % 2:  # some attempts end in a later window
            for attempt in opened:
                settle(books, *attempt)
                costs += device_cost(attempt[1], PRICE)
            opened.clear()
        books.close()

    windows = closed(books)
    assert sum(each.up_ns for each in windows) == hours.totals.up
    assert [each.number for each in windows] == list(range(1, len(windows) + 1))
    for each in windows:
        others = (each.load_ns, each.idle_ns, each.waste_ns, each.overhead_ns, each.open_ns)
        assert each.up_ns == sum(others) + each.busy_ns
        costs += sum(device_cost(ns, PRICE) for ns in others) + (each.rounding or 0)
        energy = (each.load_nj, each.idle_nj, each.waste_nj, each.overhead_nj, each.open_nj)
        assert each.energy_nj == sum(energy) + each.busy_nj == each.up_ns * WATTS
    assert costs == sum(device_cost(each.up_ns, PRICE) for each in windows)
