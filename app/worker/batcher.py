"""The batching rule, stated once. Pure: the caller brings the clock.

Candidates that may run together share a `group`. A batch is taken from one group and never passes
`max_batch_size` sequences or `max_batch_tokens` (sequences times the longest prompt plus the
longest allowed output). It closes

    size    when it holds `max_batch_size` sequences, or the next one would not fit,
    tokens  when the next candidate would pass `max_batch_tokens`,
    wait    when its oldest member has waited for company, `max_wait_ms` or `STATIC_WAIT_NS`,
    join    when its oldest member has waited `GATHER_NS`, if the engine takes sequences between its
            steps: company can join later, and those that come together share a claim.

Where the policy is adaptive and nobody can join later, `app.worker.policy` says how long the oldest
member waits, from arrivals and from what batches took; `max_wait_ms` is the most.

While an engine runs that takes nothing before it is free again, the batch for then closes as soon
as it is full; one that is not may still grow.

What does not fit opens the next batch, and what could not even be alone in an empty engine is
handed back by `misfits`: nothing behind it would ever run. Members go in by priority; within one
each tenant's first, then each one's second, and so on; those of a tenant by deadline, then age. How
many of whom are here at all is decided where messages are fetched: see `app.broker.lanes`. A
candidate that has been passed over for `STARVATION_WAITS` times its group's `max_wait_ms`, and
`STARVATION_FLOOR_NS`, or by `STARVATION_BATCHES` full batches, goes first whatever its priority, so
nothing waits for ever, and a patient job under a flood of urgent ones little longer than its share
of the messages that are fetched makes it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Final
from uuid import UUID

from app.config.settings import ModelSettings, Policy
from app.jobs import CloseReason
from app.worker.policy import Arrivals, CostFit, StepCost, closes_ns

STARVATION_WAITS: Final = 100
STARVATION_FLOOR_NS: Final = 10_000_000_000
STARVATION_BATCHES: Final = 16
STATIC_WAIT_NS: Final = 100_000_000
"""For company, where whoever comes later waits for the whole batch."""
GATHER_NS: Final = 3_000_000
"""As long as it takes to register a message, so that a lone one loses nothing by it."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Hard limits of one group's batches."""

    max_batch_size: int
    max_batch_tokens: int
    max_wait_ns: int | None = None  #: None is what suits the engine
    wait_cost: float | None = None  #: of the adaptive policy; None is a fixed wait

    @classmethod
    def of(cls, model: ModelSettings) -> Limits:
        wait_ms = model.max_wait_ms
        wait_ns = None if wait_ms is None else int(wait_ms * 1e6)
        is_adaptive = model.batch.policy is Policy.ADAPTIVE
        wait_cost = model.batch.wait_cost if is_adaptive else None
        return cls(model.max_batch_size, model.max_batch_tokens, wait_ns, wait_cost)

    def wait_ns(self, capacity: Capacity) -> int:
        """How long the oldest member waits for company."""
        suits_ns = GATHER_NS if capacity.joins else STATIC_WAIT_NS
        if self.max_wait_ns is None:
            return suits_ns
        is_joined = capacity.joins and not capacity.is_empty
        return min(self.max_wait_ns, suits_ns) if is_joined else self.max_wait_ns

    @property
    def starvation_ns(self) -> int:
        return max((self.max_wait_ns or 0) * STARVATION_WAITS, STARVATION_FLOOR_NS)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A job that waits for a batch. Times are monotonic nanoseconds of the caller's clock."""

    job_id: UUID
    group: str
    num_sequences: int
    prompt_tokens: int  #: of its longest prompt
    max_new_tokens: int
    arrived_ns: int
    priority: int = 0
    deadline: float = math.inf  #: UNIX seconds; only compared
    expires_ns: int | None = None  #: the deadline on the caller's clock
    tenant: str = ""
    num_before: int = field(default=0, compare=False)
    """Sequences that its group had taken when it came; the batcher's."""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the engine behind a group can take now."""

    free_rows: int
    joins: bool = False  #: it admits between its steps
    ceiling: Callable[[int], int] | None = None
    """Most rows that may be added if the longest has so many tokens; None is no limit."""
    is_empty: bool = True  #: nothing runs: then one job is taken even if it passes the ceiling
    is_ahead: bool = False  #: it is what will be free when the batch that runs now is over


@dataclass(frozen=True, slots=True)
class Selection:
    group: str
    members: tuple[Candidate, ...]  #: in the order they were admitted
    reason: CloseReason
    wait_ns: int  #: of the oldest member

    @property
    def num_sequences(self) -> int:
        return sum(member.num_sequences for member in self.members)


class Batcher:
    """Owns every candidate between its registration and its batch."""

    def __init__(self, limits: dict[str, Limits]) -> None:
        """`limits` has one entry per group key that candidates may carry."""
        self.limits = limits
        self._waiting: dict[str, dict[UUID, Candidate]] = {group: {} for group in limits}
        self._num_taken: Counter[str] = Counter()  #: sequences, by group
        self._paces = {
            group: _Pace(Arrivals(), CostFit())
            for group, each in limits.items()
            if each.wait_cost is not None
        }

    def __len__(self) -> int:
        return sum(len(group) for group in self._waiting.values())

    def add(self, candidate: Candidate) -> None:
        came = replace(candidate, num_before=self._num_taken[candidate.group])
        self._waiting[candidate.group][candidate.job_id] = came
        if pace := self._paces.get(candidate.group):
            pace.arrivals.add(candidate.arrived_ns, candidate.num_sequences)

    def note_ran(self, group: str, rows: int, took_ns: int) -> None:
        """A batch of this group has run, of so many sequences and so much of the device's time."""
        if pace := self._paces.get(group):
            pace.fit.add(rows, took_ns)

    def cost(self, group: str) -> StepCost | None:
        """What its batches take, if its policy asks and one has run."""
        return pace.fit.cost if (pace := self._paces.get(group)) else None

    def remove(self, job_id: UUID) -> Candidate | None:
        """Take out a cancelled, expired or flushed job; None if it is not waiting."""
        for group in self._waiting.values():
            if candidate := group.pop(job_id, None):
                return candidate
        return None

    def misfits(self, group: str, capacity: Capacity) -> list[Candidate]:
        """Take out the candidates of this group that its engine can never take, however empty."""
        most = most_rows(self.limits[group], capacity)
        found = [c for c in self._waiting[group].values() if c.num_sequences > most]
        for candidate in found:
            del self._waiting[group][candidate.job_id]
        return found

    def close(self, group: str, capacity: Capacity, now_ns: int) -> Selection | None:
        """The batch of this group that closes now, taken out of the waiting, or None.

        Without `misfits` among the waiting it gives one sooner or later, whatever they ask for.
        """
        waiting = self._waiting[group]
        if not waiting or capacity.free_rows < 1:
            return None
        timely = self._timely(group, capacity, now_ns)
        selection = self._select(group, waiting.values(), capacity, now_ns, timely)
        if selection is None:
            return None
        for member in selection.members:
            del waiting[member.job_id]
        self._num_taken[group] += selection.num_sequences
        return selection

    def foresee(
        self, group: str, came: Collection[Candidate], capacity: Capacity, now_ns: int
    ) -> Selection | None:
        """The batch that would close at once if these were added now, full and with all of them;
        None if there is none such, or others wait: who goes first, their rows say. Its members
        count as taken; nobody is added."""
        if not came or self._waiting[group] or capacity.free_rows < 1:
            return None
        taken = self._num_taken[group]
        came = [replace(candidate, num_before=taken) for candidate in came]
        selection = self._select(group, came, capacity, now_ns, None)
        if selection is None or len(selection.members) < len(came):
            return None
        self._num_taken[group] += selection.num_sequences
        if pace := self._paces.get(group):
            for member in selection.members:
                pace.arrivals.add(member.arrived_ns, member.num_sequences)
        return selection

    def _select(
        self,
        group: str,
        waiting: Collection[Candidate],
        capacity: Capacity,
        now_ns: int,
        timely: CloseReason | None,
    ) -> Selection | None:
        """Those of the waiting that are a full batch, or one that is due for `timely`."""
        limits = self.limits[group]
        size = min(limits.max_batch_size, capacity.free_rows)
        if timely is None and _takes_more(waiting, size, limits, capacity):
            return None
        taken = self._num_taken[group]
        ordered = _in_turns([(_urgency(c, limits, now_ns, taken), c) for c in waiting])
        members, full = fill(ordered, size, limits.max_batch_tokens, capacity)
        if full is CloseReason.SIZE and size < limits.max_batch_size and capacity.joins:
            full = CloseReason.JOIN
        reason = full or timely
        if reason is None or not members:
            return None
        oldest = min(member.arrived_ns for member in members)
        return Selection(group, tuple(members), reason, now_ns - oldest)

    def next_close_ns(self, capacities: Mapping[str, Capacity]) -> int | None:
        """When the first of these groups closes by waiting, or None if nothing waits there."""
        times = [
            self._closes_ns(group, capacity)
            for group, capacity in capacities.items()
            if self._waiting[group] and not capacity.is_ahead
        ]
        return min(times, default=None)

    def _timely(self, group: str, capacity: Capacity, now_ns: int) -> CloseReason | None:
        if capacity.is_ahead or now_ns < self._closes_ns(group, capacity):
            return None
        return CloseReason.JOIN if capacity.joins else CloseReason.WAIT

    def _closes_ns(self, group: str, capacity: Capacity) -> int:
        """When those that wait here have waited long enough."""
        limits, waiting = self.limits[group], self._waiting[group].values()
        oldest_ns = min(candidate.arrived_ns for candidate in waiting)
        max_wait_ns = limits.wait_ns(capacity)
        if limits.wait_cost is None or capacity.joins:
            return oldest_ns + max_wait_ns
        return closes_ns(
            sum(candidate.num_sequences for candidate in waiting),
            oldest_ns,
            self._paces[group].arrivals,
            self._paces[group].fit.cost,
            max_wait_ns=max_wait_ns,
            wait_cost=limits.wait_cost,
            deadlines_ns=(c.expires_ns for c in waiting if c.expires_ns is not None),
        )


