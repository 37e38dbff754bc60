"""What the NVIDIA driver's log lines mean for a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.worker.engine.xid import Remedy, Xid, XidWatch, find
from tests.waiting import eventually

FALLEN = "[ 12.3] NVRM: Xid (PCI:0000:06:00): 79, pid='<unknown>', GPU has fallen off the bus."
ASSERT = "kernel: NVRM: Xid (PCI:0000:07:00): 13, pid=4242, name=python, Graphics Exception"


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (13, Remedy.RESTART),
        (31, Remedy.RESTART),
        (94, Remedy.RESTART),
        (43, Remedy.IGNORE),
        (45, Remedy.IGNORE),
        (63, Remedy.IGNORE),
        (48, Remedy.LEAVE),
        (46, Remedy.LEAVE),
        (79, Remedy.LEAVE),
        (95, Remedy.LEAVE),
        (100_000, Remedy.LEAVE),
    ],
)
def test_a_code_has_the_remedy_of_the_catalogue(code: int, remedy: Remedy) -> None:
    assert Xid("0000:06:00", code).remedy is remedy


def test_events_are_found_among_other_lines() -> None:
    lines = ["usb 1-1: new device", FALLEN, "NVRM: loading", ASSERT, "Xid (PCI:1): nothing"]

    assert find(lines) == [Xid("0000:06:00", 79), Xid("0000:07:00", 13)]


@pytest.mark.parametrize("address", ["", "0000:06:00", "00000000:06:00.0", "06:00.0"])
def test_a_device_is_known_by_any_spelling_of_its_address(address: str) -> None:
    assert Xid("0000:06:00", 79).is_of(address)


@pytest.mark.parametrize("address", ["0000:07:00", "0001:06:00.0"])
def test_another_device_is_another(address: str) -> None:
    assert not Xid("0000:06:00", 79).is_of(address)


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[Callable[[str], tuple[Path, list[Xid]]]]:
    started: list[XidWatch] = []

    def start(address: str) -> tuple[Path, list[Xid]]:
        file = tmp_path / "kern.log"
        file.write_text(FALLEN + "\n")
        heard: list[Xid] = []
        started.append(XidWatch(file, address, heard.append))
        started[-1].start()
        return file, heard

    yield start
    for each in started:
        each.stop()
        each.join()


def test_only_what_is_logged_from_now_on_counts(
    watch: Callable[[str], tuple[Path, list[Xid]]],
) -> None:
    file, heard = watch("")

    with file.open("a") as log:
        log.write(ASSERT[:30])
        log.flush()
        log.write(ASSERT[30:] + "\n")

    assert eventually(lambda: heard) == [Xid("0000:07:00", 13)]


def test_events_of_other_devices_are_left_to_their_workers(
    watch: Callable[[str], tuple[Path, list[Xid]]],
) -> None:
    file, heard = watch("0000:06:00.0")

    with file.open("a") as log:
        log.write(f"{ASSERT}\n{FALLEN}\n")

    assert eventually(lambda: heard) == [Xid("0000:06:00", 79)]


def test_a_log_that_was_replaced_is_followed(
    watch: Callable[[str], tuple[Path, list[Xid]]], tmp_path: Path
) -> None:
    file, heard = watch("")

    (tmp_path / "new").write_text(ASSERT + "\n")
    (tmp_path / "new").rename(file)

    assert eventually(lambda: heard) == [Xid("0000:07:00", 13)]
