"""OpenAI's own client, over a real socket, against the API, the queue and a worker with stubs."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest

from app.config.settings import Settings
from app.jobs import LIVE_PRIORITY
from app.local.servers import EmbeddedRedis
from tests.apis import running_api
from tests.conftest import STUB_MODELS
from tests.doors import Doors, open_doors
from tests.waiting import eventually
from tests.workers import rows

ASK = [{"role": "user", "content": "What is flour?"}]
"""The stub model says what it is asked."""


@pytest.fixture(scope="module")
def doors(
    empty_databases: Callable[[str], str],
    migrated_template: str,
    redis_server: EmbeddedRedis,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Doors]:
    folder = tmp_path_factory.mktemp("doors")
    settings = Settings(
        cache_dir=str(folder),
        database={"url": empty_databases(migrated_template)},
        broker={"url": redis_server.url.removesuffix("/0") + "/99"},
        models=STUB_MODELS,
        worker={"max_attempts": 1, "lease_s": 4, "heartbeat_s": 1},
    )
    with open_doors(settings, folder / "worker") as doors:
        yield doors


@pytest.fixture
def client(doors: Doors) -> Iterator[openai.OpenAI]:
    with doors.openai() as client:
        yield client


def saying(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# ── answers ─────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_answered_as_openai_answers_it(client: openai.OpenAI, doors: Doors) -> None:
    answer = client.chat.completions.create(model="stub", messages=ASK, max_tokens=8)

    [choice] = answer.choices
    assert answer.object == "chat.completion"
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert choice.message.role == "assistant" and choice.message.content
    assert choice.message.refusal is None and choice.logprobs is None
    assert answer.usage is not None and answer.usage.completion_tokens == 8
    job = doors.the_last_job()
    assert answer.id == f"chatcmpl-{job['id']}"
    assert job["priority"] == LIVE_PRIORITY
    assert (job["state"], job["url"]) == ("completed", "/v1/chat/completions")


def test_several_answers_come_with_their_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="stub", messages=ASK, max_tokens=4, n=2, logprobs=True, top_logprobs=1
    )

    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None and choice.logprobs.content is not None
        assert len(choice.logprobs.content) == 4
        assert len(choice.logprobs.content[0].top_logprobs) == 1


def test_what_a_caller_says_of_itself_is_taken_and_the_tier_comes_back(
    client: openai.OpenAI, doors: Doors
) -> None:
    answer = client.chat.completions.create(
        model="stub",
        messages=ASK,
        max_tokens=2,
        store=True,
        metadata={"customer": "42"},
        user="somebody",
        service_tier="auto",
    )

    assert answer.service_tier == "default"
    assert doors.the_last_job()["metadata"] == {"customer": "42"}


def test_fields_that_nobody_knows_are_ignored(client: openai.OpenAI, doors: Doors) -> None:
    answer = client.chat.completions.create(
        model="stub",
        messages=ASK,
        max_tokens=2,
        extra_body={"field_of_a_later_version": {"deep": [1]}, "stop": None, "ignore_eos": True},
        extra_query={"beta": "true"},
    )

    assert answer.choices
    assert "field_of_a_later_version" not in doors.the_last_job()["request"]


def test_a_field_that_would_change_the_answer_and_cannot_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="stub", messages=ASK, extra_body={"functions": [{"name": "mill"}]}
        )

    assert refused.value.param == "functions"


def test_texts_are_gone_on_with(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="stub", prompt=["A mill", "A wheel"], max_tokens=3, logprobs=1
    )

    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or ()) == 3


def test_the_tokens_of_a_prompt_are_scored(doors: Doors) -> None:
    with doors.openai(_strict_response_validation=False) as client:  # the first has no score
        answer = client.completions.create(
            model="stub", prompt=[[65, 66, 67]], max_tokens=1, logprobs=1, echo=True
        )

    [choice] = answer.choices
    assert choice.text.startswith("ABC") and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None
    assert choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.token_logprobs) == 4


def test_vectors_are_the_same_in_both_encodings(client: openai.OpenAI, doors: Doors) -> None:
    floats = client.embeddings.create(
        model="stub-embed", input=[[102, 108], [109, 105, 108]], encoding_format="float"
    )
    with doors.openai(_strict_response_validation=False) as lenient:  # it decodes too late
        decoded = lenient.embeddings.create(model="stub-embed", input=[[102, 108], [109, 105, 108]])
    raw = client.post(
        "/embeddings",
        body={"input": [102, 108], "encoding_format": "base64"},
        cast_to=httpx.Response,
    ).json()

    vectors = [each.embedding for each in floats.data]
    assert len(vectors) == 2 and floats.usage.prompt_tokens > 0
    assert [each.embedding for each in decoded.data] == [pytest.approx(each) for each in vectors]
    data = base64.b64decode(raw["data"][0]["embedding"])
    assert list(struct.unpack(f"<{len(vectors[0])}f", data)) == pytest.approx(vectors[0])


def test_vectors_are_cut_where_that_is_asked_for(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model="stub-embed", input="flour", dimensions=0)

    assert refused.value.param == "dimensions"


def test_texts_are_reranked_scored_and_classified(client: openai.OpenAI) -> None:
    def post(path: str, body: dict[str, Any]) -> Any:
        return client.post(path, body=body, cast_to=httpx.Response).json()

    ranked = post("/rerank", {"query": "flour", "documents": ["a", "b"], "top_n": 1})
    scored = post("/score", {"text_1": "flour", "text_2": ["a", "b"]})
    classes = post("/classify", {"input": "flour"})

    assert len(ranked["results"]) == 1
    assert [each["index"] for each in scored["data"]] == [0, 1]
    assert classes["data"][0]["label"]


def test_the_same_key_brings_the_same_answer(client: openai.OpenAI, doors: Doors) -> None:
    headers = {"Idempotency-Key": "flour-1"}
    before = len(doors.jobs())

    first, second = (
        client.chat.completions.create(
            model="stub", messages=ASK, max_tokens=3, extra_headers=headers
        )
        for _ in range(2)
    )
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        client.chat.completions.create(
            model="stub", messages=ASK, max_tokens=4, extra_headers=headers
        )

    assert first == second
    assert len(doors.jobs()) == before + 1
    assert refused.value.code == "idempotency_conflict"


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


def test_a_wrong_field_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="stub", messages=ASK, temperature=9)

    error = refused.value
    assert (error.param, error.type, error.code) == ("temperature", "invalid_request_error", None)
    assert error.request_id == error.response.headers["request-id"]
    assert set(error.response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_model_that_there_is_not_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="gpt-9", messages=ASK)

    assert (refused.value.param, refused.value.code) == ("model", "model_not_found")


def test_a_prompt_that_is_too_long_is_a_bad_request(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="stub", messages=saying("flour " * 20_000))

    assert refused.value.code == "context_length_exceeded"


def test_what_openai_has_and_this_has_not_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.moderations.create(input="flour")
    with pytest.raises(openai.APIStatusError) as method:
        client.get("/chat/completions", cast_to=httpx.Response)

    assert refused.value.type == "invalid_request_error"
    assert method.value.status_code == 405 and method.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        (b"", {}, 400),
        (b'{"messages": ' + 5_000 * b"[", {}, 400),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', {}, 400),
        (b'{"messages": [{"role": "user", "content": "\\u0000"}]}', {}, 400),
        (b'{"model": NaN, "messages": []}', {}, 400),
        (b"{}", {"content-type": "text/plain"}, 415),
        (b"{}", {"content-encoding": "gzip"}, 415),
        (b'"' + 2_000_001 * b"f" + b'"', {}, 413),
        (b"{}", {f"x-{place}": "1" for place in range(100)}, 431),
        (b"{}", {"host": "mill.example"}, 421),
        (b"{}", {"origin": "https://mill.example"}, 403),
    ],
)
def test_refusals_of_all_kinds_are_in_openais_envelope(
    doors: Doors, content: bytes, headers: dict[str, str], status: int
) -> None:
    given = {"content-type": "application/json"} | headers

    answer = doors.http.post("/v1/chat/completions", content=content, headers=given)

    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error" and error["message"]
    assert answer.headers["x-request-id"] == answer.headers["request-id"]


def test_a_prompt_that_fails_the_model_is_not_tried_again(doors: Doors) -> None:
    before = len(doors.jobs())

    with doors.openai(max_retries=2) as client, pytest.raises(openai.InternalServerError) as failed:
        client.chat.completions.create(model="stub", messages=saying("nan"))

    assert failed.value.type == "server_error" and failed.value.code
    assert failed.value.response.headers["x-should-retry"] == "false"
    assert len(doors.jobs()) == before + 1


def test_a_job_that_somebody_cancels_is_a_conflict(doors: Doors) -> None:
    before = len(doors.jobs())

    def ask() -> None:
        with doors.openai(max_retries=2) as client:
            client.chat.completions.create(model="stub", messages=saying("sleep 60000"))

    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask)
        [job] = eventually(lambda: doors.jobs("state = 'running'"))
        doors.http.post(f"/v1/jobs/{job['id']}/cancel")
        with pytest.raises(openai.ConflictError) as cancelled:
            asking.result()

    assert cancelled.value.code == "cancelled"
    assert len(doors.jobs()) == before + 1


def test_who_goes_takes_the_job_along(doors: Doors) -> None:
    with doors.openai(timeout=2) as client, pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="stub", messages=saying("sleep 60000"))

    job = doors.the_last_job()
    assert (job["deadline"] - job["created_at"]).total_seconds() == pytest.approx(2, abs=1)
    state = eventually(lambda: doors.the_last_job()["state"] in ("cancelled", "expired"))
    assert state


def test_an_answer_that_does_not_come_in_time_is_a_timeout(doors: Doors) -> None:
    headers = {"x-stainless-read-timeout": "1"}

    with doors.openai() as client, pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(
            model="stub", messages=saying("sleep 60000"), extra_headers=headers
        )

    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


# ── an API alone ────────────────────────────────────────────────────────────────────────────────


def test_a_model_that_nobody_serves_is_a_503_and_no_job(settings: Settings) -> None:
    with running_api(settings) as http:
        eventually(lambda: http.get("/readyz").status_code == 200)
        answer = eventually(lambda: _refused(http, 503))

    assert answer.json()["error"]["code"] == "no_worker"
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert rows(settings, "SELECT id FROM jobs WHERE url = '/v1/completions'") == []


def _refused(http: httpx.Client, status: int) -> httpx.Response | None:
    headers = {"x-stainless-read-timeout": "1"}
    answer = http.post("/v1/chat/completions", json={"messages": ASK}, headers=headers)
    return answer if answer.status_code == status else None


def test_without_its_token_nobody_gets_in(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(
        database={"url": "postgresql://nobody@127.0.0.1:1/none"},
        broker={"url": "redis://127.0.0.1:1/0"},
        api={"port": 0, "token": "the-token-of-the-mill"},
    )
    with running_api(settings) as http:
        client = openai.OpenAI(base_url=f"{http.base_url}/v1", api_key="another")
        with client, pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model="stub", messages=ASK)
        away = http.post(
            "/v1/chat/completions",
            json={"messages": ASK},
            headers={"Authorization": "Bearer the-token-of-the-mill"},
        )

    assert refused.value.code == "invalid_api_key"
    assert away.status_code == 503 and away.json()["error"]["type"] == "server_error"
    assert 1 <= int(away.headers["retry-after"]) <= 60


# ── models ──────────────────────────────────────────────────────────────────────────────────────


def test_models_are_listed_and_told_of(client: openai.OpenAI) -> None:
    listed = client.models.list()
    stub = client.models.retrieve("stub")

    assert {model.id for model in listed} == set(STUB_MODELS)
    assert stub in listed.data
    assert (stub.object, stub.owned_by) == ("model", "gristmill")
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("gpt-9")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as refused:
        client.models.delete("stub")
    assert refused.value.status_code == 405


@pytest.mark.parametrize("version", ["2023-06-01", "2026-10-21", "later"])
def test_anthropics_clients_are_told_of_models_in_their_shape(doors: Doors, version: str) -> None:
    headers = {"anthropic-version": version}

    page = doors.http.get("/v1/models?limit=1&beta=true", headers=headers).json()
    rest = doors.http.get(f"/v1/models?after_id={page['last_id']}", headers=headers).json()
    before = doors.http.get(f"/v1/models?before_id={page['last_id']}", headers=headers).json()
    unknown = doors.http.get("/v1/models/gpt-9", headers=headers)

    [stub] = page["data"]
    assert (stub["id"], stub["type"], stub["lifecycle"]) == ("stub", "model", "active")
    assert page["first_id"] == page["last_id"] == "stub" and not page["has_more"]
    assert rest["data"] == before["data"] == [] and rest["last_id"] is None
    assert doors.http.get("/v1/models/stub", headers=headers).json() == stub
    assert unknown.status_code == 404
    assert unknown.json()["error"]["type"] == "not_found_error"
    assert unknown.json()["request_id"] == unknown.headers["request-id"]


def test_load_generators_find_that_it_is_up(doors: Doors) -> None:
    assert doors.http.get("/health").status_code == 200
