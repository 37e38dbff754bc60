"""Anthropic's own client, over a real socket, against the API, the queue and a worker of stubs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import anthropic
import psycopg
import pytest

from app.config.settings import Settings
from tests import sdk_calls, sdk_methods
from tests.doors import Doors
from tests.rescues import running_rescue
from tests.waiting import eventually

ASK: list[Any] = [{"role": "user", "content": "What is flour?"}]
"""The stub model says what it is asked."""


@pytest.fixture(scope="module")
def doors_given() -> dict[str, Any]:
    return {"rescue": {"sweep_ms": 100}}


@pytest.fixture(scope="module", autouse=True)
def rescue(doors_settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with running_rescue(doors_settings, tmp_path_factory.mktemp("rescue")):
        yield


@pytest.fixture
def client(doors: Doors) -> Iterator[anthropic.Anthropic]:
    with doors.anthropic() as client:
        yield client


def test_a_message_is_answered_as_anthropic_answers_it(
    client: anthropic.Anthropic, doors: Doors
) -> None:
    message = client.messages.create(
        model="stub",
        max_tokens=8,
        system="Be brief.",
        messages=ASK,
        metadata={"user_id": "42"},
        service_tier="auto",
    )

    [block] = message.content
    assert (message.type, message.role, message.model) == ("message", "assistant", "stub")
    assert block.type == "text" and block.text
    assert (message.stop_reason, message.stop_sequence) == ("max_tokens", None)
    assert message.usage.output_tokens == 8
    job = doors.the_last_job()
    assert message.id == f"msg_{job['id'].hex}"
    assert (job["state"], job["url"]) == ("completed", "/v1/messages")
    assert job["metadata"] == {"user_id": "42"}


def test_a_message_is_told_as_it_comes(client: anthropic.Anthropic, doors: Doors) -> None:
    with client.messages.stream(model="stub", max_tokens=6, messages=ASK) as stream:
        texts = list(stream.text_stream)
        message = stream.get_final_message()

    job = doors.the_last_job()
    [block] = doors.http.get(f"/v1/jobs/{job['id']}").json()["response"]["content"]
    assert "".join(texts) == block["text"]
    assert (message.id, message.stop_reason) == (f"msg_{job['id'].hex}", "max_tokens")
    [told] = message.content
    assert told.type == "text" and told.text == block["text"]
    assert message.usage.output_tokens == 6


@pytest.mark.parametrize("name", sdk_calls.ANTHROPIC)
def test_every_method_that_is_served_is_answered(client: anthropic.Anthropic, name: str) -> None:
    sdk_calls.ANTHROPIC[name](client)


def test_the_async_client_and_raw_and_streaming_answers_are_served_as_well(doors: Doors) -> None:
    async def calls() -> list[str]:
        async with anthropic.AsyncAnthropic(
            base_url=str(doors.http.base_url), api_key="none", _strict_response_validation=True
        ) as its:
            given: dict[str, Any] = {"model": "stub", "messages": ASK, "max_tokens": 64}
            message = await its.messages.create(**given)
            raw = await its.messages.with_raw_response.create(**given)
            async with its.messages.with_streaming_response.create(**given) as streaming:
                third = await streaming.parse()
            async with its.messages.stream(**given) as stream:
                fourth = await stream.get_final_message()
            assert raw.headers["request-id"]
            told = (message, await raw.parse(), third, fourth)
            return [each.content[0].text for each in told if each.content[0].type == "text"]

    first, *others = asyncio.run(calls())
    assert others == 3 * [first]


def test_a_thread_that_may_go_on_without_is_told_whole(
    client: anthropic.Anthropic, doors: Doors
) -> None:
    thread = client.beta.messages.thread(
        model="stub", max_tokens=64, unsupported_request_behavior="continue_unthreaded"
    )
    for text in ("a", "b"):
        thread.send({"role": "user", "content": text})

    assert [each["role"] for each in doors.the_last_job()["request"]["messages"]] == [
        "user",
        "assistant",
        "user",
    ]
    with pytest.raises(anthropic.BadRequestError) as refused:
        client.beta.messages.thread(model="stub", max_tokens=64).send(ASK[0])
    assert "send all of it" in refused.value.message


def test_what_anthropic_has_and_this_has_not_is_not_found(doors: Doors) -> None:
    told = {}
    for verb, path in sdk_methods.calls_of_others("anthropic", sdk_calls.ANTHROPIC.keys()):
        answer = doors.http.request(verb, path, headers={"anthropic-version": "2026-10-21"})
        error = answer.json()
        assert (answer.status_code, error["type"]) == (404, "error"), (verb, path)
        assert error["error"]["type"] == "not_found_error"
        assert error["request_id"] == answer.headers["request-id"]
        told[verb, path] = error["error"]["message"]

    assert len(told) > 200 and all("not served here" in each for each in told.values())
    assert ("GET", "/v1/files/a") in told


def test_events_of_a_message_come_in_their_order(client: anthropic.Anthropic) -> None:
    events = client.messages.create(model="stub", max_tokens=3, messages=ASK, stream=True)

    kinds = [event.type for event in events]

    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}


def test_a_caller_that_goes_takes_its_message_along(
    client: anthropic.Anthropic, doors: Doors
) -> None:
    asked: list[Any] = [{"role": "user", "content": "sleep 20000"}]

    with client.messages.create(model="stub", max_tokens=4, messages=asked, stream=True) as events:
        assert next(iter(events)).type == "message_start"

    eventually(lambda: doors.the_last_job()["state"] == "cancelled")


@pytest.mark.parametrize("stream", ["yes", 1, [1]])
def test_stream_is_true_or_false(client: anthropic.Anthropic, stream: Any) -> None:
    with pytest.raises(anthropic.BadRequestError, match="stream"):
        client.messages.create(
            model="stub", max_tokens=1, messages=ASK, extra_body={"stream": stream}
        )


def test_tokens_are_counted_as_the_model_counts_them(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="stub", messages=ASK, system="Be brief.")
    answered = client.messages.create(model="stub", messages=ASK, system="Be brief.", max_tokens=1)

    assert counted.input_tokens == answered.usage.input_tokens


def test_fields_that_nobody_knows_are_ignored(client: anthropic.Anthropic, doors: Doors) -> None:
    message = client.messages.create(
        model="stub",
        max_tokens=2,
        messages=ASK,
        extra_body={"field_of_a_later_version": {"deep": [1]}},
        extra_query={"beta": "true"},
        extra_headers={"anthropic-beta": "one-of-theirs"},
    )

    assert message.content
    assert "field_of_a_later_version" not in doors.the_last_job()["request"]


@pytest.mark.parametrize(
    ("fields", "kind", "type_"),
    [
        ({"model": "nobody"}, anthropic.NotFoundError, "not_found_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
        ({"max_tokens": 0}, anthropic.BadRequestError, "invalid_request_error"),
        ({"max_tokens": 1_000_000}, anthropic.BadRequestError, "invalid_request_error"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            anthropic.BadRequestError,
            "invalid_request_error",
        ),
        ({"mcp_servers": [{}]}, anthropic.BadRequestError, "invalid_request_error"),
    ],
)
def test_what_cannot_be_answered_is_refused_as_anthropic_refuses(
    client: anthropic.Anthropic, fields: dict[str, Any], kind: type[Exception], type_: str
) -> None:
    asked = {"model": "stub", "max_tokens": 1, "messages": ASK} | fields

    with pytest.raises(kind) as refused:
        client.post("/v1/messages", body=asked, cast_to=anthropic.types.Message)

    error = refused.value
    assert isinstance(error, anthropic.APIStatusError)
    assert isinstance(error.body, dict)
    assert error.body["type"] == "error" and error.body["error"]["type"] == type_
    assert error.request_id == error.body["request_id"]


# ── batches ─────────────────────────────────────────────────────────────────────────────────────


def asked(number: int, **params: Any) -> Any:
    default = {"model": "stub", "max_tokens": 16, "messages": ASK}
    return {"custom_id": f"line-{number}", "params": default | params}


def ended(client: anthropic.Anthropic, batch_id: str) -> Any:
    def look() -> Any:
        batch = client.messages.batches.retrieve(batch_id)
        counts = batch.request_counts
        told = counts.succeeded + counts.errored + counts.canceled + counts.expired
        is_over = batch.processing_status == "ended"
        assert (counts.processing == 0) == is_over and (told > 0) == is_over
        return batch if is_over else None

    return eventually(look, timeout_s=60)


def test_a_batch_goes_from_its_requests_to_their_results(
    client: anthropic.Anthropic, doors: Doors
) -> None:
    requests = [asked(n) for n in range(20)]
    requests += [asked(20, max_tokens=0), asked(21, model="nobody"), asked(22, messages="no")]

    batch = client.messages.batches.create(requests=requests)
    assert (batch.processing_status, batch.request_counts.processing) == ("in_progress", 23)
    assert batch.results_url is None and batch.id.startswith("msgbatch_")
    done = ended(client, batch.id)

    counts = done.request_counts
    assert (counts.succeeded, counts.errored, counts.canceled, counts.expired) == (20, 3, 0, 0)
    assert (done.expires_at - done.created_at).total_seconds() == 86_400
    results = {each.custom_id: each.result for each in client.messages.batches.results(batch.id)}
    assert len(results) == 23
    for number in range(20):
        result = results[f"line-{number}"]
        assert result.type == "succeeded" and result.message.content
    for number, kind in (
        (20, "invalid_request_error"),
        (21, "not_found_error"),
        (22, "invalid_request_error"),
    ):
        result = results[f"line-{number}"]
        assert result.type == "errored" and result.error.error.type == kind
    assert all(job["priority"] == 6 for job in doors.jobs("url = '/v1/messages' AND priority > 0"))


def test_a_batch_that_is_cancelled_keeps_what_was_finished(client: anthropic.Anthropic) -> None:
    slow = [{"role": "user", "content": "sleep 60000"}]
    batch = client.messages.batches.create(requests=[asked(0), asked(1, messages=slow)])
    with pytest.raises(anthropic.ConflictError) as early:
        client.get(f"/v1/messages/batches/{batch.id}/results", cast_to=object)
    with pytest.raises(anthropic.ConflictError):
        client.messages.batches.delete(batch.id)

    cancelling = client.messages.batches.cancel(batch.id)
    done = ended(client, batch.id)

    assert early.value.response.headers["x-should-retry"] == "false"
    assert cancelling.processing_status in ("canceling", "ended")
    assert cancelling.cancel_initiated_at is not None
    assert done.request_counts.canceled >= 1
    kinds = {each.custom_id: each.result.type for each in client.messages.batches.results(batch.id)}
    assert kinds["line-1"] == "canceled" and kinds["line-0"] in ("succeeded", "canceled")
    assert client.messages.batches.cancel(batch.id).processing_status == "ended"  # once more


def test_batches_are_listed_newest_first_in_pages_and_deleted(client: anthropic.Anthropic) -> None:
    ids = [client.messages.batches.create(requests=[asked(0)]).id for _ in range(3)]

    page = client.messages.batches.list(limit=2)
    assert [each.id for each in page.data] == ids[:0:-1] and page.has_more
    older = client.messages.batches.list(limit=2, after_id=page.last_id)
    assert older.data[0].id == ids[0]
    newer = client.messages.batches.list(limit=1, before_id=ids[0])
    assert [each.id for each in newer.data] == [ids[1]] and newer.has_more
    assert ids[0] in [each.id for each in client.messages.batches.list(limit=2)]  # on its pages

    ended(client, ids[0])
    assert client.messages.batches.delete(ids[0]).id == ids[0]
    for call in (client.messages.batches.retrieve, client.messages.batches.delete):
        with pytest.raises(anthropic.NotFoundError):
            call(ids[0])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "requests"),
        ({"requests": []}, "requests"),
        ({"requests": "no"}, "requests"),
        ({"requests": [1]}, "requests.0"),
        ({"requests": [{"params": {}}]}, "requests.0.custom_id"),
        ({"requests": [{"custom_id": "a b", "params": {}}]}, "requests.0.custom_id"),
        ({"requests": [{"custom_id": "a"}]}, "requests.0.params"),
        ({"requests": [asked(1), asked(1)]}, "requests.1.custom_id"),
    ],
)
def test_a_batch_that_is_none_is_refused_at_once(
    client: anthropic.Anthropic, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(anthropic.BadRequestError, match=param):
        client.post("/v1/messages/batches", body=body, cast_to=object)


def test_the_same_key_is_the_same_batch(client: anthropic.Anthropic) -> None:
    key = {"Idempotency-Key": "monday"}
    first = client.messages.batches.create(requests=[asked(0)], extra_headers=key)
    again = client.messages.batches.create(requests=[asked(0)], extra_headers=key)

    assert again.id == first.id
    with pytest.raises(anthropic.ConflictError) as other:
        client.messages.batches.create(requests=[asked(1)], extra_headers=key)
    assert other.value.response.headers["x-should-retry"] == "false"


def test_results_are_where_the_batch_says(client: anthropic.Anthropic, doors: Doors) -> None:
    batch = client.messages.batches.create(requests=[asked(0)])
    done = ended(client, batch.id)

    assert done.results_url == f"{doors.http.base_url}/v1/messages/batches/{batch.id}/results"
    told = doors.http.get(done.results_url, headers={"x-api-key": "none"})
    assert told.headers["content-type"] == "application/x-jsonl"


def test_results_are_read_as_long_as_their_file_is_kept(
    client: anthropic.Anthropic, doors: Doors
) -> None:
    batch = client.messages.batches.create(requests=[asked(n) for n in range(3)])
    url = ended(client, batch.id).results_url
    before = doors.http.get(url)
    batch_id = [batch.id.removeprefix("msgbatch_")]
    with psycopg.connect(doors.settings.database.url, autocommit=True) as connection:
        connection.execute("DELETE FROM job_batch_lines WHERE batch_id = %s", batch_id)
        after = doors.http.get(url)
        connection.execute("UPDATE files SET expires_at = now() WHERE batch_id = %s", batch_id)

    assert len(before.content.splitlines()) == 3 and after.content == before.content
    with pytest.raises(anthropic.NotFoundError, match="not kept any more"):
        client.messages.batches.results(batch.id)
