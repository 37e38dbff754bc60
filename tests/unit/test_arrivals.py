"""What the worker makes of a Celery message before it is a job."""

from __future__ import annotations

import datetime as dt
import json
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from kombu.message import Message

from app.config.settings import Settings
from app.errors import GristmillError, RequestError
from app.jobs import job_id_of
from app.worker.pool.arrivals import ARRIVAL_HEADER, identify, read, scrub

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


@pytest.mark.parametrize("priority", [3, 9])
def test_priority_is_taken_from_the_message(config: Settings, priority: int) -> None:
    assert arrive(message(priority=priority), config).priority == priority


@pytest.mark.parametrize(("given", "taken"), [(-5, 0), (99, 9), ("high", 0), (None, 0)])
def test_a_priority_out_of_range_is_clamped(config: Settings, given: Any, taken: int) -> None:
    assert arrive(message(priority=given), config).priority == taken


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


@pytest.mark.parametrize("id_", [None, 5, "", "x" * 300])
def test_a_message_without_a_usable_id_cannot_be_filed(config: Settings, id_: Any) -> None:
    with pytest.raises(RequestError):
        identify(message(headers={"id": id_}), config)


def test_celery_sees_neither_prompt_nor_foreign_headers(config: Settings) -> None:
    sent = message(
        [[], {"prompt": SECRET}, {}],
        headers={"kwargsrepr": SECRET, "argsrepr": SECRET, "origin": SECRET, "eta": None},
    )
    arrival = arrive(sent, config)

    scrub(sent, TASK_ID, "inference.generate", arrival)

    shown = dict(sent.headers)
    assert shown.pop(ARRIVAL_HEADER) is arrival
    assert SECRET not in json.dumps(shown)
    assert SECRET not in str(sent.payload)
    assert shown["kwargsrepr"] == "(model=stub)"
