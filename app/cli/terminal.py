"""What the commands share: where they print, and how they read the settings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import Console

if TYPE_CHECKING:
    from app.config.file import Loaded

FAILED, WRONG_SETTINGS, UNAVAILABLE, JOB_FAILED, INTERRUPTED = 1, 3, 4, 5, 130

out: Final = Console(highlight=False)
err: Final = Console(stderr=True, highlight=False)

as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load_settings() -> Loaded:
    from app.config.file import load

    return load()


def tell(line: str) -> None:
    """Print a line for the person at the terminal, beside the output proper."""
    err.print(line, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """Print one line of JSON, for programs."""
    click.echo(json.dumps(value))
