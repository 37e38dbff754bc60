"""How many calls a tenant makes a minute: counted in Redis, for all API processes together.

A sliding window of two counters, by the library `limits`. Its keys begin with
`gristmill.rates/`, after `broker.key_prefix`.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from typing import Final

from limits import RateLimitItemPerMinute
from limits.storage import RedisStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from app.broker.app import make_app
from app.broker.refusal import as_unavailable
from app.config.settings import Settings
from app.errors import Unavailable

WINDOW_S: Final = 60
BREAK_S: Final = 5.0
"""After a failure nobody asks Redis for this long: calls do not wait for it."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Where a tenant is within its limit, this call included."""

    limit: int
    remaining: int
    reset_s: int  #: until the window is over
    is_over: bool  #: this call is one too many, and was not counted


class Rates:
    """Counts calls. Threads may share it; it connects when first used."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_app(settings)
        timeout_s = settings.broker.publish_timeout_s
        self._app.conf.broker_transport_options |= {
            "socket_timeout": timeout_s,
            "socket_connect_timeout": timeout_s,
            "max_retries": 0,
        }
        self._prefix = f"{settings.broker.key_prefix}gristmill.rates"
        self._lock = threading.Lock()
        self._limiter: SlidingWindowCounterRateLimiter | None = None
        self._try_again_at = 0.0

    def hit(self, tenant: str, per_minute: int) -> Rate:
        """Count a call, unless it is one too many. Raises `Unavailable`."""
        if time.monotonic() < self._try_again_at:
            raise Unavailable("Redis did not answer, or refused; it is tried again in a moment.")
        try:
            with as_unavailable():
                return self._hit(tenant, per_minute)
        except Unavailable:
            self._try_again_at = time.monotonic() + BREAK_S
            raise

    def _hit(self, tenant: str, per_minute: int) -> Rate:
        limiter, item = self._connected(), RateLimitItemPerMinute(per_minute)
        is_over = not limiter.hit(item, tenant)
        stats = limiter.get_window_stats(item, tenant)
        left_s = max(1, math.ceil(stats.reset_time - time.time()))
        return Rate(per_minute, 0 if is_over else stats.remaining, min(left_s, WINDOW_S), is_over)

    def _connected(self) -> SlidingWindowCounterRateLimiter:
        with self._lock:
            if self._limiter is None:
                channel = self._app.connection_for_write().default_channel
                storage = RedisStorage(
                    "redis://", connection_pool=channel.pool, key_prefix=self._prefix
                )
                self._limiter = SlidingWindowCounterRateLimiter(storage)
            return self._limiter

    def close(self) -> None:
        self._app.close()