@dataclass(frozen=True, slots=True)
class _Pace:
    """What an adaptive group has seen: who came, and what batches took."""

    arrivals: Arrivals
    fit: CostFit


def most_rows(limits: Limits, capacity: Capacity) -> int:
    """Sequences that a job of this group may have at most, as far as its engine shows it now."""
    free = capacity.free_rows if capacity.is_empty else limits.max_batch_size
    return min(limits.max_batch_size, free)


def _takes_more(
    waiting: Collection[Candidate], size: int, limits: Limits, capacity: Capacity
) -> bool:
    """Whether all these fit into a batch that is not full then, so that their order is all one."""
    rows = sum(candidate.num_sequences for candidate in waiting)
    if rows >= size or capacity.ceiling is not None:
        return False
    prompt = max(candidate.prompt_tokens for candidate in waiting)
    output = max(candidate.max_new_tokens for candidate in waiting)
    return rows * (prompt + output) <= limits.max_batch_tokens


_Urgency = tuple[bool, int, float, int]


def _urgency(candidate: Candidate, limits: Limits, now_ns: int, num_taken: int) -> _Urgency:
    is_old = now_ns - candidate.arrived_ns >= limits.starvation_ns
    num_passed = num_taken - candidate.num_before
    if is_old or num_passed >= STARVATION_BATCHES * limits.max_batch_size:
        return (False, 0, 0.0, candidate.arrived_ns)
    return (True, candidate.priority, candidate.deadline, candidate.arrived_ns)


