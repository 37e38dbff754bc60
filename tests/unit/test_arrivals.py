"""What the worker makes of a Celery message before it is a job."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kombu.message import Message

from app.broker.message import FORMAT_HEADER
from app.config.settings import Settings
from app.errors import GristmillError, RequestError
from app.jobs import EARLIEST, LATEST, job_id_of
from app.requests.bodies import FORMAT
from app.worker.pool import arrivals
from app.worker.pool.arrivals import identify, read, scrub, tenant_of

TASK_ID = str(uuid.uuid4())


def message(
    body: Any = None, *, headers: dict[str, Any] | None = None, priority: Any = None, **changes: Any
) -> Message:
    """A protocol 2 message as kombu hands it to the consumer."""
    given = {"lang": "py", "task": "inference.generate", "id": TASK_ID} | (headers or {})
    values: dict[str, Any] = {
        "body": json.dumps([[], {"prompt": "hello"}, {}] if body is None else body),
        "content_type": "application/json",
        "content_encoding": "utf-8",
        "headers": given,
        "properties": {"priority": priority},
    }
    return Message(**(values | changes))


@pytest.fixture
def config(make_settings: Callable[..., Settings]) -> Settings:
    return make_settings()


def arrive(sent: Message, config: Settings) -> Any:
    task_id, name = identify(sent, config)
    return read(sent, task_id, name, config)


def test_a_plain_prompt_becomes_a_request_for_the_default_model(config: Settings) -> None:
    arrival = arrive(message(), config)

    assert arrival.job_id == uuid.UUID(TASK_ID)
    assert arrival.request.prompts == ["hello"]
    assert arrival.model == "stub"
    assert arrival.priority == 0


def test_a_task_id_that_is_no_uuid_names_the_same_job_every_time(config: Settings) -> None:
    arrival = arrive(message(headers={"id": "order-17"}), config)

    assert arrival.job_id == job_id_of("order-17")
    assert arrival.job_id != job_id_of("order-18")


def test_eta_and_expires_become_times_of_the_row(config: Settings) -> None:
    eta, expires = "2030-01-02T03:04:05+00:00", "2030-01-02T04:04:05"

    arrival = arrive(message(headers={"eta": eta, "expires": expires}), config)

    assert arrival.not_before == dt.datetime(2030, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
    assert arrival.deadline == dt.datetime(2030, 1, 2, 4, 4, 5, tzinfo=dt.UTC)


def test_a_message_without_arguments_only_wakes_its_row(config: Settings) -> None:
    arrival = arrive(message([[], {}, {}]), config)

    assert arrival.request is None


def test_protocol_1_is_understood(config: Settings) -> None:
    body = {"task": "inference.generate", "id": TASK_ID, "args": [], "kwargs": {"prompt": "x"}}

    sent = message(body)
    sent.headers = {}
    arrival = arrive(sent, config)

    assert arrival.request.prompts == ["x"]


def test_protocol_1_keeps_eta_expires_and_the_time_limit(config: Settings) -> None:
    # given a message whose options are in its body
    sent = message(
        {
            "task": "inference.generate",
            "id": TASK_ID,
            "kwargs": {"prompt": "x"},
            "eta": "2030-01-02T03:04:05+01:00",
            "expires": "2030-01-02T04:04:05.123456789Z",
            "timelimit": [60, 50],
        },
        headers={},
    )
    sent.headers = {}

    arrival = arrive(sent, config)

    assert arrival.not_before == dt.datetime(2030, 1, 2, 2, 4, 5, tzinfo=dt.UTC)
    assert arrival.deadline == dt.datetime(2030, 1, 2, 4, 4, 5, 123456, tzinfo=dt.UTC)
    assert arrival.time_limit_s == 60.0


@pytest.mark.parametrize(
    "body",
    [
        [None, {"prompt": "x"}, None],
        [[], {"prompt": "x"}, []],
        [{}, {"prompt": "x"}, {"callbacks": None, "chain": []}],
    ],
)
def test_what_is_empty_may_be_written_in_any_way(config: Settings, body: Any) -> None:
    assert arrive(message(body), config).request.prompts == ["x"]


@pytest.mark.parametrize(
    ("expires", "kept"),
    [
        ("9999-12-31T23:59:59-05:00", LATEST),
        ("9999-12-31T23:59:59.999999", LATEST),
        ("0001-01-01T00:00:00+14:00", EARLIEST),
        ("9999-12-29T23:59:59-00:30", dt.datetime(9999, 12, 30, 0, 0, tzinfo=dt.UTC)),
        ("", None),
    ],
)
def test_a_deadline_beyond_what_a_row_can_hold_is_the_last_one_it_can(
    config: Settings, expires: str, kept: dt.datetime | None
) -> None:
    arrival = arrive(message(headers={"expires": expires, "eta": expires}), config)

    assert arrival.deadline == kept
    assert arrival.not_before == kept
    assert kept is None or arrival.deadline.tzinfo is dt.UTC


@pytest.mark.parametrize(
    ("limits", "kept"),
    [([30, None], 30.0), ([0, 0], None), ([None, 5], None), ([10**400, 1], 1e9), ([], None)],
)
def test_a_time_limit_is_a_bounded_number_of_seconds(
    config: Settings, limits: list[Any], kept: float | None
) -> None:
    assert arrive(message(headers={"timelimit": limits}), config).time_limit_s == kept


def test_a_message_may_ask_for_its_tokens(config: Settings) -> None:
    for given, kept in ((True, True), (False, False), (None, False)):
        arrival = arrive(message(headers={"stream_events": given}), config)
        assert arrival.stream_events is kept
    assert not arrive(message(), config).stream_events


def test_a_request_of_a_later_format_only_wakes_its_row(config: Settings) -> None:
    # given what a producer of a later version sends: fields that are not known here
    sent = message(
        [[], {"prompt": "x", "thinking": "hard"}, {}], headers={FORMAT_HEADER: FORMAT + 1}
    )

    arrival = arrive(sent, config)

    assert arrival.request is None
    assert arrival.model is None


def test_a_task_id_that_was_a_uuid_and_no_text_is_its_text(config: Settings) -> None:
    assert arrive(message(headers={"id": uuid.UUID(TASK_ID)}), config).job_id == uuid.UUID(TASK_ID)


@pytest.mark.parametrize("priority", [3, 9])
def test_priority_is_taken_from_the_message(config: Settings, priority: int) -> None:
    assert arrive(message(priority=priority), config).priority == priority


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (-5, 0),
        (99, 9),
        (10**400, 9),
        ("high", 0),
        ("5", 5),
        (None, 0),
        (True, 1),
        (3.0, 3),
        (float("nan"), 0),
        (float("inf"), 0),
        ([3], 0),
        ({}, 0),
    ],
)
def test_a_priority_is_a_whole_number_from_0_to_9_whatever_was_sent(
    config: Settings, given: Any, taken: int
) -> None:
    arrival = arrive(message(priority=given), config)

    assert arrival.priority == taken
    assert type(arrival.priority) is int


SECRET = "a secret prompt"

WRONG: dict[str, tuple[Message, str]] = {
    "unknown task": (message(headers={"task": "tasks.add"}), "task"),
    "positional arguments": (message([[SECRET], {}, {}]), "args"),
    "extra argument": (message([[], {"prompt": SECRET, "color": 1}, {}]), "color"),
    "wrong type": (message([[], {"prompt": 7}, {}]), "prompt"),
    "a chat for the embedding task": (message(headers={"task": "inference.embed"}), "task"),
    "unknown model": (message([[], {"prompt": SECRET, "model": "gpt-9"}, {}]), "model"),
    "a callback": (message([[], {"prompt": SECRET}, {"callbacks": [{"task": "x"}]}]), "embed"),
    "a chain": (message([[], {"prompt": SECRET}, {"chain": [{"task": "x"}]}]), "embed"),
    "embeds in a list": (message([[], {"prompt": SECRET}, [{"callbacks": 1}]]), "embed"),
    "body is a mapping": (message({"prompt": SECRET}), "body"),
    "body is not JSON": (
        Message(
            "{nope",
            content_type="application/json",
            headers={"task": "inference.generate", "id": TASK_ID},
        ),
        "body",
    ),
    "pickle": (message(content_type="application/x-python-serialize"), "body"),
    "eta is no time": (message(headers={"eta": "soon"}), "eta"),
    "stream_events is no truth": (message(headers={"stream_events": "yes"}), "stream_events"),
    "timelimit is no pair": (message(headers={"timelimit": "5"}), "timelimit"),
    "metadata is no mapping": (message([[], {"prompt": SECRET, "metadata": 3}, {}]), "metadata"),
    "url is unknown": (message([[], {"prompt": SECRET, "url": "/v1/x"}, {}]), "url"),
    "NUL in the prompt": (message([[], {"prompt": "a\0b"}, {}]), "prompt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_named_and_never_quoted(config: Settings, case: str) -> None:
    sent, param = WRONG[case]

    with pytest.raises(RequestError) as caught:
        arrive(sent, config)

    assert caught.value.param == param
    assert SECRET not in caught.value.message


def test_a_body_over_the_limit_is_refused_unread(make_settings: Callable[..., Settings]) -> None:
    config = make_settings(worker={"max_request_bytes": 1_000})
    sent = message([[], {"prompt": "x" * 2_000}, {}])

    with pytest.raises(GristmillError) as caught:
        arrive(sent, config)

    assert caught.value.code == "request_too_large"


@pytest.mark.parametrize("id_", [None, 5, "", "x" * 300, "\ud800"])
def test_a_message_without_a_usable_id_cannot_be_filed(config: Settings, id_: Any) -> None:
    with pytest.raises(RequestError):
        identify(message(headers={"id": id_}), config)


def test_what_is_kept_of_a_message_to_settle_it_shows_no_prompt(config: Settings) -> None:
    sent = message([[], {"prompt": SECRET}, {}], headers={"kwargsrepr": SECRET, "origin": SECRET})

    scrub(sent)

    assert SECRET not in str([sent.headers, sent.properties, sent.body, sent.payload])


@pytest.mark.parametrize("item", [{"a": []}, "", []])
@pytest.mark.parametrize("kind", [str, str.encode])
def test_a_message_crowded_with_parts_is_refused_before_values_are_made_of_it(
    config: Settings, monkeypatch: pytest.MonkeyPatch, item: Any, kind: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(arrivals, "loads", lambda *_, **__: pytest.fail("Values were made."))
    sent = message()
    sent.body = kind(json.dumps([[], {"prompt": [item] * 60_000}, {}]))

    with pytest.raises(RequestError, match="more than 50000 texts, objects and lists"):
        arrive(sent, config)


def test_a_message_may_wake_further_jobs_by_their_ids(config: Settings) -> None:
    more = [str(uuid.uuid4()), "order-17"]

    arrival = arrive(message([[], {}, {}], headers={"more": more}), config)

    assert [task_id for task_id, _ in arrival.others()] == more
    assert [each.job_id for _, each in arrival.others()] == [job_id_of(each) for each in more]
    assert all(each.request is None for _, each in arrival.others())


@pytest.mark.parametrize("more", ["x", 5, {}, [5], [""], ["x" * 256], ["\ud800"], ["x"] * 1_000])
def test_further_jobs_are_a_list_of_so_many_task_ids(more: Any, config: Settings) -> None:
    with pytest.raises(RequestError, match="more must be a list"):
        arrive(message(headers={"more": more}), config)


@pytest.mark.parametrize(
    ("trusted", "named", "tenant"),
    [
        ((), None, "messages"),
        ((), "mill", "messages"),
        (("mill",), "mill", "mill"),
        (("mill",), "bakery", "messages"),
        (("mill",), None, "messages"),
        (("*",), "bakery", "bakery"),
        (("*",), "*", "messages"),
        (("*",), "", "messages"),
        (("*",), "x" * 101, "messages"),
        (("*",), ["mill"], "messages"),
        (("*",), {"a": 1}, "messages"),
    ],
)
def test_a_message_names_its_tenant_only_where_it_is_trusted_with_that(
    make_settings: Callable[..., Settings], trusted: tuple[str, ...], named: Any, tenant: str
) -> None:
    config = make_settings(broker={"tenant": "messages", "trusted_tenants": trusted})

    assert arrive(message(headers={"tenant": named}), config).tenant == tenant
    refused = message(headers={"tenant": named}, body="not JSON")
    assert tenant_of(refused, config.broker) == tenant
    assert tenant_of(message(headers=[]), config.broker) == "messages"


def test_a_trusted_tenant_is_a_name_or_any(make_settings: Callable[..., Settings]) -> None:
    for wrong in ("", "a b", "**", "ä"):
        with pytest.raises(ValueError, match="trusted_tenants"):
            make_settings(broker={"trusted_tenants": [wrong]})
