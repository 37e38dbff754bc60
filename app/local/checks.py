"""Whether each part is up and well on this machine: for `gristmill up` and for health checks."""

from __future__ import annotations

import socket

import httpx

from app.config.settings import Settings
from app.errors import Unavailable


def api_answers(settings: Settings) -> bool:
    """Whether the API can take jobs."""
    return _is_success(f"{settings.api.url}/readyz")


def worker_answers(settings: Settings) -> bool:
    """Whether a worker here makes progress: models, engine, Postgres and Redis are at hand."""
    from app.broker.commands import ready_workers

    try:
        names = ready_workers(settings)
    except Unavailable:
        return False
    return any(name.endswith(f"@{socket.gethostname()}") for name in names)


def rescue_is_alive(settings: Settings) -> bool:
    """Whether rescue has swept of late."""
    from app.rescue import is_alive

    return is_alive(settings)


def flower_answers(settings: Settings) -> bool:
    """Whether Flower serves its pages."""
    return _is_success(f"{settings.flower.url}/healthcheck")


def _is_success(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.TransportError:
        return False
