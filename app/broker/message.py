"""A message: what it holds, and its bytes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID, uuid4

from app.jobs import DEFAULT_TENANT, Kind

TASK_NAMES: Final = {kind: f"inference.{kind}" for kind in Kind}
TASKS: Final = {name: kind for kind, name in TASK_NAMES.items()} | {"inference.score": Kind.RERANK}
"""The tasks that a message may name, and the kind of each."""

STREAM_HEADER: Final = "stream_events"
"""Whether the job's tokens are told as they come; for services that send messages themselves."""
MORE_HEADER: Final = "more"
"""Header with the ids of further jobs that a message wakes, whose requests are in their rows."""
JOBS_HEADER: Final = "num_jobs"
"""Header with the number of all its jobs, where a server finds it without parsing."""
MAX_MORE: Final = 999

TENANT_HEADER: Final = "tenant"
"""Header with the tenant whose list a message goes into; without it, into that of all."""

FORMAT_HEADER: Final = "request_format"
"""Header with the version of the format of the request inside; the first one when left out."""


@dataclass(frozen=True, slots=True)
class Message:
    """A wake-up for one job. `request` is the body as it was sent, or None: it is in the row."""

    job_id: UUID
    kind: Kind
    model: str
    request: dict[str, Any] | None = None
    url: str | None = None
    priority: int = 0
    tenant: str = DEFAULT_TENANT


def num_jobs(headers: Mapping[str, Any]) -> int:
    """How many jobs a message wakes."""
    more = headers.get(MORE_HEADER)
    return 1 + len(more) if isinstance(more, list) else 1


def raw_message(
    job_id: UUID | str, kind: Kind, request: dict[str, Any], *, queue: str, priority: int = 0
) -> bytes:
    """The smallest message that is accepted: LPUSH it to `Layout.key(queue, priority)`."""
    body = json.dumps([[], request, {}]).encode()
    envelope = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "any", "task": TASK_NAMES[kind], "id": str(job_id)},
        "properties": {
            "delivery_tag": str(uuid4()),
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": priority,
        },
    }
    return json.dumps(envelope).encode()
