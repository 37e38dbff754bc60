"""Everything on this machine: what `gristmill up` starts, watches and stops.

    Postgres, Redis ──▶ schema ──▶ models ──▶ api, worker, rescue, flower

Servers whose URL is set are taken as they are. Every part logs to a file of its own in
`cache_dir/logs`; a part that ends is started again; `run.json` tells other terminals where all is.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

from app.config import run_file
from app.config.file import Loaded
from app.config.settings import Settings
from app.engines.models import ensure_files
from app.errors import ConfigError
from app.local import checks
from app.local.child import Child
from app.local.ports import free_port
from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.store.database import migrate

START_TIMEOUT_S: Final = 60.0
"""For api, rescue and flower; the worker has `worker.load_timeout_s`."""
DRAIN_S: Final = 3.5
"""At the end, time for the worker to finish what it runs."""
LEAVE_S: Final = 2.5
"""Then, time for it to give the rest back. All parts are gone within 10 s."""
MIN_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 30.0
STEADY_S: Final = 60.0
"""A part that ran for this long before it ended begins anew with the shortest backoff."""

_CHECKS: Final[dict[str, Callable[[Settings], bool]]] = {
    "api": checks.api_answers,
    "worker": checks.worker_answers,
    "rescue": checks.rescue_is_alive,
    "flower": checks.flower_answers,
}
"""The children, each with the question whether it is ready."""

Part = Child | EmbeddedPostgres | EmbeddedRedis


@dataclass(slots=True)
class _Watched:
    part: Part
    started_at: float
    backoff_s: float = 0.0
    again_at: float | None = None  #: set while it is down


class System:
    """A context manager: all is up inside, and all is gone after, whatever happened.

    Stays in one thread that lives as long as it does: the children end with that thread.
    """

    def __init__(self, loaded: Loaded, tell: Callable[[str], None]) -> None:
        """`tell` takes a line for the person at the terminal."""
        self.settings = loaded.settings
        self._loaded = loaded
        self._config_path = loaded.path
        self._tell = tell
        self._cache_dir = Path(loaded.settings.cache_dir)
        self._held = contextlib.ExitStack()
        self._watched: list[_Watched] = []
        self._logs: list[_Log] = []

    def __enter__(self) -> Self:
        """Start everything and wait until it is ready.

        Raises `ConfigError` if it runs already, and what keeps a part from starting.
        """
        self._held.enter_context(run_file.only_one(self._cache_dir))
        try:
            if self._loaded.is_of_running:
                raise ConfigError("What ran here was just being stopped: start it once more.")
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start(self) -> None:
        shutil.rmtree(self._cache_dir / "logs", ignore_errors=True)
        chosen = self._start_servers()
        for section in ("api", "flower"):
            wanted = getattr(self.settings, section)
            chosen[section, "port"] = port = free_port(wanted.port, wanted.host)
            if wanted.port not in (0, port):
                self._tell(f"Port {wanted.port} cannot be had: {section} takes {port}.")
        if self.settings.api.token:  # other terminals need it, too
            chosen["api", "token"] = self.settings.api.token
        self.settings = _with(self.settings, chosen)
        self._tell(f"The schema is at {migrate(self.settings.database.url)}.")
        for name, model in self.settings.models.items():
            ensure_files(name, model, self._cache_dir, lambda step: self._tell(f"Model: {step}."))
        self._write_run_file(chosen)
        self._start_children(self._environment(chosen))

    def _start_servers(self) -> dict[tuple[str, str], Any]:
        """Start those that no URL is set for; returns the URLs."""
        urls: dict[tuple[str, str], Any] = {}
        postgres = EmbeddedPostgres(self._cache_dir / "postgres", log=self._log_file("postgres"))
        redis = EmbeddedRedis(self._cache_dir / "redis", log=self._log_file("redis"))
        for section, server in (("database", postgres), ("broker", redis)):
            if not getattr(self.settings, section).url:
                self._watched.append(_Watched(server, time.monotonic()))
                urls[section, "url"] = server.start().url
                self._tell(f"{server.name} is up.")
        return urls

    def _start_children(self, environment: dict[str, str]) -> None:
        for name in _CHECKS:
            command = [sys.executable, "-m", "app.cli", name]
            child = Child(name, command, self._log_file(name), env=environment)
            self._watched.append(_Watched(child, time.monotonic()))
            self._logs.append(_Log(child))
            child.start()
        for log in self._logs:
            child = log.child
            is_worker = child.name == "worker"
            limit_s = self.settings.worker.load_timeout_s if is_worker else START_TIMEOUT_S
            child.wait_until(partial(_CHECKS[child.name], self.settings), limit_s)
            self._tell(f"{child.name} is ready.")

    def _write_run_file(self, chosen: dict[tuple[str, str], Any]) -> None:
        values = {".".join(key): value for key, value in chosen.items()}
        run_file.write(self._cache_dir, {"config": str(self._config_path), **values})

    def _environment(self, chosen: dict[tuple[str, str], Any]) -> dict[str, str]:
        grace_s = min(DRAIN_S, self.settings.worker.grace_s)
        return {
            **os.environ,
            "GRISTMILL_CONFIG": str(self._config_path),
            "GRISTMILL_CACHE_DIR": str(self._cache_dir),
            "GRISTMILL_WORKER__GRACE_S": str(grace_s),
            **{f"GRISTMILL_{'__'.join(key).upper()}": str(chosen[key]) for key in chosen},
        }

    def _log_file(self, name: str) -> Path:
        return self._cache_dir / "logs" / f"{name}.log"

    @property
    def parts(self) -> list[Part]:
        return [watched.part for watched in self._watched]

    def watch(self) -> None:
        """Look after the parts until interrupted."""
        while True:
            self.look()
            time.sleep(0.2)

    def look(self) -> None:
        """Tell new warnings, note who has ended, start again who has been down for long enough."""
        for log in self._logs:
            for line in log.new_warnings():
                self._tell(f"{log.child.name}: {line}")
        now = time.monotonic()
        for watched in self._watched:
            if watched.again_at is None:
                if watched.part.exit_code is not None:
                    self._note_end(watched, now)
            elif now >= watched.again_at:
                watched.again_at, watched.started_at = None, now
                watched.part.start()

    def _note_end(self, watched: _Watched, now: float) -> None:
        was_steady = now - watched.started_at > STEADY_S
        doubled_s = 0.0 if was_steady else 2 * watched.backoff_s
        watched.backoff_s = min(max(doubled_s, MIN_BACKOFF_S), MAX_BACKOFF_S)
        watched.again_at = now + watched.backoff_s
        part = watched.part
        self._tell(
            f"{part.name} ended with exit code {part.exit_code} and starts again in "
            f"{watched.backoff_s:g} s."
        )

    def stop(self) -> None:
        """The worker first, while it can still commit; the servers last. May be called twice."""
        with _uninterrupted():
            parts = self.parts
            children = {part.name: part for part in parts if isinstance(part, Child)}
            if worker := children.pop("worker", None):
                worker.stop(DRAIN_S + LEAVE_S)
            for child in children.values():
                child.signal_stop()
            deadline = time.monotonic() + 2
            for child in children.values():
                child.stop(deadline - time.monotonic())
            for part in parts:
                part.stop(1)
            self._watched.clear()
            self._held.close()


class _Log:
    """What a child logs, read as it grows."""

    def __init__(self, child: Child) -> None:
        self.child = child
        self._read_to = 0

    def new_warnings(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), self.child.log.open("rb") as log:
            log.seek(self._read_to)
            for line in log:
                if not line.endswith(b"\n"):
                    break
                self._read_to += len(line)
                if re.match(rb".{0,60}\b(WARNING|ERROR|CRITICAL)\b", line):
                    yield line.decode(errors="replace").rstrip()


def _with(settings: Settings, chosen: dict[tuple[str, str], Any]) -> Settings:
    """The settings with some values replaced, by section and key."""
    for (section, key), value in chosen.items():
        part = getattr(settings, section).model_copy(update={key: value})
        settings = settings.model_copy(update={section: part})
    return settings


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C a second time does not leave half of it running; stopping is bounded anyway."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
