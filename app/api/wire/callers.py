"""At the door of the API: who may come in, before anything of a request is read but its head."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from http import HTTPStatus
from typing import Final

from fastapi import Request, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api import problems
from app.api.keyring import Keyring
from app.api.wire.raw_bodies import DRAIN_BYTES
from app.config.callers import HEADERS, refusal
from app.config.settings import ApiSettings
from app.errors import GristmillError, NoKey
from app.keys import is_shaped
from app.store.tenancy import NOBODY, acting_for

OPEN: Final = frozenset({"/health", "/healthz", "/readyz", "/docs", "/openapi.json"})
"""Need no key: health checks have none, and the documentation is the same everywhere."""
OPEN_FOLDER: Final = "/static-offline-docs/"
"""The documentation's scripts and styles."""

DRAIN_S: Final = 5.0
"""For how long a refused request's body is still taken off the wire."""

_BEARER: Final = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_HEADERS: Final = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]


class KnownCallers:
    """Refuses web pages of other origins and whoever has no valid key, where one is needed; of all
    others it says who they are (`app.api.caller`)."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, keyring: Keyring) -> None:
        self._app = app
        self._settings = settings
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_closed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"].extend(_HEADERS)
            await send(message)

        request = Request(scope)
        refused = self._of_a_foreign_page(request) or await self._without_key(request)
        if refused is None:
            caller = getattr(request.state, "caller", None)
            with acting_for(caller.tenant if caller else NOBODY):
                await self._app(scope, receive, send_closed)
            return
        await _drain(receive)
        await refused(scope, receive, send_closed)

    def _of_a_foreign_page(self, request: Request) -> Response | None:
        allowed = self._settings.allowed_hosts
        foreign = refusal(request.method, request.headers, allowed, "api.allowed_hosts")
        if foreign is None:
            return None
        error = HTTPException(foreign.status, foreign.detail, {"Connection": "close"})
        return problems.refused(request, error)

    async def _without_key(self, request: Request) -> Response | None:
        path = request.scope["path"]
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return None
        given = _key_of(request)
        try:
            request.state.caller = await self._keyring.caller(given)
        except NoKey as error:
            return problems.refused(request, _unauthorized(error, has_key=given is not None))
        except GristmillError as error:
            problem = problems.describe(error, instance=path)
            return problems.respond(problem, request, {"Connection": "close"})
        return None


def _key_of(request: Request) -> str | None:
    """The key that came with a request: of two the one that means to be ours."""
    bearer = _BEARER.fullmatch(request.headers.get("Authorization", ""))
    given = [bearer[1]] if bearer else []
    given += [each for each in (request.headers.get("x-api-key"),) if each]
    return next(filter(is_shaped, given), given[0] if given else None)


def _unauthorized(error: NoKey, *, has_key: bool) -> HTTPException:
    """As RFC 6750 has it."""
    why = f"{error} " if has_key else ""
    problem = ', error="invalid_token"' if has_key else ""
    return HTTPException(
        HTTPStatus.UNAUTHORIZED,
        f"{why}Send an API key as `Authorization: Bearer KEY` or `x-api-key: KEY`; "
        "`gristmill keys create` makes one.",
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
