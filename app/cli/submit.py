"""`gristmill submit`: one text, or a file of any length."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final, cast

import click

from app.cli.api import LASTING_S, Api, uses_api
from app.cli.lines import Source, json_object, numbered_lines
from app.cli.options import Time, metadata_option, setting
from app.cli.quote import Line, quote_many, quote_one
from app.cli.results import Asked, show, show_as_it_comes, show_as_they_end
from app.cli.soft_stop import SoftStop
from app.cli.terminal import FAILED, JOB_FAILED, as_json_option, print_json, print_row, tell
from app.jobs import MAX_PRIORITY
from gristmill_client import JobState, Submission
from gristmill_client.errors import GristmillError, IdempotencyConflict, NotStorable, RequestError

MAX_UNANSWERED: Final = 1_000
"""Lines that may be ahead of their outcome: about a page of the client's."""

OF_THE_LINE: Final = (RequestError, IdempotencyConflict, NotStorable)
"""Refusals that the next line need not meet."""


@click.command()
@click.argument("text", required=False)
@click.option(
    "--as",
    "field",
    type=click.Choice(["messages", "prompt", "input", "classify", "translate"]),
    default="messages",
    help="A chat, a text to go on with, to embed (input), to classify, or to translate.",
)
@click.option("--model", help="A configured model; else the default one.")
@click.option("--set", "given", multiple=True, metavar="NAME=VALUE", help="As in max_tokens=64.")
@click.option(
    "--file",
    type=click.File("rb"),
    help="One JSON object a line: a request, or one in `body` with options beside it. - is stdin.",
)
@click.option(
    "--idempotency-key",
    metavar="KEY",
    help="The same once more is the same job. Line 7 of a file has its own, or KEY-7.",
)
@click.option("--priority", type=click.IntRange(0, MAX_PRIORITY), help="0 is served first.")
@click.option("--deadline", type=Time(is_ahead=True), help="Expires then; or in 90m, 12h, 7d.")
@metadata_option
@click.option("--webhook-url", metavar="URL", help="Told of each job's end, by a signed POST.")
@click.option("--wait", is_flag=True, help="Wait for the answers; exit code 5 if a job fails.")
@click.option("--stream", is_flag=True, help="Show the answer to TEXT as it comes.")
@click.option("--dry-run", is_flag=True, help="Only tell when it would have ended, and its cost.")
@as_json_option
@uses_api
def submit(
    api: Api,
    text: str | None,
    field: str,
    model: str | None,
    given: tuple[str, ...],
    file: Any,
    idempotency_key: str | None,
    priority: int | None,
    deadline: datetime | None,
    metadata: dict[str, str],
    webhook_url: str | None,
    wait: bool,
    stream: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Submit TEXT as a job, or every line of a file.

    Prints the id of each job as soon as it is accepted, for a file behind the number of its line.
    With --idempotency-key the same command goes on where an earlier one was interrupted.
    """
    _check_usage(text, file)
    if stream and (file is not None or dry_run):
        raise click.UsageError("--stream is for a single TEXT that is submitted.")
    wait = wait or stream
    form = Form(
        settings=dict(map(setting, given)) | ({"model": model} if model else {}),
        options={
            "priority": priority,
            "deadline": deadline,
            "webhook_url": webhook_url,
            "stream_events": stream or None,
        },
        metadata=metadata,
        key=idempotency_key,
    )
    if dry_run:
        if wait:
            raise click.UsageError("With --dry-run there is nothing to wait for.")
        if file is None:
            sys.exit(quote_one(api, form.submission(_asked(text, field)), as_json))
        sys.exit(quote_many(api, list(_lines(file, form)), as_json))
    ledger = Ledger(as_json, keeps_ids=wait)
    if file is None:
        submissions: Iterator[Submission | None] = iter([form.submission(_asked(text, field))])
        ledger.expect(None)
    else:
        submissions = _of_file(file, form, ledger)
    _submit(api, submissions, ledger, form)
    ledger.sum_up()
    all_answered = True
    if wait:
        with api.client(LASTING_S) as client:
            if file is None and ledger.accepted:
                job_id = ledger.accepted[0].id
                if stream:
                    job = show_as_it_comes(client, job_id, as_json)
                else:
                    job = client.wait(job_id)
                    show(job, as_json)
                all_answered = job.state is JobState.COMPLETED
            else:
                all_answered = show_as_they_end(client, ledger.accepted, as_json)
    sys.exit(FAILED if ledger.num_refused else 0 if all_answered else JOB_FAILED)


def _asked(text: str | None, field: str) -> dict[str, Any]:
    match field:
        case "messages":
            return {"messages": [{"role": "user", "content": text}]}
        case "classify":
            return {"url": "/v1/classify", "body": {"input": text}}
        case "translate":
            return {"url": "/v1/translations", "body": {"input": text}}
        case _:
            return {field: text}


def _check_usage(text: str | None, file: object) -> None:
    if (text is None) == (file is None):
        raise click.UsageError("Give a text or --file, and not both.")
    if text == "-" or (text and _is_file(text)):
        raise click.UsageError(f"{text} is a file: submit its lines with --file {text}")


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long for a name
        return False


def _submit(api: Api, submissions: Iterator[Submission | None], ledger: Ledger, form: Form) -> None:
    stop = SoftStop()
    with api.client(LASTING_S, stop.pausing) as client:
        try:
            with stop.heeded():
                for outcome in client.iter_submit(stop.reading(submissions)):
                    stop.answered()
                    ledger.answer(outcome)
        except (KeyboardInterrupt, GristmillError):
            ledger.tell_where_it_stopped(form.key is not None)
            raise


def _lines(file: Source, form: Form) -> Iterator[Line]:
    for number, raw in filter(None, numbered_lines(file)):
        try:
            yield number, form.submission(json_object(raw), number)
        except RequestError as error:
            yield number, error


def _of_file(file: Source, form: Form, ledger: Ledger) -> Iterator[Submission | None]:
    for line in numbered_lines(file):
        if line is None:
            yield None
            continue
        number, raw = line
        try:
            submission = form.submission(json_object(raw), number)
        except RequestError as error:
            ledger.refuse(number, error)
        else:
            ledger.expect(number)
            yield submission
        if ledger.num_unanswered >= MAX_UNANSWERED:
            yield None


@dataclass(frozen=True, slots=True)
class Form:
    """What the command says of every job. It comes before what a line says, but for its key."""

    settings: dict[str, Any]
    options: dict[str, Any]
    metadata: dict[str, str]
    key: str | None

    def submission(self, value: dict[str, Any], number: int | None = None) -> Submission:
        """The job of a line. Raises `RequestError` if it is none."""
        own = value if "body" in value else {"body": value}
        body, metadata = own["body"], own.get("metadata") or {}
        if not (isinstance(body, dict) and isinstance(metadata, dict)):
            raise RequestError("body and metadata must be JSON objects.", param="body")
        told = own | {name: each for name, each in self.options.items() if each is not None}
        told |= {"body": body | self.settings, "metadata": metadata | self.metadata}
        if self.key is not None and told.get("idempotency_key") is None:
            told["idempotency_key"] = self.key if number is None else f"{self.key}-{number}"
        return cast("Submission", told)


@dataclass(slots=True)
class Ledger:
    """Tells what became of each line, in the order of the lines. TEXT is line None."""

    as_json: bool
    keeps_ids: bool  #: for the wait that follows, which is about the answers
    accepted: list[Asked] = field(default_factory=list)
    num_refused: int = 0
    num_told: int = 0
    last: int | None = None  #: the last line that was told of
    _unanswered: deque[tuple[int | None, RequestError | None]] = field(default_factory=deque)

    @property
    def num_unanswered(self) -> int:
        return len(self._unanswered)

    def expect(self, number: int | None) -> None:
        """There will be an answer for this line."""
        self._unanswered.append((number, None))

    def refuse(self, number: int, error: RequestError) -> None:
        """This line was not even sent."""
        self._unanswered.append((number, error))
        self._tell_refused()

    def answer(self, outcome: str | GristmillError) -> None:
        """The outcome of the next line that expects one. Raises what all others would meet too."""
        if isinstance(outcome, GristmillError) and not isinstance(outcome, OF_THE_LINE):
            raise outcome
        number, _ = self._unanswered.popleft()
        self._tell(number, outcome)
        self._tell_refused()

    def _tell_refused(self) -> None:
        while self._unanswered and (error := self._unanswered[0][1]):
            self._tell(self._unanswered.popleft()[0], error)

    def _tell(self, number: int | None, outcome: str | GristmillError) -> None:
        self.num_told += 1
        self.last = number
        line = {} if number is None else {"line": number}
        where = "" if number is None else f"line {number}: "
        if isinstance(outcome, GristmillError):
            self.num_refused += 1
            if self.as_json:
                print_json(line | {"error": _told_of(outcome)})
            else:
                tell(f"{where}refused: {outcome}")
        elif self.keeps_ids:
            self.accepted.append(Asked(outcome, line))
            tell(f"{where}accepted: {outcome}")
        elif self.as_json:
            print_json(line | {"id": outcome})
        else:
            print_row(*line.values(), outcome)

    def sum_up(self) -> None:
        if self.num_refused and self.last is not None:
            tell(f"{self.num_refused} of {self.num_told} lines were refused.")

    def tell_where_it_stopped(self, has_key: bool) -> None:
        after = f"after line {self.last}" if self.last else "before any job was accepted"
        tell(
            f"Stopped {after}. "
            + (
                "The same command once more goes on from there."
                if has_key
                else "With --idempotency-key the same command once more would go on from there."
            )
        )


def _told_of(error: GristmillError) -> dict[str, str]:
    """An error in the shape that jobs have theirs in."""
    param = getattr(error, "param", None)
    return {"code": error.code, "message": error.message} | ({"param": param} if param else {})
