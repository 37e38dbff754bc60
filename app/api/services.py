"""What the handlers work with: built once by `create_app`, owned by the app."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Annotated, Final

from fastapi import Depends, Request

from app.api.metrics import Metrics
from app.api.waiting import Waiters
from app.broker import Publisher
from app.config import Settings
from app.store.database import Database
from app.submit import Submitter

MAX_BULKS: Final = 4
"""Bulk submissions read at once: each may take many megabytes, and the next ones wait."""


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    database: Database
    publisher: Publisher
    submitter: Submitter
    waiters: Waiters
    metrics: Metrics
    bulk_slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_BULKS))

    def close(self) -> None:
        self.publisher.close()
        self.database.close()


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_services)]
