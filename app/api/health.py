"""Is the process up, can it take jobs, and what do the numbers say."""

from __future__ import annotations

import logging
from typing import Final

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from app.api.caller import WhoAdministers
from app.api.problems import RETRY_AFTER_UNAVAILABLE_S
from app.api.schemas import Check, Readiness
from app.api.services import Here
from app.errors import GristmillError, SchemaError, Unavailable

router = APIRouter(tags=["health"])

log = logging.getLogger(__name__)

NOT_KEPT: Final = {"Cache-Control": "no-store"}
PLAIN_TEXT: Final = {"content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/healthz", summary="Is the process up", responses={200: PLAIN_TEXT})
@router.head("/healthz", include_in_schema=False)
@router.get("/health", include_in_schema=False)  # where vLLM has it, and load generators look
@router.head("/health", include_in_schema=False)
async def healthz() -> Response:
    """Answers `ok` as long as the process does; looks at nothing else."""
    return Response("ok\n", media_type="text/plain", headers=NOT_KEPT)


@router.get(
    "/readyz",
    summary="Can jobs be taken",
    responses={503: {"model": Readiness, "description": "No jobs can be taken now."}},
)
@router.head("/readyz", include_in_schema=False)
async def readyz(here: Here, response: Response) -> Readiness:
    """Tries what a submission does, once a second at most.

    503 while Postgres does not take a job: it is away, only reads, or its schema is not this
    version's. While Redis takes no message the API is `degraded` and still ready: rows are written,
    and rescue sends their messages later.
    """
    here.redis.begin()  # both at once, and without a task for each who asks
    refused, unsent = await here.postgres.error(), await here.redis.error()
    readiness = _readiness(refused, unsent)
    response.headers.update(NOT_KEPT)
    if readiness.status == "unavailable":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_UNAVAILABLE_S)
    return readiness


@router.get("/metrics", summary="Metrics for Prometheus", responses={200: PLAIN_TEXT})
async def metrics(here: Here, _: WhoAdministers) -> Response:
    """Jobs by state and model, queues, submissions and request durations; a second old at most."""
    return Response(await here.scrape.found(), headers={"Content-Type": CONTENT_TYPE_LATEST})


def _readiness(refused: Exception | None, unsent: Exception | None) -> Readiness:
    checks = _check_postgres(refused)
    checks["redis"] = Check(ok=unsent is None, detail=_redis_detail(unsent))
    if refused is not None:
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="degraded" if unsent else "ready", checks=checks)


def _check_postgres(refused: Exception | None) -> dict[str, Check]:
    if refused is None:
        return {"postgres": Check(ok=True), "schema": Check(ok=True)}
    if isinstance(refused, SchemaError):
        return {"postgres": Check(ok=True), "schema": Check(ok=False, detail=refused.message)}
    why = refused if isinstance(refused, GristmillError) else type(refused).__name__
    log.warning("No job can be taken: %s", why, extra={"action": "not_ready"})
    return {
        "postgres": Check(ok=False, detail=_POSTGRES_AWAY),
        "schema": Check(ok=False, detail="Not known while Postgres takes no jobs."),
    }


_POSTGRES_AWAY: Final = (
    "Postgres does not answer, or takes no jobs; see database.url and the server's log."
)


def _redis_detail(unsent: Exception | None) -> str | None:
    if unsent is None:
        return None
    said = unsent.message if isinstance(unsent, Unavailable) else "Redis does not answer."
    return f"{said} Jobs are stored, and their messages are sent later."
