"""Webhook endpoints by OpenAI's own client, and deliveries, over a real socket with a deliverer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import httpx
import openai
import psycopg
import pytest
from standardwebhooks import Webhook

from app.config.settings import Settings, WebhookSettings
from app.store.webhook_endpoints import MAX_ENDPOINTS
from app.webhooks.events import EVENT_TYPES
from tests.apis import made_key, running_api
from tests.conftest import STUB_MODELS
from tests.receivers import Receiver, receiving, running_hooks
from tests.waiting import eventually

OWN: Final = {"name": "mill", "event_types": ["job.cancelled", "job.completed"]}


@pytest.fixture(scope="module")
def settings(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    empty_redis: Callable[[], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Settings:
    """One system for all of these."""
    return Settings(
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        database={"url": empty_databases(migrated_template)},
        broker={"url": empty_redis()},
        webhooks=WebhookSettings(
            allow_networks=("127.0.0.0/8",),
            poll_ms=50,
            timeout_s=5,
            encryption_key="Zm9vYmFyYmF6Zm9vYmFyYmF6Zm9vYmFyYmF6Zm9vYmE=",
        ),
        models=STUB_MODELS,
    )


@pytest.fixture(scope="module")
def api(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("hooks")
    with running_hooks(settings, folder), running_api(settings) as client:
        yield client


@pytest.fixture(autouse=True)
def _nothing_before(settings: Settings) -> None:
    with psycopg.connect(settings.database.url, autocommit=True) as connection:
        for table in ("attempts", "deliveries", "endpoints", "receivers"):
            connection.execute(f"DELETE FROM webhook_{table}")


@pytest.fixture
def client(api: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{api.base_url}/v1",
        api_key="none",
        max_retries=0,
        _strict_response_validation=True,
    )


def made(client: openai.OpenAI, url: str, **given: Any) -> Any:
    """An endpoint for types of our own, which the client's types do not know."""
    return client.webhooks.create(url=url, **OWN | given)  # type: ignore[arg-type]


def cancelled(api: httpx.Client, **fields: Any) -> str:
    """A job that is cancelled."""
    job = api.post("/v1/jobs", json={"body": {"prompt": "a"}} | fields).raise_for_status().json()
    api.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()
    return str(job["id"])


def came(receiver: Receiver, number: int = 1) -> None:
    eventually(lambda: len(receiver.hooks) >= number, timeout_s=30)


def test_an_endpoint_lives_by_the_calls_of_openais_client(client: openai.OpenAI) -> None:
    types = ["batch.completed", "response.failed"]
    new = client.webhooks.create(name="bill", url="https://a.example/x", event_types=types)  # type: ignore[arg-type]
    assert new.signing_secret.startswith("whsec_") and new.id.startswith("we_")
    assert new.signing_secret_hint == f"whsec_...{new.signing_secret.rstrip('=')[-4:]}"

    found = client.webhooks.retrieve(new.id)
    assert found.model_dump() == {
        **new.model_dump(exclude={"signing_secret"}), "disabled_at": None,
    }  # fmt: skip

    changed = client.webhooks.update(new.id, name="bills", url="https://b.example/")
    assert (changed.name, changed.url, changed.event_types) == (
        "bills", "https://b.example/", types,
    )  # fmt: skip
    assert client.webhooks.update(new.id).updated_at == changed.updated_at

    rotated = client.webhooks.rotate_secret(new.id, keep_old_secret_active_for_24_hours=True)
    again = client.webhooks.rotate_secret(new.id)
    assert len({new.signing_secret, rotated.signing_secret, again.signing_secret}) == 3

    assert client.webhooks.delete(new.id).deleted
    with pytest.raises(openai.NotFoundError) as gone:
        client.webhooks.retrieve(new.id)
    assert gone.value.code == "webhook_not_found"


def test_endpoints_are_listed_page_by_page_newest_first(client: openai.OpenAI) -> None:
    ids = [made(client, f"https://a.example/{n}").id for n in range(5)]

    page = client.webhooks.list(limit=2)
    assert [each.id for each in page.data] == ids[:2:-1] and page.has_more
    rest = client.webhooks.list(limit=20, after=page.last_id or "")
    assert [each.id for each in rest.data] == ids[2::-1] and not rest.has_more
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"url": "http://93.184.215.14/"}, "url"),
        ({"url": "https://169.254.169.254/"}, "url"),
        ({"url": "https://user:password@example.com/"}, "url"),
        ({"url": "https://" + "a" * 3_000}, "url"),
        ({"url": "\ud800"}, "body"),
        ({"name": ""}, "name"),
        ({"name": "a\0"}, "name"),
        ({"name": "a" * 201}, "name"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["job.exploded"]}, "event_types"),
        ({"event_types": ["job.completed"] * 1_000}, "event_types"),
        ({"event_types": "job.completed"}, "event_types"),
        ({"secret": "mine"}, "secret"),
    ],
)
def test_what_is_wrong_with_an_endpoint_is_said(
    api: httpx.Client, given: dict[str, Any], param: str
) -> None:
    content = json.dumps({"url": "https://a.example/"} | OWN | given)
    answer = api.post(
        "/v1/webhook_endpoints", content=content, headers={"Content-Type": "application/json"}
    )

    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["param"] == param
    assert "password" not in error["message"]


