"""At the door of the API: who may come in, before anything of a request is read but its head."""

from __future__ import annotations

import asyncio
import hmac
import re
from contextlib import suppress
from http import HTTPStatus
from typing import Final

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.api.raw_bodies import DRAIN_BYTES
from app.config.callers import HEADERS, refusal
from app.config.settings import ApiSettings

OPEN: Final = frozenset({"/health", "/healthz", "/readyz", "/docs", "/openapi.json"})
"""Need no token: health checks have none, and the documentation is the same everywhere."""
OPEN_FOLDER: Final = "/static-offline-docs/"
"""The documentation's scripts and styles."""

DRAIN_S: Final = 5.0
"""For how long a refused request's body is still taken off the wire."""

_BEARER: Final = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_HEADERS: Final = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class KnownCallers:
    """Refuses web pages of other origins and, where a token is set, whoever does not send it."""

    def __init__(self, app: ASGIApp, settings: ApiSettings) -> None:
        self._app = app
        self._settings = settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].extend(_HEADERS)
            await send(message)

        request = Request(scope)
        refused = self._refused(request)
        if refused is None:
            await self._app(scope, receive, send_closed)
            return
        await _drain(receive)
        await problems.refused(request, refused)(scope, receive, send_closed)

    def _refused(self, request: Request) -> HTTPException | None:
        allowed = self._settings.allowed_hosts
        foreign = refusal(request.method, request.headers, allowed, "api.allowed_hosts")
        if foreign is not None:
            return HTTPException(foreign.status, foreign.detail, {"Connection": "close"})
        path = request.scope["path"]
        if not self._settings.token or path in OPEN or path.startswith(OPEN_FOLDER):
            return None
        return self._lacks_token(request)

    def _lacks_token(self, request: Request) -> HTTPException | None:
        """As RFC 6750 has it."""
        given = _BEARER.fullmatch(request.headers.get("Authorization", ""))
        if given and hmac.compare_digest(given[1].encode(), self._settings.token.encode()):
            return None
        problem = ', error="invalid_token"' if given else ""
        return HTTPException(
            HTTPStatus.UNAUTHORIZED,
            "Send the token of the setting api.token, as `Authorization: Bearer TOKEN`"
            f"{'; the one that was sent is another' if given else ''}.",
            {"WWW-Authenticate": f'Bearer realm="gristmill"{problem}', "Connection": "close"},
        )


async def _drain(receive: Receive) -> None:
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(DRAIN_S):
            while size <= DRAIN_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body"):
                    return
