"""The query of a URL: on our own paths only what the called route declares, and once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from fastapi import Request
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from app.api.envelopes import Door, door_of
from app.errors import RequestError
from app.requests.part import MAX_TOLD, printable


async def only_declared(request: Request) -> None:
    """Raise `RequestError` for a parameter that the route does not declare, or that comes twice.

    A dependency of every route. It reads what FastAPI knows of the route: the parameters of the
    handler and its dependencies, and families of them (`metadata[KEY]`) in its `openapi_extra`.
    Clients of other protocols send parameters of later versions, which are ignored.
    """
    if (
        not request.scope["query_string"]
        or door_of(request.url.path, request.headers) is not Door.OWN
    ):
        return
    route = request.scope["route"]
    assert isinstance(route, APIRoute)
    names, families = set(_names(route.dependant)), set(_families(route))
    for name, times in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in names and family_of(name) not in families:
            raise _unknown(name, sorted(names) + [f"{family}[KEY]" for family in sorted(families)])
        if times > 1:
            told = printable(name)
            raise RequestError(f"The parameter {told} is given {times} times.", param=told)


def family_of(name: str) -> str | None:
    """The `metadata` of `metadata[KEY]`; None for a plain name."""
    family, bracket, _ = name.partition("[")
    return family if bracket and name.endswith("]") else None


def members_of(family: str, request: Request) -> dict[str, str]:
    """Key and value of each `family[KEY]=VALUE` in the query."""
    start = len(family) + 1
    return {
        name[start:-1]: value
        for name, value in request.query_params.items()
        if family_of(name) == family
    }


def family(name: str, description: str, examples: dict[str, str]) -> dict[str, Any]:
    """OpenAPI of such a family of parameters, for a route's `openapi_extra`."""
    return {
        "name": name,
        "in": "query",
        "required": False,
        "description": description,
        "style": "deepObject",
        "explode": True,
        "schema": {"type": "object", "additionalProperties": {"type": "string"}},
        "example": examples,
    }


def _names(dependant: Dependant) -> Iterator[str]:
    for field in dependant.query_params:
        yield field.alias
    for each in dependant.dependencies:
        yield from _names(each)


def _families(route: APIRoute) -> Iterator[str]:
    for parameter in (route.openapi_extra or {}).get("parameters", ()):
        yield parameter["name"]


def _unknown(name: str, known: list[str]) -> RequestError:
    told = printable(name)
    if not known:
        return RequestError(f"Unknown parameter {told}: this call takes none.", param=told)
    near = get_close_matches(name[:MAX_TOLD], known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}?" if near else f"One of: {', '.join(known)}."
    return RequestError(f"Unknown parameter {told}. {hint}", param=told)
