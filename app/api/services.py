"""What the handlers work with: built once by `create_app`, owned by the app."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request

from app.api.metrics import Metrics
from app.api.waiting import Waiters
from app.broker import Publisher
from app.config import Settings
from app.store.database import Database
from app.submit import Submitter


@dataclass(frozen=True, slots=True)
class Services:
    settings: Settings
    database: Database
    publisher: Publisher
    submitter: Submitter
    waiters: Waiters
    metrics: Metrics

    def close(self) -> None:
        self.publisher.close()
        self.database.close()


async def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Here = Annotated[Services, Depends(_services)]
