"""Is the process up, can it take jobs, and what do the numbers say."""

from __future__ import annotations

from typing import Final

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from app.api.problems import RETRY_AFTER_UNAVAILABLE_S
from app.api.schemas import Check, Readiness
from app.api.services import Here, Services
from app.errors import SchemaError, Unavailable

router = APIRouter(tags=["health"])

PLAIN_TEXT: Final = {"content": {"text/plain": {"schema": {"type": "string"}}}}


@router.get("/healthz", summary="Is the process up", responses={200: PLAIN_TEXT})
async def healthz() -> Response:
    """Answers `ok` as long as the process does; looks at nothing else."""
    return Response("ok\n", media_type="text/plain")


@router.get(
    "/readyz",
    summary="Can jobs be taken",
    responses={503: {"model": Readiness, "description": "No jobs can be taken now."}},
)
async def readyz(here: Here, response: Response) -> Readiness:
    """503 while Postgres is away or its schema is not this version's. Without Redis the API is
    `degraded` and still ready: rows are written, and rescue sends their messages later."""
    readiness = await here.run(_readiness, here)
    if readiness.status == "unavailable":
        response.status_code = 503
        response.headers["Retry-After"] = str(RETRY_AFTER_UNAVAILABLE_S)
    return readiness


@router.get("/metrics", summary="Metrics for Prometheus", responses={200: PLAIN_TEXT})
async def metrics(here: Here) -> Response:
    """Jobs by state and model, queues, submissions and request durations."""
    text = await here.run(here.metrics.text)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


def _readiness(here: Services) -> Readiness:
    checks = _check_postgres(here) | _check_redis(here)
    if not (checks["postgres"].ok and checks["schema"].ok):
        return Readiness(status="unavailable", checks=checks)
    return Readiness(status="ready" if checks["redis"].ok else "degraded", checks=checks)


def _check_postgres(here: Services) -> dict[str, Check]:
    try:
        here.database.check_schema()
    except SchemaError as error:
        return {"postgres": Check(ok=True), "schema": Check(ok=False, detail=error.message)}
    except Unavailable:
        away = "Postgres does not answer; see database.url and the server's log."
        unknown = "Not known while Postgres is away."
        return {
            "postgres": Check(ok=False, detail=away),
            "schema": Check(ok=False, detail=unknown),
        }
    return {"postgres": Check(ok=True), "schema": Check(ok=True)}


def _check_redis(here: Services) -> dict[str, Check]:
    try:
        here.publisher.queue_lengths(())
    except Unavailable:
        detail = "Redis does not answer; jobs are stored, and their messages are sent later."
        return {"redis": Check(ok=False, detail=detail)}
    return {"redis": Check(ok=True)}
