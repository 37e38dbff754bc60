"""Where the API is, for the commands that talk to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Final, TypeVar

import click

from app.cli.terminal import load_settings, tell
from gristmill_client import Client
from gristmill_client.errors import GristmillError

T = TypeVar("T")

QUICK_S: Final = 5.0
"""Patience of a command that somebody looks at."""
LASTING_S: Final = 120.0
"""Patience of one that is at work: it outlasts a restart of the API."""
TELL_EVERY_S: Final = 30.0


@dataclass(slots=True)
class Api:
    url: str | None
    key: str | None
    patience_s: float | None
    _told_at: float = field(default=float("-inf"), init=False)

    def client(
        self, patience_s: float = QUICK_S, on_pause: Callable[[], None] = lambda: None
    ) -> Client:
        """A client of it, which says on the terminal when it has to wait."""

        def tell_why(error: GristmillError, _: float) -> None:
            on_pause()
            if time.monotonic() - self._told_at > TELL_EVERY_S:
                self._told_at = time.monotonic()
                tell(f"{error} Trying again.")

        url, key = self.url, self.key
        if url is None:
            settings = load_settings().settings.api
            url, key = settings.url, key or settings.key  # which is for that url alone
        patience_s = patience_s if self.patience_s is None else self.patience_s
        try:
            return Client(url, key=key, patience_s=patience_s, on_pause=tell_why)
        except ValueError as error:
            raise click.UsageError(str(error)) from None


def uses_api(command: Callable[..., T]) -> Callable[..., T]:
    """Give a command an `Api` as its first argument, and the options that say where it is."""

    @wraps(command)
    def with_api(
        *, api_url: str | None, key: str | None, patience: float | None, **options: Any
    ) -> T:
        return command(Api(api_url, key, patience), **options)

    for option in (
        click.option(
            "--patience",
            type=click.FloatRange(0),
            metavar="SECONDS",
            help="How long to try again while the API is away or full.",
        ),
        click.option(
            "--key",
            envvar="GRISTMILL_API__KEY",
            help="Your API key; better in GRISTMILL_API__KEY, which no other user sees.",
        ),
        click.option(
            "--api-url",
            envvar="GRISTMILL_API_URL",
            metavar="URL",
            help="Where the API is; else GRISTMILL_API_URL, else as the settings say.",
        ),
    ):
        with_api = option(with_api)
    return with_api
