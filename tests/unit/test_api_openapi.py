"""The API's own documentation: complete, and readable without the internet."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from app.api.app import create_app
from app.api.envelopes import door_of, media_type_of
from app.api.jobs.schemas_many import CancelRequest, StatusRequest
from app.api.jobs.schemas_timeline import EXAMPLE, Timeline
from app.api.wire import checked
from app.config.settings import Settings
from app.intake.submit import parse_submission
from app.requests import bodies
from tests.pages import ROOT


@pytest.fixture
def app(make_settings: Callable[..., Settings]) -> FastAPI:
    """The application; nothing it would connect to is there, and it need not be."""
    return create_app(
        make_settings(
            database={"url": "postgresql://nobody@127.0.0.1:1/none"},
            broker={"url": "redis://127.0.0.1:1/0"},
        )
    )


@pytest.fixture
def document(app: FastAPI) -> dict[str, Any]:
    return app.openapi()


def get(app: FastAPI, path: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    return asyncio.run(send())


def test_the_document_is_written_down_once_however_often_it_is_asked_for(
    app: FastAPI, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = get(app, "/openapi.json")

    monkeypatch.setattr(json, "dumps", lambda *args, **kwargs: pytest.fail("written again"))
    second = get(app, "/openapi.json")

    assert first.headers["content-type"] == "application/json"
    assert second.content == first.content


def operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"{method.upper()} {path}", operation


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        for each in node.values():
            yield from references(each)
    elif isinstance(node, list):
        for each in node:
            yield from references(each)


def test_every_field_says_what_it_means(document: dict[str, Any]) -> None:
    silent = [
        f"{name}.{field}"
        for name, schema in document["components"]["schemas"].items()
        for field, told in schema.get("properties", {}).items()
        if not told.get("description")
    ]

    assert silent == []


def test_every_field_that_a_caller_sends_has_an_example(document: dict[str, Any]) -> None:
    sent = {"Submission", "ChatMessage", *(body.__name__ for body in bodies.BODIES.values())}
    without = [
        f"{name}.{field}"
        for name in sent
        for field, told in document["components"]["schemas"][name]["properties"].items()
        if not told.get("examples") and "$ref" not in str(told)
    ]

    assert without == []


def test_every_operation_and_parameter_is_described(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        assert operation.get("summary") and operation.get("description"), name
        for parameter in operation.get("parameters", []):
            assert parameter.get("description"), f"{name} {parameter['name']}"


def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}

    assert set(references(document)) <= known


def test_every_error_is_documented_as_a_problem(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        for status, answer in operation["responses"].items():
            if int(status) >= 400 and not name.endswith("/readyz"):
                door = door_of(name.partition(" ")[2], {})
                assert list(answer["content"]) == [media_type_of(door)], f"{name} {status}"
        assert "400" in operation["responses"], name  # of a parameter that it does not know
    submit = document["paths"]["/v1/jobs"]["post"]["responses"]
    assert {"202", "400", "404", "413", "415", "422", "429", "503"} <= set(submit)


def test_the_body_of_a_submission_is_one_of_the_calls(document: dict[str, Any]) -> None:
    body = document["components"]["schemas"]["Submission"]["properties"]["body"]

    assert set(references(body)) == {
        f"#/components/schemas/{body.__name__}" for body in bodies.BODIES.values()
    }


def test_the_examples_of_submissions_would_be_accepted(document: dict[str, Any]) -> None:
    def example(path: str) -> dict[str, Any]:
        body = document["paths"][path]["post"]["requestBody"]
        told: dict[str, Any] = body["content"]["application/json"]["example"]
        return told

    for submission in [example("/v1/jobs"), *example("/v1/jobs/bulk")["jobs"]]:
        bodies.parse(parse_submission(submission).body)


PAGES = ("jobs.md", "batches.md", "webhooks.md")
"""Where calls are told of, each on one of them."""


def test_the_table_of_calls_is_that_of_the_api(document: dict[str, Any]) -> None:
    pages = "".join((ROOT / "docs" / page).read_text() for page in PAGES)
    told = re.findall(r"^\| `([A-Z]+ /\S+)` \|", pages, re.MULTILINE)

    assert sorted(told) == sorted(name for name, _ in operations(document))


def test_the_examples_of_bodies_would_be_accepted(document: dict[str, Any]) -> None:
    for path, model in (("/v1/jobs/status", StatusRequest), ("/v1/jobs/cancel", CancelRequest)):
        body = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
        checked.parse(json.dumps(body["example"]).encode(), model)


def test_the_example_of_a_timeline_is_one_and_adds_up(document: dict[str, Any]) -> None:
    shown = document["components"]["schemas"]["Timeline"]["example"]

    told = Timeline.model_validate(EXAMPLE)

    assert json.loads(told.model_dump_json()) == EXAMPLE
    assert shown["spans"][2:] == EXAMPLE["spans"][2:]  # nulls are left out of what is shown
    assert sum(round(1_000 * span.ms) for span in told.spans) == round(1_000 * told.total_ms)
    assert sum(part.ns for part in told.device.parts) == told.device.total_ns


def test_a_family_of_parameters_is_documented_as_one(document: dict[str, Any]) -> None:
    parameters = document["paths"]["/v1/jobs"]["get"]["parameters"]
    [metadata] = [each for each in parameters if each["name"] == "metadata"]

    assert (metadata["style"], metadata["explode"]) == ("deepObject", True)


def test_the_documentation_page_loads_nothing_from_elsewhere(app: FastAPI) -> None:
    page = get(app, "/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)

    assert sources and all(source.startswith("/") for source in sources)
    for source in sources:
        assert get(app, source).status_code == 200, source
