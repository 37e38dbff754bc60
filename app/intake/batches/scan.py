"""Reading all lines of a batch before it begins: nothing of one with a wrong line is run.

A scan is held by one keeper and goes on in slices; another one begins anew.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from app.batches import Door
from app.intake.batches import lines
from app.intake.batches.input_file import Row
from app.intake.batches.lines import Knows, WrongLine
from app.requests.bodies import Url
from app.store.batch_work import LineError

MAX_ERRORS: Final = 1_000
"""Of those that are told; the batch has failed with the first."""

SLICE_S: Final = 0.2
"""How long others wait meanwhile."""


@dataclass
class Scan:
    """What is known of a batch so far."""

    door: Door
    url: Url
    knows: Knows
    max_lines: int
    rows: Iterator[Row]
    total: int = 0
    errors: list[LineError] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    _seen: set[bytes] = field(default_factory=set)  #: digests of custom ids: as short as possible

    def go_on(self) -> bool:
        """Read for a while; whether all is read."""
        until = time.monotonic() + SLICE_S
        for row in self.rows:
            if not row.is_blank:
                self._take(row)
            if self.total > self.max_lines or len(self.errors) >= MAX_ERRORS:
                break
            if time.monotonic() > until:
                return False
        if self.total > self.max_lines:
            most = f"Too many tasks: a batch has {self.max_lines} requests at most."
            self.errors = [LineError("too_many_tasks", most, None, None)]
        elif self.total == 0:
            sentence = "The batch input file is empty: it needs at least one request."
            self.errors.append(LineError("empty_file", sentence, None, None))
        return True

    @property
    def model(self) -> str | None:
        """The one model of all lines."""
        return next(iter(self.models)) if len(self.models) == 1 else None

    def _take(self, row: Row) -> None:
        self.total += 1
        try:
            if row.raw is None:
                raise lines.TOO_LONG
            line = lines.parse(row.raw, self.door, self.url)
            if line.model not in self.models:
                if not self.knows(self.url, line.model):
                    raise lines.unknown_model(line.model)
                self.models.add(line.model)
            digest = hashlib.blake2b(line.custom_id.encode(), digest_size=12).digest()
            if digest in self._seen:
                raise WrongLine(
                    "duplicate_custom_id",
                    "The custom_id of this line is that of an earlier one.",
                    "custom_id",
                )
            self._seen.add(digest)
        except WrongLine as wrong:
            self.errors.append(wrong.at(row.number))
