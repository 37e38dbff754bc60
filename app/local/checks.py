"""Whether each part is up and well on this machine: for `gristmill up` and for health checks.

An answer of None is none: what one asks through is away, and the part is not to blame.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Final

import httpx

from app.alive import Alive
from app.config.settings import Settings
from app.errors import Unavailable
from app.local.upkeep import Answer

if TYPE_CHECKING:
    from app.broker.commands import Asking

ANSWER_S: Final = 5.0
"""Longest wait for an answer over HTTP."""


def api(settings: Settings) -> Answer:
    """READY if it can take jobs."""
    url = settings.api.url
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as http:
        try:
            answer = http.get(f"{url}/readyz")
            is_ours = "status" in answer.json()
        except (httpx.TransportError, ValueError, TypeError):
            # It tries Postgres, and may wait for it.
            return Answer.ALIVE if _text(http, f"{url}/healthz") == "ok\n" else Answer.SILENT
    if not is_ours:  # another server has the port
        return Answer.SILENT
    return Answer.READY if answer.is_success else Answer.ALIVE


def worker(settings: Settings, asking: Asking | None = None) -> Answer | None:
    """READY if a worker here makes progress: models, engine, Postgres and Redis are at hand."""
    from app.broker.commands import workers

    try:
        found = asking.workers() if asking else workers(settings)
    except Unavailable:
        return None
    here = [ready for name, ready in found.items() if name.endswith(f"@{socket.gethostname()}")]
    if not here:
        return Answer.SILENT
    return Answer.READY if any(here) else Answer.ALIVE


def rescue(settings: Settings) -> Answer:
    """READY if it has swept of late."""
    from app.rescue import alive

    return _said(alive(settings))


def hooks(settings: Settings) -> Answer:
    """READY if it has looked for webhooks of late."""
    from app.hooks import alive

    return _said(alive(settings))


def _said(alive: Alive) -> Answer:
    if alive.is_alive:
        return Answer.READY
    return Answer.ALIVE if alive.has_tried else Answer.SILENT


def flower(settings: Settings) -> Answer:
    """READY if it serves its pages."""
    with httpx.Client(timeout=ANSWER_S, trust_env=False) as http:
        is_well = _text(http, f"{settings.flower.url}/healthcheck") == "OK"
    return Answer.READY if is_well else Answer.SILENT


def _text(http: httpx.Client, url: str) -> str:
    try:
        return http.get(url).text
    except httpx.TransportError:
        return ""
