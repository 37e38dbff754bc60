"""Two tenants at one API: what one has does not exist for the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from fastapi import FastAPI, Request

from app.api import caller
from app.api.caller import Caller, Scope
from app.config.settings import Settings
from tests.apis import running_api

BODY = {"prompt": "A grist mill is"}


@pytest.fixture
def api(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    """Its callers say who they are, and with which scopes."""
    from tests import apis

    create = apis.create_app

    def create_app(settings: Settings) -> FastAPI:
        async def told(request: Request) -> Caller:
            scopes = request.headers.get("x-scopes", "submit read").split()
            return Caller(request.headers["x-tenant"], frozenset(map(Scope, scopes)))

        app = create(settings)
        app.dependency_overrides[caller._caller] = told
        return app

    monkeypatch.setattr(apis, "create_app", create_app)
    with running_api(settings) as client:
        yield client


OURS, THEIRS = {"x-tenant": "ours"}, {"x-tenant": "theirs"}


def submit(api: httpx.Client, headers: dict[str, str], **fields: Any) -> str:
    answer = api.post("/v1/jobs", json={"body": BODY} | fields, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    return str(answer.json()["id"])


def test_another_tenants_job_is_answered_as_one_that_never_was(api: httpx.Client) -> None:
    job_id, nobody = submit(api, OURS), str(uuid4())
    calls = [("GET", ""), ("GET", "/timeline"), ("POST", "/cancel"), ("POST", "/replay"),
             ("DELETE", "")]  # fmt: skip

    for method, rest in calls:
        told = {}
        for id in (job_id, nobody):
            answer = api.request(method, f"/v1/jobs/{id}{rest}", headers=THEIRS)
            assert answer.status_code == 404, (method, rest)
            told[id] = {**answer.json(), "request_id": "", "instance": ""}
        assert told[job_id] == told[nobody]

    job = api.get(f"/v1/jobs/{job_id}", headers=OURS).json()
    assert job["state"] == "queued"


def test_lists_and_calls_for_many_jobs_are_of_one_tenant(api: httpx.Client) -> None:
    ours, theirs = submit(api, OURS, metadata={"a": "b"}), submit(api, THEIRS, metadata={"a": "b"})

    listed = api.get("/v1/jobs", params={"metadata[a]": "b"}, headers=THEIRS).json()
    status = api.post("/v1/jobs/status", json={"ids": [ours, theirs]}, headers=THEIRS).json()
    full = {"ids": [ours, theirs], "view": "full"}
    whole = api.post("/v1/jobs/status", json=full, headers=THEIRS).json()
    after = api.get("/v1/jobs", params={"after": ours}, headers=THEIRS)
    cancelled = api.post("/v1/jobs/cancel", json={"ids": [ours]}, headers=THEIRS).json()
    filtered = {"filter": {"metadata": {"a": "b"}}}
    passed = api.post("/v1/jobs/cancel", json=filtered, headers=THEIRS).json()

    assert [job["id"] for job in listed["data"]] == [theirs]
    assert [item["status"] for item in status["items"]] == [404, 200]
    assert [item["status"] for item in whole["items"]] == [404, 200]
    assert after.status_code == 404
    assert [item["status"] for item in cancelled["items"]] == [404]
    assert [item["id"] for item in passed["items"]] == [theirs]
    assert api.get(f"/v1/jobs/{ours}", headers=OURS).json()["state"] == "queued"


def test_an_idempotency_key_is_its_tenants_own(api: httpx.Client) -> None:
    ours = submit(api, OURS, idempotency_key="order 42")
    theirs = submit(api, THEIRS, idempotency_key="order 42")

    assert ours != theirs
    assert submit(api, OURS, idempotency_key="order 42") == ours
    bulk = {"jobs": [{"body": BODY, "idempotency_key": "order 42"}]}
    [item] = api.post("/v1/jobs/bulk", json=bulk, headers=THEIRS).json()["items"]
    assert (item["status"], item["id"]) == (200, theirs)


def test_a_tenant_is_told_of_its_own_usage_and_an_admin_of_all(api: httpx.Client) -> None:
    for headers in (OURS, THEIRS):
        job_id = submit(api, headers)
        api.post(f"/v1/jobs/{job_id}/cancel", headers=headers)

    def tenants(headers: dict[str, str], **params: str) -> list[str]:
        answer = api.get("/v1/usage", params={"by": "tenant"} | params, headers=headers)
        assert answer.status_code == 200, answer.text
        return sorted(row["group"]["tenant"] for row in answer.json()["data"])

    assert tenants(OURS) == ["ours"]
    assert tenants(OURS, tenant="ours") == ["ours"]
    refused = api.get("/v1/usage", params={"tenant": "theirs"}, headers=OURS)
    assert refused.status_code == 403
    admin = OURS | {"x-scopes": "read admin"}
    assert tenants(admin) == ["ours", "theirs"]
    assert tenants(admin, tenant="theirs") == ["theirs"]


def test_a_scope_allows_what_it_says_and_nothing_else(api: httpx.Client) -> None:
    job_id = submit(api, OURS)
    reads = [("GET", f"/v1/jobs/{job_id}"), ("GET", "/v1/jobs"), ("POST", "/v1/jobs/status")]
    writes = [("POST", "/v1/jobs"), ("POST", f"/v1/jobs/{job_id}/cancel"),
              ("DELETE", f"/v1/jobs/{job_id}")]  # fmt: skip
    admins = [("GET", "/metrics")]

    def refused(scope: str, calls: list[tuple[str, str]]) -> set[bool]:
        headers = OURS | {"x-scopes": scope}
        body = {"ids": [job_id]}
        answers = [
            api.request(method, path, json=body if method == "POST" else None, headers=headers)
            for method, path in calls
        ]
        return {answer.status_code == 403 for answer in answers}

    assert refused("read", writes + admins) == {True}
    assert refused("submit", reads + admins) == {True}
    assert refused("admin", reads + writes) == {True}
    assert (
        refused("read", reads) == refused("submit", writes) == refused("admin", admins) == {False}
    )
