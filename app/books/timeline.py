"""Where a job's time, money and energy went, to the microsecond and the nano-unit. Pure.

A job waits and is tried in turns, until it ends or is looked at:

    accepted ── wait ── attempt 1 ── wait ── attempt 2 ── … ── ended, or now

Spans lie end to end from the first moment to the last, so their lengths add up to the whole by
construction, whatever the stamps say: each span begins where the one before ends, and a stamp that
lies before that, or behind the end, as after a clock was set, is moved there, and that is told.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from app.books.shares import share

_US: Final = timedelta(microseconds=1)  #: the resolution of the database's clock


class Phase(enum.StrEnum):
    """What a job was at. Of a wait before an earlier attempt only its length is kept."""

    WAITING = "waiting"  #: before an earlier attempt
    SCHEDULED = "scheduled"  #: until it was due
    UNSENT = "unsent"  #: until its last message was sent
    SENT = "sent"  #: its message was in Redis, until a worker received it
    HELD = "held"  #: in a worker that fills its batch or has no room
    CLAIMED = "claimed"  #: in a batch, until the engine began
    PREFILL = "prefill"  #: in the engine, until its first token
    DECODE = "decode"  #: until its last
    COMMIT = "commit"  #: until its result was written
    RUNNING = "running"  #: in an attempt of which no more is known


WORDS: Final = {
    Phase.WAITING: "waited for an attempt of which no more is kept",
    Phase.SCHEDULED: "was not due",
    Phase.UNSENT: "waited for its last message to be sent",
    Phase.SENT: "its message was in Redis",
    Phase.HELD: "in a worker, for company or for room",
    Phase.CLAIMED: "in a batch, for the engine to begin",
    Phase.PREFILL: "in the engine, until the first token",
    Phase.DECODE: "in the engine, until the last token",
    Phase.COMMIT: "until the result was written",
    Phase.RUNNING: "ran, or runs; no more is known",
}
"""For people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """An attempt. Stamps are on the database's clock; None is what did not happen, or is not
    known."""

    number: int
    claimed_at: datetime
    ended_at: datetime | None = None  #: None: it runs
    started_at: datetime | None = None
    first_token_at: datetime | None = None
    last_token_at: datetime | None = None
    device_ns: int = 0  #: billed
    wasted_ns: int = 0
    prefill_ns: int | None = None  #: of `device_ns`; None: the engine does not tell it apart
    recomputed_ns: int = 0  #: of `device_ns`, for what a preemption had dropped
    cost_nano: int | None = None  #: what `device_ns` costs, in nano-units; None: it has no price
    energy_nj: int | None = None  #: of `device_ns`, in nanojoules; None: not known
    wasted_nj: int | None = None  #: of `wasted_ns`


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """A job from its acceptance until it ended, or until it is looked at."""

    created_at: datetime
    until: datetime
    tries: Sequence[Try] = ()  #: oldest first
    waits: bool = False  #: after its last try: it is queued, or ended in the queue
    not_before: datetime | None = None
    sent_at: datetime | None = None  #: its last message; of the last wait, as is `received_at`
    received_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a job's life."""

    phase: Phase
    attempt: int | None  #: that it is in; None: it waited
    began_at: datetime
    ended_at: datetime
    is_adjusted: bool = False  #: the stamp of its end lay outside of what was left, and was moved

    @property
    def us(self) -> int:
        """Its length in microseconds, never negative."""
        return (self.ended_at - self.began_at) // _US


def spans(life: Life) -> list[Span]:
    """A job's life in parts, end to end, without those that took no time."""
    found: list[Span] = []
    begin, end = life.created_at, max(life.created_at, life.until)
    for phase, attempt, stamp in _stamps(life):
        at = min(max(stamp, begin), end)
        if at > begin or at != stamp:
            found.append(Span(phase, attempt, begin, at, at != stamp))
        begin = at
    if begin < end:  # rows that were changed by hand: nobody knows
        found.append(Span(phase, attempt, begin, end, is_adjusted=True))
    return found


def _stamps(life: Life) -> Iterator[tuple[Phase, int | None, datetime]]:
    """What came after what, and until when. The last one ends with the life."""
    for each in life.tries:
        if each is life.tries[-1] and not life.waits:
            yield from _wait(life, each.claimed_at)
        else:
            yield Phase.WAITING, None, each.claimed_at
        yield from _try(each, life.until)
    if life.waits or not life.tries:
        yield from _wait(life, life.until)


