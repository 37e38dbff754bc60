"""What the official SDKs offer: each method of each resource, and the HTTP calls that it makes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import anthropic
import openai

CLIENTS: Final = {
    "openai": lambda: openai.OpenAI(api_key="none", base_url="http://127.0.0.1:1/v1"),
    "anthropic": lambda: anthropic.Anthropic(api_key="none", base_url="http://127.0.0.1:1"),
}
_CALL: Final = re.compile(
    r'self\._(get_api_list|get|post|patch|put|delete)\(\s*(?:path_template\(\s*)?f?"([^"?]+)'
)


@dataclass(frozen=True, slots=True)
class Method:
    name: str  #: as it is called: `chat.completions.create`
    calls: tuple[tuple[str, str], ...]  #: method and path; none if it calls other methods
    parameters: frozenset[str]

    @property
    def resource(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def word(self) -> str:
        return self.name.rpartition(".")[2]


def methods(sdk: str) -> list[Method]:
    """Those of the client and of all below it."""
    return list(_of(CLIENTS[sdk](), ()))


def calls_of_others(sdk: str, names: Collection[str]) -> list[tuple[str, str]]:
    """HTTP calls that methods with other names make, and none of these; ids in them are `a`."""
    given: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    for method in methods(sdk):
        calls = {(verb, re.sub(r"{[^}]+}", "a", path)) for verb, path in method.calls}
        given[method.name in names] |= calls
    return sorted(given[False] - given[True])


def _of(resource: Any, names: tuple[str, ...]) -> Iterator[Method]:
    kind = type(resource)
    for name in dir(kind):
        member = inspect.getattr_static(kind, name)
        if name.startswith(("_", "with_")):
            continue
        if isinstance(member, property | cached_property):
            below = getattr(resource, name)
            if "resources" in type(below).__module__:
                yield from _of(below, (*names, name))
        elif names and callable(_plain(member)):
            function = inspect.unwrap(_plain(member))
            parameters = frozenset(inspect.signature(function).parameters)
            yield Method(".".join((*names, name)), tuple(_calls(function)), parameters)


def _plain(member: Any) -> Any:
    return member.__func__ if isinstance(member, staticmethod) else member


def _calls(function: Callable[..., Any]) -> Iterator[tuple[str, str]]:
    for verb, path in _CALL.findall(inspect.getsource(function)):
        method = "GET" if verb == "get_api_list" else verb.upper()
        yield method, path if path.startswith("/v1/") else f"/v1{path}"
