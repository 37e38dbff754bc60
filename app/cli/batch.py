"""`gristmill batch run`: every request of a file, and each answer into another one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any, Final

import click
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from app.cli.api import LASTING_S, Api, uses_api
from app.cli.batch_lines import Form, Line, Output, answer_line, line_of
from app.cli.lines import Source, numbered_lines
from app.cli.options import Time, metadata_option
from app.cli.submit import OF_THE_LINE
from app.cli.terminal import JOB_FAILED, err, tell
from app.jobs import MAX_PRIORITY
from gristmill_client import Job, JobState, Submission
from gristmill_client.errors import GristmillError, JobNotFound, JobUnreadable, RequestError

BACKGROUND: Final = 6
"""Priority of a line that is given none: behind what somebody waits for."""

ENDS: Final = (Job, *OF_THE_LINE, JobNotFound, JobUnreadable)
"""What is written of a line. Everything else, an invalid key say, is met by all of them: they wait
for the same command once more."""


@click.group()
def batch() -> None:
    """Whole files of requests."""


@batch.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Where the answers go, a line each, as they come.",
)
@click.option("--model", help="A configured model, for lines that name none.")
@click.option(
    "--priority", type=click.IntRange(0, MAX_PRIORITY), default=BACKGROUND, show_default=True
)
@click.option("--deadline", type=Time(is_ahead=True), help="Expires then; or in 90m, 12h, 7d.")
@metadata_option
@uses_api
def run(
    api: Api,
    file: Any,
    output: Path,
    model: str | None,
    priority: int,
    deadline: datetime | None,
    metadata: dict[str, str],
) -> None:
    """Answer every line of FILE, in the form of OpenAI's or Anthropic's batches, or of `submit`.
    - is the standard input.

    Interrupted at whatever point, the same command goes on: lines that have ended are not run
    again. Exit code 5 if one has no answer.
    """
    form = Form(model, {"priority": priority, "deadline": deadline}, metadata)
    with Output.opened(output) as written, _progress() as progress:
        bar = progress.add_task("", total=_looked_through(file), text="")
        if file.seekable():
            written.go_on_with(file)
        tally = Tally(written)
        lines = _todo(file, written, tally)
        with api.client(LASTING_S) as client:
            asked: dict[int, Line] = {}

            def submissions() -> Iterator[Submission | None]:
                places = count()
                for line in lines:
                    if line is None:
                        yield None
                    else:
                        asked[next(places)] = line
                        yield line.submission(form, written.run.name)

            progress.update(bar, completed=tally.num_ended, text=tally.text)
            try:
                for place, found in client.iter_run(submissions()):
                    if not isinstance(found, ENDS):
                        raise found
                    written.write(answer_line(asked.pop(place).custom_id, found))
                    tally.add(found)
                    progress.update(bar, completed=tally.num_ended, text=tally.text)
            except (KeyboardInterrupt, GristmillError, OSError):
                tell("Stopped. What was submitted goes on; so does the same command once more.")
                raise
        progress.update(bar, total=tally.num_ended, completed=tally.num_ended, text=tally.text)
        written.finish()
    tell(f"{tally.num_ended} lines: {tally.text}.")
    sys.exit(JOB_FAILED if tally.num_failed else 0)


def _todo(file: Source, written: Output, tally: Tally) -> Iterator[Line | None]:
    """The lines that have not ended yet; None where a pipe has no more of them for now. Those that
    are none end here."""
    for each in _read(file):
        if each is None:
            yield None
            continue
        custom_id, line = each
        if custom_id in written.ended:
            continue
        if isinstance(line, RequestError):
            written.write(answer_line(custom_id, line))
            tally.add(line)
        else:
            yield line


def _read(file: Source) -> Iterator[tuple[str, Line | RequestError] | None]:
    """Each line by its custom_id. Wrong usage if two have the same."""
    seen: dict[str, int] = {}
    for each in numbered_lines(file):
        if each is None:
            yield None
            continue
        number, raw = each
        custom_id, line = line_of(raw, number)
        if first := seen.setdefault(custom_id, number) - number:
            raise click.UsageError(
                f"Lines {number + first} and {number} have the same custom_id: its answer could "
                "not be told from the other's."
            )
        yield custom_id, line


@dataclass(slots=True)
class Tally:
    """What has ended so far, and what that cost in this call of the command."""

    written: Output
    num_failed: int = field(init=False)
    cost: dict[str, Decimal] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.num_failed = self.written.num_failed

    @property
    def num_ended(self) -> int:
        return len(self.written.ended)

    def add(self, found: Job | GristmillError) -> None:
        if not isinstance(found, Job) or found.state is not JobState.COMPLETED:
            self.num_failed += 1
        if isinstance(found, Job):
            cost, usage = found.raw.get("cost") or {}, found.raw.get("usage") or {}
            if cost.get("amount") is not None:
                before = self.cost.get(cost["currency"], Decimal(0))
                self.cost[cost["currency"]] = before + Decimal(cost["amount"])
            self.tokens += usage.get("output_tokens") or 0

    @property
    def text(self) -> str:
        costs = " + ".join(f"{amount:.6f} {currency}" for currency, amount in self.cost.items())
        parts = [f"{self.num_failed} failed", f"{self.tokens:,} tokens", costs]
        return ", ".join(filter(None, parts))


def _looked_through(file: Any) -> int | None:
    """How many lines there are; None if that cannot be told before they come."""
    if not file.seekable():
        return None
    number = sum(1 for _ in filter(None, _read(file)))
    file.seek(0)
    return number


def _progress() -> Progress:
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=err,
        disable=not err.is_terminal,
    )
