"""Submissions cut into pages: each far below what the server takes, in jobs and in bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import uuid4

from gristmill_client.errors import RequestError
from gristmill_client.exchange import encode
from gristmill_client.options import plain

MAX_JOBS: Final = 1_000
MAX_BYTES: Final = 4_000_000
"""Defaults of the server are 10,000 jobs and 64 MB. A smaller page is answered sooner, and its ids
are known sooner."""

Page = list[bytes | RequestError]
"""The jobs in JSON; in place of one that cannot be written as such, why."""


@dataclass(slots=True)
class PageSize:
    """Most of a page; whoever meets a server or a proxy that takes less makes it smaller."""

    jobs: int = MAX_JOBS
    bytes: int = MAX_BYTES


def pages(submissions: Iterable[Mapping[str, Any] | None], most: PageSize) -> Iterator[Page]:
    """Take as many submissions as fit, and no more than that from the iterable, time and again.

    None ends a page: nothing else may come for a while. A job that is larger than a page is alone
    in one.
    """
    page: Page = []
    size = 0
    for submission in submissions:
        if submission is not None:
            job = job_of(submission)
            num_bytes = len(job) if isinstance(job, bytes) else 0
            if page and size + num_bytes > most.bytes:
                yield page
                page, size = [], 0
            page.append(job)
            size += num_bytes
        if page and (submission is None or len(page) >= most.jobs):
            yield page
            page, size = [], 0
    if page:
        yield page


def submission_of(body: Mapping[str, Any], options: Mapping[str, Any]) -> bytes:
    """One job in JSON. A key is made here so that a retry cannot become a second job.

    Raises `RequestError` if it cannot be written as JSON.
    """
    told = {name: plain(value) for name, value in options.items() if value is not None}
    return encode({"idempotency_key": str(uuid4())} | told | {"body": dict(body)})


def job_of(submission: Mapping[str, Any]) -> bytes | RequestError:
    """The same of one among many, or why it cannot be."""
    try:
        return submission_of(submission["body"], submission)
    except RequestError as error:
        return error
    except (KeyError, TypeError, ValueError, AttributeError):
        return RequestError('A submission is {"body": {…}, options…}.', param="body")
