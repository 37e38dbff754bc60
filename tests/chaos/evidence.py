"""What is known of one fault, for the checker to judge."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.history import Event

Row = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True, slots=True)
class Violation:
    invariant: str  #: I1 to I15
    text: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.text}"


@dataclass(frozen=True, slots=True)
class Recovery:
    """From healing to the end of the last job that was open at that time, in seconds."""

    seconds: float
    bound_s: float


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known of one fault. Rows are as Postgres makes JSON of them."""

    events: Sequence[Event]
    jobs: Rows = ()
    attempts: Rows = ()
    results: Rows = ()
    batches: Rows = ()
    workers: Rows = ()
    transitions: Rows = ()
    audit: Rows = ()  #: rows that break a rule of the audit
    texts: Mapping[str, str] = field(default_factory=dict)  #: where no prompt may be, by place
    canary: str = ""
    recovery: Recovery | None = None
    rss: Mapping[str, Sequence[int]] = field(default_factory=dict)  #: samples of each part, bytes
    connections: Mapping[str, Sequence[int]] = field(default_factory=dict)  #: of each server
    max_rss: int = 0  #: of any part, bytes; 0 is not checked
    max_connections: Mapping[str, int] = field(default_factory=dict)
    ended: Mapping[str, int] = field(default_factory=dict)  #: times that a part ended by itself
    may_end: frozenset[str] = frozenset()  #: parts that the fault ends
    logs: Mapping[str, str] = field(default_factory=dict)  #: of each part, during the fault
    reflexes: Sequence[Mapping[str, float]] = ()  #: in seconds, before the fault and after it
    hooks: Rows = ()  #: events of webhooks that came, in order

    def submissions(self) -> dict[str, list[Event]]:
        """The events of submissions, by nonce."""
        by_nonce: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            if event.action == "submit":
                by_nonce[event.nonce].append(event)
        return by_nonce


def job_of_nonce(evidence: Evidence) -> dict[str, Row]:
    """The job's row for each nonce: by the ids that the client was told, else by its key."""
    by_id = {row["id"]: row for row in evidence.jobs}
    by_key = {row["idempotency_key"]: row for row in evidence.jobs if row.get("idempotency_key")}
    found: dict[str, Row] = {}
    for nonce, events in evidence.submissions().items():
        ids = [each.job_id for each in events if each.job_id in by_id]
        if ids:
            found[nonce] = by_id[ids[0]]
        elif nonce in by_key:
            found[nonce] = by_key[nonce]
    return found
