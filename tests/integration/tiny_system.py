"""API and worker over tiny models of any kind, as one system."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from app.config.settings import Settings
from tests.apis import running_api
from tests.workers import running_worker


@dataclass
class System:
    settings: Settings
    api: httpx.Client
    folders: dict[str, Path]

    def answer(self, body: dict[str, Any], **submission: Any) -> dict[str, Any]:
        """The job of a submission, ended."""
        told = self.api.post("/v1/jobs?wait=60", json={"body": body, **submission})
        assert told.status_code in (200, 202), told.text
        job: dict[str, Any] = told.json()
        assert job["state"] == "completed", job
        return job


@contextmanager
def running_system(
    settings: Settings, folders: dict[str, Path], log_folder: Path
) -> Iterator[System]:
    with running_api(settings) as api, running_worker(settings, log_folder):
        yield System(settings, api, folders)
