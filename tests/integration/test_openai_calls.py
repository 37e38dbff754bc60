"""OpenAI's own client, over a real socket, against the API, the queue and a worker with stubs."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from app.config.settings import ModelSettings, Settings
from app.jobs import LIVE_PRIORITY
from app.keys import Scope, new_key
from app.store import keys
from app.store.database import Database
from tests import sdk_calls, sdk_methods
from tests.apis import Hands, running_api
from tests.conftest import STUB_MODELS
from tests.doors import Doors, open_doors
from tests.rescues import running_rescue
from tests.waiting import eventually
from tests.workers import rows, running_worker

ASK = [{"role": "user", "content": "What is flour?"}]
"""The stub model says what it is asked."""


def slow_stub(step_ms: int = 5) -> ModelSettings:
    """A token takes so long, and sequences join between the steps."""
    options = {"joins": True, "step_ms": step_ms}
    return ModelSettings(
        source="stub", kind="generate", engine="stub", default=True, options=options
    )


@pytest.fixture(scope="module")
def doors_given() -> dict[str, Any]:
    return {"models": STUB_MODELS | {"stub": slow_stub()}}


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


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # theirs, of methods with newer names
@pytest.mark.parametrize("name", sdk_calls.OPENAI)
def test_every_method_that_is_served_is_answered(client: openai.OpenAI, name: str) -> None:
    sdk_calls.OPENAI[name](client)


def test_the_async_client_and_raw_and_streaming_answers_are_served_as_well(doors: Doors) -> None:
    async def calls() -> list[str]:
        base_url = f"{doors.http.base_url}/v1"
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key="none", _strict_response_validation=True
        ) as its:
            chats = its.chat.completions
            given: dict[str, Any] = {"model": "stub", "messages": ASK}
            answer = await chats.create(**given)
            raw = await chats.with_raw_response.create(**given)
            async with chats.with_streaming_response.create(**given) as streaming:
                third = await streaming.parse()
            async with chats.stream(**given) as stream:
                fourth = await stream.get_final_completion()
            response = await its.responses.create(model="stub", input=ASK[0]["content"])
            assert raw.headers["x-request-id"]
            said = [
                each.choices[0].message.content for each in (answer, raw.parse(), third, fourth)
            ]
            return [*map(str, said), response.output_text]

    first, *others = asyncio.run(calls())
    assert others == 4 * [first]


def test_what_openai_has_and_this_has_not_is_not_found(client: openai.OpenAI, doors: Doors) -> None:
    told = {}
    served = sdk_calls.OPENAI.keys() | sdk_calls.HOOKS
    for verb, path in sdk_methods.calls_of_others("openai", served):
        answer = doors.http.request(verb, path)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (404, "unknown_url"), (verb, path)
        assert (error["type"], error["param"]) == ("invalid_request_error", None)
        told[verb, path] = error["message"]

    assert len(told) > 200 and all("not served here" in each for each in told.values())
    assert "/v1/files" in told["POST", "/v1/uploads"]
    assert "truncation" in told["POST", "/v1/responses/compact"]
    assert "configured" in told["DELETE", "/v1/models/a"]
    with pytest.raises(openai.NotFoundError) as refused:
        client.moderations.create(input="flour")
    assert refused.value.code == "unknown_url"
    with pytest.raises(openai.APIStatusError) as method:
        client.get("/embeddings", cast_to=httpx.Response)
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

    assert (failed.value.type, failed.value.code) == ("server_error", "not_finite")
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


def test_a_client_that_says_it_waits_for_a_moment_is_served_all_the_same(doors: Doors) -> None:
    with doors.openai() as client:
        answer = client.chat.completions.create(
            model="stub",
            messages=saying("A mill"),
            extra_headers={"x-stainless-read-timeout": "0.004"},
        )

    assert answer.choices[0].message.content


def test_an_answer_that_does_not_come_in_time_is_a_timeout(doors: Doors) -> None:
    headers = {"x-stainless-read-timeout": "1"}

    with doors.openai() as client, pytest.raises(openai.InternalServerError) as late:
        client.chat.completions.create(
            model="stub", messages=saying("sleep 60000"), extra_headers=headers
        )

    assert (late.value.status_code, late.value.code) == (504, "deadline_exceeded")


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def test_a_chat_is_told_as_it_comes_and_is_what_it_is_at_once(
    client: openai.OpenAI, doors: Doors
) -> None:
    whole = client.chat.completions.create(model="stub", messages=ASK, max_tokens=8)
    chunks = list(
        client.chat.completions.create(model="stub", messages=ASK, max_tokens=8, stream=True)
    )

    first, *middle, last = chunks
    assert first.choices[0].delta.role == "assistant" and first.choices[0].delta.content == ""
    assert "".join(each.choices[0].delta.content or "" for each in chunks) == (
        whole.choices[0].message.content
    )
    assert len(middle) > 1
    assert {each.object for each in chunks} == {"chat.completion.chunk"}
    assert {each.id for each in chunks} == {f"chatcmpl-{doors.the_last_job()['id']}"}
    assert [each.choices[0].finish_reason for each in (first, *middle)] == [None] * len(chunks[:-1])
    assert last.choices[0].finish_reason == "length" and last.choices[0].delta.content is None
    assert all(each.usage is None for each in chunks)


def test_a_stream_ends_with_the_usage_where_that_is_wanted(client: openai.OpenAI) -> None:
    *chunks, last = client.chat.completions.create(
        model="stub",
        messages=ASK,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True, "include_obfuscation": False},
        service_tier="auto",
    )

    assert all(each.usage is None and each.choices for each in chunks)
    assert last.choices == [] and last.usage is not None
    assert last.usage.completion_tokens == 8
    assert {each.service_tier for each in (*chunks, last)} == {"default"}


def test_load_generators_hear_the_usage_with_each_chunk(doors: Doors) -> None:
    body = {
        "messages": ASK,
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "ignore_eos": True,
        "stop": None,
    }

    with doors.http.stream("POST", "/v1/chat/completions", json=body) as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line]

    assert answer.headers["content-type"].startswith("text/event-stream")
    assert lines[-1] == "[DONE]"
    counts = [json.loads(line)["usage"]["completion_tokens"] for line in lines[:-1]]
    assert counts == sorted(counts) and counts[-1] == 5


def test_several_answers_are_told_with_their_logprobs(client: openai.OpenAI) -> None:
    given: dict[str, Any] = {
        "model": "stub", "messages": ASK, "max_tokens": 6, "n": 2, "logprobs": True,
        "top_logprobs": 1,
    }  # fmt: skip
    whole = client.chat.completions.create(**given)
    chunks = list(client.chat.completions.create(**given, stream=True))

    for choice in whole.choices:
        own = [each.choices[0] for each in chunks if each.choices[0].index == choice.index]
        assert "".join(each.delta.content or "" for each in own) == choice.message.content
        scored = [each.logprobs.content or [] for each in own if each.logprobs]
        assert choice.logprobs is not None
        told = [entry.to_dict() for entry in itertools.chain.from_iterable(scored)]
        assert told == [entry.to_dict() for entry in choice.logprobs.content or []]


@pytest.mark.parametrize("echo", [False, True])
def test_texts_are_gone_on_with_as_it_comes(doors: Doors, echo: bool) -> None:
    given: dict[str, Any] = {
        "model": "stub", "prompt": ["A mill", "A wheel"], "max_tokens": 4, "n": 2, "logprobs": 1,
        "echo": echo,
    }  # fmt: skip
    with doors.openai(_strict_response_validation=False) as client:  # it knows no unended chunk
        whole = client.completions.create(**given)
        chunks = list(client.completions.create(**given, stream=True))

    assert {each.object for each in chunks} == {"text_completion"}
    for choice in whole.choices:
        own = [each.choices[0] for each in chunks if each.choices[0].index == choice.index]
        assert "".join(each.text for each in own) == choice.text
        assert [each.finish_reason for each in own if each.finish_reason] == ["length"]
        assert choice.logprobs is not None
        for name, told in choice.logprobs.to_dict().items():
            parts = [each.logprobs.to_dict()[name] for each in own if each.logprobs]
            assert list(itertools.chain.from_iterable(parts)) == told  # type: ignore[arg-type]


def test_what_fails_before_it_is_begun_is_an_error_of_its_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(
            model="stub",
            messages=ASK,
            stream=True,
            extra_body={"stream_options": {"include_usage": 1}},
        )
    with pytest.raises(openai.BadRequestError) as odd:
        client.chat.completions.create(model="stub", messages=ASK, extra_body={"stream": "yes"})

    assert refused.value.param == "stream_options.include_usage"
    assert odd.value.param == "stream"


def test_what_fails_in_the_middle_is_the_last_event(doors: Doors) -> None:
    headers = {"x-stainless-read-timeout": "1"}

    with doors.openai() as client:
        stream = client.chat.completions.create(
            model="stub", messages=saying("sleep 60000"), stream=True, extra_headers=headers
        )
        with pytest.raises(openai.APIError) as failed:
            list(stream)

    assert failed.value.code == "deadline_exceeded"
    eventually(lambda: doors.the_last_job()["state"] in ("expired", "cancelled"))


def test_who_leaves_a_stream_takes_the_job_along(doors: Doors) -> None:
    with doors.openai() as client:
        stream = client.chat.completions.create(
            model="stub", messages=saying("sleep 60000"), stream=True
        )
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()

    eventually(lambda: doors.the_last_job()["state"] == "cancelled")


def test_a_stream_goes_on_where_it_was_when_its_worker_is_killed(
    make_settings: Callable[..., Settings], database_url: str, redis_url: str, tmp_path: Path
) -> None:
    # given a stream that is being told
    said = "flour " * 20
    settings = make_settings(
        database={"url": database_url},
        broker={"url": redis_url},
        models={"stub": slow_stub(20)},
        worker={"lease_s": 2, "heartbeat_s": 0.5},
    )
    with open_doors(settings, tmp_path / "worker") as doors, doors.openai() as client:
        stream = iter(
            client.chat.completions.create(model="stub", messages=saying(said), stream=True)
        )
        told = [next(stream) for _ in range(10)]

        # when its worker is killed, and another one takes the job up
        doors.worker.kill()
        with (
            running_rescue(settings, tmp_path / "rescue"),
            running_worker(settings, tmp_path / "another"),
        ):
            told += stream

    # then it is one answer, told once
    text = "".join(each.choices[0].delta.content or "" for each in told)
    [job] = rows(settings, "SELECT response FROM results")
    assert text == job["response"]["choices"][0]["message"]["content"] and said.strip() in text
    assert [each.choices[0].finish_reason for each in told if each.choices[0].finish_reason] == [
        "stop"
    ]


def test_a_stream_that_nobody_begins_ends_when_its_caller_has_waited(settings: Settings) -> None:
    hands = Hands(settings.database.url)  # it is up, and takes nothing
    try:
        with running_api(settings) as http:
            eventually(lambda: http.get("/readyz").status_code == 200)
            late = http.post(
                "/v1/chat/completions",
                json={"messages": ASK, "stream": True},
                headers={"x-stainless-read-timeout": "1"},
            )
    finally:
        hands.close()

    assert (late.status_code, late.json()["error"]["code"]) == (504, "deadline_exceeded")
    assert [row["state"] for row in rows(settings, "SELECT state FROM jobs")] == ["cancelled"]


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


def test_without_a_key_nobody_gets_in(settings: Settings, database: Database) -> None:
    key = new_key()
    with database.begin() as connection:
        keys.create(connection, key, actor="test", name="first", scopes=set(Scope))

    with running_api(settings) as http:
        url = f"{http.base_url}/v1"
        client = openai.OpenAI(base_url=url, api_key="another", max_retries=0)
        with client, pytest.raises(openai.AuthenticationError) as refused:
            client.chat.completions.create(model="stub", messages=ASK)
        with openai.OpenAI(base_url=url, api_key=key.text) as client:
            assert client.models.list().data

    assert (refused.value.type, refused.value.code) == ("invalid_request_error", "invalid_api_key")


def test_without_postgres_a_call_may_come_back(make_settings: Callable[..., Settings]) -> None:
    settings = make_settings(
        database={"url": "postgresql://nobody@127.0.0.1:1/none"},
        broker={"url": "redis://127.0.0.1:1/0"},
    )
    with running_api(settings) as http:
        away = http.post("/v1/chat/completions", json={"messages": ASK})

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
    with pytest.raises(openai.NotFoundError) as refused:
        client.models.delete("stub")
    assert "configured" in refused.value.message


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
