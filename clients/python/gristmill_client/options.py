"""What may be said about a job when it is submitted, and about jobs that are asked for."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Required, TypedDict


class Options(TypedDict, total=False):
    """How a job is to be run; see the API's documentation of POST /v1/jobs."""

    url: str
    priority: int  #: 0, served first, to 9
    not_before: datetime
    deadline: datetime
    stream_events: bool  #: its tokens can be followed as they come, by `stream`
    metadata: dict[str, str]
    webhook_url: str  #: told of its end, by a signed POST
    idempotency_key: str  #: the same key and body once more are the same job


class Submission(Options, total=False):
    """A job to submit among many: the body of an OpenAI-style call, and options."""

    body: Required[Mapping[str, Any]]


class Chosen(TypedDict, total=False):
    """Jobs to cancel: those for which all of this holds. Times are those of acceptance."""

    state: str
    model: str
    metadata: dict[str, str]
    since: datetime  #: at or after
    until: datetime  #: before


class Filters(Chosen, total=False):
    """Jobs to list: those for which all of this holds."""

    error_code: str
    idempotency_key: str


class Usage(TypedDict, total=False):
    """Which usage is asked for; see the API's documentation of GET /v1/usage."""

    by: str  #: keys of the groups, as in day,model,metadata.customer
    since: datetime  #: jobs that ended then or later: a full hour
    until: datetime  #: or before
    zone: str  #: whose days and months, as in Europe/Berlin
    top: int  #: groups that are told apart
    model: str
    tenant: str
    priority: int
    metadata: dict[str, str]


def plain(value: Any) -> Any:
    """An option as JSON and query strings have it: times in RFC 3339."""
    return value.isoformat() if isinstance(value, datetime) else value


def query_of(filters: Mapping[str, Any]) -> dict[str, Any]:
    """Filters as the query of a list."""
    given = {name: plain(value) for name, value in filters.items() if value not in (None, "", {})}
    metadata = given.pop("metadata", {})
    return given | {f"metadata[{key}]": value for key, value in metadata.items()}
