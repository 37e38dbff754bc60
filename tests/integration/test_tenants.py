"""Two tenants at one API: what one has does not exist for the other."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Final
from uuid import uuid4

import httpx
import pytest
from fastapi.routing import APIRoute, RouteContext, iter_route_contexts

from app.api.app import create_app
from app.api.caller import _caller
from app.api.wire.callers import OPEN
from app.config.settings import Settings
from app.keys import Scope
from tests.apis import Hands, made_key, running_api
from tests.conftest import STUB_MODELS

BODY: Final = {"prompt": "A grist mill is"}
Headers = Mapping[str, str]


@pytest.fixture(scope="module")
def settings(
    empty_databases: Callable[[str], str], migrated_template: str, empty_redis: Callable[[], str]
) -> Settings:
    """One system for all of these."""
    return Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": empty_redis()},
        models=STUB_MODELS,
    )


@pytest.fixture(scope="module")
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


@pytest.fixture
def as_tenant(settings: Settings) -> Callable[..., dict[str, str]]:
    """Headers with a new key of a tenant."""

    def headers(tenant: str, *scopes: Scope) -> dict[str, str]:
        return {"x-api-key": made_key(settings.database.url, tenant, *scopes).text}

    return headers


@pytest.fixture
def ours(as_tenant: Callable[..., dict[str, str]]) -> dict[str, str]:
    return as_tenant(f"ours-{uuid4()}")


@pytest.fixture
def theirs(as_tenant: Callable[..., dict[str, str]]) -> dict[str, str]:
    return as_tenant(f"theirs-{uuid4()}")


def submit(api: httpx.Client, headers: Headers, **fields: Any) -> str:
    answer = api.post("/v1/jobs", json={"body": BODY} | fields, headers=headers)
    assert answer.status_code in (200, 202), answer.text
    return str(answer.json()["id"])


# ── every route ─────────────────────────────────────────────────────────────────────────────────


def upload(api: httpx.Client, headers: Headers) -> str:
    form = {"files": {"file": ("in.jsonl", b"{}")}, "data": {"purpose": "user_data"}}
    answer = api.post("/v1/files", headers=headers, **form)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def respond(api: httpx.Client, headers: Headers) -> str:
    body = {"input": "A grist mill is", "background": True}
    answer = api.post("/v1/responses", headers=headers, json=body)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def begin_batch(api: httpx.Client, headers: Headers) -> str:
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": BODY}
    form = {"files": {"file": ("in.jsonl", json.dumps(line))}, "data": {"purpose": "batch"}}
    file = api.post("/v1/files", headers=headers, **form).json()
    asked = {"endpoint": "/v1/completions", "completion_window": "24h"}
    answer = api.post("/v1/batches", headers=headers, json=asked | {"input_file_id": file["id"]})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


Make = Callable[[httpx.Client, Headers], str]


def endpoint(api: httpx.Client, headers: Headers) -> str:
    body = {"name": "a", "url": "https://a.example/", "event_types": ["job.cancelled"]}
    answer = api.post("/v1/webhook_endpoints", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def delivery(api: httpx.Client, headers: Headers) -> str:
    job_id = submit(api, headers, webhook_url="https://a.example/")
    api.post(f"/v1/jobs/{job_id}/cancel", headers=headers).raise_for_status()
    answer = api.get("/v1/webhook_deliveries", params={"object_id": job_id}, headers=headers)
    return str(answer.json()["data"][0]["id"])


IDS: Final[dict[str, Make]] = {
    "webhook_endpoint_id": endpoint,
    "delivery_id": delivery,
    "job_id": submit,
    "file_id": upload,
    "batch_id": begin_batch,
    "response_id": respond,
}
"""How a tenant comes to have what an id in a path names, and the id. Whoever adds a route with
another id adds it here: it is then asked for by another tenant."""

CHAT: Final = {"messages": [{"role": "user", "content": "flour"}], "store": True}


def stored_chat(hands: Hands, api: httpx.Client, headers: Headers) -> str:
    job_id = submit(api, headers, body=CHAT)
    hands.finish(hands.claim(job_id))
    return f"chatcmpl-{job_id}"


@pytest.fixture(scope="module")
def makers(settings: Settings) -> Iterator[dict[str, Make]]:
    """The same, with what a worker has to have answered."""
    with closing(Hands(settings.database.url)) as hands:
        yield IDS | {"completion_id": partial(stored_chat, hands)}


SHARED: Final = {"model_id"}
"""Names in paths that belong to no tenant: all see the same."""

BODIES: Final[dict[tuple[str, str], dict[str, Any]]] = {
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}"): {},
    ("POST", "/v1/chat/completions/{completion_id}"): {"metadata": {}},
    ("POST", "/v1/webhook_endpoints/{webhook_endpoint_id}/test"): {"event_type": "job.failed"},
}
"""What a call with an id in its path must be sent, where it needs anything."""

NEEDS_NO_CALLER: Final = {*OPEN, "/docs/oauth2-redirect"}


def routes(settings: Settings) -> list[RouteContext]:
    found = iter_route_contexts(create_app(settings).routes)
    return [each for each in found if isinstance(each.original_route, APIRoute)]


def test_every_route_knows_who_calls(settings: Settings) -> None:
    def asks(dependant: Any) -> bool:
        return dependant.call is _caller or any(map(asks, dependant.dependencies))

    known = routes(settings)
    assert {"/v1/jobs", "/v1/jobs/{job_id}", "/metrics"} <= {route.path for route in known}
    forgotten = {
        route.path
        for route in known
        if route.path not in NEEDS_NO_CALLER and not asks(route.dependant)
    }

    assert forgotten == set(), "take `who: Who` and pass who.tenant on"


def test_another_tenants_id_is_answered_on_every_route_as_one_that_never_was(
    api: httpx.Client,
    settings: Settings,
    makers: dict[str, Make],
    ours: Headers,
    theirs: Headers,
) -> None:
    found = 0
    for route in routes(settings):
        names = [each.alias for each in route.dependant.path_params if each.alias not in SHARED]
        assert set(names) <= set(makers), f"{route.path}: say in IDS how one comes to be"
        for method in sorted((route.methods or set()) - {"HEAD"}) if names else ():
            told = []
            made = makers[names[0]](api, ours)
            nobodys = made[:-1] + ("1" if made[-1] == "0" else "0")
            for id in (made, nobodys):
                path = str(route.path).replace("{" + names[0] + "}", id)
                for name in names[1:]:
                    path = path.replace("{" + name + "}", str(uuid4()))
                body = BODIES.get((method, str(route.path)))
                answer = api.request(method, path, json=body, headers=theirs)
                assert answer.status_code == 404, (method, path, answer.text)
                told.append(answer.text.replace(id, "ID").replace(_request_id(answer), ""))
            assert told[0] == told[1], (method, path)
            found += 1

    assert found >= 5


def _request_id(answer: httpx.Response) -> str:
    return answer.headers["x-request-id"]


def test_what_another_tenant_tried_with_a_job_has_not_touched_it(
    api: httpx.Client, ours: Headers, theirs: Headers
) -> None:
    job_id = submit(api, ours)

    for method, rest in (("POST", "/cancel"), ("DELETE", "")):
        assert api.request(method, f"/v1/jobs/{job_id}{rest}", headers=theirs).status_code == 404

    job = api.get(f"/v1/jobs/{job_id}", headers=ours).json()
    assert (job["state"], job["purged_at"]) == ("queued", None)


def test_a_stored_chat_is_its_tenants_alone(
    api: httpx.Client, makers: dict[str, Make], ours: Headers, theirs: Headers
) -> None:
    mine = makers["completion_id"](api, ours)
    path = f"/v1/chat/completions/{mine}"

    assert api.post(path, json={"metadata": {"a": "b"}}, headers=theirs).status_code == 404
    assert api.delete(path, headers=theirs).status_code == 404

    assert api.get(path, headers=ours).json()["metadata"] == {}
    for headers, told in ((ours, [mine]), (theirs, [])):
        listed = api.get("/v1/chat/completions", headers=headers).json()
        assert [each["id"] for each in listed["data"]] == told
    after = api.get("/v1/chat/completions", params={"after": mine}, headers=theirs)
    assert after.status_code == 400


# ── lists and sums ──────────────────────────────────────────────────────────────────────────────


def test_lists_and_calls_for_many_jobs_are_of_one_tenant(
    api: httpx.Client, ours: Headers, theirs: Headers
) -> None:
    label = str(uuid4())
    mine = submit(api, ours, metadata={"a": label})
    other = submit(api, theirs, metadata={"a": label})

    listed = api.get("/v1/jobs", params={"metadata[a]": label}, headers=theirs).json()
    status = api.post("/v1/jobs/status", json={"ids": [mine, other]}, headers=theirs).json()
    full = {"ids": [mine, other], "view": "full"}
    whole = api.post("/v1/jobs/status", json=full, headers=theirs).json()
    after = api.get("/v1/jobs", params={"after": mine}, headers=theirs)
    cancelled = api.post("/v1/jobs/cancel", json={"ids": [mine]}, headers=theirs).json()
    filtered = {"filter": {"metadata": {"a": label}}}
    passed = api.post("/v1/jobs/cancel", json=filtered, headers=theirs).json()

    assert [job["id"] for job in listed["data"]] == [other]
    assert [item["status"] for item in status["items"]] == [404, 200]
    assert [item["status"] for item in whole["items"]] == [404, 200]
    assert after.status_code == 404
    assert [item["status"] for item in cancelled["items"]] == [404]
    assert [item["id"] for item in passed["items"]] == [other]
    assert api.get(f"/v1/jobs/{mine}", headers=ours).json()["state"] == "queued"


def test_an_idempotency_key_is_its_tenants_own(
    api: httpx.Client, ours: Headers, theirs: Headers
) -> None:
    mine = submit(api, ours, idempotency_key="order 42")
    other = submit(api, theirs, idempotency_key="order 42")

    assert mine != other
    assert submit(api, ours, idempotency_key="order 42") == mine
    bulk = {"jobs": [{"body": BODY, "idempotency_key": "order 42"}]}
    [item] = api.post("/v1/jobs/bulk", json=bulk, headers=theirs).json()["items"]
    assert (item["status"], item["id"]) == (200, other)
    listed = api.get("/v1/jobs", params={"idempotency_key": "order 42"}, headers=theirs).json()
    assert [job["id"] for job in listed["data"]] == [other]


def test_a_tenant_is_told_of_its_own_usage_and_an_admin_of_all(
    api: httpx.Client, as_tenant: Callable[..., Headers]
) -> None:
    for tenant in ("mill", "bakery"):
        headers = as_tenant(tenant)
        job_id = submit(api, headers)
        assert api.post(f"/v1/jobs/{job_id}/cancel", headers=headers).status_code == 200
    mill, admin = as_tenant("mill"), as_tenant("mill", Scope.READ, Scope.ADMIN)

    def tenants(headers: Headers, **params: str) -> set[str]:
        answer = api.get("/v1/usage", params={"by": "tenant"} | params, headers=headers)
        assert answer.status_code == 200, answer.text
        return {row["group"]["tenant"] for row in answer.json()["data"]}

    assert tenants(mill) == tenants(mill, tenant="mill") == {"mill"}
    for another in ("bakery", "of whom nobody has heard"):
        refused = api.get("/v1/usage", params={"tenant": another}, headers=mill)
        assert refused.status_code == 403
    assert tenants(admin) >= {"mill", "bakery"}
    assert tenants(admin, tenant="bakery") == {"bakery"}


# ── scopes ──────────────────────────────────────────────────────────────────────────────────────


READING_POSTS: Final = {
    "/v1/jobs/status",
    "/v1/messages/count_tokens",
    "/v1/responses/input_tokens",
}
"""Calls that change nothing, though they have a body."""

ADMINS: Final = {"/metrics"}


def test_a_scope_allows_what_it_says_and_nothing_else_on_every_route(
    api: httpx.Client, settings: Settings, as_tenant: Callable[..., Headers]
) -> None:
    keys = {scope: as_tenant("mill", scope) for scope in Scope}
    seen: set[tuple[str, Scope]] = set()
    for route in routes(settings):
        if route.path in NEEDS_NO_CALLER:
            continue
        reads = "GET" in (route.methods or ()) or route.path in READING_POSTS
        needed = Scope.ADMIN if route.path in ADMINS else Scope.READ if reads else Scope.SUBMIT
        path = re.sub("{.*?}", str(uuid4()), str(route.path))
        for method in sorted((route.methods or set()) - {"HEAD"}):
            for scope, headers in keys.items():
                answer = api.request(method, path, json={}, headers=headers)
                assert (answer.status_code == 403) == (scope is not needed), (method, path, scope)
                assert answer.status_code < 500
        seen.add((str(route.path), needed))

    assert {scope for _, scope in seen} == set(Scope)
    assert {path for path, scope in seen if scope is Scope.READ} > READING_POSTS
