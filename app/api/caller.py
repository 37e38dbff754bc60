"""Who calls: whose jobs a request is about, and what its key allows.

A handler takes `who: Who` and passes `who.tenant` on; see `app.api.wire.callers` for
where it is from.
"""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Final

from fastapi import Depends, Request
from starlette.exceptions import HTTPException

from app.api import rates
from app.keys import Scope
from app.store.tables import DEFAULT_TENANT


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose key came with a request. Another tenant's rows do not exist for it."""

    tenant: str
    scopes: frozenset[Scope]
    key_id: str | None = None  #: None where no key is asked for

    @property
    def actor(self) -> str:
        """As the log of what was done knows it."""
        return f"key:{self.key_id}" if self.key_id else "anybody"

    def need(self, scope: Scope) -> None:
        """Raises 403 unless its key has this scope."""
        if scope not in self.scopes:
            raise HTTPException(
                HTTPStatus.FORBIDDEN, f"This call takes a key with the scope `{scope}`."
            )


ANYBODY: Final = Caller(DEFAULT_TENANT, frozenset(Scope))
"""Whoever reaches an API that asks for no key."""


async def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller  # or it would not have come this far
    return caller


async def _who(request: Request, caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    is_read = request.method in ("GET", "HEAD")
    caller.need(Scope.READ if is_read else Scope.SUBMIT)
    if not is_read:
        await rates.count(request, caller.tenant)
    return caller


async def _who_reads(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    caller.need(Scope.READ)
    return caller


async def _who_administers(caller: Annotated[Caller, Depends(_caller)]) -> Caller:
    caller.need(Scope.ADMIN)
    return caller


Who = Annotated[Caller, Depends(_who)]
"""The caller of a route: with the scope `read` for GET, else with `submit`."""
WhoReads = Annotated[Caller, Depends(_who_reads)]
"""The same for a POST that only reads."""
WhoAdministers = Annotated[Caller, Depends(_who_administers)]
"""The same for what belongs to no tenant."""