def _wait(life: Life, until: datetime) -> Iterator[tuple[Phase, int | None, datetime]]:
    """The last wait. What is not known of it belongs to what was known last."""
    is_first = len(life.tries) <= (0 if life.waits else 1)
    if is_first and life.not_before is not None and life.not_before > life.created_at:
        yield Phase.SCHEDULED, None, min(life.not_before, until)
    if life.sent_at is None:
        yield Phase.UNSENT, None, until
        return
    yield Phase.UNSENT, None, life.sent_at
    if life.received_at is None:
        yield Phase.SENT, None, until
        return
    yield Phase.SENT, None, life.received_at
    yield Phase.HELD, None, until


def _try(each: Try, until: datetime) -> Iterator[tuple[Phase, int | None, datetime]]:
    ended = each.ended_at or until
    known = (
        (Phase.CLAIMED, each.started_at),
        (Phase.PREFILL, each.first_token_at),
        (Phase.DECODE, each.last_token_at),
    )
    for phase, stamp in known:
        if stamp is not None:
            yield phase, each.number, stamp
    yield Phase.COMMIT if each.last_token_at else Phase.RUNNING, each.number, ended


class Use(enum.StrEnum):
    """What device time was taken for."""

    PREFILL = "prefill"  #: the prompt
    DECODE = "decode"  #: the output
    RECOMPUTED = "recomputed"  #: both, once more: a preemption had dropped them
    COMPUTED = "computed"  #: the answer, by an engine that does not tell these apart
    WASTED = "wasted"  #: nothing that was answered; billed to nobody


@dataclass(frozen=True, slots=True)
class Taken:
    """Device time of an attempt, in nanoseconds, and what that costs and draws."""

    attempt: int
    use: Use
    ns: int
    cost_nano: int | None = None  #: in nano-units; None: it has no price
    energy_nj: int | None = None  #: in nanojoules; None: not known


def taken(tries: Sequence[Try]) -> list[Taken]:
    """What the attempts took of the device's time, and what of it costs and draws how much.

    The parts add up to what all attempts were billed and what they wasted, and so do their costs
    and joules, which are shared by time; parts of no time are left out.
    """
    found: list[Taken] = []
    for each in tries:
        uses = {use: ns for use, ns in _uses(each).items() if ns > 0}
        costs = _shared(uses, each.cost_nano, 0)
        joules = _shared(uses, each.energy_nj, each.wasted_nj)
        found += [
            Taken(each.number, use, ns, costs.get(use), joules.get(use)) for use, ns in uses.items()
        ]
    return found


def _shared(uses: dict[Use, int], billed: int | None, wasted: int | None) -> dict[Use, int]:
    """Of an attempt's money or energy, what each use has; nothing if that is not known."""
    if billed is None or wasted is None:
        return {}
    paying = [use for use in uses if use is not Use.WASTED]
    parts = share(billed, [uses[use] for use in paying]) if paying else []
    return {Use.WASTED: wasted, **dict(zip(paying, parts, strict=True))}


def _uses(each: Try) -> dict[Use, int]:
    if each.prefill_ns is None:
        return {Use.COMPUTED: each.device_ns, Use.WASTED: each.wasted_ns}
    prefill = min(each.prefill_ns, each.device_ns)
    recomputed = min(each.recomputed_ns, each.device_ns - prefill)
    return {
        Use.PREFILL: prefill,
        Use.DECODE: each.device_ns - prefill - recomputed,
        Use.RECOMPUTED: recomputed,
        Use.WASTED: each.wasted_ns,
    }


class Awaits(enum.StrEnum):
    """What an open job waits for."""

    TIME = "time"  #: it is not due
    SENDING = "sending"  #: rescue is to send its message, when it looks and the queue has room
    WORKER = "worker"  #: its message is in Redis, for a worker with room
    NO_WORKER = "no_worker"  #: the same, and no worker that is up serves its model
    BATCH = "batch"  #: a worker has it, and waits for company or for room in its engine
    ENGINE = "engine"  #: it is in a batch that runs, or is about to
    STOP = "stop"  #: the same, and it was cancelled
    RESCUE = "rescue"  #: the worker that has it is lost: rescue is to take it back


def awaits(
    life: Life, *, holder_is_up: bool | None, num_workers: int, is_cancelled: bool = False
) -> Awaits:
    """What an open job waits for. `holder_is_up` tells of the worker that has it, if one has;
    `num_workers` serve its model and are up."""
    if holder_is_up is False:
        return Awaits.RESCUE
    if not life.waits and life.tries:
        return Awaits.STOP if is_cancelled else Awaits.ENGINE
    if holder_is_up:
        return Awaits.BATCH
    if life.not_before is not None and life.not_before > life.until:
        return Awaits.TIME
    if num_workers == 0:
        return Awaits.NO_WORKER
    return Awaits.WORKER if life.sent_at else Awaits.SENDING
