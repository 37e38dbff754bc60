"""The whole system under a benchmark: its worker can be found, killed, and its log counted."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import psutil

from app.local.supervisor import System
from gristmill_client import Client, Job

T = TypeVar("T")


class Bench:
    """A running system, which is looked after whenever this waits for something."""

    def __init__(self, system: System, client: Client) -> None:
        self._system = system
        self.client = client
        self._log = Path(system.settings.cache_dir) / "logs" / "worker.log"

    def wait(self, answer: Callable[[], T | None], pause_s: float = 0.05) -> T:
        """The first true answer; parts that end meanwhile are started again."""
        while not (found := answer()):
            self._system.look()
            time.sleep(pause_s)
        return found

    def logged(self, text: str) -> int:
        """How often the worker's log says so."""
        return self._log.read_text(errors="replace").count(text)

    def worker(self) -> psutil.Process | None:
        """The worker's process; None while it is down."""
        for child in psutil.Process().children():
            words = child.cmdline()
            if "worker" in words[-8:] or ("celery" in words and "worker" in words):
                return child
        return None

    def kill_worker(self) -> None:
        """SIGKILL to its whole process group, as the kernel or an operator would."""
        worker = self.worker()
        if worker is not None:
            os.killpg(os.getpgid(worker.pid), 9)
            worker.wait(10)

    def ended(self, ids: list[str]) -> list[Job] | None:
        """The jobs, once every one of them is final."""
        jobs = [self.client.job(job_id) for job_id in ids]
        return jobs if all(job.state.is_final for job in jobs) else None
