"""What the commands share: where they print, and how they read the settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console
from rich.text import Text

from app.printable import printable

if TYPE_CHECKING:
    from app.config.file import Loaded

FAILED, WRONG_SETTINGS, UNAVAILABLE, JOB_FAILED, INTERRUPTED = 1, 3, 4, 5, 130


class PlainConsole(Console):
    """Shows text as it is written: nothing in it acts on the terminal, and there is no markup or
    emoji in it but where `markup=True` says so of our own."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **options)


out: Final = PlainConsole()
err: Final = PlainConsole(stderr=True)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_settings() -> Loaded:
    from app.config.file import load

    return load()


def tell(line: str) -> None:
    """Print a line for the person at the terminal, beside the output proper."""
    err.print(line, soft_wrap=True)


def say(text: str) -> None:
    """Print what a model said: as it is into a file or pipe, harmless to a terminal."""
    click.echo(printable(text) if out.is_terminal else text, color=True)  # True: left as it is


def print_json(value: Any) -> None:
    """Print one line of JSON, for programs."""
    click.echo(json.dumps(value))
