"""A request is the same whether it comes over HTTP or as a plain Celery message."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import Mock
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, assume, given, settings
from kombu.message import Message

from app.config.settings import Settings
from app.engines.catalog import load_catalog
from app.errors import GristmillError, RequestError
from app.intake.submit import Submitter
from app.jobs import Kind
from app.requests import bodies
from app.worker.pool.arrivals import TASKS, read
from tests.any_messages import requests
from tests.conftest import STUB_MODELS

STRICT = Settings(models=STUB_MODELS)
LENIENT = Settings(models=STUB_MODELS, unknown_fields="ignore")
LANGUAGES = {"source_language", "target_language"}
CATALOG = load_catalog(STRICT)


def over_http(body: dict[str, Any], config: Settings) -> Any:
    """Request, fingerprint and metadata of the job, or what is wrong with it."""
    url = body.pop("url", None)
    submission = {"body": body} if url is None else {"body": body, "url": url}
    try:
        job = Submitter(config, Mock(), Mock(), CATALOG).check(submission)
    except GristmillError as error:
        param = (getattr(error, "param", None) or "").removeprefix("body.")
        return error.code, error.message, param
    return job.request, job.fingerprint, job.metadata, job.model


def as_message(body: dict[str, Any], config: Settings) -> Any:
    name = next(name for name, kind in TASKS.items() if kind in _kinds(body))
    task_id = str(uuid4())
    sent = Message(
        body=json.dumps([[], body, {}]),
        content_type="application/json",
        content_encoding="utf-8",
        headers={"task": name, "id": task_id},
        properties={},
    )
    try:
        arrival = read(sent, task_id, name, config)
    except GristmillError as error:
        return error.code, error.message, getattr(error, "param", None) or ""
    assert arrival.request is not None
    return arrival.request.raw, arrival.request.fingerprint, arrival.metadata, arrival.model


def _kinds(body: dict[str, Any]) -> set[Any]:
    """Those of models that may answer it."""
    named = {name for name, value in body.items() if value is not None}
    present = [url for field, url in bodies._URL_BY_FIELD.items() if field in named]
    if len(present) != 1:
        return set(TASKS.values())
    if "input" in named and named & LANGUAGES:
        return {Kind.TRANSLATE}
    return {present[0].kind}


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(requests())
def test_both_ways_take_and_refuse_the_same(body: dict[str, Any]) -> None:
    body = {name: it for name, it in body.items() if name not in ("url", "model")}
    text = json.dumps(body)
    assume("__type__" not in text)  # which kombu makes something else of

    for config in (STRICT, LENIENT):
        http, message = over_http(json.loads(text), config), as_message(json.loads(text), config)
        if isinstance(message[0], dict) and not isinstance(http[0], dict):
            continue  # what needs a tokenizer is checked later on that way
        assert http == message


@pytest.mark.parametrize("way", [over_http, as_message])
def test_the_setting_for_unknown_fields_is_for_both_ways(way: Any) -> None:
    body = {"messages": [{"role": "user", "content": "flour", "mood": "calm"}], "colour": 7}

    assert way(dict(body), STRICT)[1] == "Unknown field colour."
    assert way(dict(body), LENIENT)[0] == {"messages": [{"role": "user", "content": "flour"}]}


@pytest.mark.parametrize("way", [over_http, as_message])
def test_metadata_in_a_body_becomes_the_jobs(way: Any) -> None:
    raw, _, metadata, _ = way({"prompt": "flour", "metadata": {"order": "17"}}, STRICT)

    assert metadata == {"order": "17"}
    assert "metadata" not in raw


def test_metadata_beside_a_body_wins_over_that_within() -> None:
    submitter = Submitter(STRICT, Mock(), Mock(), CATALOG)
    body = {"prompt": "flour", "metadata": {"order": "17", "mill": "Vik"}}

    job = submitter.check({"body": body, "metadata": {"order": "18"}})

    assert job.metadata == {"order": "18", "mill": "Vik"}


def test_wrong_metadata_within_a_body_is_refused_by_name() -> None:
    with pytest.raises(RequestError) as refused:
        Submitter(STRICT, Mock(), Mock(), CATALOG).check(
            {"body": {"prompt": "a", "metadata": {"a": 1}}}
        )

    assert refused.value.param == "body.metadata"
