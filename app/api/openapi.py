"""The OpenAPI document: FastAPI's own, and the schemas of bodies that handlers read themselves."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.routing import Route

from app.api import envelopes
from app.api.anthropic.schemas_batches import MessageBatchBody
from app.api.envelopes import Door, door_of
from app.api.jobs.schemas_many import CancelRequest, StatusRequest
from app.api.openai.schemas_batches import BatchBody
from app.api.openai.schemas_stored_chats import MetadataChange
from app.api.openai.schemas_webhooks import EndpointChange, NewEndpoint, Rotation, TestedEvent
from app.api.problems import documented
from app.api.schemas import BulkRequest
from app.intake.submit import Submission
from app.requests.bodies import BODIES

_SCHEMAS: Final[tuple[type[BaseModel], ...]] = (
    *envelopes.SCHEMAS.values(),
    Submission,
    BulkRequest,
    StatusRequest,
    CancelRequest,
    NewEndpoint,
    EndpointChange,
    Rotation,
    TestedEvent,
    BatchBody,
    MetadataChange,
    MessageBatchBody,
    *BODIES.values(),
)


_REFUSALS: Final = {
    door: {
        str(status): answer
        for status, answer in documented(
            HTTPStatus.BAD_REQUEST,
            HTTPStatus.UNAUTHORIZED,
            HTTPStatus.FORBIDDEN,
            HTTPStatus.MISDIRECTED_REQUEST,
            door=door,
        ).items()
    }
    for door in Door
}
"""Of every operation: see `app.api.wire.query` and `app.api.wire.callers`."""
_KEYS: Final = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, as `gristmill keys create` makes one.",
    },
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same key, as other clients send it.",
    },
}


def install(app: FastAPI) -> None:
    """Serve the completed document, made and written down once: it is large, and anybody may ask.

    FastAPI's own route would write it down for each caller.
    """
    app.openapi = lambda: _document(app)  # type: ignore[method-assign]
    assert app.openapi_url
    routes = app.router.routes
    (own,) = [route for route in routes if getattr(route, "path", None) == app.openapi_url]
    routes[routes.index(own)] = Route(
        app.openapi_url, partial(_serve, app), include_in_schema=False
    )


async def _serve(app: FastAPI, _: Request) -> Response:
    return Response(text(app), media_type="application/json")


def text(app: FastAPI) -> bytes:
    """The document as it is served; making it takes a tenth of a second, the first time."""
    if not hasattr(app.state, "openapi_text"):
        app.state.openapi_text = JSONResponse(app.openapi()).body
    written: bytes = app.state.openapi_text
    return written


def _document(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title, version=app.version, summary=app.summary, routes=app.routes
        )
        _, own = models_json_schema(
            [(model, "validation") for model in _SCHEMAS],
            ref_template="#/components/schemas/{model}",
        )
        schemas = document["components"]["schemas"]
        schemas.update(own["$defs"])
        document["components"]["securitySchemes"] = _KEYS
        document["security"] = [{}, *({name: []} for name in _KEYS)]  # {}: where none is needed
        for unused in ("HTTPValidationError", "ValidationError"):
            schemas.pop(unused, None)
        for path, operations in document["paths"].items():
            for operation in operations.values():
                # FastAPI documents its own 422 for parameters; here that is a 400.
                refusals = _REFUSALS[door_of(path, {})]
                answers = operation["responses"] = refusals | operation["responses"]
                if "HTTPValidationError" in str(answers.get("422", "")):
                    del answers["422"]
        app.openapi_schema = document
    return app.openapi_schema
