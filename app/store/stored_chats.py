"""Stored chat completions: chats that were sent with `store`, once they are completed, as long as
their answers are kept. They are results like all others; of a page's ids all are told at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, select, text, tuple_

from app.store import lists
from app.store.encoding import UNREADABLE
from app.store.tables import DEFAULT_TENANT, results


@dataclass(frozen=True, slots=True)
class StoredChat:
    job_id: UUID
    metadata: dict[str, str]
    response: dict[str, Any]
    request: dict[str, Any] | None  #: None once it was removed
    format: int  #: of the request


_IS_ONE: Final = "results.stored AND results.response IS NOT NULL AND results.error_code IS NULL"
"""As the index `results_stored` has it."""

# Those of some jobs, each with what it was asked.
_FIND: Final = text(f"""
    SELECT
        results.job_id, results.metadata, results.response, requests.request, results.format
    FROM job_keys
    JOIN results ON results.created_at = job_keys.created_at AND results.job_id = job_keys.id
    LEFT JOIN requests
        ON requests.created_at = job_keys.created_at AND requests.job_id = job_keys.id
    WHERE job_keys.id = ANY(CAST(:ids AS uuid[])) AND job_keys.tenant = :tenant AND {_IS_ONE}
""")

# Give one other labels.
_RELABEL: Final = text(f"""
    UPDATE results SET metadata = CAST(:metadata AS jsonb) FROM job_keys
    WHERE job_keys.id = :job_id AND job_keys.tenant = :tenant
        AND results.created_at = job_keys.created_at AND results.job_id = job_keys.id AND {_IS_ONE}
""")


def find(
    connection: Connection, ids: Sequence[UUID], *, tenant: str = DEFAULT_TENANT
) -> list[StoredChat]:
    """Those that this tenant has, in the order of `ids`; without those whose answers cannot be
    read."""
    found = {
        row.job_id: StoredChat(
            row.job_id,
            row.metadata,
            row.response,
            None if row.request is UNREADABLE else row.request,
            row.format,
        )
        for row in connection.execute(_FIND, {"ids": list(ids), "tenant": tenant})
        if row.response is not UNREADABLE and row.metadata is not UNREADABLE
    }
    return [found[id] for id in ids if id in found]


def page(
    connection: Connection,
    *,
    model: str | None = None,
    metadata: Mapping[str, str] = {},
    oldest_first: bool = True,
    after: UUID | None = None,
    limit: int,
    tenant: str = DEFAULT_TENANT,
) -> list[UUID]:
    """The ids of a tenant's stored chats with this model and these labels, beginning after `after`,
    which may have been deleted meanwhile. Raises `JobNotFound` if there never was such a job."""
    query = select(results.c.job_id).where(results.c.tenant == tenant, text(_IS_ONE))
    if model is not None:
        query = query.where(results.c.model == model)
    if metadata and lists.are_few(connection, metadata, tenant):
        some = lists.labelled(metadata, tenant)
        is_it = (results.c.job_id == some.c.id) & (results.c.created_at == some.c.created_at)
        query = query.join(some, is_it)
    elif metadata:
        query = query.where(results.c.metadata.contains(metadata))
    place = (results.c.created_at, results.c.job_id)
    if after is not None:
        here, mark = tuple_(*place), lists.place(connection, after, tenant)
        query = query.where(here > mark if oldest_first else here < mark)
    order = [each.asc() if oldest_first else each.desc() for each in place]
    return list(connection.scalars(query.order_by(*order).limit(limit)))


def relabel(
    connection: Connection,
    job_id: UUID,
    metadata: Mapping[str, str],
    *,
    tenant: str = DEFAULT_TENANT,
) -> StoredChat | None:
    """Give one other labels in place of its own; None if this tenant has no such one."""
    given = {"job_id": job_id, "metadata": json.dumps(dict(metadata)), "tenant": tenant}
    connection.execute(_RELABEL, given)
    return next(iter(find(connection, [job_id], tenant=tenant)), None)
