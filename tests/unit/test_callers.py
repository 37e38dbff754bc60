"""Who may speak to what listens here: pages of other origins and their names may not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from app.api import keyring
from app.api.app import create_app
from app.api.envelopes import Door, door_of
from app.config.callers import HEADERS, refusal
from app.config.settings import Settings
from app.keys import Scope, new_key
from app.store.keys import Known

ALLOWED = ("api.example.com", "*.svc.cluster.local")


def status(method: str = "POST", **headers: str) -> int | None:
    """What a request with these headers is refused with, if it is."""
    spelled = httpx.Headers({name.replace("_", "-"): it for name, it in headers.items()})
    refused = refusal(method, spelled, ALLOWED, "api.allowed_hosts")
    return refused.status if refused else None


@pytest.mark.parametrize(
    "host",
    [
        *(
            "127.0.0.1",
            "127.0.0.1:8000",
            "[::1]:8000",
            "10.1.2.3:8000",
            "localhost",
            "LOCALHOST.:80",
        ),
        *("gristmill.localhost:8000", "api.example.com", "API.example.com.:443", ""),
        "gristmill-api.prod.svc.cluster.local:8000",
    ],
)
def test_an_address_localhost_and_names_that_are_set_are_served(host: str) -> None:
    assert status(host=host) is None


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example"),
        *("notlocalhost", "svc.cluster.local", "api.example.com.evil.example", "x:y:z", "[::1"),
        *("evil.example#127.0.0.1", "evil@127.0.0.1", "127.0.0.1,evil.example", "127.0.0.1/", "."),
        *("0x7f000001", "2130706433", "127.1", "*.svc.cluster.local\t"),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_a_name_that_leads_here_by_dns_rebinding_is_refused(method: str, host: str) -> None:
    assert status(method, host=host) == HTTPStatus.MISDIRECTED_REQUEST


HOSTS = st.sampled_from(
    ["127.0.0.1:8000", "localhost", "evil.example", "api.example.com", "[::1]:8000"]
)
SITES = st.sampled_from([None, "same-origin", "none", "cross-site", "same-site", "", "odd"])
ORIGINS = st.sampled_from(
    [
        *(None, "null", "", "x", "http://evil.example", "http://127.0.0.1:3000", "http://[::1"),
        *("http://localhost:8000", "http://127.0.0.1:8000.evil.example", "https://127.0.0.1"),
    ]
)


@given(HOSTS, SITES, ORIGINS, st.sampled_from(["GET", "HEAD", "POST", "DELETE", "OPTIONS"]))
def test_no_request_of_a_page_of_another_origin_is_served(
    host: str, site: str | None, origin: str | None, method: str
) -> None:
    given = {"host": host, "sec_fetch_site": site, "origin": origin, "sec_fetch_mode": "cors"}
    refused = status(method, **{name: it for name, it in given.items() if it is not None})

    from_elsewhere = site not in (None, "same-origin", "none")
    other_origin = site is None and origin is not None  # none of these is that of `host`
    assert bool(refused) == (host == "evil.example" or from_elsewhere or other_origin)


def test_pages_of_our_own_and_programs_are_served() -> None:
    assert status(host="127.0.0.1:8000") is None
    assert status(host="127.0.0.1:8000", sec_fetch_site="same-origin") is None
    assert status(host="127.0.0.1:8000", origin="http://127.0.0.1:8000") is None
    assert status(host="api.example.com", origin="https://api.example.com:443") is None
    assert status(host="10.0.0.1:8000", origin="https://api.example.com") is None  # by a proxy


def test_a_link_on_another_page_may_lead_here_and_neither_a_form_nor_a_frame() -> None:
    link = {
        "host": "127.0.0.1:8000",
        "sec_fetch_site": "cross-site",
        "sec_fetch_mode": "navigate",
        "sec_fetch_dest": "document",
    }

    assert status("GET", **link) is None
    assert status("POST", **link) == HTTPStatus.FORBIDDEN
    assert status("GET", **link | {"sec_fetch_dest": "iframe"}) == HTTPStatus.FORBIDDEN


KEY = new_key()


@pytest.fixture
def app_with(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., FastAPI]:
    """The application with these settings of the API; it connects to nothing. `is_locked`: there is
    one key."""
    found = Known("theirs", frozenset(Scope), None, True)

    def make(is_locked: bool = False, **api: Any) -> FastAPI:
        known = {KEY.id: found} if is_locked else {}
        monkeypatch.setattr(keyring, "look_up", lambda _, id, digest: known.get(id))
        monkeypatch.setattr(keyring, "any_made", lambda _: is_locked)
        return create_app(
            make_settings(
                database={"url": "postgresql://nobody@127.0.0.1:1/none"},
                broker={"url": "redis://127.0.0.1:1/0"},
                api=api,
            )
        )

    return make


def ask(app: FastAPI, method: str, path: str, **given: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.request(method, path, **given)

    return asyncio.run(send())


def test_a_refusal_is_a_problem_that_says_what_to_set(app_with: Callable[..., FastAPI]) -> None:
    answer = ask(app_with(), "GET", "/healthz", headers={"Host": "gpu-box:8000"})

    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (421, "misdirected_request")
    assert "api.allowed_hosts" in problem["detail"]
    assert problem["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/jobs/", "/v1/jobs/bulk/", "/docs/", "/static-offline-docs"])
def test_no_path_is_answered_with_a_redirect(app_with: Callable[..., FastAPI], path: str) -> None:
    answer = ask(app_with(), "POST", path)

    assert answer.status_code in (404, 405)
    assert "location" not in answer.headers


@pytest.mark.parametrize("path", ["/docs", "/openapi.json", "/healthz", "/nothing"])
def test_no_answer_can_be_read_framed_or_run_by_a_page_of_another_origin(
    app_with: Callable[..., FastAPI], path: str
) -> None:
    answer = ask(app_with(), "GET", path)

    assert {name: answer.headers.get(name) for name in HEADERS} == HEADERS
    assert not [name for name in answer.headers if name.startswith("access-control")]


def paths(app: FastAPI) -> set[tuple[str, str]]:
    document = app.openapi()["paths"]
    return {(method.upper(), path) for path, methods in document.items() for method in methods}


def test_without_a_key_nothing_is_answered_but_probes_and_documentation(
    app_with: Callable[..., FastAPI], caplog: pytest.LogCaptureFixture
) -> None:
    app = app_with(is_locked=True)
    key, another = KEY.text, new_key().text
    stolen = key[:20] + another[20:]  # another secret under its id
    wrong: list[dict[str, str]] = [
        {},
        {"Authorization": key},
        {"Authorization": f"Basic {key}"},
        {"Authorization": f"Bearer {key[:-1]}"},
        {"Authorization": f"Bearer {key}x"},
        {"Authorization": f"Bearer {another}", "x-api-key": stolen},
        {"x-api-key": stolen},
        {"x-api-key": "sk-ant-another-systems"},
        {"Authorization": "Bearer é"},
    ]
    open_paths = {"/healthz", "/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css"}
    closed = {each for each in paths(app) if each[1] not in ("/healthz", "/readyz")}
    assert len(closed) > 6

    for path in open_paths:
        assert ask(app, "GET", path).status_code == 200
    for method, path in closed | {
        ("GET", "/nothing"),
        ("GET", "/docs/"),
        ("GET", "/healthz/../v1/jobs"),
    }:
        for headers in wrong:
            raw = {name: it.encode() for name, it in headers.items()}
            answer = ask(app, method, path, headers=raw)

            assert answer.status_code == 401, path
            if door_of(path, {}) is Door.OWN:
                assert answer.json()["code"] == "unauthorized"
            assert answer.headers["WWW-Authenticate"].startswith('Bearer realm="gristmill"')
            assert not [each for each in (key, another, stolen) if each in answer.text]
    assert "gm_" not in caplog.text


def test_with_a_key_in_either_header_a_request_is_served(app_with: Callable[..., FastAPI]) -> None:
    app = app_with(is_locked=True)
    ways = [
        {"Authorization": f"Bearer {KEY.text}"},
        {"Authorization": f"bearer {KEY.text}"},
        {"x-api-key": KEY.text},
        {"x-api-key": KEY.text, "Authorization": "Basic cHJveHk6c2VjcmV0"},
        {"x-api-key": KEY.text, "Authorization": "Bearer another-systems"},
    ]

    for headers in ways:
        assert ask(app, "GET", "/v1/models", headers=headers).status_code == 200, headers


def test_until_there_is_a_key_whoever_comes_to_this_machine_is_served_whatever_it_sends(
    app_with: Callable[..., FastAPI],
) -> None:
    for headers in ({}, {"Authorization": "Bearer sk-none"}, {"x-api-key": new_key().text}):
        assert ask(app_with(), "GET", "/v1/models", headers=headers).status_code == 200
        locked = app_with(host="0.0.0.0")
        assert ask(locked, "GET", "/v1/models", headers=headers).status_code == 401
