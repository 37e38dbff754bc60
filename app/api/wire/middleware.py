"""Around every request: an id, a duration, and an answer even to a bug."""

from __future__ import annotations

import logging
import re
import time
import traceback
from typing import Final
from uuid import uuid4

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems, rates
from app.api.metrics import Metrics

log = logging.getLogger(__name__)

CLIENT_IS_GONE: Final = 499
"""In the metrics alone, as other servers count it: there is nobody to answer."""

MAX_FIELDS: Final = 100
"""Header fields of a request. Each takes hundreds of bytes here, as long as the request lasts."""

REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestScope:
    """Gives each request its `x-request-id` (the caller's own, if it is a plain word), for which
    Anthropic's clients look in `request-id`, measures it, and turns what nobody caught into a 500
    that leaks nothing."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        given = request.headers.get("x-request-id", "")
        request.state.request_id = given if REQUEST_ID.fullmatch(given) else uuid4().hex
        began = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = request.state.request_id.encode()
                message["headers"] += [(b"x-request-id", name), (b"request-id", name)]
                message["headers"] += rates.headers_of(request)
            await send(message)

        try:
            if len(scope["headers"]) > MAX_FIELDS:
                await problems.too_many_fields(request)(scope, receive, send_with_id)
            else:
                await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            status = status or CLIENT_IS_GONE
        except Exception as error:
            _log_without_values(error, request)
            if not status:
                await problems.internal_error(request)(scope, receive, send_with_id)
        finally:
            path = getattr(scope.get("route"), "path", "unknown")
            self._metrics.observe_request(request.method, path, status, time.perf_counter() - began)


def _log_without_values(error: Exception, request: Request) -> None:
    """Where a bug is, without the text of the error: it may quote a prompt."""
    places = "".join(traceback.format_tb(error.__traceback__))
    log.error(
        "%s was not caught.\n%s",
        type(error).__name__,
        places,
        extra={"action": "request_failed", "request_id": request.state.request_id},
    )
