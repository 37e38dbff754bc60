"""Options that commands share, and how they read what is given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import click

from app.jobs import JobState

Command = TypeVar("Command", bound=Callable[..., Any])

_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}


class Time(click.ParamType[datetime]):
    """A time, or how far off it is: `2027-01-31T12:00`, `90m`, `12h`, `7d`."""

    name = "TIME"

    def __init__(self, *, is_ahead: bool) -> None:
        self._direction = 1 if is_ahead else -1

    def convert(self, value: Any, *_: object) -> datetime:
        try:
            if off := re.fullmatch(r"(\d{1,9})([smhd])", value):
                return datetime.now(UTC) + self._direction * timedelta(
                    **{_UNITS[off[2]]: int(off[1])}
                )
            return datetime.fromisoformat(value).astimezone(UTC)  # without a zone it is local
        except (ValueError, OverflowError):
            raise click.BadParameter(
                f"{value} is neither a time, as in 2027-01-31T12:00, nor how far off, as in 12h."
            ) from None


class NameValue(click.ParamType[tuple[str, str]]):
    """`customer=42`."""

    name = "NAME=VALUE"

    def convert(self, value: Any, *_: object) -> tuple[str, str]:
        name, equals, text = value.partition("=")
        if not (name and equals):
            raise click.BadParameter(f"{value}: give NAME=VALUE.")
        return name, text


def setting(text: str) -> tuple[str, Any]:
    """`max_tokens=64` as a name and a JSON value; what is not JSON is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: give NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


metadata_option = click.option(
    "--metadata",
    type=NameValue(),
    multiple=True,
    callback=lambda _context, _option, given: dict(given),
    help="A text of your own that goes with the job, as in customer=42; may be repeated.",
)

STATES: Final = tuple(state.value for state in JobState)
CANCELLABLE: Final = (JobState.QUEUED.value, JobState.RUNNING.value)

_MODEL: Final = click.option("--model", help="Of this model.")
_ERROR: Final = click.option("--error-code", help="Ended with this error, as in engine_crash.")
_SINCE: Final = click.option(
    "--since", type=Time(is_ahead=False), help="Accepted since then; or 90m, 12h, 7d ago."
)
_UNTIL: Final = click.option(
    "--until", type=Time(is_ahead=False), help="Accepted before then; or as long ago."
)
_METADATA: Final = click.option(
    "--metadata",
    type=NameValue(),
    multiple=True,
    callback=lambda _context, _option, given: dict(given),
    help="With this among its metadata, as in customer=42; may be repeated.",
)


def chooses_jobs(*, states: Sequence[str] = STATES) -> Callable[[Command], Command]:
    """Give a command the options that choose jobs."""
    options = [
        click.option("--state", type=click.Choice(states), help="In this state."),
        *(_MODEL, _METADATA, _SINCE, _UNTIL),
        *([_ERROR] if states == STATES else []),
    ]

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def chosen(job_ids: tuple[str, ...], filters: dict[str, Any]) -> dict[str, Any]:
    """The filters that are given. Wrong usage unless there are ids or filters, and not both."""
    given = {name: value for name, value in filters.items() if value}
    if bool(job_ids) == bool(given):
        raise click.UsageError("Name jobs, or choose them by options, and not both.")
    return given