def _in_turns(urgent: list[tuple[_Urgency, Candidate]]) -> list[Candidate]:
    """By urgency; those that are fed and of one priority, each tenant's first before any second."""
    urgent.sort(key=lambda each: each[0])
    if len({candidate.tenant for _, candidate in urgent}) < 2:
        return [candidate for _, candidate in urgent]
    seen: Counter[tuple[int, str]] = Counter()
    placed = []
    for (fed, priority, *_), candidate in urgent:
        placed.append((fed, priority, seen[priority, candidate.tenant] if fed else 0))
        seen[priority, candidate.tenant] += 1
    order = sorted(range(len(urgent)), key=placed.__getitem__)  # stable
    return [urgent[place][1] for place in order]


def fill(
    ordered: list[Candidate], max_size: int, max_tokens: int, capacity: Capacity | None = None
) -> tuple[list[Candidate], CloseReason | None]:
    """Admit in order until a limit is met; the most urgent one that does not fit ends the batch.

    Skipping it for a smaller one behind it would let big jobs starve.
    """
    members: list[Candidate] = []
    rows = prompt = output = 0
    for candidate in ordered:
        grown_rows = rows + candidate.num_sequences
        grown_prompt = max(prompt, candidate.prompt_tokens)
        grown_output = max(output, candidate.max_new_tokens)
        if grown_rows > max_size:
            return members, CloseReason.SIZE
        if _is_over(capacity, grown_rows, grown_prompt + grown_output, is_first=not members):
            return members, CloseReason.SIZE
        if members and grown_rows * (grown_prompt + grown_output) > max_tokens:
            return members, CloseReason.TOKENS
        members.append(candidate)
        rows, prompt, output = grown_rows, grown_prompt, grown_output
    return members, CloseReason.SIZE if rows == max_size else None


def _is_over(capacity: Capacity | None, rows: int, tokens: int, *, is_first: bool) -> bool:
    """Whether so many rows would not fit into memory, as far as is known."""
    if capacity is None or capacity.ceiling is None or (is_first and capacity.is_empty):
        return False
    return rows > capacity.ceiling(tokens)
