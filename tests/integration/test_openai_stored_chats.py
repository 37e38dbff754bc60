"""OpenAI's own client and chats that it asked to be stored, over a real socket, against the API."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any, Final
from uuid import UUID, uuid4

import openai
import pytest
from celery import Celery
from openai.types.chat import ChatCompletion

from tests.doors import Doors
from tests.waiting import eventually

ASK: Final = [{"role": "user", "content": "What is flour?"}]
NOBODYS: Final = UUID("5f0c2f0e-9a53-4c1e-8d5b-3f6f6f2f7a11")  # each process names tests alike
UNKNOWN: Final = f"chatcmpl-{NOBODYS}"


@pytest.fixture
def client(doors: Doors) -> Iterator[openai.OpenAI]:
    with doors.openai() as client:
        yield client


def ask(client: openai.OpenAI, *, store: bool | None = True, **given: Any) -> ChatCompletion:
    asked = {"model": "stub", "messages": ASK, "max_tokens": 2} | given
    answer: ChatCompletion = client.chat.completions.create(**asked, store=store)
    return answer


def labelled(client: openai.OpenAI, number: int) -> tuple[dict[str, str], list[str]]:
    """Labels of some chats that nothing else has, and their ids in the order that they came in."""
    labels = {"of": str(uuid4())}
    return labels, [ask(client, metadata=labels).id for _ in range(number)]


# ── retrieve ────────────────────────────────────────────────────────────────────────────────────


def test_a_stored_chat_is_retrieved_as_it_was_answered(client: openai.OpenAI) -> None:
    answer = ask(client, metadata={"order": "17"}, service_tier="auto", n=2)

    found = client.chat.completions.retrieve(answer.id)

    assert found.metadata == {"order": "17"}
    assert found.service_tier == "default"
    assert found.model_copy(update={"metadata": None}) == answer


def test_a_streamed_chat_is_stored_as_well(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="stub", messages=[{"role": "user", "content": "flour"}], store=True
    ) as stream:
        told = stream.get_final_completion()

    found = client.chat.completions.retrieve(told.id)
    assert found.choices[0].message.content == told.choices[0].message.content


@pytest.mark.parametrize("store", [False, None])
def test_a_chat_that_was_not_stored_is_not_told_of(
    client: openai.OpenAI, store: bool | None
) -> None:
    labels = {"of": str(uuid4())}
    answer = ask(client, store=store, metadata=labels)

    calls = client.chat.completions
    for call in (
        lambda: calls.retrieve(answer.id),
        lambda: calls.update(answer.id, metadata={}),
        lambda: calls.delete(answer.id),
        lambda: calls.messages.list(answer.id),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert "no such stored chat completion" in refused.value.message
    assert calls.list(metadata=labels).data == []


@pytest.mark.parametrize("id", [UNKNOWN, "chatcmpl-x", "x", str(NOBODYS), f"resp_{NOBODYS.hex}"])
def test_an_unknown_id_is_not_found(client: openai.OpenAI, id: str) -> None:
    calls = client.chat.completions
    for call in (
        lambda: calls.retrieve(id),
        lambda: calls.update(id, metadata={}),
        lambda: calls.delete(id),
        lambda: calls.messages.list(id),
    ):
        with pytest.raises(openai.NotFoundError) as refused:
            call()
        assert refused.value.type == "invalid_request_error"


def test_what_did_not_complete_is_not_stored(client: openai.OpenAI, doors: Doors) -> None:
    labels = {"of": str(uuid4())}
    job = {"body": {"messages": ASK, "store": True, "metadata": labels}, "not_before": LATER}
    job_id = doors.http.post("/v1/jobs", json=job).raise_for_status().json()["id"]
    assert client.chat.completions.list(metadata=labels).data == []

    doors.http.post(f"/v1/jobs/{job_id}/cancel").raise_for_status()

    assert client.chat.completions.list(metadata=labels).data == []
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.retrieve(f"chatcmpl-{job_id}")


LATER: Final = "2099-01-31T12:00:00Z"


# ── list ────────────────────────────────────────────────────────────────────────────────────────


def test_stored_chats_are_listed_page_by_page_in_both_orders(client: openai.OpenAI) -> None:
    labels, ids = labelled(client, 5)
    calls = client.chat.completions

    first = calls.list(metadata=labels, limit=2)

    assert [each.id for each in first.data] == ids[:2] and first.has_more
    assert [each.id for each in calls.list(metadata=labels, limit=2)] == ids
    backwards = calls.list(metadata=labels, limit=2, order="desc")
    assert [each.id for each in backwards] == ids[::-1]
    assert [each.id for each in calls.list(metadata=labels, after=ids[2])] == ids[3:]
    assert all(each.metadata == labels for each in calls.list(metadata=labels))


def test_lists_are_of_a_model_and_of_all_pairs_of_metadata(client: openai.OpenAI) -> None:
    labels, [id] = labelled(client, 1)
    both = ask(client, metadata=labels | {"more": "yes"}).id
    calls = client.chat.completions

    assert [each.id for each in calls.list(metadata=labels, model="stub")] == [id, both]
    assert [each.id for each in calls.list(metadata=labels | {"more": "yes"})] == [both]
    assert calls.list(metadata=labels, model="stub-embed").data == []
    assert {id, both} <= {each.id for each in calls.list(limit=100, order="desc")}


def test_a_list_goes_on_behind_one_that_was_deleted_meanwhile(client: openai.OpenAI) -> None:
    labels, ids = labelled(client, 3)
    calls = client.chat.completions

    deleted = [calls.delete(each.id).id for each in calls.list(metadata=labels, limit=1)]

    assert deleted == ids
    assert calls.list(metadata=labels).data == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"after": UNKNOWN}, "after"),
        ({"after": "chatcmpl-x"}, "after"),
        ({"after": "\0"}, "after"),
        ({"limit": 0}, "limit"),
        ({"limit": 101}, "limit"),
        ({"order": "up"}, "order"),
        ({"model": "a\0"}, "model"),
        ({"metadata": {"": "x"}}, "metadata"),
        ({"metadata": {"a": 513 * "x"}}, "metadata"),
        ({"metadata": {str(n): "x" for n in range(17)}}, "metadata"),
    ],
    ids=str,
)
def test_a_wrong_query_of_a_list_is_refused_by_name(
    client: openai.OpenAI, query: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.list(**query)

    assert refused.value.param == param


# ── update ──────────────────────────────────────────────────────────────────────────────────────


def test_metadata_is_replaced_and_is_found_by_as_it_is_now(
    client: openai.OpenAI, doors: Doors
) -> None:
    labels, [id] = labelled(client, 1)
    new = {"of": str(uuid4()), **{f"{n}".ljust(64, "k"): 512 * "v" for n in range(15)}}
    calls = client.chat.completions

    updated = calls.update(id, metadata=new)

    assert updated.metadata == new
    assert calls.retrieve(id) == updated
    assert [each.id for each in calls.list(metadata={"of": new["of"]})] == [id]
    assert calls.list(metadata=labels).data == []
    job = doors.http.get(f"/v1/jobs/{id.removeprefix('chatcmpl-')}").json()
    assert job["metadata"] == new
    assert calls.update(id, metadata=None).metadata == {}


@pytest.mark.parametrize(
    ("metadata", "param", "code"),
    [
        ({"a": 1}, "metadata.a", "invalid_type"),
        ({"a": ["b"]}, "metadata.a", "invalid_type"),
        ("a", "metadata", "invalid_type"),
        ({65 * "k": "v"}, "metadata", None),
        ({"": "v"}, "metadata", None),
        ({"k": 513 * "v"}, "metadata", None),
        ({"k": "\0"}, "metadata.k", None),
        ({str(n): "v" for n in range(17)}, "metadata", None),
    ],
    ids=["number", "list", "text", "long key", "no key", "long value", "NUL", "17 pairs"],
)
def test_wrong_metadata_is_refused_by_name_and_changes_nothing(
    client: openai.OpenAI, metadata: Any, param: str, code: str | None
) -> None:
    labels, [id] = labelled(client, 1)

    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.update(id, metadata=metadata)

    assert (refused.value.param, refused.value.code) == (param, code)
    assert client.chat.completions.retrieve(id).metadata == labels


def test_an_update_that_names_no_metadata_is_refused(client: openai.OpenAI) -> None:
    _, [id] = labelled(client, 1)

    for body in ({}, {"metadat": {}}):
        with pytest.raises(openai.BadRequestError) as refused:
            client.post(f"/chat/completions/{id}", body=body, cast_to=ChatCompletion)
        assert refused.value.code == "missing_required_parameter"


# ── delete ──────────────────────────────────────────────────────────────────────────────────────


def test_a_deleted_chat_is_gone_with_what_it_said_and_stays_in_the_books(
    client: openai.OpenAI, doors: Doors
) -> None:
    answer = ask(client)

    deleted = client.chat.completions.delete(answer.id)

    assert (deleted.id, deleted.deleted) == (answer.id, True)
    for call in (client.chat.completions.retrieve, client.chat.completions.delete):
        with pytest.raises(openai.NotFoundError):
            call(answer.id)
    [job] = doors.jobs(f"id = '{answer.id.removeprefix('chatcmpl-')}'")
    assert (job["state"], job["request"]) == ("completed", None)
    assert job["purged_at"] is not None


# ── messages ────────────────────────────────────────────────────────────────────────────────────


def test_messages_of_a_stored_chat_are_what_was_asked(doors: Doors) -> None:
    # given a conversation with each kind of content
    call = {"id": "call_1", "type": "function", "function": {"name": "mill", "arguments": "{}"}}
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "ground"},
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        {"role": "user", "content": "c", "name": "alice"},
    ]
    with doors.openai(_strict_response_validation=False) as client:  # its type knows one role alone
        id = ask(client, messages=conversation).id
        told = client.chat.completions.messages.list(id, limit=4)
        backwards = client.chat.completions.messages.list(id, order="desc", limit=1)

        # then they are listed in their order, page by page, or from the last one
        everything = list(told)
        assert [each.id for each in everything] == [f"{id}-{n}" for n in range(6)]
        assert [each.id for each in backwards] == [f"{id}-{n}" for n in range(6)][::-1]
    assert len(told.data) == 4 and told.has_more
    roles = ["system", "user", "assistant", "tool", "assistant", "user"]
    assert [str(each.role) for each in everything] == roles
    assert [each.content for each in everything] == ["Be brief.", "a\nb", None, "ground", None, "c"]
    assert everything[1].content_parts is not None and len(everything[1].content_parts) == 2
    assert everything[0].content_parts is None
    assert everything[2].tool_calls is not None and everything[2].tool_calls[0].id == "call_1"
    assert everything[4].refusal == "No."


def test_messages_of_an_assistant_pass_the_clients_own_type(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "A mill"}]
    id = ask(client, messages=[{"role": "assistant", "content": parts}]).id

    [message] = client.chat.completions.messages.list(id)

    assert (message.content, message.refusal) == ("A mill", None)
    assert message.content_parts is not None and message.content_parts[0].type == "text"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.messages.list(id, after=f"{id}-1")
    assert refused.value.param == "after"


# ── other ways in ───────────────────────────────────────────────────────────────────────────────


def test_the_async_client_and_raw_answers_have_them_as_well(
    client: openai.OpenAI, doors: Doors
) -> None:
    labels, ids = labelled(client, 2)

    async def calls() -> list[str]:
        base_url = f"{doors.http.base_url}/v1"
        async with openai.AsyncOpenAI(
            base_url=base_url, api_key="none", _strict_response_validation=True
        ) as its:
            completions = its.chat.completions
            assert (await completions.retrieve(ids[0])).id == ids[0]
            assert (await completions.update(ids[0], metadata=labels)).metadata == labels
            listed = [each.id async for each in completions.list(metadata=labels, limit=1)]
            assert (await completions.delete(ids[0])).deleted
            return listed

    assert asyncio.run(calls()) == ids
    raw = client.chat.completions.with_raw_response.retrieve(ids[1])
    assert raw.headers["x-request-id"] and raw.parse().id == ids[1]


@pytest.mark.parametrize("way", ["job", "message"])
def test_a_chat_of_the_queue_is_stored_too(client: openai.OpenAI, doors: Doors, way: str) -> None:
    body = {"messages": ASK, "store": True, "max_tokens": 2}
    if way == "job":
        job = {"body": body}
        job_id = doors.http.post("/v1/jobs", json=job).raise_for_status().json()["id"]
    else:
        broker = doors.settings.broker.url
        with Celery("somebody-else", broker=broker, set_as_current=False) as service:
            job_id = service.send_task("inference.generate", kwargs=body).id
        eventually(lambda: doors.http.get(f"/v1/jobs/{job_id}").status_code == 200)
    ended = doors.http.get(f"/v1/jobs/{job_id}", params={"wait": 30}).json()
    assert ended["state"] == "completed"

    assert client.chat.completions.retrieve(f"chatcmpl-{job_id}").choices
