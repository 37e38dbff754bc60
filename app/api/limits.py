"""/v1/limits: how much is taken here."""

from __future__ import annotations

from fastapi import APIRouter

from app.api.caller import Who
from app.api.jobs.schemas_many import MAX_IDS, MAX_IDS_FULL
from app.api.schemas import MAX_PAGE, Limits, QueueLimits
from app.api.services import Here
from app.requests.json_text import MAX_PARTS

router = APIRouter(prefix="/v1/limits", tags=["limits"])


@router.get("", summary="Tell the limits")
async def limits(here: Here, _: Who) -> Limits:
    """How much this API takes, and how full its queue is. What each model takes is in /v1/models.

    `queue` is as last counted, mostly less than a second ago.
    """
    api = here.settings.api
    queued = await here.read(here.submitter.queued)
    return Limits(
        max_body_bytes=api.max_body_bytes,
        max_parts=MAX_PARTS,
        max_bulk_bytes=api.max_bulk_bytes,
        max_bulk_items=api.max_bulk_items,
        max_ids=MAX_IDS,
        max_ids_full=MAX_IDS_FULL,
        max_page=MAX_PAGE,
        max_wait_s=api.max_wait_s,
        max_long_polls=api.max_long_polls,
        long_polls=here.waiters.num_waiting,
        max_streams=api.max_streams,
        streams=here.listeners.num_listening,
        queue=QueueLimits(
            max_jobs=api.max_queued_jobs,
            max_tokens=api.max_queued_tokens,
            jobs=queued.jobs,
            tokens=queued.tokens,
        ),
    )
