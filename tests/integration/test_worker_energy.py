"""A real worker whose device has a known power: every joule is on a record, and adds up."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from contextlib import closing
from decimal import Decimal
from pathlib import Path

import pytest
from celery import Celery

from app.config.settings import Settings
from app.store.audit import audit
from app.store.database import Database
from tests.waiting import eventually
from tests.workers import results, rows, running_worker

IDLE_W, BUSY_W = 5, 30


def test_attempts_take_the_energy_of_their_time_and_what_they_wasted_is_theirs_too(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a device of 30 W, and a prompt that kills its engine
    model = {"source": "stub", "engine": "stub", "kind": "generate", "default": True}
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"lease_s": 3, "heartbeat_s": 0.5, "grace_s": 5},
        energy={"idle_watts": IDLE_W, "busy_watts": BUSY_W, "carbon_grams_per_kwh": Decimal(400)},
        models={"stub": model | {"max_wait_ms": 50, "options": {"step_ms": 2}}},
    )

    # when
    with (
        Celery("somebody-else", broker=redis_url, set_as_current=False) as producer,
        running_worker(settings, tmp_path / "worker") as worker,
    ):
        prompts = [*(f"prompt number {n}" for n in range(20)), "crash"]
        for prompt in prompts:
            producer.send_task("inference.generate", kwargs={"prompt": prompt})
        found = eventually(lambda: len(all_ := results(settings)) == 21 and all_, 60)
        worker.send_signal(signal.SIGTERM)
        worker.wait(30)

    # then the books balance, to the nanojoule
    with closing(Database(database_url)) as database, database.begin() as connection:
        books = audit(connection, None, None)
    [sums] = books.sums
    assert (books.differences, books.outside) == ([], [])
    assert sums.nj["up"] == BUSY_W * (sums.ns["up"] - sums.ns["idle"]) + IDLE_W * sums.ns["idle"]
    assert min(sums.nj["busy"], sums.nj["waste"], sums.nj["load"], sums.nj["idle"]) > 0

    # and each has taken its part
    told = rows(settings, "SELECT * FROM attempts")
    assert all(row["energy_method"] == "estimated" for row in told)
    spent_ns = sum(row["device_ns"] + row["wasted_ns"] for row in told)
    assert sum(row["energy_nj"] + row["wasted_nj"] for row in told) == BUSY_W * spent_ns
    assert any(row["wasted_nj"] for row in told)
    for row in found.values():
        assert (row["energy_method"], row["energy_boundary"]) == ("estimated", "device")
        assert row["energy_nj"] == BUSY_W * row["device_ns"]
        assert abs(row["carbon_ug"] - row["energy_nj"] * 400 / 3.6e9) < 1


class Package:
    """A processor's counter in a file, which wraps, and draws 100 W."""

    RANGE_UJ = 400_000_000

    def __init__(self, folder: Path) -> None:
        self.drawn_uj = self.RANGE_UJ - 50_000_000  # 50 J to go
        self._zone = folder / "intel-rapl:0"
        self._zone.mkdir(parents=True)
        (self._zone / "name").write_text("package-0\n")
        (self._zone / "max_energy_range_uj").write_text(f"{self.RANGE_UJ}\n")
        self._show()

    def _show(self) -> None:
        new = self._zone / "new"
        new.write_text(f"{self.drawn_uj % self.RANGE_UJ}\n")
        new.rename(self._zone / "energy_uj")

    def draw(self, stopping: threading.Event) -> None:
        before_ns = time.monotonic_ns()
        while not stopping.wait(0.02):
            now_ns = time.monotonic_ns()
            self.drawn_uj += (now_ns - before_ns) // 10
            before_ns = now_ns
            self._show()


def test_what_a_counter_says_is_in_the_windows_and_their_attempts(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a worker that finds a counter of 100 W
    model = {"source": "stub", "engine": "stub", "kind": "generate", "default": True}
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        worker={"heartbeat_s": 0.5, "grace_s": 5, "device": "cpu"},
        models={"stub": model | {"max_wait_ms": 50, "options": {"step_ms": 20}}},
    )
    package, stopping = Package(tmp_path / "powercap"), threading.Event()
    counting = threading.Thread(target=package.draw, args=(stopping,))
    found_there = (
        "from pathlib import Path; from app.worker.energy import rapl;"
        f"rapl.POWERCAP = Path({str(tmp_path / 'powercap')!r})\n"
    )
    counting.start()
    try:
        # when
        with (
            Celery("somebody-else", broker=redis_url, set_as_current=False) as producer,
            running_worker(settings, tmp_path / "worker", found_there) as worker,
        ):
            for n in range(20):
                producer.send_task("inference.generate", kwargs={"prompt": f"number {n}"})
            found = eventually(lambda: len(all_ := results(settings)) == 20 and all_, 60)
            worker.send_signal(signal.SIGTERM)
            worker.wait(30)
    finally:
        stopping.set()
        counting.join()

    # then it wrapped, which nobody took for a reset; all of it is measured, and adds up
    assert package.drawn_uj > package.RANGE_UJ
    with closing(Database(database_url)) as database, database.begin() as connection:
        books = audit(connection, None, None)
    assert (books.differences, books.outside) == ([], [])
    [sums] = books.sums
    assert sums.nj["up"] == pytest.approx(100 * sums.ns["up"], rel=0.1)
    windows = rows(settings, "SELECT * FROM windows")
    assert {row["counter_resets"] for row in windows} == {0}
    assert "measured" in {row["energy_method"] for row in windows}
    assert {row["energy_method"] for row in found.values()} <= {"measured", "estimated"}
    assert {row["energy_boundary"] for row in found.values()} == {"cpu packages"}
    assert all(row["energy_nj"] > 0 for row in found.values())
