"""Everything on this machine: what `gristmill up` starts, watches and stops.

    Postgres, Redis ──▶ schema ──▶ models ──▶ api, worker, rescue, hooks, flower

Servers whose URL is set are taken as they are. Every part logs to a file of its own in
`cache_dir/logs`; a part that ends, or hangs, is started again; `run.json` tells other terminals
where all is. What cannot start at the first time keeps the whole from starting: somebody looks on.
Later nothing does, and what cannot start is tried again.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Self

from app.broker.commands import Asking
from app.config import run_file
from app.config.file import Loaded
from app.config.settings import Settings
from app.engines.checkpoint.models import ensure_files
from app.errors import ConfigError
from app.local import checks
from app.local.child import Child
from app.local.logs import Log
from app.local.ports import free_port
from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.local.signals import handled
from app.local.upkeep import Answer
from app.local.watch import Watched
from app.store import prices
from app.store.migration import migrate

START_TIMEOUT_S: Final = 120.0
"""For a part; the worker has `worker.load_timeout_s`."""
SERVER_HANG_S: Final = 30.0
"""A server that is silent for so long is killed and started again. Its data are safe from that."""
HANG_S: Final = 60.0
"""The same for the other parts, whose own limits come first."""
LOOK_S: Final = 0.2
DRAIN_S: Final = 3.5
"""At the end, time for the worker to finish what it runs."""
LEAVE_S: Final = 2.5
"""Then, time for it to give the rest back. All parts are gone within 10 s."""

_CHECKS: Final[dict[str, Callable[[Settings], Answer | None]]] = {
    "api": checks.api,
    "worker": checks.worker,
    "rescue": checks.rescue,
    "hooks": checks.hooks,
    "flower": checks.flower,
}
"""The children, each with the question whether it is well."""

Part = Child | EmbeddedPostgres | EmbeddedRedis


class System:
    """A context manager: all is up inside, and all is gone after, whatever happened.

    Stays in one thread that lives as long as it does: the children end with that thread.
    """

    def __init__(self, loaded: Loaded, tell: Callable[[str], None]) -> None:
        """`tell` takes a line for the person at the terminal."""
        self.settings = loaded.settings
        self._loaded = loaded
        self._config_path = loaded.path
        self._say = tell
        self._cache_dir = Path(loaded.settings.cache_dir)
        self._held = contextlib.ExitStack()
        self.parts: list[Part] = []
        self._watched: list[Watched] = []
        self._logs: dict[str, Log] = {}

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
        self._watch_log("up")
        chosen = self._start_servers()
        for section in ("api", "flower"):
            wanted = getattr(self.settings, section)
            try:
                chosen[section, "port"] = port = free_port(wanted.port, wanted.host)
            except ConfigError as error:
                raise ConfigError(f"{section}.host: {error.message}") from None
            if wanted.port not in (0, port):
                self._tell(f"Port {wanted.port} cannot be had: {section} takes {port}.")
        if self.settings.api.key:  # other terminals need it, too
            chosen["api", "key"] = self.settings.api.key
        self.settings = _with(self.settings, chosen)
        self._tell(f"The schema is at {migrate(self.settings.database.url)}.")
        prices.keep_at(self.settings.database.url, self.settings.prices)
        for name, model in self.settings.models.items():
            ensure_files(name, model, self._cache_dir, lambda step: self._tell(f"Model: {step}."))
        self._write_run_file(chosen)
        self._start_children(self._environment(chosen))

    def _start_servers(self) -> dict[tuple[str, str], Any]:
        """Start those that no URL is set for; returns the URLs."""
        urls: dict[tuple[str, str], Any] = {}
        postgres = EmbeddedPostgres(
            self._cache_dir / "postgres", log=self._watch_log("postgres").file
        )
        redis = EmbeddedRedis(self._cache_dir / "redis", log=self._watch_log("redis").file)
        for section, server in (("database", postgres), ("broker", redis)):
            if not getattr(self.settings, section).url:
                self.parts.append(server)
                urls[section, "url"] = server.start().url
                self._watch(server, server.answer, START_TIMEOUT_S, SERVER_HANG_S)
                self._tell(f"{server.name} is up.")
        return urls

    def _start_children(self, environment: dict[str, str]) -> None:
        children = [
            Child(
                name,
                [sys.executable, "-m", "app.cli", name],
                self._watch_log(name).file,
                env=environment,
            )
            for name in _CHECKS
        ]
        for child in children:
            self.parts.append(child)
            child.start()
        for child in children:
            self._await(child)
            self._tell(f"{child.name} is ready.")

    def _await(self, child: Child) -> None:
        is_worker = child.name == "worker"
        asking = self._held.enter_context(contextlib.closing(Asking(self.settings)))

        def ask() -> Answer | None:
            if is_worker:
                return checks.worker(self.settings, asking)
            return _CHECKS[child.name](self.settings)

        limit_s = self.settings.worker.load_timeout_s if is_worker else START_TIMEOUT_S
        child.wait_until(lambda: ask() is Answer.READY, limit_s)
        self._watch(child, ask, limit_s, HANG_S)

    def _watch(
        self, part: Part, ask: Callable[[], Answer | None], start_s: float, hang_s: float
    ) -> None:
        """From now on, when it is ready for the first time."""
        watched = Watched(part, ask, self._tell, start_s=start_s, hang_s=hang_s)
        watched.has_started(time.monotonic())
        self._watched.append(watched)

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

    def _watch_log(self, name: str) -> Log:
        self._logs[name] = Log(self._cache_dir / "logs" / f"{name}.log")
        return self._logs[name]

    def _tell(self, line: str) -> None:
        with contextlib.suppress(OSError):  # whoever reads it has gone, or its disk is full
            self._say(line)

    def watch(self) -> None:
        """Look after the parts until interrupted."""
        while True:
            self.look()
            time.sleep(LOOK_S)

    def look(self) -> None:
        """Tell new warnings, keep logs small, and do for each part what it needs now."""
        for name in _CHECKS:
            for line in self._logs[name].new_lines():
                if re.match(rb".{0,60}\b(WARNING|ERROR|CRITICAL)\b", line):
                    self._tell(f"{name}: {line.decode(errors='replace').rstrip()}")
        for log in self._logs.values():
            log.keep_small()
        for watched in self._watched:
            watched.look(time.monotonic())

    def stop(self) -> None:
        """The worker first, while it can still commit; the servers last. May be called twice."""
        with _uninterrupted():
            children = {part.name: part for part in self.parts if isinstance(part, Child)}
            if worker := children.pop("worker", None):
                worker.stop(DRAIN_S + LEAVE_S)
            for child in children.values():
                child.signal_stop()
            deadline = time.monotonic() + 2
            for child in children.values():
                child.stop(deadline - time.monotonic())
            for part in self.parts:
                part.stop(1)
            self.parts.clear()
            self._watched.clear()
            self._held.close()


def _with(settings: Settings, chosen: dict[tuple[str, str], Any]) -> Settings:
    """The settings with some values replaced, by section and key."""
    for (section, key), value in chosen.items():
        part = getattr(settings, section).model_copy(update={key: value})
        settings = settings.model_copy(update={section: part})
    return settings


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C a second time does not leave half of it running; stopping is bounded anyway."""
    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda *_: None):
        yield
