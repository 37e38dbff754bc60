"""No parameter is ignored: what a route does not declare, or gets twice, is refused by its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st

from app.api import keyring
from app.api.app import create_app
from app.api.envelopes import Door, door_of
from app.api.wire import query
from app.config.settings import Settings
from app.errors import RequestError

ID = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "any_made", lambda _: False)


@pytest.fixture(scope="module")
def app() -> FastAPI:
    """The application; nothing it would connect to is there: what is refused is refused before."""
    return create_app(
        Settings(
            database={"url": "postgresql://nobody@127.0.0.1:1/none"},
            broker={"url": "redis://127.0.0.1:1/0"},
            models={"stub": {"source": "stub", "kind": "generate", "engine": "stub"}},
        )
    )


def calls(app: FastAPI) -> Iterator[tuple[str, str, list[str]]]:
    """Every call of the API: method, path, and the names that its documentation declares."""
    for path, operations in app.openapi()["paths"].items():
        for method, operation in operations.items():
            told = [each for each in operation.get("parameters", ()) if each["in"] == "query"]
            names = [
                f"{each['name']}[a]" if each.get("style") == "deepObject" else each["name"]
                for each in told
            ]
            yield method.upper(), path.replace("{job_id}", ID), names


def send(app: FastAPI, method: str, path: str, pairs: list[tuple[str, str]]) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.request(method, path, params=pairs)

    return asyncio.run(go())


def test_every_call_refuses_a_parameter_that_it_does_not_know(app: FastAPI) -> None:
    for method, path, names in calls(app):
        answer = send(app, method, path, [("surprise", "1")])

        if door_of(path, {}) is not Door.OWN:  # it knows nothing of what clients may send
            assert answer.status_code != 400 or "surprise" not in answer.text
            continue
        problem = answer.json()
        assert (answer.status_code, problem["param"]) == (400, "surprise"), f"{method} {path}"
        assert "none" in problem["detail"] if not names else names[0][:5] in problem["detail"]


def test_every_call_refuses_a_parameter_that_comes_twice(app: FastAPI) -> None:
    for method, path, names in calls(app):
        for name in names if door_of(path, {}) is Door.OWN else ():
            answer = send(app, method, path, [(name, "1"), (name, "2")])

            assert (answer.status_code, answer.json()["param"]) == (400, name), f"{method} {path}"
            assert "2 times" in answer.json()["detail"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("stat", "state"), ("Model", "model"), ("metadata.customer", "metadata[KEY]"), ("wait", "")],
)
def test_the_nearest_name_is_told(app: FastAPI, name: str, near: str) -> None:
    detail = send(app, "GET", "/v1/jobs", [(name, "1")]).json()["detail"]

    assert f"Did you mean {near}?" in detail if near else "One of: after, " in detail


@given(name=st.text(max_size=300))
def test_any_name_is_refused_in_one_short_line(name: str) -> None:
    error = query._unknown(name, ["state", "model"])

    assert isinstance(error, RequestError) and error.param is not None
    assert len(error.param) <= query.MAX_TOLD and error.message.isprintable()


@given(key=st.text(max_size=70))
def test_a_key_of_a_family_may_be_any_text(key: str) -> None:
    assert query.family_of(f"metadata[{key}]") == "metadata"


def test_the_members_of_a_family_are_read_by_key() -> None:
    scope = {"type": "http", "query_string": b"metadata[a]=1&metadata%5Bb%5D%5D=x%20y&state=queued"}

    assert query.members_of("metadata", Request(scope)) == {"a": "1", "b]": "x y"}


def test_a_list_is_filtered_by_what_metadata_can_hold(app: FastAPI) -> None:
    for name, value in (("metadata[]", "1"), ("metadata[a]", "\0"), ("metadata[a]", "x" * 513)):
        answer = send(app, "GET", "/v1/jobs", [(name, value)])

        assert answer.status_code == 400, json.dumps(value)
        assert answer.json()["param"].startswith("metadata")
