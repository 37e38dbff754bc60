"""When a webhook is tried again, and when no more; pure.

    attempt     1    2    3    4     5    6    7     8     9     10
    wait after  5 s  5 m  30 m  2 h  5 h  10 h  14 h  20 h  24 h

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

from typing import Final

WAITS_S: Final = (5, 300, 1_800, 7_200, 18_000, 36_000, 50_400, 72_000, 86_400)
"""After each failed attempt, the first one first."""

WINDOW_S: Final = 72 * 3_600
"""A receiver that has not answered for so long since the event is not tried any more: the last wait
ends here."""

JITTER: Final = 0.1
"""Waits are longer or shorter by up to this part, so that what failed together comes apart."""

TRIP: Final = 10
"""Failures in a row after which a receiver is only asked by one webhook at a time."""
MIN_PAUSE_S: Final = 60
MAX_PAUSE_S: Final = 900
"""How long it then rests; twice as long each time."""


def wait_s(
    attempts: int, age_s: float, chance: float, retry_after_s: float | None = None
) -> float | None:
    """How long to wait after the last of so many failed attempts; None: give up.

    `age_s` is since the event, `chance` from 0 to 1, `retry_after_s` what the receiver asked for:
    it makes the wait longer, never shorter, and never longer than the window.
    """
    left_s = WINDOW_S - age_s
    if attempts > len(WAITS_S) or left_s <= 0:
        return None
    own_s = WAITS_S[max(attempts, 1) - 1] * (1 + JITTER * (2 * chance - 1))
    return min(max(own_s, retry_after_s or 0.0), left_s)


def pause_s(failures: int) -> float | None:
    """How long a receiver rests after so many failures in a row; None: not at all."""
    if failures < TRIP:
        return None
    return float(min(MIN_PAUSE_S * 2 ** min(failures - TRIP, 10), MAX_PAUSE_S))
