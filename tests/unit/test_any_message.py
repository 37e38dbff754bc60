"""Whatever is pushed into Redis becomes an arrival or a refusal, and an arrival is harmless."""

from __future__ import annotations

import json
from datetime import UTC
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from kombu import Connection
from kombu.transport.virtual import Message

from app.broker.message import raw_message
from app.config.settings import Settings
from app.engines.sampling.sampler import RowSampler
from app.engines.text.tokenizer import load_tokenizer
from app.errors import GristmillError, RequestError
from app.jobs import EARLIEST, LATEST, Kind
from app.requests import bodies
from app.requests.prepare import prepare
from app.worker.pool import envelope
from app.worker.pool.arrivals import Arrival, identify, read
from app.worker.pool.request import Request
from tests.any_messages import ANYTHING, items, requests
from tests.conftest import STUB_MODELS

CONFIG = Settings(models=STUB_MODELS)
TASK = SimpleNamespace(name="inference.generate")
CONSUMER = SimpleNamespace(acks=None, hostname="mill", event_dispatcher=None, connection_errors=())
many = partial(
    settings, max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def arrival_of(item: bytes) -> Arrival | None:
    """As the hub does it; None for a refusal."""
    try:
        given_ = envelope.checked(item, "celery", 1_000_000)
    except RequestError:
        return None
    with Connection("memory://") as connection:
        channel = connection.default_channel
        message = Message(given_, channel=channel)
        channel._get_message_priority(given_)  # what kombu asks when it gives a message back
    try:
        task_id, name = identify(message, CONFIG)
    except RequestError:
        return None
    try:
        arrival = read(message, task_id, name, CONFIG)
    except GristmillError as error:
        json.dumps([error.message, getattr(error, "param", None)]).encode()
        return None
    request = Request.of(TASK, None, CONSUMER)(task_id, arrival, message)
    json.dumps(request.info(), allow_nan=False)
    return arrival


def bent(headers: dict[str, object] | None = None, **properties: object) -> bytes:
    """A good message, but for these."""
    item = json.loads(raw_message(str(uuid4()), Kind.GENERATE, {"prompt": "x"}, queue="celery"))
    item["headers"] |= headers or {}
    item["properties"] |= properties
    return json.dumps(item).encode()


@many()
@example(bent(priority=True))
@example(bent(priority=10**400))
@example(bent({"timelimit": [10**400, None]}))
@example(bent({"timelimit": [True, None]}))
@example(bent({"eta": "0001-01-01T00:00:00+14:00"}))
@example(bent({"expires": "9999-12-31T23:59:59-05:00"}))
@given(items())
def test_any_item_becomes_an_arrival_in_range_or_a_refusal(item: bytes) -> None:
    arrival = arrival_of(item)

    if arrival is not None:
        assert type(arrival.priority) is int
        assert 0 <= arrival.priority <= 9
        for stamp in (arrival.not_before, arrival.deadline):
            assert stamp is None or (EARLIEST <= stamp <= LATEST and stamp.tzinfo is UTC)
        assert arrival.time_limit_s is None or 0 < arrival.time_limit_s <= 1e9


@many()
@given(st.binary(max_size=60) | ANYTHING.map(lambda value: json.dumps(value).encode()))
def test_bytes_that_are_no_message_at_all_are_refused(item: bytes) -> None:
    assert arrival_of(item) is None


@pytest.mark.timeout(240)
@many(max_examples=200)
@given(requests())
def test_any_request_that_is_accepted_is_sampled(raw: dict[str, object]) -> None:
    # given a request that was accepted, at the door and in tokens
    raw = {name: raw[name] for name in raw if name not in ("url", "metadata")}
    try:
        request = bodies.parse(raw)
        assert bodies.parse_stored(request.raw, request.url, bodies.FORMAT) == request
        model = STUB_MODELS[CONFIG.model_name(request.kind, request.body.model)]
        tokenizer = load_tokenizer(Path(), model)
        prepared = prepare(request, tokenizer, model)
    except GristmillError:
        return

    # when each of its answers is sampled
    for answer in range(request.num_answers):
        params = prepared.sampling(answer)
        if params is None:
            return
        sampler = RowSampler(1, tokenizer.vocab_size, "cpu")
        sampler.put(0, params, prepared.prompts[0])
        plan = sampler.plan([0])
        logits = torch.randn(1, tokenizer.vocab_size, generator=torch.Generator().manual_seed(7))

        # then there is a token, every time
        for _ in range(2):
            assert 0 <= sampler.sample(logits, plan).tokens.item() < tokenizer.vocab_size
