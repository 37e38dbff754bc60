"""Anthropic's own client, over a real socket, against the API, the queue and a worker of stubs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import pytest

from app.config.settings import Settings
from app.local.servers import EmbeddedRedis
from tests.conftest import STUB_MODELS
from tests.doors import Doors, open_doors
from tests.waiting import eventually

ASK: list[Any] = [{"role": "user", "content": "What is flour?"}]
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
        broker={"url": redis_server.url.removesuffix("/0") + "/98"},
        models=STUB_MODELS,
        worker={"max_attempts": 1, "lease_s": 4, "heartbeat_s": 1},
    )
    with open_doors(settings, folder / "worker") as doors:
        yield doors


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