def test_a_tenant_has_so_many_endpoints(client: openai.OpenAI) -> None:
    for _ in range(MAX_ENDPOINTS):
        made(client, "https://a.example/")

    with pytest.raises(openai.ConflictError):
        made(client, "https://a.example/")


def test_an_endpoint_is_told_of_what_it_asks_for_and_of_nothing_else(
    api: httpx.Client, client: openai.OpenAI
) -> None:
    with receiving() as receiver, receiving() as other:
        endpoint = made(client, receiver.url("/hooks"))
        made(client, other.url(), event_types=["job.expired"])
        job_id = cancelled(api)
        came(receiver)

    [hook] = receiver.hooks
    assert not other.hooks and hook.path == "/hooks"
    assert (hook.event["type"], hook.event["data"]) == ("job.cancelled", {"id": job_id})
    Webhook(endpoint.signing_secret).verify(hook.body, hook.headers)
    client.webhooks.unwrap(hook.body, hook.headers, secret=endpoint.signing_secret)


def test_a_batch_is_told_of_by_its_own_url_and_to_endpoints(
    api: httpx.Client, client: openai.OpenAI, settings: Settings
) -> None:
    asked: Any = {"input_file_id": "file-none", "endpoint": "/v1/completions"}
    with receiving() as receiver, receiving() as own:
        client.webhooks.create(name="b", url=receiver.url(), event_types=["batch.failed"])
        batch = client.batches.create(
            **asked, completion_window="24h", extra_body={"webhook_url": own.url()}
        )
        with psycopg.connect(settings.database.url, autocommit=True) as connection:
            for assignment in ("total = total", "state = 'failed', ended_at = now()", "fed = fed"):
                connection.execute(f"UPDATE job_batches SET {assignment}")
        came(receiver)
        came(own)

    for [hook] in (receiver.hooks, own.hooks):
        assert (hook.event["type"], hook.event["data"]) == ("batch.failed", {"id": batch.id})
    refused = api.post("/v1/batches", json=asked | {"webhook_url": "https://10.0.0.1/"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "webhook_url")


def test_a_test_says_what_the_endpoint_answered(client: openai.OpenAI) -> None:
    with receiving(lambda _: (418, {})) as receiver:
        endpoint = made(client, receiver.url())
        tested = client.webhooks.test(endpoint.id, event_type="batch.completed")
        assert (tested.status_code, tested.success, tested.event_type) == (
            418, True, "batch.completed",
        )  # fmt: skip
        [hook] = receiver.hooks
        event = client.webhooks.unwrap(hook.body, hook.headers, secret=endpoint.signing_secret)
        assert event.type == "batch.completed"

    # nobody is there any more
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.webhooks.test(endpoint.id, event_type="batch.completed")
    assert refused.value.code == "webhook_unreachable" and "not_connected" in str(refused.value)
    with pytest.raises(openai.BadRequestError):
        client.webhooks.test(endpoint.id, event_type="video.failed")


def test_an_endpoint_that_is_gone_is_disabled_until_it_is_updated(
    api: httpx.Client, client: openai.OpenAI
) -> None:
    with receiving(lambda _: (410, {})) as receiver:
        endpoint = made(client, receiver.url())
        cancelled(api)
        came(receiver)
        eventually(lambda: _endpoint(api, endpoint.id)["disabled_at"])
        cancelled(api)  # nobody is told
        [failed] = _deliveries(api)
        assert (failed["state"], failed["status_code"]) == ("failed", 410)
        assert api.post(f"/v1/webhook_deliveries/{failed['id']}/replay").status_code == 409

        receiver.answer = lambda _: (200, {})
        client.webhooks.update(endpoint.id, name="back")
        assert _endpoint(api, endpoint.id)["disabled_at"] is None
        cancelled(api)
        came(receiver, 2)


def test_what_is_pending_goes_to_the_new_url_and_ends_with_the_endpoint(
    api: httpx.Client, client: openai.OpenAI
) -> None:
    with receiving(lambda _: (500, {})) as old, receiving() as new:
        endpoint = made(client, old.url())
        cancelled(api)
        eventually(lambda: _deliveries(api)[0]["error"])
        client.webhooks.update(endpoint.id, url=new.url())
        came(new)  # after its five seconds

        client.webhooks.update(endpoint.id, url=old.url())
        cancelled(api)
        eventually(lambda: _deliveries(api)[0]["error"])
        client.webhooks.delete(endpoint.id)

    assert _deliveries(api)[0]["state"] == "failed"
    assert _deliveries(api)[0]["error"] == "endpoint_deleted"
    replayed = api.post(f"/v1/webhook_deliveries/{_deliveries(api)[0]['id']}/replay")
    assert replayed.status_code == 409 and replayed.json()["code"] == "webhook_conflict"


def test_a_webhook_url_is_signed_with_the_secret_of_its_tenant(api: httpx.Client) -> None:
    secret = api.post("/v1/webhook_secret").raise_for_status().json()["signing_secret"]
    with receiving() as receiver:
        job_id = cancelled(api, webhook_url=receiver.url())
        came(receiver)
        rotated = api.post(
            "/v1/webhook_secret", json={"keep_old_secret_active_for_24_hours": True}
        ).json()["signing_secret"]
        cancelled(api, webhook_url=receiver.url())
        came(receiver, 2)

    first, second = receiver.hooks
    assert first.event["data"]["id"] == job_id
    Webhook(secret).verify(first.body, first.headers)
    for each in (secret, rotated):
        Webhook(each).verify(second.body, second.headers)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://10.0.0.1/", "webhook_refused"),
        ("https://[::ffff:169.254.169.254]/", "webhook_refused"),
        ("https://2130706433/", "invalid_request"),
        ("javascript:alert(1)", "invalid_request"),
        (7, "invalid_request"),
    ],
)
def test_a_job_with_a_webhook_url_that_is_not_to_be_called_is_refused(
    api: httpx.Client, url: object, code: str
) -> None:
    answer = api.post("/v1/jobs", json={"body": {"prompt": "a"}, "webhook_url": url})

    assert (answer.status_code, answer.json()["code"]) == (400, code), answer.text
    assert answer.json()["param"] == "webhook_url"


