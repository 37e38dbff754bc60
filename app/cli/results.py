"""What became of jobs: shown one by one, and as they end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import click

from app.cli.api import LASTING_S, Api, uses_api
from app.cli.lines import Source, json_object, numbered_lines
from app.cli.terminal import (
    JOB_FAILED,
    as_json_option,
    out,
    print_fields,
    print_json,
    print_row,
    say,
    tell,
)
from gristmill_client import Client, Job, JobFailed, JobState
from gristmill_client.errors import GristmillError, RequestError, ResponseRemoved
from gristmill_client.exchange import COME_BACK


@dataclass(frozen=True, slots=True)
class Asked:
    """A job that is asked for, and what was said beside its id: the number of its line."""

    id: str
    beside: dict[str, Any]


@click.command()
@click.argument("job_ids", nargs=-1, metavar="[ID]...")
@click.option(
    "--file",
    type=click.File("rb"),
    help="Ids, one a line, as `submit --file` prints them, with --json or without. - is stdin.",
)
@click.option("--text", "only_text", is_flag=True, help="Only what was answered, as it is.")
@click.option(
    "--timeout", type=click.FloatRange(0), metavar="SECONDS", help="Longest wait; else no end."
)
@as_json_option
@uses_api
def results(
    api: Api,
    job_ids: tuple[str, ...],
    file: Any,
    only_text: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Wait for jobs, and print each as it ends: line of the file, id, state and answer.

    The answer is one line of JSON: its text, its vector, a list of several, or the error. With
    --text it is the text itself, in the order of the ids. Exit code 5 if a job has no answer.
    """
    if bool(job_ids) == (file is not None):
        raise click.UsageError("Give ids or --file, and not both.")
    asked = _of_file(file) if file else (Asked(job_id, {}) for job_id in job_ids)
    with api.client(LASTING_S) as client:
        if only_text:
            all_answered = _print_texts(client, asked, timeout)
        else:
            all_answered = show_as_they_end(client, asked, as_json, timeout)
    sys.exit(0 if all_answered else JOB_FAILED)


def _of_file(file: Source) -> Iterator[Asked | None]:
    for line in numbered_lines(file):
        if line is None:
            yield None
            continue
        number, raw = line
        if not raw.lstrip().startswith(b"{"):
            if cells := raw.decode(errors="replace").split():
                yield Asked(cells[-1], {"line": int(cells[0])} if _has_number(cells) else {})
            continue
        try:
            told = json_object(raw)
        except RequestError as error:
            raise click.UsageError(f"Line {number}: {error}") from None
        yield Asked(str(told.get("id", "")), told)


def _has_number(cells: list[str]) -> bool:
    return len(cells) > 1 and cells[0].isdecimal() and len(cells[0]) < 20


def _print_texts(client: Client, asked: Iterable[Asked | None], timeout_s: float | None) -> bool:
    all_answered = True
    for each in filter(None, asked):
        try:
            response = client.result(each.id, timeout_s)
        except COME_BACK:
            raise
        except GristmillError as error:
            all_answered = False
            tell(str(error) if isinstance(error, JobFailed) else f"{each.id}: {error}")
        else:
            for answer in answers(response):
                say(answer if isinstance(answer, str) else json.dumps(answer))
    return all_answered


def show_as_they_end(
    client: Client, asked: Iterable[Asked | None], as_json: bool, timeout_s: float | None = None
) -> bool:
    """Show each job once it has ended; True if all have an answer. None: nothing more for a while.

    One without an id is a line that was refused when it was submitted.
    """
    followed: dict[str, list[Asked]] = {}
    all_answered = True

    def ids() -> Iterator[str | None]:
        nonlocal all_answered
        for each in asked:
            if each is None:
                yield None
            elif each.id:
                followed.setdefault(each.id, []).append(each)
                yield each.id
            else:
                all_answered = False
                _show_line(each, "refused", each.beside.get("error"), {}, as_json)

    for job_id, job in client.as_completed(ids(), timeout_s):
        answer, is_answered = _answer(job)
        all_answered &= is_answered
        for each in followed.pop(job_id):
            if isinstance(job, Job) and out.is_terminal and not as_json:
                show(job, as_json=False)
            elif isinstance(job, Job):
                _show_line(each, job.state, answer, job.raw, as_json)
            else:
                _show_line(each, "unknown", answer, {"error": answer}, as_json)
    return all_answered


def _answer(job: Job | GristmillError) -> tuple[Any, bool]:
    """What a job says, or why it says nothing, and whether it is the former."""
    if isinstance(job, Job) and job.state is not JobState.COMPLETED:
        return job.error, False
    if isinstance(job, Job) and job.response is not None:
        found = list(answers(job.response))
        return found[0] if len(found) == 1 else found, True
    error = ResponseRemoved() if isinstance(job, Job) else job
    return {"code": error.code, "message": error.message}, False


def _show_line(
    asked: Asked, state: str, answer: object, told: dict[str, Any], as_json: bool
) -> None:
    if as_json:
        rest = {name: value for name, value in told.items() if name != "id"}
        print_json(asked.beside | ({"id": asked.id} if asked.id else {}) | rest)
    else:
        line = [asked.beside["line"]] if "line" in asked.beside else []
        print_row(*line, asked.id, state, json.dumps(answer))


def show_as_it_comes(client: Client, job_id: str, as_json: bool) -> Job:
    """The first answer token by token, and behind it the record; or each event as JSON."""
    is_within = False  #: of a line
    for event in client.stream(job_id):
        if as_json:
            print_json({"event": event.event, "id": event.id, "data": event.data})
        elif event.event == "restarted" and is_within:
            say("")
            tell("The job is begun anew.")
        elif event.text and event.index == 0:
            say(event.text, goes_on=True)
        is_within = bool(event.text) or (is_within and event.event != "restarted")
        if (job := event.job) is not None:
            if not as_json:
                is_shown = event.data["complete"] and len([*answers(job.response or {})]) == 1
                if is_within:
                    say("")
                show(job, as_json, with_answers=not (is_within and is_shown))
            return job
    raise AssertionError("a stream ends with its job")


def show(job: Job, as_json: bool, *, with_answers: bool = True) -> None:
    """The answer, and behind it the record."""
    if as_json:
        print_json(job.raw)
        return
    for answer in answers(job.response or {}) if with_answers else ():
        if isinstance(answer, list):
            say(f"a vector of {len(answer)} numbers")
        else:
            say(answer if isinstance(answer, str) else json.dumps(answer))
    print_fields(_fields(job.raw))


def answers(response: dict[str, Any]) -> Iterator[Any]:
    """What a response says: the text of each choice, each vector, or the score of each text."""
    for choice in response.get("choices", ()):
        yield choice["message"]["content"] if "message" in choice else choice["text"]
    for item in response.get("data", ()):
        yield item.get("embedding", item.get("score", item.get("scores")))
    yield from response.get("results", ())
    said = (item.get("content", ()) for item in response.get("output", ()))  # of a response
    for part in (*response.get("content", ()), *chain.from_iterable(said)):  # of a message
        if "text" in part:
            yield part["text"]


def _fields(raw: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name in (
        "id",
        "state",
        "model",
        "position",
        "eta",
        "metadata",
        "batch",
        "timing",
        "usage",
        "cost",
        "energy",
        "error",
    ):
        value = raw.get(name)
        if isinstance(value, dict):
            value = "  ".join(f"{key} {part}" for key, part in value.items() if part is not None)
        if value:
            yield name, str(value)
