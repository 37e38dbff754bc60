"""OpenAI's own client and its Responses API, over a real socket, against API, queue and worker."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final, Literal

import hypothesis
import openai
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from openai.types.responses import Response
from pydantic import BaseModel

from app.requests.response import ResponsesBody
from tests.any_messages import ANYTHING, TEXTS
from tests.apis import running_api
from tests.doors import Doors
from tests.waiting import eventually
from tests.workers import rows

OPEN: Final = ("queued", "in_progress")
UNKNOWN: Final = f"resp_{0:032x}"


@pytest.fixture
def client(doors: Doors) -> Iterator[openai.OpenAI]:
    with doors.openai() as client:
        yield client


def background(client: openai.OpenAI, text: str = "What is flour?", **given: Any) -> Response:
    return client.responses.create(model="stub", input=text, background=True, **given)


def done(client: openai.OpenAI, response: Response) -> Response:
    """It, when it is."""

    def look() -> Response | None:
        found = client.responses.retrieve(response.id)
        return None if found.status in OPEN else found

    return eventually(look)


# ── create ──────────────────────────────────────────────────────────────────────────────────────


def test_a_response_is_answered_in_the_same_call(client: openai.OpenAI, doors: Doors) -> None:
    response = client.responses.create(
        model="stub",
        input="What is flour?",
        instructions="Be brief.",
        max_output_tokens=200,
        metadata={"order": "17"},
        service_tier="flex",
    )

    job = doors.the_last_job()
    assert response.id == f"resp_{job['id'].hex}"
    assert (response.status, response.object, response.model) == ("completed", "response", "stub")
    assert response.output_text
    assert (response.service_tier, response.metadata) == ("flex", {"order": "17"})
    assert response.completed_at and response.completed_at >= response.created_at
    [row] = rows(doors.settings, f"SELECT * FROM results WHERE job_id = '{job['id']}'")
    assert response.usage is not None and response.usage.output_tokens == row["output_tokens"]
    assert (job["url"], job["metadata"]) == ("/v1/responses", {"order": "17"})
    assert client.responses.retrieve(response.id) == response


def test_one_in_the_background_is_answered_at_once_and_retrieved(client: openai.OpenAI) -> None:
    response = background(client, service_tier="flex", metadata={"a": "b"})

    assert response.status in OPEN and response.background and response.output == []
    assert response.usage is None
    found = done(client, response)
    assert found.status == "completed" and found.output_text
    assert (found.id, found.created_at) == (response.id, response.created_at)
    assert (found.metadata, found.service_tier) == ({"a": "b"}, "flex")


def test_what_is_cut_off_at_its_length_is_incomplete(client: openai.OpenAI) -> None:
    found = done(client, background(client, max_output_tokens=1))

    assert found.status == "incomplete" and found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
    assert found.usage is not None and found.usage.output_tokens == 1


@pytest.mark.parametrize(("window", "hours"), [("soonest", None), ("2h", 2), ("8h", 8)])
def test_a_completion_window_is_a_deadline(
    client: openai.OpenAI,
    doors: Doors,
    window: Literal["soonest", "2h", "8h"],
    hours: int | None,
) -> None:
    response = background(
        client, background_options={"completion_window": window, "continuation_id": "survey"}
    )

    [job] = doors.jobs(f"id = '{response.id.removeprefix('resp_')}'")
    taken = job["deadline"] and round((job["deadline"] - job["created_at"]).total_seconds() / 3600)
    assert taken == hours
    assert (job["priority"] > 0) == (hours is not None)


class Mill(BaseModel):
    name: str
    wheels: int


def test_structured_output_is_parsed(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="stub", input='{"name": "Vik", "wheels": 2}', text_format=Mill
    )

    assert parsed.text.format.type == "json_schema"  # type: ignore[union-attr]


def test_the_same_key_brings_the_same_response(client: openai.OpenAI, doors: Doors) -> None:
    headers = {"Idempotency-Key": "grist-1"}
    before = len(doors.jobs())

    first = background(client, extra_headers=headers)
    done(client, first)
    second = background(client, extra_headers=headers)

    assert (second.id, second.status) == (first.id, "completed")
    assert len(doors.jobs()) == before + 1


# ── conversations ───────────────────────────────────────────────────────────────────────────────


def test_a_response_goes_on_from_another_without_its_instructions(
    client: openai.OpenAI, doors: Doors
) -> None:
    first = client.responses.create(model="stub", input="Hello.", instructions="Be loud.")
    second = client.responses.create(
        model="stub", input="And?", previous_response_id=first.id, instructions="Be brief."
    )
    third = client.responses.create(model="stub", input="So?", previous_response_id=second.id)

    assert third.previous_response_id == second.id and third.instructions is None
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    said = [item.content[0].text for item in items]  # type: ignore[union-attr]
    assert said == ["Hello.", first.output_text, "And?", second.output_text, "So?"]
    assert "Be loud." not in second.output_text.split("Hello.")[0]


def test_items_are_listed_page_by_page_in_both_orders(client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "a1", "name": "grind", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "a1", "output": "flour"}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": []}
    said: list[Any] = [
        {"role": "user", "content": "a"},
        thought,
        call,
        output,
        {"role": "user", "content": [{"type": "input_text", "text": "b"}]},
    ]
    response = client.responses.create(model="stub", input=said)

    page = client.responses.input_items.list(response.id, limit=2)
    oldest = list(client.responses.input_items.list(response.id, order="asc", limit=100))

    kinds = ["message", "reasoning", "function_call", "function_call_output", "message"]
    assert [item.type for item in oldest] == kinds
    assert page.has_more and [item.id for item in page.data] == [item.id for item in oldest[:2:-1]]
    assert len({item.id for item in page}) == 5
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.input_items.list(response.id, after="msg_nobody")
    assert refused.value.param == "after"


@pytest.mark.parametrize("previous", [UNKNOWN, "resp_x", "msg_1"])
def test_what_there_is_not_cannot_be_gone_on_from(client: openai.OpenAI, previous: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model="stub", input="And?", previous_response_id=previous)

    assert refused.value.param == "previous_response_id"


def test_tokens_are_counted_with_the_conversation_before(client: openai.OpenAI) -> None:
    first = client.responses.create(model="stub", input="Hello.")
    given: dict[str, Any] = {"model": "stub", "input": "And?", "previous_response_id": first.id}

    counted = client.responses.input_tokens.count(**given)
    answered = client.responses.create(**given)

    assert answered.usage is not None
    assert counted.input_tokens == answered.usage.input_tokens
    assert counted.object == "response.input_tokens"


# ── streams ─────────────────────────────────────────────────────────────────────────────────────


def numbers(events: list[Any]) -> list[int]:
    return [each.sequence_number for each in events]


def told_of(client: openai.OpenAI, text: str, **given: Any) -> list[Any]:
    return list(client.responses.create(model="stub", input=text, stream=True, **given))


def text_in(events: list[Any]) -> str:
    return "".join(each.delta for each in events if each.type == "response.output_text.delta")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_response_is_streamed_and_retrieved_as_it_was_told(
    client: openai.OpenAI, doors: Doors, in_background: bool
) -> None:
    # given
    with client.responses.stream(
        model="stub", input="A mill grinds grain, slowly.", background=in_background
    ) as told:
        events = list(told)
        final = told.get_final_response()

    # then events are numbered without a gap, and the response is the one that is stored
    assert numbers(events) == list(range(len(events)))
    assert [each.type.removeprefix("response.") for each in events[:5]] == [
        "created",
        "queued",
        "in_progress",
        "output_item.added",
        "content_part.added",
    ]
    assert text_in(events) == final.output_text == "A mill grinds grain, slowly."
    assert len(events) > 12
    assert client.responses.retrieve(final.id).output_text == final.output_text
    assert doors.the_last_job()["stream_events"]


def test_a_stream_is_resumed_after_any_event_in_both_ways(client: openai.OpenAI) -> None:
    events = told_of(client, "One two three.", background=True)
    id = events[-1].response.id
    assert len(events) > 10
    assert client.responses.retrieve(id) == events[-1].response

    for last in (0, 3, len(events) // 2, len(events) - 2):
        # of the server's own accord
        rest = list(client.responses.retrieve(id, stream=True, starting_after=last))
        assert numbers(rest) == list(range(last + 1, len(events)))
        assert [each.to_dict() for each in rest] == [each.to_dict() for each in events[last + 1 :]]
        # by the client, from the first on
        with client.responses.stream(response_id=id, starting_after=last) as again:
            assert numbers(list(again)) == numbers(rest)
            assert again.get_final_response().output_text == "One two three."
    # who has had all of it hears the end once more
    [end] = client.responses.retrieve(id, stream=True, starting_after=len(events))
    assert (end.type, end.sequence_number) == ("response.completed", len(events) + 1)


def test_a_stream_that_redis_lost_is_told_of_the_row(client: openai.OpenAI, doors: Doors) -> None:
    events = told_of(client, "One two three.", background=True)

    with redis.Redis.from_url(doors.settings.broker.url) as server:
        for key in server.scan_iter("*gristmill.events.*"):
            server.delete(key)
    again = list(client.responses.retrieve(events[-1].response.id, stream=True))

    assert again == events


def test_one_that_was_not_begun_as_a_stream_is_streamed_at_its_end(client: openai.OpenAI) -> None:
    response = background(client, "sleep 500")

    events = list(client.responses.retrieve(response.id, stream=True))

    assert numbers(events) == list(range(len(events)))
    assert text_in(events) == "sleep 500"


def test_a_response_that_is_cancelled_ends_its_stream(client: openai.OpenAI) -> None:
    stream = client.responses.create(
        model="stub", input="sleep 60000", background=True, stream=True
    )
    first = next(stream)
    assert first.type == "response.created"
    eventually(lambda: client.responses.retrieve(first.response.id).status == "in_progress")

    client.responses.cancel(first.response.id)

    last = list(stream)[-1]
    assert last.type == "response.incomplete" and last.response.status == "cancelled"


def test_a_response_that_fails_ends_its_stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(model="stub", input="nan", stream=True))

    assert events[-1].type == "response.failed" and events[-1].response.error is not None
    assert events[-1].response.error.code == "server_error"


def test_who_leaves_a_stream_takes_a_response_along_that_is_not_in_the_background(
    client: openai.OpenAI, doors: Doors
) -> None:
    for in_background in (True, False):
        stream = client.responses.create(
            model="stub", input="sleep 60000", stream=True, background=in_background
        )
        first = next(stream)
        assert first.type == "response.created"
        id = first.response.id

        stream.response.close()

        if in_background:
            assert client.responses.retrieve(id).status in OPEN
            client.responses.cancel(id)
        else:
            eventually(lambda id=id: client.responses.retrieve(id).status == "cancelled")


def test_what_is_not_to_be_stored_is_streamed_once(client: openai.OpenAI, doors: Doors) -> None:
    with client.responses.stream(model="stub", input="Flour.", store=False) as told:
        final = told.get_final_response()

    assert final.output_text == "Flour."
    eventually(lambda: doors.the_last_job()["request"] is None)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(final.id)


@pytest.mark.parametrize("after", [-1, "x", 2**70])
def test_a_wrong_place_to_go_on_from_is_named(client: openai.OpenAI, after: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.retrieve(UNKNOWN, stream=True, starting_after=after)

    assert refused.value.param == "starting_after"


# ── cancel and delete ───────────────────────────────────────────────────────────────────────────


def test_one_in_the_background_is_cancelled_as_often_as_one_likes(
    client: openai.OpenAI, doors: Doors
) -> None:
    response = background(client, "sleep 60000")
    eventually(lambda: client.responses.retrieve(response.id).status == "in_progress")

    first = client.responses.cancel(response.id)
    second = client.responses.cancel(response.id)

    assert first.status == second.status == "cancelled" and first.error is None
    assert client.responses.retrieve(response.id) == second


def test_what_cannot_be_cancelled_is_said_once(doors: Doors) -> None:
    with doors.openai(max_retries=2) as client:
        ended = done(client, background(client))
        waited_for = client.responses.create(model="stub", input="What is flour?")

        with pytest.raises(openai.ConflictError) as conflict:
            client.responses.cancel(ended.id)
        with pytest.raises(openai.BadRequestError):
            client.responses.cancel(waited_for.id)

    assert conflict.value.response.headers["x-should-retry"] == "false"
    assert conflict.value.response.request.headers["x-stainless-retry-count"] == "0"


@pytest.mark.parametrize("text", ["What is flour?", "sleep 60000"])
def test_what_is_deleted_is_gone_with_all_that_it_says(
    client: openai.OpenAI, doors: Doors, text: str
) -> None:
    response = background(client, text, metadata={"a": "b"})
    if text == "What is flour?":
        done(client, response)

    client.responses.delete(response.id)

    for call in (
        lambda: client.responses.retrieve(response.id),
        lambda: client.responses.cancel(response.id),
        lambda: client.responses.delete(response.id),
        lambda: client.responses.input_items.list(response.id),
    ):
        with pytest.raises(openai.NotFoundError):
            call()
    with pytest.raises(openai.BadRequestError):
        client.responses.create(model="stub", input="And?", previous_response_id=response.id)
    id = response.id.removeprefix("resp_")
    [job] = doors.jobs(f"id = '{id}'")
    assert (job["request"], job["metadata"]) == (None, {})
    eventually(lambda: doors.jobs(f"id = '{id}'")[0]["state"] in ("completed", "cancelled"))
    assert rows(doors.settings, f"SELECT response FROM results WHERE job_id = '{id}'") == [
        {"response": None}
    ]


def test_what_is_not_to_be_stored_is_told_once(client: openai.OpenAI, doors: Doors) -> None:
    response = client.responses.create(model="stub", input="What is flour?", store=False)

    assert response.output_text
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    assert doors.the_last_job()["request"] is None
    with pytest.raises(openai.BadRequestError) as refused:
        background(client, store=False)
    assert refused.value.param == "store"


@pytest.mark.parametrize("text", ["nan", "sleep 60000"])
def test_what_is_not_to_be_stored_is_removed_though_it_brings_no_answer(
    doors: Doors, text: str
) -> None:
    told = doors.http.post(
        "/v1/responses",
        json={"model": "stub", "input": text, "store": False},
        headers={"x-stainless-read-timeout": "2"},
    )

    assert told.status_code == (504 if text == "sleep 60000" else 500), told.text
    assert doors.the_last_job()["request"] is None


def test_a_stream_that_is_one_too_many_leaves_no_work_behind(doors: Doors) -> None:
    none = doors.settings.api.model_copy(update={"max_streams": 0})
    with running_api(doors.settings.model_copy(update={"api": none})) as http:
        body = {"model": "stub", "input": "sleep 60000", "stream": True, "store": False}
        busy = http.post("/v1/responses", json=body)

    assert (busy.status_code, busy.json()["error"]["code"]) == (503, "busy")
    job = doors.the_last_job()
    assert job["request"] is None
    eventually(lambda: doors.jobs(f"id = '{job['id']}'")[0]["state"] == "cancelled")


# ── errors ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("id", [UNKNOWN, "resp_", "x", f"chatcmpl-{0:032x}", "resp_" + 32 * "Z"])
def test_what_there_is_not_is_not_found(client: openai.OpenAI, id: str) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.retrieve(id)

    assert missing.value.type == "invalid_request_error"


def test_a_job_of_another_call_is_no_response(client: openai.OpenAI, doors: Doors) -> None:
    client.completions.create(model="stub", prompt="A mill")

    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(f"resp_{doors.the_last_job()['id'].hex}")


def test_what_fails_in_the_background_says_so_in_a_legal_word(client: openai.OpenAI) -> None:
    failed = done(client, background(client, "nan"))

    assert failed.status == "failed" and failed.error is not None
    assert failed.error.code == "server_error" and failed.error.message


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"input": []}, "input"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background_options": {"completion_window": "2h"}}, "background_options"),
        ({"tools": [{"type": "web_search"}]}, "tools.0"),
        ({"temperature": 9}, "temperature"),
        ({"input": "flour " * 20_000}, "input"),
        ({"model": "gpt-9"}, "model"),
    ],
)
def test_what_cannot_be_answered_is_refused_by_name(
    client: openai.OpenAI, given: dict[str, Any], param: str
) -> None:
    asked = {"model": "stub", "input": "flour"} | given

    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.post("/responses", body=asked, cast_to=Response)

    assert refused.value.param == param


ITEMS: Final = st.lists(
    ANYTHING
    | st.fixed_dictionaries(
        {},
        optional={
            "type": st.sampled_from(["message", "function_call", "reasoning"]) | ANYTHING,
            "role": st.sampled_from(["user", "assistant"]) | ANYTHING,
            "content": TEXTS | ANYTHING,
            "call_id": TEXTS,
            "name": TEXTS,
            "arguments": st.just("{}") | ANYTHING,
            "id": TEXTS,
        },
    ),
    max_size=4,
)
BODIES: Final = st.fixed_dictionaries(
    {"input": TEXTS | ITEMS},
    optional={
        name: st.sampled_from(field.examples or [None]) | ANYTHING
        for name, field in ResponsesBody.model_fields.items()
        if name not in ("input", "background", "model")
    },
)


@pytest.mark.timeout(300)
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(BODIES)
def test_whatever_is_sent_is_a_response_or_an_error_of_the_callers(
    doors: Doors, body: dict[str, Any]
) -> None:
    content = json.dumps(body | {"background": True})  # NaN and half surrogates, too
    headers = {"content-type": "application/json"}

    answer = doors.http.post("/v1/responses", content=content, headers=headers)

    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["type"] == "invalid_request_error"
    elif not answer.headers["content-type"].startswith("text/event-stream"):
        Response.model_validate(answer.json(), strict=True)


# ── by other ways ───────────────────────────────────────────────────────────────────────────────


def test_one_that_was_submitted_as_a_job_is_a_response_too(
    client: openai.OpenAI, doors: Doors
) -> None:
    body = {"input": "What is flour?", "background": True}
    job = doors.http.post("/v1/jobs?wait=30", json={"url": "/v1/responses", "body": body}).json()

    found = client.responses.retrieve(job["response"]["id"])

    assert found.status == "completed" and found.output_text
    assert job["response"]["output"] == found.to_dict()["output"]
