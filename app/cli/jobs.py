"""Commands about jobs that were submitted, by way of the HTTP API."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, Final

import click

from app.cli.api import LASTING_S, QUICK_S, Api, uses_api
from app.cli.options import CANCELLABLE, chooses_jobs, chosen
from app.cli.results import Asked, show, show_as_they_end
from app.cli.terminal import (
    FAILED,
    JOB_FAILED,
    as_json_option,
    print_json,
    print_row,
    print_table,
    tell,
)
from app.jobs import REPLAYED
from gristmill_client import Client, Job, JobState
from gristmill_client.errors import GristmillError
from gristmill_client.exchange import COME_BACK


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@chooses_jobs()
@click.option("--wait", is_flag=True, help="Wait until they have ended.")
@as_json_option
@uses_api
def status(api: Api, job_ids: tuple[str, ...], wait: bool, as_json: bool, **filters: Any) -> None:
    """Show a job: its answer, state, timing and cost; or several, one a line.

    Exit code 5 if one that is named failed, expired or was cancelled.
    """
    given = chosen(job_ids, filters)
    with api.client(LASTING_S if wait else QUICK_S) as client:
        if len(job_ids) == 1:
            job = client.wait(job_ids[0]) if wait else client.job(job_ids[0])
            show(job, as_json)
            sys.exit(_exit_code([job]))
        elif wait:
            ids = job_ids or [job.id for job in client.iter_jobs(**given)]
            asked = (Asked(job_id, {}) for job_id in ids)
            sys.exit(0 if show_as_they_end(client, asked, as_json) else JOB_FAILED)
        elif given:
            _show_jobs(client.iter_jobs(**given), as_json)
        else:
            found = client.jobs_status(job_ids, with_responses=as_json)
            _show_jobs((job for job in found if isinstance(job, Job)), as_json)
            for job_id, outcome in zip(job_ids, found, strict=True):
                if isinstance(outcome, GristmillError):
                    tell(f"{job_id}: {outcome}")
            sys.exit(_exit_code(found))


def _exit_code(found: Iterable[Job | GristmillError]) -> int:
    outcomes = list(found)
    if any(isinstance(each, GristmillError) for each in outcomes):
        return FAILED
    states = {each.state for each in outcomes if isinstance(each, Job)}
    return JOB_FAILED if states & REPLAYED else 0


def _show_jobs(jobs: Iterable[Job], as_json: bool) -> None:
    if as_json:
        for job in jobs:
            print_json(job.raw)
        return
    print_table(("id", "state", "model", "accepted", "error"), map(_row, jobs))


def _row(job: Job) -> tuple[object, ...]:
    error = (job.error or {}).get("code", "")
    return job.id, job.state, job.raw["model"], job.raw["created_at"], error


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@chooses_jobs(states=CANCELLABLE)
@as_json_option
@uses_api
def cancel(api: Api, job_ids: tuple[str, ...], as_json: bool, **filters: Any) -> None:
    """Cancel jobs: those named, or all that fit.

    A queued job is cancelled at once; one that runs ends at its next step, and is shown as running.
    """
    given = chosen(job_ids, filters)
    num_refused = 0
    with api.client() as client:
        outcomes = client.cancel_chosen(**given) if given else client.cancel_many(job_ids)
        for outcome in outcomes:
            if outcome.error is not None:
                num_refused += 1
                tell(f"{outcome.id}: {outcome.error}")
            elif as_json:
                print_json({"id": outcome.id, "state": outcome.state})
            else:
                print_row(outcome.id, outcome.state)
    sys.exit(FAILED if num_refused else 0)


@click.command()
@click.argument("job_ids", nargs=-1, required=True, metavar="ID...")
@click.option("--yes", is_flag=True, help="Do not ask.")
@uses_api
def purge(api: Api, job_ids: tuple[str, ...], yes: bool) -> None:
    """Remove what jobs were asked and what they answered, for good; what they cost stays."""
    yes or click.confirm("What was asked and answered is gone then. Go on?", abort=True)
    num_refused = 0
    with api.client() as client:
        for job_id in job_ids:
            try:
                client.purge(job_id)
            except COME_BACK:
                raise
            except GristmillError as error:
                num_refused += 1
                tell(f"{job_id}: {error}")
    sys.exit(FAILED if num_refused else 0)


@click.group("jobs")
def group() -> None:
    """List jobs, and replay those that ended badly."""


@group.command("list")
@chooses_jobs()
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Most jobs.")
@as_json_option
@uses_api
def list_jobs(api: Api, limit: int, as_json: bool, **filters: Any) -> None:
    """List jobs, newest first; with --json one a line."""
    with api.client() as client:
        _show_jobs(client.iter_jobs(limit=limit, **filters), as_json)


@group.command()
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@chooses_jobs()
@as_json_option
@uses_api
def replay(api: Api, job_ids: tuple[str, ...], as_json: bool, **filters: Any) -> None:
    """Run jobs once more that failed, expired or were cancelled: those named, or all that fit.

    Each becomes a new job, whose id is printed behind that of the old one. A job is replayed once:
    a second time prints the same id.
    """
    given = chosen(job_ids, filters)
    refused = 0
    with api.client() as client:
        for job_id in job_ids or _ended_badly(client, given):
            try:
                new_id = client.replay(job_id).id
            except COME_BACK:
                raise
            except GristmillError as error:
                refused += 1
                tell(f"{job_id}: {error}")
            else:
                if as_json:
                    print_json({"id": new_id, "replay_of": job_id})
                else:
                    print_row(job_id, new_id)
    sys.exit(FAILED if refused else 0)


def _ended_badly(client: Client, filters: dict[str, Any]) -> Iterator[str]:
    """Ids of those; all are found before the first is replayed, which makes a new job."""
    given = filters.pop("state", None)
    states = [JobState(given)] if given else sorted(REPLAYED)
    found = [job.id for state in states for job in client.jobs(state=state, **filters)]
    return iter(found)


COMMANDS: Final = (status, cancel, purge, group)
