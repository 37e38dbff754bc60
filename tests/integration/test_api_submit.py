"""Submitting over a real socket, into a real Postgres and a real Redis."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx
import pytest
import redis

from app.api.wire import room
from app.broker.message import num_jobs
from app.broker.queues import queue_name
from app.config.settings import ModelSettings, Settings
from app.engines.text.tokenizer import StubTokenizer
from app.jobs import Grammar
from app.local.servers import EmbeddedRedis
from app.requests import bodies
from tests.apis import Hands, running_api
from tests.conftest import STUB_MODELS
from tests.waiting import eventually
from tests.workers import rows

BODY = {"prompt": "A grist mill is"}
SECRET = "the miller's secret"


@pytest.fixture
def api(settings: Settings) -> Iterator[httpx.Client]:
    with running_api(settings) as client:
        yield client


@pytest.fixture(scope="module")
def refusing(
    empty_databases: Callable[[str], str], migrated_template: str, redis_server: EmbeddedRedis
) -> Iterator[httpx.Client]:
    """One API for all requests that change nothing, which is seen at the end."""
    settings = Settings(
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url},
        models=STUB_MODELS,
    )
    with running_api(settings) as client:
        yield client
    assert stored(settings) == []


def in_a_year() -> str:
    return (datetime.now(UTC) + timedelta(days=365)).isoformat()


def stored(settings: Settings) -> list[dict[str, Any]]:
    return rows(settings, "SELECT * FROM jobs ORDER BY created_at, id")


# ── one job ─────────────────────────────────────────────────────────────────────────────────────


def test_a_job_is_stored_sent_and_answered_with_where_to_follow_it(
    api: httpx.Client, settings: Settings, redis_url: str
) -> None:
    deadline = in_a_year()

    answer = api.post(
        "/v1/jobs",
        json={
            "body": BODY | {"max_tokens": 9},
            "priority": 3,
            "deadline": deadline,
            "metadata": {"customer": "42"},
        },
    )

    job = answer.json()
    assert answer.status_code == 202
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["self"]
    assert int(answer.headers["retry-after"]) >= 1
    assert (job["object"], job["state"], job["model"]) == ("job", "queued", "stub")
    assert (job["url"], job["priority"]) == ("/v1/completions", 3)
    assert job["metadata"] == {"customer": "42"}
    looked_at = api.get(f"/v1/jobs/{job['id']}")  # it was answered without a look at its row
    passing = {"position": job["position"], "eta": job["eta"]}
    assert looked_at.json() | passing == job
    assert looked_at.headers["etag"] == answer.headers["etag"]
    [row] = stored(settings)
    assert row["id"] == UUID(job["id"])
    assert row["request"] == BODY | {"max_tokens": 9}
    assert (row["input_tokens"], row["max_output_tokens"]) == (len(BODY["prompt"]), 9)
    assert row["enqueued_at"] is not None
    with redis.Redis.from_url(redis_url) as client:
        # The answer does not wait for it.
        [message] = eventually(lambda: client.lrange(f"{queue_name('stub')}\x06\x163", 0, -1))
        assert json.loads(message)["headers"]["id"] == job["id"]


@pytest.mark.parametrize(
    ("body", "url", "model"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "/v1/chat/completions", "stub"),
        ({"prompt": "hi"}, "/v1/completions", "stub"),
        ({"input": "hi"}, "/v1/embeddings", "stub-embed"),
    ],
)
def test_url_and_model_follow_from_the_body(
    api: httpx.Client, body: dict[str, Any], url: str, model: str
) -> None:
    job = api.post("/v1/jobs", json={"body": body}).json()

    assert (job["url"], job["model"]) == (url, model)


def test_a_job_for_later_is_stored_and_not_sent(
    api: httpx.Client, settings: Settings, redis_url: str
) -> None:
    answer = api.post("/v1/jobs", json={"body": BODY, "not_before": in_a_year()})

    assert answer.status_code == 202
    [row] = stored(settings)
    assert row["enqueued_at"] is None
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(queue_name("stub")) == 0


def test_a_schema_is_kept_with_the_order_of_its_keys(api: httpx.Client, settings: Settings) -> None:
    schema = {"type": "object", "properties": {"wheel": {}, "age": {}}, "required": ["wheel"]}
    body = BODY | {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "mill", "schema": schema, "strict": True},
        }
    }

    answers = [
        api.post("/v1/jobs", json={"body": body}, headers={"Idempotency-Key": "k"})
        for _ in range(2)
    ]

    assert len({answer.json()["id"] for answer in answers}) == 1
    [row] = stored(settings)
    kept = bodies.parse(row["request"], row["url"])
    assert kept.body.grammar == Grammar("json_schema", json.dumps(schema, separators=(",", ":")))
    assert kept.fingerprint == row["fingerprint"]


# ── bad input ───────────────────────────────────────────────────────────────────────────────────

JSON = {"content-type": "application/json"}


def prompt(**fields: Any) -> dict[str, Any]:
    return {"body": {"prompt": SECRET} | fields}


SCHEMA = "body.response_format.json_schema.schema"
NESTED: dict[str, Any] = {}
for _ in range(80):
    NESTED = {"properties": {"a": NESTED}}


def with_schema(schema: Any, name: str = "mill") -> dict[str, Any]:
    format_ = {"type": "json_schema", "json_schema": {"name": name, "schema": schema}}
    return prompt(response_format=format_)


@pytest.mark.parametrize(
    ("submission", "status", "code", "param"),
    [
        (prompt(best_of=2), 400, "invalid_request", "body.best_of"),
        (prompt() | {"colour": "red"}, 400, "invalid_request", "colour"),
        (prompt(max_tokens="many"), 400, "invalid_request", "body.max_tokens"),
        (prompt(max_tokens=0), 400, "invalid_request", "body.max_tokens"),
        (prompt(max_tokens=4_097), 400, "invalid_request", "body.max_tokens"),
        (prompt(temperature=2.5), 400, "invalid_request", "body.temperature"),
        (prompt(stream=True), 400, "invalid_request", "body.stream"),
        (prompt(n=17), 400, "invalid_request", "body.n"),
        (prompt(stop=["a", "b", "c", "d", "e"]), 400, "invalid_request", "body.stop"),
        (prompt(stop=[""]), 400, "invalid_request", "body.stop"),
        (prompt(structured_outputs={"regex": "((("}), 400, "invalid_schema",
         "body.structured_outputs.regex"),
        (prompt(structured_outputs={"regex": "x" * 70_000}), 400, "invalid_schema",
         "body.structured_outputs.regex"),
        (prompt(structured_outputs={"regex": "x", "grammar": "x"}), 400, "invalid_request",
         "body.structured_outputs.grammar"),
        (prompt(structured_outputs={"regex": "x"}, response_format={"type": "json_object"}),
         400, "invalid_request", "body.structured_outputs"),
        (prompt(response_format={"type": "yaml"}), 400, "invalid_request",
         "body.response_format.type"),
        (prompt(response_format={"type": "json_schema"}), 400, "invalid_request",
         "body.response_format.json_schema"),
        (with_schema({"type": "array", "uniqueItems": True}), 400, "invalid_schema", SCHEMA),
        (with_schema({"$ref": "http://127.0.0.1:9/x.json"}), 400, "invalid_schema", SCHEMA),
        (with_schema({"enum": [f"value-{n}" for n in range(10_000)]}), 400, "invalid_schema",
         SCHEMA),
        (with_schema(NESTED), 400, "invalid_schema", SCHEMA),
        (with_schema("{"), 400, "invalid_schema", SCHEMA),
        (with_schema([]), 400, "invalid_request", SCHEMA),
        (with_schema({}, name="a mill"), 400, "invalid_request",
         "body.response_format.json_schema.name"),
        ({"body": {"prompt": ""}}, 400, "invalid_request", "body.prompt"),
        ({"body": {"prompt": []}}, 400, "invalid_request", "body.prompt"),
        ({"body": {"prompt": f"{SECRET}\0"}}, 400, "invalid_request", "body.prompt"),
        ({"body": {"messages": []}}, 400, "invalid_request", "body.messages"),
        ({"body": {"messages": [{"role": "user"}]}}, 400, "invalid_request",
         "body.messages.0.content"),
        ({"body": {"prompt": SECRET, "input": SECRET}}, 400, "invalid_request", "body.input"),
        ({"body": {}}, 400, "invalid_request", "body.prompt"),
        ({"body": SECRET}, 400, "invalid_request", "body"),
        ({}, 400, "invalid_request", "body"),
        (prompt() | {"url": "/v1/nonsense"}, 404, "url_not_found", "url"),
        (prompt(model="gpt-9"), 404, "model_not_found", "body.model"),
        (prompt(model="stub-embed"), 404, "model_not_found", "body.model"),
        ({"body": {"prompt": "x" * 9_000}}, 422, "context_length_exceeded", "body.prompt"),
        ({"body": {"prompt": [0, 257]}}, 400, "invalid_request", "body.prompt"),
        ({"body": {"prompt": [0, -1]}}, 400, "invalid_request", "body.prompt"),
        (prompt(max_tokens=4_096) | {"body": {"prompt": "x" * 5_000, "max_tokens": 4_096}}, 422,
         "context_length_exceeded", "body.prompt"),
        ({"body": {"prompt": [1] * 9_000}}, 422, "context_length_exceeded", "body.prompt"),
        (prompt() | {"deadline": "2020-01-01T00:00:00Z"}, 422, "deadline_passed", "deadline"),
        (
            prompt() | {"deadline": "2030-01-01T00:00:00Z", "not_before": "2030-01-02T00:00:00Z"},
            422, "deadline_passed", "deadline",
        ),
    ],
)  # fmt: skip
def test_a_wrong_submission_names_the_field_and_quotes_no_prompt(
    refusing: httpx.Client,
    submission: dict[str, Any],
    status: int,
    code: str,
    param: str,
) -> None:
    answer = refusing.post("/v1/jobs", json=submission)

    problem = answer.json()
    assert answer.status_code == problem["status"] == status, problem
    assert answer.headers["content-type"] == "application/problem+json"
    assert (problem["code"], problem["param"]) == (code, param)
    assert problem["detail"] and SECRET not in answer.text


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"body": {"prompt": "hi", "temperature": NaN}}', "body.temperature"),
        (b'{"body": {"prompt": "hi", "temperature": 1e999}}', "body.temperature"),
        (b'{"body": {"prompt": "hi", "seed": 1' + b"0" * 30 + b"}}", "body.seed"),
        (b'{"body": {"prompt": "hi\\ud800"}}', "body"),
        (b'{"body": {"prompt": "hi"', "body"),
        (b"", "body"),
        (b"[]", None),
        (b"null", None),
    ],
)
def test_what_is_not_good_json_is_refused(
    refusing: httpx.Client, raw: bytes, param: str | None
) -> None:
    answer = refusing.post("/v1/jobs", content=raw, headers=JSON)

    assert answer.status_code == 400
    assert answer.json().get("param") == param


LONG = "the water wheel turns " * 80_000


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": LONG}, "body.prompt"),
        ({"prompt": ["a", LONG]}, "body.prompt.1"),
        ({"messages": [{"role": "user", "content": LONG}]}, "body.messages"),
        ({"model": "stub-embed", "input": LONG}, "body.input"),
    ],
)
def test_a_prompt_of_nearly_2_mb_is_refused_and_never_tokenised(
    refusing: httpx.Client, monkeypatch: pytest.MonkeyPatch, body: Any, param: str
) -> None:
    def encode(tokenizer: StubTokenizer, text: str, **_: bool) -> tuple[int, ...]:
        assert len(text) < 10
        return tuple(text.encode())

    monkeypatch.setattr(StubTokenizer, "encode_text", encode)
    answer = refusing.post("/v1/jobs", json={"body": body})
    bulk = refusing.post("/v1/jobs/bulk", json={"jobs": [{"body": body}]})

    for told in (answer.json(), bulk.json()["items"][0]["error"]):
        assert (told["code"], told["param"]) == ("context_length_exceeded", param)


def test_a_body_of_3_mb_is_refused(refusing: httpx.Client) -> None:
    raw = json.dumps({"body": {"prompt": "x" * 3_000_000}}).encode()

    def in_chunks() -> Iterator[bytes]:
        yield from (raw[start : start + 65_536] for start in range(0, len(raw), 65_536))

    for content in (raw, in_chunks()):
        answer = refusing.post("/v1/jobs", content=content, headers=JSON)
        assert (answer.status_code, answer.json()["code"]) == (413, "request_too_large")


def test_an_endless_body_is_cut_off(refusing: httpx.Client) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield b" " * 65_536

    try:
        assert refusing.post("/v1/jobs", content=endless(), headers=JSON).status_code == 413
    except httpx.TransportError:
        pass  # the connection was closed while this end was still sending
    assert refusing.get("/healthz").status_code == 200


def test_a_gzip_bomb_is_refused_unread(refusing: httpx.Client) -> None:
    bomb = gzip.compress(b" " * 50_000_000)

    answer = refusing.post("/v1/jobs", content=bomb, headers=JSON | {"content-encoding": "gzip"})

    assert (answer.status_code, answer.json()["code"]) == (415, "unsupported_media_type")


def test_a_body_that_does_not_arrive_is_given_up(
    refusing: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "READ_TIMEOUT_S", 0.05)
    with socket.create_connection((refusing.base_url.host, refusing.base_url.port)) as slow:
        slow.settimeout(10)
        slow.sendall(
            b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 1000000\r\n\r\n{}"
        )

        answer = b"".join(iter(lambda: slow.recv(65_536), b""))  # to the end: it was closed

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"application/problem+json" in answer


# ── idempotency ─────────────────────────────────────────────────────────────────────────────────


def test_the_same_key_and_request_are_the_same_job(
    api: httpx.Client, settings: Settings, redis_url: str
) -> None:
    spellings = [{"Idempotency-Key": "order-42"}, {"Idempotency-Key": '"order-42"'}, {}]
    fields = [{}, {}, {"idempotency_key": "order-42"}]

    answers = [
        api.post("/v1/jobs", json={"body": BODY} | field, headers=headers)
        for headers, field in zip(spellings, fields, strict=True)
    ]

    assert [answer.status_code for answer in answers] == [202, 202, 202]
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert len(stored(settings)) == 1
    with redis.Redis.from_url(redis_url) as client:
        eventually(lambda: client.llen(queue_name("stub")) == 1)


def test_the_same_key_with_another_request_is_refused(
    api: httpx.Client, settings: Settings
) -> None:
    headers = {"Idempotency-Key": "order-42"}
    api.post("/v1/jobs", json={"body": BODY}, headers=headers)

    answer = api.post("/v1/jobs", json={"body": {"prompt": "Another"}}, headers=headers)

    assert (answer.status_code, answer.json()["code"]) == (422, "idempotency_conflict")
    assert len(stored(settings)) == 1


def test_a_key_brings_back_a_job_that_is_final_with_its_answer(
    api: httpx.Client, settings: Settings
) -> None:
    headers = {"Idempotency-Key": "order-42"}
    job = api.post("/v1/jobs", json={"body": BODY}, headers=headers).json()
    hands = Hands(settings.database.url)
    hands.finish(hands.claim(job["id"]))
    hands.close()

    answer = api.post("/v1/jobs", json={"body": BODY}, headers=headers)

    assert answer.status_code == 200
    assert (answer.json()["id"], answer.json()["state"]) == (job["id"], "completed")
    assert answer.json()["response"] == {"choices": [{"text": "done"}]}


@pytest.mark.parametrize("key", ["", "k" * 256, "a b", '"'])
def test_a_key_that_cannot_be_kept_is_refused(refusing: httpx.Client, key: str) -> None:
    answer = refusing.post("/v1/jobs", json={"body": BODY}, headers={"Idempotency-Key": key})

    assert (answer.status_code, answer.json()["param"]) == (400, "Idempotency-Key")


def test_two_keys_for_one_job_are_refused(refusing: httpx.Client) -> None:
    answer = refusing.post(
        "/v1/jobs",
        json={"body": BODY, "idempotency_key": "one"},
        headers={"Idempotency-Key": "another"},
    )

    assert (answer.status_code, answer.json()["param"]) == (400, "idempotency_key")


# ── many jobs ───────────────────────────────────────────────────────────────────────────────────


def test_good_jobs_are_accepted_beside_bad_ones_each_in_its_place(
    api: httpx.Client, settings: Settings, redis_url: str
) -> None:
    answer = api.post(
        "/v1/jobs/bulk",
        json={
            "jobs": [
                {"body": {"prompt": "first"}},
                prompt(max_tokens=0),
                {"body": {"prompt": "third"}, "priority": 1},
                prompt(model="gpt-9"),
                SECRET,
            ]
        },
    )

    bulk = answer.json()
    assert answer.status_code == 202
    assert (bulk["accepted"], bulk["refused"]) == (2, 3)
    assert [item["status"] for item in bulk["items"]] == [202, 400, 202, 404, 400]
    assert bulk["items"][1]["error"]["param"] == "body.max_tokens"
    assert "id" not in bulk["items"][1] and "error" not in bulk["items"][0]
    assert SECRET not in answer.text
    prompts = {str(row["id"]): row["request"]["prompt"] for row in stored(settings)}
    assert prompts == {bulk["items"][0]["id"]: "first", bulk["items"][2]["id"]: "third"}
    with redis.Redis.from_url(redis_url) as client:
        assert client.llen(queue_name("stub")) == 2
    assert api.get(bulk["items"][0]["location"]).json()["state"] == "queued"


def test_a_bulk_without_a_good_job_is_answered_all_the_same(refusing: httpx.Client) -> None:
    answer = refusing.post("/v1/jobs/bulk", json={"jobs": [{}, prompt(n=0)]})

    assert answer.status_code == 200
    assert answer.json()["refused"] == 2


def test_a_bulk_that_is_repeated_brings_back_its_jobs(
    api: httpx.Client, settings: Settings
) -> None:
    jobs = [{"body": {"prompt": str(n)}, "idempotency_key": f"key-{n}"} for n in range(3)]
    first = api.post("/v1/jobs/bulk", json={"jobs": jobs[:2]}).json()

    again = api.post("/v1/jobs/bulk", json={"jobs": jobs}).json()

    assert [item["status"] for item in again["items"]] == [200, 200, 202]
    assert [item["id"] for item in again["items"][:2]] == [item["id"] for item in first["items"]]
    assert len(stored(settings)) == 3


def test_one_key_twice_in_a_bulk_is_one_job(api: httpx.Client, settings: Settings) -> None:
    job = {"body": BODY, "idempotency_key": "order-42"}

    items = api.post("/v1/jobs/bulk", json={"jobs": [job, job]}).json()["items"]

    assert sorted(item["status"] for item in items) == [200, 202]
    assert items[0]["id"] == items[1]["id"]
    assert len(stored(settings)) == 1


@pytest.mark.parametrize(
    "body", [{}, {"jobs": []}, {"jobs": {}}, {"jobs": [prompt()], "more": 1}, [prompt()]]
)
def test_a_bulk_that_is_no_list_of_jobs_is_refused(refusing: httpx.Client, body: Any) -> None:
    answer = refusing.post("/v1/jobs/bulk", json=body)

    assert (answer.status_code, answer.json()["param"]) == (400, "jobs")


def headers_in(client: redis.Redis) -> list[dict[str, Any]]:
    """Of the messages that wait for the model."""
    return [json.loads(item)["headers"] for item in client.lrange(queue_name("stub"), 0, -1)]


def test_a_bulk_takes_as_many_jobs_as_it_says_and_no_more(
    api: httpx.Client, settings: Settings, redis_url: str
) -> None:
    jobs = [{"body": {"prompt": f"prompt {n}"}} for n in range(10_000)]

    answer = api.post("/v1/jobs/bulk", json={"jobs": jobs})

    assert answer.json()["accepted"] == 10_000
    count = "SELECT count(*), count(enqueued_at) AS sent FROM jobs"
    eventually(lambda: rows(settings, count) == [{"count": 10_000, "sent": 10_000}], 60)
    with redis.Redis.from_url(redis_url) as client:
        eventually(lambda: sum(map(num_jobs, headers_in(client))) == 10_000, 60)
    refused = api.post("/v1/jobs/bulk", json={"jobs": [*jobs, jobs[0]]})
    assert refused.status_code == 400


# ── a full queue ────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_says_when_to_come_back(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> None:
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        api={"port": 0, "max_queued_jobs": 3},
    )
    with running_api(settings) as api:
        jobs = {"jobs": [{"body": BODY}] * 3}
        assert api.post("/v1/jobs/bulk", json=jobs).json()["accepted"] == 3

        for answer in (
            api.post("/v1/jobs", json={"body": BODY}),
            api.post("/v1/jobs/bulk", json=jobs),
            api.post("/v1/jobs", json={"body": {"what": "it did not look at"}}),
        ):
            assert (answer.status_code, answer.json()["code"]) == (429, "queue_full")
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert len(stored(settings)) == 3


def test_models_are_listed_with_what_they_take(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str
) -> None:
    small = ModelSettings(source="stub", kind="generate", engine="stub", context_tokens=64)
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models=STUB_MODELS | {"small": small},
    )
    with running_api(settings) as api:
        models = {model["id"]: model for model in api.get("/v1/models").json()["data"]}

        assert set(models) == STUB_MODELS.keys() | {"small"}
        assert models["small"]["context_tokens"] == 64
        assert models["stub"]["default"] and not models["small"]["default"]
