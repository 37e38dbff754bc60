"""Each method of the official SDKs is in the pages' tables, as served or not; and it is so."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest

from app.api.app import create_app
from app.config.settings import Settings
from tests import sdk_calls
from tests.pages import ROOT
from tests.sdk_methods import Method, methods

ROW: Final = re.compile(r"^\| `client\.([a-z_.]+)` \|(.*?)\|(.*?)\|$", re.MULTILINE)
WORD: Final = re.compile(r"`([a-z_]+)`")
SDKS: Final = ("openai", "anthropic")


def table(sdk: str) -> Iterator[tuple[str, bool]]:
    """Methods that a page tells of, and whether they are served."""
    page = (ROOT / "docs" / f"{sdk}.md").read_text()
    _, _, rest = page.partition("<!-- methods -->")
    for resource, served, others in ROW.findall(rest.partition("<!-- end: methods -->")[0]):
        for word in WORD.findall(served):
            yield f"{resource}.{word}", True
        for word in WORD.findall(others):
            yield f"{resource}.{word}", False


@pytest.fixture
def document(make_settings: Callable[..., Settings]) -> dict[str, Any]:
    """Of an API of which nothing that it would connect to is there."""
    away = {"database": {"url": "postgresql://127.0.0.1:1/none"}}
    return create_app(make_settings(**away, broker={"url": "redis://127.0.0.1:1/0"})).openapi()


@pytest.fixture
def operations(document: dict[str, Any]) -> set[tuple[str, str]]:
    """Method and path of what is served."""
    return {
        (method.upper(), nameless(path))
        for path, found in document["paths"].items()
        for method in found
    }


def nameless(path: str) -> str:
    return re.sub(r"{\w+}", "{}", path)


@pytest.mark.parametrize("sdk", SDKS)
def test_the_table_has_every_method_of_the_resources_that_it_names(sdk: str) -> None:
    told = dict(table(sdk))
    resources = {name.rpartition(".")[0] for name in told}

    theirs = {each.name for each in methods(sdk) if each.resource in resources}

    assert len(list(table(sdk))) == len(told)
    assert set(told) == theirs


@pytest.mark.parametrize("sdk", SDKS)
def test_what_is_told_as_served_is_and_nothing_else(
    sdk: str, operations: set[tuple[str, str]]
) -> None:
    told = dict(table(sdk))

    def is_served(method: Method) -> bool:
        """Methods that call others are as good as these."""
        return all(
            (verb, nameless(path)) in operations and (sdk, path.split("/")[2]) not in CLOSED
            for verb, path in method.calls
        )

    wrong = {
        each.name
        for each in methods(sdk)
        if each.calls and is_served(each) != told.get(each.name, False)
    }
    assert wrong == set()


@pytest.mark.parametrize("sdk", SDKS)
def test_what_is_asked_in_a_query_is_known_or_told_as_ignored(
    sdk: str, document: dict[str, Any]
) -> None:
    found = {}
    for method in methods(sdk):
        if method.name in CALLED[sdk] and method.calls and method.calls[0][0] == "GET":
            path = nameless(method.calls[0][1])
            [served] = [it["get"] for at, it in document["paths"].items() if nameless(at) == path]
            known = {each["name"] for each in served.get("parameters", ())}
            given = {name for name in method.parameters if f"{{{name}}}" not in method.calls[0][1]}
            found[method.name] = given - known - OPTIONS

    unknown = set().union(*found.values())
    assert len(found) > 5 and unknown == IGNORED[sdk]
    differs = (ROOT / "docs" / f"{sdk}.md").read_text().partition("## What differs")[2]
    assert all(f"`{name}`" in differs for name in unknown)


OPTIONS: Final = {"self", "extra_headers", "extra_query", "extra_body", "timeout", "betas"}
"""Of every method; betas are a header."""
IGNORED: Final = {
    "openai": {"include", "include_obfuscation"},
    "anthropic": {"lifecycle", "workspace_id"},
}


@pytest.mark.parametrize("sdk", SDKS)
def test_each_method_that_is_served_is_called_by_a_test(sdk: str) -> None:
    served = {name for name, is_served in table(sdk) if is_served}

    assert served == CALLED[sdk]


CALLED: Final = {
    "openai": sdk_calls.OPENAI.keys() | sdk_calls.HOOKS,
    "anthropic": sdk_calls.ANTHROPIC.keys(),
}
CLOSED: Final = {("anthropic", "files")}
"""What the other SDK has under the same paths."""
