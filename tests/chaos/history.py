"""The history of a run: what the clients asked and what they were told, and nothing else.

Written by the client process alone, one JSON object a line, in the order in which things happened
there. Every operation has a line `invoke` and then one of

    ok       it was done
    fail     it was refused, and certainly not done
    unknown  no clear answer: it may have been done
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Self

PHASES: Final = ("invoke", "ok", "fail", "unknown")


@dataclass(frozen=True, slots=True)
class Event:
    """One line. `number` names the operation: it is that of its `invoke`."""

    number: int
    phase: str  #: one of PHASES
    action: str  #: submit, poll, cancel, batch, or ready: what the API says of itself
    at_ns: int  #: this machine's monotonic clock
    fault: str  #: during which fault
    nonce: str  #: of the job's prompt, or of a batch; also its idempotency key
    way: str = ""  #: of a submission: http, bulk, message or batch
    batch: str = ""  #: the nonce of the batch that a job is a line of
    job_id: str | None = None  #: or that of a batch
    prompt: str | None = None  #: of a submission
    expect: tuple[str, ...] = ()  #: of a submission: states and error codes that it may end with
    status: int | None = None  #: of the HTTP answer
    retry_after: str | None = None  #: the header of a refusal
    is_hooked: bool = False  #: of a submission: its end is to be told
    state: str | None = None  #: of a poll: the job's state, or a batch's
    counts: tuple[int, ...] = ()  #: of a batch: lines, those that completed, those that failed
    text: str | None = None  #: of a poll: the answer's text
    detail: str = ""


class History:
    """Appends to a file. Threads may share it."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("a", buffering=1)
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._events: list[Event] = []
        self.fault = ""  #: noted in every line

    def invoke(self, action: str, nonce: str, **given: Any) -> int:
        """Note that something is about to be asked; returns the operation's number."""
        number = next(self._numbers)
        self._append(number, "invoke", action, nonce, given)
        return number

    def end(self, number: int, phase: str, action: str, nonce: str, **given: Any) -> None:
        """Note what became of it."""
        assert phase in PHASES[1:], phase
        self._append(number, phase, action, nonce, given)

    def events(self, fault: str | None = None) -> list[Event]:
        """All so far, or those of one fault."""
        with self._lock:
            return [event for event in self._events if fault is None or event.fault == fault]

    def forget(self) -> None:
        """Let go of what is in the file already."""
        with self._lock:
            self._events.clear()

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(
        self, number: int, phase: str, action: str, nonce: str, given: dict[str, Any]
    ) -> None:
        event = Event(number, phase, action, time.monotonic_ns(), self.fault, nonce, **given)
        shown = {
            name: value
            for name, value in asdict(event).items()
            if value not in (None, "", ()) and value is not False
        }
        with self._lock:
            self._events.append(event)
            self._file.write(json.dumps(shown) + "\n")


def read(file: Path) -> Iterator[Event]:
    """The events of a file."""
    known = {field.name for field in fields(Event)}
    for line in file.read_text().splitlines():
        values = json.loads(line)
        assert values.keys() <= known
        lists = {name: tuple(values.get(name, ())) for name in ("expect", "counts")}
        yield Event(**values | lists)
