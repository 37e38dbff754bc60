"""Command lines of the parts that Celery runs, and questions that its remote control answers."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Final
from uuid import uuid4

from celery import Celery

from app.broker.app import make_app
from app.broker.refusal import as_unavailable
from app.config.environment import is_service_link
from app.config.host import is_loopback
from app.config.settings import Settings
from app.errors import ConfigError

_CELERY: Final = (sys.executable, "-m", "celery", "-A", "app.worker")
_FLOWER: Final = (sys.executable, "-m", "app.broker.flower", "-A", "app.worker", "flower")


def worker_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Command line of a worker, and the environment to run it in.

    Without gossip and mingle, which only workers that share clocks need. SIGTERM is Celery's warm
    shutdown; the pool ends it within `worker.grace_s`, and sooner when nothing runs any more.
    """
    name = f"gristmill-{uuid4().hex[:8]}@%h"
    options = ["--without-gossip", "--without-mingle", "--hostname", name]
    return [*_CELERY, "worker", *options, "--loglevel", settings.log_level], dict(os.environ)


def flower_command(settings: Settings) -> tuple[list[str], dict[str, str]]:
    """Command line of Flower, and the environment to run it in.

    Read-only and in memory. Open on the loopback address alone; elsewhere FLOWER_BASIC_AUTH or
    FLOWER_AUTH must be set, or this raises `ConfigError`. `/healthcheck` answers without
    a password in any case.
    """
    flower = settings.flower
    options = {
        "address": flower.host,
        "port": flower.port,
        "max_tasks": flower.max_tasks,
        "read_only": True,
        "tasks_columns": "uuid,name,state,kwargs,result,received,runtime",
        "persistent": False,
        "purge_offline_workers": 3600,  # a worker has another name after each start
    }
    command = [*_FLOWER, *(f"--{name}={value}" for name, value in options.items())]
    environment = _flowers_environment()
    if is_loopback(flower.host):
        return command, {**environment, "FLOWER_UNAUTHENTICATED_API": "true"}
    if not (environment.get("FLOWER_BASIC_AUTH") or environment.get("FLOWER_AUTH")):
        raise ConfigError(
            f"flower.host is {flower.host}: set FLOWER_BASIC_AUTH=user:password, or use 127.0.0.1."
        )
    return command, environment


def _flowers_environment() -> dict[str, str]:
    """What is set for Flower and not for a service of this name; raises `ConfigError`.

    Flower takes each FLOWER_NAME for its option and ends in a traceback if it is none.
    """
    from flower.options import options  # here alone: it brings a web server

    environment = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith("FLOWER_") and is_service_link(name, value))
    }
    for name, value in environment.items():
        option = options._options.get(name.removeprefix("FLOWER_").lower().replace("_", "-"))
        if name.startswith("FLOWER_") and option and option.type in (int, float):
            try:
                option.type(value)
            except ValueError:
                raise ConfigError(
                    f"environment variable {name} must be a number for Flower: correct or unset it."
                ) from None
    return environment


READINESS: Final = "gristmill_readiness"
"""Name of the remote control command that asks a worker whether it makes progress."""


def workers(settings: Settings, timeout_s: float = 1.0) -> dict[str, bool]:
    """Names, NAME@HOST, of the workers that answer within the time, and whether they make progress.

    Raises `Unavailable`.
    """
    with contextlib.closing(Asking(settings)) as asking:
        return asking.workers(timeout_s)


class Asking:
    """Asks `workers` again and again over one app: each that is made leaves kilobytes behind."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._app: Celery | None = None

    def workers(self, timeout_s: float = 1.0) -> dict[str, bool]:
        app, self._app = self._app or make_app(self._settings), None
        with as_unavailable():
            try:
                replies = app.control.broadcast(READINESS, reply=True, timeout=timeout_s)
            except BaseException:
                app.close()
                raise
        self._app = app
        return {
            name: isinstance(answer, dict) and bool(answer.get("ready"))
            for reply in replies
            for name, answer in reply.items()
        }

    def close(self) -> None:
        if self._app is not None:
            self._app.close()


def ready_workers(settings: Settings, timeout_s: float = 1.0) -> list[str]:
    """Names of those that make progress. Raises `Unavailable`."""
    return [name for name, is_ready in workers(settings, timeout_s).items() if is_ready]
