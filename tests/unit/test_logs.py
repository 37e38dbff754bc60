"""Log files of the parts: bounded, and what was logged before a crash is there after it."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from app.local import logs
from app.local.child import Child
from app.local.logs import KEPT, Log, rotate
from tests.waiting import eventually


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "worker.log"


def test_the_log_of_a_crash_survives_the_next_start(file: Path):
    for word in ("crash", "after"):
        child = Child("worker", ["sh", "-c", f"echo {word}; exit 1"], file)
        child.start()
        eventually(lambda each=child: each.exit_code is not None)

    assert file.read_text().splitlines() == ["crash", "after"]
    assert child.tail().splitlines()[1] == "  after"  # what is told of a start is of that start


def test_logs_are_bounded_while_their_writer_goes_on_into_the_same_file(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logs, "MAX_BYTES", 1000)
    log, number = Log(file), 0
    with file.open("ab", buffering=0) as writer:
        for _ in range(10):
            for _ in range(20):
                writer.write(b"line %06d of a hundred characters %s\n" % (number, 60 * b"."))
                number += 1
            log.keep_small()

    files = list(file.parent.iterdir())
    assert len(files) == 1 + KEPT
    assert sum(each.stat().st_size for each in files) <= (1 + KEPT) * 2100
    assert not [each for each in files if each.stat().st_mode & 0o077 and each != file]
    kept = Log(file).last_lines(1000)
    assert [int(line.split()[1]) for line in kept] == list(range(number - len(kept), number))


def test_a_reader_sees_every_line_once_also_when_the_file_was_emptied(file: Path):
    file.write_bytes(b"of an earlier run\n")
    log, seen = Log(file), []
    with file.open("ab", buffering=0) as writer:
        for number in range(6):
            writer.write(b"%d\nhalf" % number)
            seen += log.new_lines()
            writer.write(b" a line\n")
            seen += log.new_lines()
            if number % 2:
                rotate(file)

    assert seen == [line for number in range(6) for line in (b"%d" % number, b"half a line")]


def test_on_a_full_disk_a_log_that_cannot_be_copied_stays_as_it_is(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(logs, "MAX_BYTES", 1)
    monkeypatch.setattr(shutil, "copyfileobj", fail)
    file.write_text("kept\n")

    Log(file).keep_small()

    assert [each.read_text() for each in file.parent.iterdir()] == ["kept\n"]


def test_the_last_lines_come_out_of_older_files_where_the_newest_has_too_few(file: Path):
    for line in ("one", "two", "three"):
        file.write_text(f"{line}\n")
        rotate(file)
    file.write_text("four\n")

    assert Log(file).last_lines(3) == [b"two", b"three", b"four"]
    assert Log(file).last_lines(0) == []