def test_a_delivery_shows_its_attempts_and_is_made_again_with_the_same_id(
    api: httpx.Client,
) -> None:
    with receiving(lambda _: (400, {})) as receiver:
        job_id = cancelled(api, webhook_url=receiver.url())
        eventually(lambda: _deliveries(api)[0]["error"])
        [pending] = _deliveries(api, object_id=job_id)
        assert (pending["state"], pending["status_code"]) == ("pending", 400)
        receiver.answer = lambda _: (200, {})
        replayed = api.post(f"/v1/webhook_deliveries/{pending['id']}/replay").raise_for_status()
        assert replayed.json()["state"] == "pending"
        came(receiver, 2)
        eventually(lambda: _deliveries(api)[0]["state"] == "delivered")
        api.post(f"/v1/webhook_deliveries/{pending['id']}/replay").raise_for_status()
        came(receiver, 3)

    assert {hook.id for hook in receiver.hooks} == {pending["event_id"]}
    told = api.get(f"/v1/webhook_deliveries/{pending['id']}").json()
    eventually(lambda: len(_history(api, pending["id"])) == 3)
    assert [each["status_code"] for each in _history(api, pending["id"])] == [400, 200, 200]
    assert told["endpoint_id"] is None and told["object"] == "webhook_delivery"
    assert not _deliveries(api, state="failed")
    assert api.get("/v1/webhook_deliveries?endpoint_id=we_1").status_code == 400
    assert api.get("/v1/webhook_deliveries/wd_1").status_code == 404


def test_no_secret_is_in_the_table_or_in_a_log(
    api: httpx.Client, client: openai.OpenAI, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = made(client, "https://a.example/")
    own = api.post("/v1/webhook_secret").json()["signing_secret"]

    with psycopg.connect(settings.database.url) as connection:
        rows = str(connection.execute("SELECT * FROM webhook_endpoints").fetchall())
        rows += str(connection.execute("SELECT * FROM admin_log").fetchall())
    for secret in (endpoint.signing_secret, own):
        assert secret not in rows and secret.removeprefix("whsec_") not in rows
        assert secret not in caplog.text


def test_another_tenant_hears_of_nothing(
    api: httpx.Client, settings: Settings, client: openai.OpenAI
) -> None:
    with receiving() as receiver, receiving() as theirs:
        made(client, receiver.url())
        with another_tenant(settings) as other:
            made(client.with_options(api_key=other), theirs.url())
            cancelled_by = {"Authorization": f"Bearer {other}"}
            job = api.post("/v1/jobs", json={"body": {"prompt": "a"}}, headers=cancelled_by).json()
            api.post(f"/v1/jobs/{job['id']}/cancel", headers=cancelled_by).raise_for_status()
            came(theirs)
            listed = api.get("/v1/webhook_deliveries", headers=cancelled_by).json()["data"]

    assert [each["object_id"] for each in listed] == [job["id"]]
    assert not receiver.hooks


@contextmanager
def another_tenant(settings: Settings) -> Iterator[str]:
    """A key of one; the API is open again after."""
    yield made_key(settings.database.url, "bakery").text
    with psycopg.connect(settings.database.url, autocommit=True) as connection:
        connection.execute("DELETE FROM api_keys")


def _endpoint(api: httpx.Client, id: str) -> dict[str, Any]:
    return dict(api.get(f"/v1/webhook_endpoints/{id}").raise_for_status().json())


def _deliveries(api: httpx.Client, **params: str) -> list[dict[str, Any]]:
    return list(api.get("/v1/webhook_deliveries", params=params).raise_for_status().json()["data"])


def _history(api: httpx.Client, id: str) -> list[dict[str, Any]]:
    return list(api.get(f"/v1/webhook_deliveries/{id}").raise_for_status().json()["history"])
