"""Commands about jobs, by way of the HTTP API."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

import click
from rich.progress import Progress
from rich.table import Table

from app.cli.terminal import (
    FAILED,
    JOB_FAILED,
    as_json_option,
    err,
    load_settings,
    out,
    print_json,
    say,
    tell,
)
from app.client import Client, Job
from app.errors import GristmillError, QueueFull, Unavailable
from app.jobs import REPLAYED, JobState

Command = TypeVar("Command", bound=Callable[..., Any])


@click.command()
@click.argument("text", required=False)
@click.option(
    "--as",
    "field",
    type=click.Choice(["messages", "prompt", "input"]),
    default="messages",
    help="A chat, a text to go on with, or a text to embed.",
)
@click.option("--model", help="A configured model; else the default one.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="As in max_tokens=64.")
@click.option(
    "--file", type=click.File(), help="Request bodies, one JSON object a line; - is stdin."
)
@click.option("--wait", is_flag=True, help="Wait for the answers; exit code 5 if a job fails.")
@as_json_option
def submit(
    text: str | None,
    field: str,
    model: str | None,
    given: tuple[str, ...],
    file: Any,
    wait: bool,
    as_json: bool,
) -> None:
    """Submit TEXT as a job, or every line of a file."""
    bodies = _bodies(text, field, file)
    settings = dict(_setting(each) for each in given) | ({"model": model} if model else {})
    with _client() as client:
        outcomes = client.submit_many([{"body": body | settings} for body in bodies])
        refused = [outcome for outcome in outcomes if isinstance(outcome, GristmillError)]
        ids = [outcome for outcome in outcomes if not isinstance(outcome, GristmillError)]
        if refused and not ids:
            raise refused[0]
        for error in refused:
            tell(f"refused: {error}")
        if wait:
            all_completed = _wait_for(client, ids, as_json)
        else:
            all_completed = True
            for job_id in ids:
                click.echo(json.dumps({"id": job_id}) if as_json else job_id)
    sys.exit(FAILED if refused else 0 if all_completed else JOB_FAILED)


def _bodies(text: str | None, field: str, file: Any) -> list[dict[str, Any]]:
    if (text is None) == (file is None):
        raise click.UsageError("Give a text or --file, and not both.")
    if file is None:
        return [{field: [{"role": "user", "content": text}] if field == "messages" else text}]
    lines = [(number, line) for number, line in enumerate(file, 1) if line.strip()]
    return [_json(line, f"line {number}") for number, line in lines]


def _wait_for(client: Client, ids: Sequence[str], as_json: bool) -> bool:
    """Show each job as it ends, in the order given; True if all completed."""
    all_completed = True
    with Progress(console=err, transient=True, disable=len(ids) < 2) as progress:
        for job_id in progress.track(ids, description="Waiting"):
            job = client.wait(job_id)
            all_completed &= job.state is JobState.COMPLETED
            _show(job, as_json)
    return all_completed


@click.command()
@click.argument("job_id")
@click.option("--wait", is_flag=True, help="Wait until it has ended; exit code 5 if it failed.")
@as_json_option
def status(job_id: str, wait: bool, as_json: bool) -> None:
    """Show a job: state, timing, cost and answer."""
    with _client() as client:
        job = client.wait(job_id) if wait else client.job(job_id)
    _show(job, as_json)
    sys.exit(JOB_FAILED if job.state.is_final and job.state is not JobState.COMPLETED else 0)


@click.command()
@click.argument("job_id")
@as_json_option
def cancel(job_id: str, as_json: bool) -> None:
    """Cancel a job: at once if it is queued; if it runs, its place is freed at the next step."""
    with _client() as client:
        _show(client.cancel(job_id), as_json)


class _Since(click.ParamType[datetime]):
    """A time, or how long ago: `2027-01-31T12:00`, `90m`, `12h`, `7d`."""

    name = "TIME"

    def convert(self, value: Any, *_: object) -> datetime:
        if ago := re.fullmatch(r"(\d{1,6})([mhd])", value):
            unit = {"m": "minutes", "h": "hours", "d": "days"}[ago[2]]
            return datetime.now(UTC) - timedelta(**{unit: int(ago[1])})
        try:
            return datetime.fromisoformat(value).astimezone(UTC)  # without a zone it is local
        except (ValueError, OverflowError):
            raise click.BadParameter(
                f"{value} is neither a time, as in 2027-01-31T12:00, nor how long ago, as in 12h."
            ) from None


STATES: Final = [state.value for state in JobState]


def _which_jobs(command: Command) -> Command:
    """The options of a command that choose jobs."""
    for option in (
        click.option("--since", type=_Since(), help="Accepted since then; or 90m, 12h, 7d ago."),
        click.option("--error-code", help="Ended with this error, as in engine_crash."),
        click.option("--model", help="Of this model."),
        click.option(
            "--state", type=click.Choice([state.value for state in JobState]), help="In this state."
        ),
    ):
        command = option(command)
    return command


@click.group("jobs")
def group() -> None:
    """List jobs, and replay those that ended badly."""


@group.command("list")
@_which_jobs
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most jobs.")
@as_json_option
def list_jobs(limit: int, as_json: bool, **filters: Any) -> None:
    """List jobs, newest first; with --json one a line."""
    with _client() as client:
        found = client.jobs(limit=limit, **filters)
    if as_json:
        for job in found:
            click.echo(json.dumps(job.raw))
        return
    table = Table(box=None, pad_edge=False)
    for name in ("id", "state", "model", "accepted", "error"):
        table.add_column(name, no_wrap=name == "id")
    for job in found:
        error = (job.error or {}).get("code", "")
        table.add_row(job.id, job.state, job.raw["model"], job.raw["created_at"][:19], error)
    out.print(table)


@group.command()
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@_which_jobs
@as_json_option
def replay(job_ids: tuple[str, ...], as_json: bool, **filters: Any) -> None:
    """Run jobs once more that failed, expired or were cancelled: those named, or all that fit.

    Each becomes a new job, whose id is printed behind that of the old one. A job is replayed once:
    a second time prints the same id.
    """
    if bool(job_ids) == any(filters.values()):
        raise click.UsageError("Name jobs, or choose them by options, and not both.")
    with _client() as client:
        refused = 0
        for job_id in job_ids or _ended_badly(client, filters):
            try:
                new_id = client.replay(job_id).id
            except RETRIABLE:
                raise
            except GristmillError as error:
                refused += 1
                tell(f"{job_id}: {error}")
            else:
                told = {"id": new_id, "replay_of": job_id}
                click.echo(json.dumps(told) if as_json else f"{job_id} {new_id}")
    sys.exit(FAILED if refused else 0)


RETRIABLE: Final = (Unavailable, QueueFull)
"""Refusals of the service itself: the jobs behind would meet the same. Start again later."""


def _ended_badly(client: Client, filters: dict[str, Any]) -> list[str]:
    given = filters.pop("state")
    states = [JobState(given)] if given else sorted(REPLAYED)
    return [job.id for state in states for job in client.jobs(state=state, **filters)]


def _show(job: Job, as_json: bool) -> None:
    if as_json:
        print_json(job.raw)
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    raw = job.raw
    for name in ("id", "state", "model", "batch", "timing", "usage", "cost", "error"):
        value = raw.get(name)
        if isinstance(value, dict):
            value = "  ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        if value is not None:
            table.add_row(name, str(value))
    out.print(table)
    for text in _texts(job.response or {}):
        say(text)


def _texts(response: dict[str, Any]) -> Iterator[str]:
    """What a response says: the text of each choice, or the size of each vector."""
    for choice in response.get("choices", ()):
        yield choice["message"]["content"] if "message" in choice else choice["text"]
    for item in response.get("data", ()):
        yield f"a vector of {len(item['embedding'])} numbers"


def _client() -> Client:
    api = load_settings().settings.api
    return Client(api.url, token=api.token, patience_s=5)


def _json(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{where} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise click.UsageError(f"{where} is not a JSON object.")
    return value


def _setting(text: str) -> tuple[str, Any]:
    """`max_tokens=64` as a name and a JSON value; what is not JSON is text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text}: give NAME=VALUE.")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


COMMANDS: Final = (submit, status, cancel, group)
