"""The lines of a batch: requests in the forms of several doors, and the file of their answers."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Final, cast
from uuid import uuid4

import click

from app.cli.lines import CHUNK_BYTES, json_object
from gristmill_client import Job, JobState, Submission
from gristmill_client.errors import GristmillError, RequestError

MESSAGES: Final = "/v1/messages"
BEGIN: Final = b'{"id": "batch_req_'
"""Of every line that is written."""


@dataclass(frozen=True, slots=True)
class Form:
    """What the command says of every line; a line comes before it."""

    model: str | None
    options: dict[str, Any]
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class Line:
    """A request of the file."""

    custom_id: str
    told: dict[str, Any]  #: what `submit` takes: a body, and what is beside it

    def submission(self, form: Form, run: str) -> Submission:
        body = self.told["body"]
        if form.model and isinstance(body, dict):
            body = {"model": form.model} | body
        told = {k: v for k, v in form.options.items() if v is not None} | self.told
        metadata = self.told.get("metadata") or {}
        if isinstance(metadata, dict):
            told["metadata"] = metadata | form.metadata
        told |= {"body": body, "idempotency_key": self._key(run, body)}
        return cast("Submission", told)

    def _key(self, run: str, body: object) -> str:
        """The same for the same line of the same run: it is one job, however often it is sent."""
        asked = json.dumps([self.custom_id, self.told.get("url"), body], sort_keys=True)
        return f"{run}-{hashlib.sha256(asked.encode(errors='replace')).hexdigest()[:32]}"


def line_of(raw: bytes, number: int) -> tuple[str, Line | RequestError]:
    """A line of the file, or what is wrong with it, and its custom_id: it may have none, and is
    then called by its number."""
    custom_id = f"line-{number}"
    try:
        value = json_object(raw)
        custom_id = _custom_id(value, custom_id)
        return custom_id, Line(custom_id, _told(value))
    except RequestError as error:
        return custom_id, error


def _custom_id(value: dict[str, Any], default: str) -> str:
    custom_id = value.get("custom_id", default)
    if not (isinstance(custom_id, str) and custom_id):
        raise RequestError("custom_id must be a text.", param="custom_id")
    return custom_id


def _told(value: dict[str, Any]) -> dict[str, Any]:
    if "params" in value:  # of Anthropic's batches
        return {"url": MESSAGES, "body": value["params"]}
    told = {name: each for name, each in value.items() if name not in ("custom_id", "method")}
    if "body" not in value:
        return {"body": told}
    if value.get("method", "POST") != "POST":
        raise RequestError("method must be POST.", param="method")
    return told


class Output:
    """The file of answers. What is in it has ended, and is not asked again. Beside it is the file
    of the run."""

    run: Run

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file = path, file
        self.ended: set[str] = set()
        self.num_failed = 0

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator[Output]:
        if str(path) == "-" or (path.exists() and not path.is_file()):
            raise click.UsageError(f"{path}: the answers go into a file, and this is none.")
        with path.open("ab", buffering=0) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise click.UsageError(f"{path}: another run is writing there.") from None
            output = cls(path, file)
            output._read()  # before anything is written: it may be somebody else's file
            output.run = Run(path.resolve().with_name(f"{path.resolve().name}.run"))
            yield output

    def go_on_with(self, file: BinaryIO) -> None:
        """Wrong usage if these are not the requests whose answers are here."""
        if self.ended and not self.run.is_of(file):
            raise click.UsageError(
                f"{file.name}: this is not what it was when {self._path} was begun: answers there "
                "may be those of other lines. Put it back, or name another file for the answers."
            )
        self.run.note(file)

    def _read(self) -> None:
        """What ended before. The end of a line that was being written is taken off."""
        whole = 0
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                is_cut = not raw.endswith(b"\n")
                if is_cut and (whole or BEGIN.startswith(raw[: len(BEGIN)])):
                    break
                try:
                    value = {} if is_cut else json_object(raw)
                    self.ended.add(str(value["custom_id"]))
                    self.num_failed += value["error"] is not None
                except (RequestError, KeyError):
                    raise click.UsageError(
                        f"{self._path}, line {number}: this was not written by `gristmill batch "
                        "run`. Name another file for the answers."
                    ) from None
                whole += len(raw)
        self._file.truncate(whole)

    def write(self, line: dict[str, Any]) -> None:
        rest = memoryview(json.dumps(line).encode() + b"\n")
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:  # which does not say where
            raise OSError(error.errno, error.strerror, str(self._path)) from None
        self.ended.add(line["custom_id"])

    def finish(self) -> None:
        os.fsync(self._file.fileno())
        self.run.end()


class Run:
    """What is known of a run while something of it is left to do: jobs that were submitted before
    an interruption are found by its name.

    Its file has the name, and of what was asked how many bytes the file of requests had, and their
    SHA-256.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        told = path.read_text("utf-8", "replace").split() if path.exists() else []
        if told and not re.fullmatch(r"batch-\w{32}( \d+ \w{64})?", " ".join(told)):
            raise click.UsageError(
                f"{path}: this was not written by `gristmill batch run`. Name another file for the "
                "answers."
            )
        self.name, *self._asked = told or [f"batch-{uuid4().hex}"]
        self._write()

    def is_of(self, file: BinaryIO) -> bool:
        """Whether the requests are those of before; more of them may follow."""
        return not self._asked or _sha256(file, int(self._asked[0])) == self._asked[1]

    def note(self, file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        self._asked = [str(size), _sha256(file, size)]
        self._write()

    def end(self) -> None:
        self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        """At once: half of a name would be that of no run."""
        new = self._path.with_name(f"{self._path.name}.new")
        with new.open("w") as file:
            file.write(" ".join((self.name, *self._asked)))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._path)


def _sha256(file: BinaryIO, size: int) -> str:
    """Of the first bytes of a file, which is left at its beginning."""
    digest = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, CHUNK_BYTES))):
        digest.update(chunk)
        size -= len(chunk)
    file.seek(0)
    return digest.hexdigest()


def answer_line(custom_id: str, found: Job | GristmillError) -> dict[str, Any]:
    """A line of OpenAI's output and error files; of what has no answer both fields say why."""
    if isinstance(found, Job) and found.state is JobState.COMPLETED and found.response is not None:
        response = {"status_code": 200, "request_id": found.id, "body": found.response}
        return {
            "id": f"batch_req_{found.id}",
            "custom_id": custom_id,
            "response": response,
            "error": None,
        }
    error = _error_of(found)
    job_id = found.id if isinstance(found, Job) else None
    return {
        "id": f"batch_req_{job_id or uuid4()}",
        "custom_id": custom_id,
        "response": None,
        "error": error,
    }


def _error_of(found: Job | GristmillError) -> dict[str, Any]:
    if isinstance(found, GristmillError):
        param = getattr(found, "param", None)
        return {"code": found.code, "message": found.message, "param": param}
    told = found.error or {}
    if found.state is JobState.COMPLETED:
        return {"code": "response_removed", "message": "Its answer is not kept any more."}
    return {
        "code": told.get("code", f"batch_{found.state}"),
        "message": told.get("message", f"The job was {found.state}."),
    }
