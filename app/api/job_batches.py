"""Batches as both doors find, list and cancel them."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from app.api.services import Services
from app.batches import Door, id_in
from app.errors import BatchKeyConflict, RequestError
from app.intake.decision import Decision
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


def listed(
    here: Services,
    door: Door,
    tenant: str,
    limit: int,
    after: UUID | None,
    before: UUID | None = None,
) -> list[BatchView]:
    with here.database.begin() as connection:
        return job_batches.listed(
            connection, tenant=tenant, door=door, limit=limit, after=after, before=before
        )


def find(here: Services, door: Door, tenant: str, name: str) -> BatchView:
    """Raises `BatchNotFound`, as all below do."""
    with here.database.begin() as connection:
        return job_batches.find(connection, tenant=tenant, **_asked(door, name))


def cancel(decision: Decision, here: Services, door: Door, tenant: str, name: str) -> BatchView:
    with here.database.begin() as connection:
        view = job_batches.cancel(connection, tenant=tenant, **_asked(door, name))
        decision.commit()
    return view


def delete(decision: Decision, here: Services, door: Door, tenant: str, name: str) -> None:
    with here.database.begin() as connection:
        job_batches.delete(connection, tenant=tenant, **_asked(door, name))
        decision.commit()


def _asked(door: Door, name: str) -> dict[str, Any]:
    """What a batch is looked for by."""
    return {"batch_id": id_in(door, name), "door": door, "name": printable(name)}
