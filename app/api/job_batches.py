"""Batches as both doors find, list and cancel them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from app.api.services import Services
from app.batches import Door, id_in
from app.errors import BatchKeyConflict, RequestError
from app.requests.part import printable
from app.store import job_batches
from app.store.isolation import Connection
from app.store.job_batches import BatchView, NewBatch


def keep(connection: Connection, batch: NewBatch) -> tuple[BatchView, bool]:
    """The batch, and whether it is new. Raises `BatchKeyConflict`."""
    view, is_new = job_batches.create(connection, batch)
    if view.fingerprint != batch.fingerprint:
        raise BatchKeyConflict()
    return view, is_new


def cursor(door: Door, name: str | None, param: str) -> UUID | None:
    """The batch that a page begins behind. Raises `RequestError`."""
    found = id_in(door, name) if name else None
    if name and found is None:
        raise RequestError(f"'{param}' must be the id of a batch.", param=param)
    return found


async def listed(
    here: Services,
    door: Door,
    tenant: str,
    limit: int,
    after: UUID | None,
    before: UUID | None = None,
) -> list[BatchView]:
    given: dict[str, Any] = {"limit": limit, "after": after, "before": before}
    return await here.query(job_batches.listed, tenant=tenant, door=door, **given)


async def find(here: Services, door: Door, tenant: str, name: str) -> BatchView:
    """Raises `BatchNotFound`, as all below do."""
    return await here.query(job_batches.find, **_asked(door, tenant, name))


async def cancel(here: Services, door: Door, tenant: str, name: str) -> BatchView:
    return await here.commit(job_batches.cancel, **_asked(door, tenant, name))


async def delete(here: Services, door: Door, tenant: str, name: str) -> None:
    await here.commit(job_batches.delete, **_asked(door, tenant, name))


def _asked(door: Door, tenant: str, name: str) -> dict[str, Any]:
    """What a batch is looked for by."""
    return {
        "batch_id": id_in(door, name),
        "tenant": tenant,
        "door": door,
        "name": printable(name),
    }
