"""The whole way for tests of doors: an API, a worker with stub models, and SDKs in between."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai

from app.config.settings import Settings
from tests.apis import running_api
from tests.waiting import eventually
from tests.workers import Worker, rows, running_worker


@dataclass(frozen=True)
class Doors:
    settings: Settings
    http: httpx.Client
    worker: Worker

    def openai(self, **given: Any) -> openai.OpenAI:
        """OpenAI's own client, which checks each answer against its types."""
        known = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
        return openai.OpenAI(**{"base_url": f"{self.http.base_url}/v1"} | known | given)

    def anthropic(self, **given: Any) -> anthropic.Anthropic:
        """Anthropic's own client, in the same way."""
        known = {"api_key": "none", "max_retries": 0, "_strict_response_validation": True}
        return anthropic.Anthropic(**{"base_url": str(self.http.base_url)} | known | given)

    def jobs(self, where: str = "true") -> list[dict[str, Any]]:
        return rows(self.settings, f"SELECT * FROM jobs WHERE {where} ORDER BY created_at, id")

    def the_last_job(self) -> dict[str, Any]:
        return self.jobs()[-1]


@contextmanager
def open_doors(settings: Settings, folder: Path, timeout_s: float = 60) -> Iterator[Doors]:
    """An API and a worker that is seen to be up, once it has loaded its models."""
    with running_worker(settings, folder, "", timeout_s) as worker, running_api(settings) as http:

        def is_seen() -> bool:
            quote = http.post("/v1/jobs?dry_run=true", json={"body": {"prompt": "a"}}).json()
            return "no_worker" not in str(quote)

        eventually(is_seen)
        yield Doors(settings, http, worker)
