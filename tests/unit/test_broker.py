"""The Celery app's settings, the message's bytes, and the commands that start Celery's parts."""

from __future__ import annotations

import base64
import json
import ssl
from collections.abc import Callable, Iterator
from typing import Any
from uuid import uuid4

import flower.options
import kombu.transport
import kombu.transport.redis
import pytest
from celery.app import defaults
from celery.app.amqp import Queues
from kombu.transport.redis import Channel
from redis.exceptions import MovedError, ReadOnlyError, ResponseError

from app.broker.app import _celery_settings, make_app
from app.broker.commands import flower_command
from app.broker.message import Message, raw_message
from app.broker.publisher import Publisher
from app.broker.queues import Layout, queue_name, queues_of
from app.broker.refusal import said
from app.config.settings import ModelSettings, Settings
from app.errors import ConfigError
from app.jobs import LIVE_PRIORITY, MAX_PRIORITY, Kind
from app.worker.pool import envelope

PROMPT = "the miller's secret"


@pytest.fixture
def two_models(make_settings: Callable[..., Settings]) -> Settings:
    def model(max_batch_size: int) -> ModelSettings:
        return ModelSettings(
            source="stub", kind=Kind.GENERATE, engine="stub", max_batch_size=max_batch_size
        )

    return make_settings(
        broker={"url": "memory://", "default_queue": "inbox"},
        models={"small": model(4), "large": model(32)},
        worker={"models": ["small"]},
    )


def test_every_setting_is_one_that_celery_knows(two_models: Settings) -> None:
    known = {name for name, _ in defaults.flatten(defaults.NAMESPACES)}

    assert set(_celery_settings(two_models)) <= known


def test_queues_hang_on_the_anonymous_exchange_so_that_there_are_no_bindings_to_lose(
    two_models: Settings,
) -> None:
    queues: Queues = make_app(two_models).amqp.queues

    assert set(queues) == {"gristmill.small", "gristmill.large", "inbox"}
    assert {queue.exchange.name for queue in queues.values()} == {""}


def test_a_worker_takes_messages_of_its_models_and_of_the_inbox(two_models: Settings) -> None:
    app = make_app(two_models)

    assert set(app.amqp.queues.consume_from) == {"gristmill.small", "inbox"}


def test_a_worker_holds_one_batch_that_runs_and_one_that_forms(two_models: Settings) -> None:
    assert make_app(two_models).conf.worker_concurrency == 3 * 4


def test_a_task_that_celery_runs_itself_says_what_is_wrong(two_models: Settings) -> None:
    app = make_app(two_models)

    for name in ("inference.generate", "inference.embed"):
        with pytest.raises(RuntimeError, match="its own pool"):
            app.tasks[name](prompt=PROMPT)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://broker/0", None),
        ("rediss://broker/0", "required"),
        ("rediss://broker/0?ssl_cert_reqs=none", ssl.CERT_NONE),
    ],
)
def test_certificates_are_checked_unless_the_url_says_otherwise(
    make_settings: Callable[..., Settings], url: str, expected: object
) -> None:
    app = make_app(make_settings(broker={"url": url}))

    with app.connection_for_read() as connection:
        assert (connection.ssl or {}).get("ssl_cert_reqs") == expected


def test_the_settings_win_over_what_the_environment_holds_for_another_celery_app(
    two_models: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("BROKER_URL", "BROKER_READ_URL", "BROKER_WRITE_URL", "RESULT_BACKEND"):
        monkeypatch.setenv(f"CELERY_{name}", "redis://elsewhere/9")
    monkeypatch.setenv("CELERY_LOADER", "another.app:Loader")

    app = make_app(two_models)

    for connection in (app.connection_for_read(), app.connection_for_write()):
        assert connection.as_uri().startswith("memory://")
    assert app.conf.result_backend is None


@pytest.mark.parametrize("priority", range(10))
def test_the_list_of_a_priority_is_the_one_that_kombu_reads(priority: int) -> None:
    channel = object.__new__(Channel)

    assert Layout().key("q", priority) == channel._q_for_pri("q", priority)


# ── the message ─────────────────────────────────────────────────────────────────────────────────


def test_a_raw_message_has_exactly_the_documented_fields() -> None:
    job_id = uuid4()

    item = raw_message(job_id, Kind.EMBED, {"input": "flour"}, queue="q", priority=3)

    message = json.loads(item)
    assert len(message["properties"].pop("delivery_tag")) == 36
    assert json.loads(base64.b64decode(message.pop("body"))) == [[], {"input": "flour"}, {}]
    assert message == {
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"lang": "any", "task": "inference.embed", "id": str(job_id)},
        "properties": {
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": "q"},
            "priority": 3,
        },
    }


def test_two_raw_messages_never_share_a_delivery_tag() -> None:
    items = [raw_message("same", Kind.GENERATE, {}, queue="q") for _ in range(2)]

    first, second = (json.loads(item)["properties"]["delivery_tag"] for item in items)
    assert first != second


def test_a_raw_message_passes_the_check_of_the_worker() -> None:
    envelope.checked(raw_message("x", Kind.GENERATE, {"prompt": PROMPT}, queue="q"), "q", 10_000)


@pytest.fixture
def sent(two_models: Settings) -> Iterator[Callable[..., dict[str, Any]]]:
    """Send one message through kombu's in-memory transport and read it as it travels."""

    def send(message: Message, **broker_settings: object) -> dict[str, Any]:
        settings = two_models.model_copy(
            update={"broker": two_models.broker.model_copy(update=broker_settings)}
        )
        Publisher(settings).send(message)
        with make_app(settings).connection_for_read() as connection:
            channel = connection.default_channel
            return dict(channel._get(f"gristmill.{message.model}"))

    return send


def test_the_prompt_is_in_the_body_and_nowhere_else(sent: Callable[..., dict[str, Any]]) -> None:
    message = Message(uuid4(), Kind.GENERATE, "small", {"prompt": PROMPT}, "/v1/completions")

    travelling = sent(message)

    args, kwargs, embed = json.loads(base64.b64decode(travelling.pop("body")))
    assert (args, kwargs) == ([], {"prompt": PROMPT, "url": "/v1/completions"})
    assert not any(embed.values())
    assert PROMPT not in json.dumps(travelling)
    assert travelling["headers"]["kwargsrepr"] == "(model=small)"
    assert travelling["headers"]["id"] == str(message.job_id)


def test_a_message_without_a_request_carries_the_id_alone(
    sent: Callable[..., dict[str, Any]],
) -> None:
    message = Message(uuid4(), Kind.GENERATE, "small")

    travelling = sent(message)

    assert json.loads(base64.b64decode(travelling["body"]))[:2] == [[], {}]


# ── commands ────────────────────────────────────────────────────────────────────────────────────


def test_flower_is_read_only_and_open_on_the_loopback_address(two_models: Settings) -> None:
    command, environment = flower_command(two_models)

    assert "--read_only=True" in command
    assert "--address=127.0.0.1" in command
    assert environment["FLOWER_UNAUTHENTICATED_API"] == "true"


def test_flower_knows_every_option_that_it_is_started_with(two_models: Settings) -> None:
    command, _ = flower_command(two_models)

    given = [part[2:].partition("=")[0] for part in command if part.startswith("--")]
    assert given
    assert all(name in flower.options.options for name in given)


def test_flower_on_another_address_needs_a_password(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings(flower={"host": "0.0.0.0", "port": 5555})
    monkeypatch.delenv("FLOWER_BASIC_AUTH", raising=False)

    with pytest.raises(ConfigError, match="FLOWER_BASIC_AUTH"):
        flower_command(settings)

    monkeypatch.setenv("FLOWER_BASIC_AUTH", "miller:flour")
    command, environment = flower_command(settings)
    assert "FLOWER_UNAUTHENTICATED_API" not in environment
    assert "miller" not in " ".join(command)


def test_what_kubernetes_sets_for_a_service_named_flower_does_not_reach_flower(
    two_models: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = {
        "FLOWER_PORT": "tcp://10.0.0.1:5555",
        "FLOWER_SERVICE_HOST": "10.0.0.1",
        "FLOWER_SERVICE_PORT": "5555",
        "FLOWER_PORT_5555_TCP_ADDR": "10.0.0.1",
    }
    for name, value in (links | {"FLOWER_BASIC_AUTH": "miller:flour"}).items():
        monkeypatch.setenv(name, value)

    _, environment = flower_command(two_models)

    assert not links.keys() & environment.keys()
    assert environment["FLOWER_BASIC_AUTH"] == "miller:flour"


def test_a_number_that_flower_could_not_read_is_refused_by_name(
    two_models: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWER_MAX_WORKERS", "many")

    with pytest.raises(ConfigError, match="FLOWER_MAX_WORKERS"):
        flower_command(two_models)


def test_a_later_format_has_queues_that_workers_of_before_do_not_take() -> None:
    assert queues_of(["mill"], format=1) == [queue_name("mill", format=1)] == ["gristmill.mill"]
    assert queue_name("mill", format=2) not in queues_of(["mill"], format=1)
    assert queues_of(["mill"], format=2) == ["gristmill.mill", "gristmill.mill@2"]


# ── what Redis said ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            ReadOnlyError("You can't write against a read only replica.", status_code="READONLY"),
            "Redis refuses: READONLY You can't write against a read only replica.",
        ),
        (
            ResponseError("NOREPLICAS Not enough good replicas to write."),
            "Redis refuses: NOREPLICAS Not enough good replicas to write.",
        ),
        (
            ResponseError(
                f"Command # 1 (LPUSH q {PROMPT}) of pipeline caused error: MISCONF Redis is "
                "configured to save RDB snapshots, but it's currently unable to persist to disk."
            ),
            "Redis refuses: MISCONF Redis is configured to save RDB snapshots, but it's currently "
            "unable to persist to disk.",
        ),
        (
            ResponseError(f"ERR unknown command 'LPUSH', with args beginning with: 'q' '{PROMPT}'"),
            "Redis refuses: ERR unknown command 'LPUSH'.",
        ),
        (MovedError("866 127.0.0.1:7001"), "Redis refuses: it is a Redis Cluster;"),
        (ConnectionRefusedError(PROMPT), "Redis does not answer (ConnectionRefusedError)."),
    ],
)
def test_what_redis_said_is_told_without_what_it_quotes(error: Exception, text: str) -> None:
    assert said(error).startswith(text)
    assert PROMPT not in said(error)


@pytest.mark.parametrize("layout", [Layout(), Layout((0,)), Layout((0, 5), ":", "mill:")])
def test_each_priority_has_one_list_and_what_is_waited_for_the_first(layout: Layout) -> None:
    told = [priority for band in layout.bands for priority in band]

    assert told == list(range(LIVE_PRIORITY, MAX_PRIORITY + 1))
    for step, band in enumerate(layout.bands):
        assert {max(0, layout.step(priority)) for priority in band} == {step}
    assert layout.key("q", LIVE_PRIORITY) == layout.key("q", 0)


@pytest.mark.parametrize("layout", [Layout(), Layout((0, 5), ":", "mill:")])
@pytest.mark.parametrize("priority", [0, 5, 9])
def test_a_list_is_known_by_its_key(layout: Layout, priority: int) -> None:
    assert layout.queue(layout.key("gristmill.stub", priority)) == "gristmill.stub"


def test_the_worker_has_its_own_transport_though_its_process_used_plain_celery_before(
    make_settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "redis://127.0.0.1:1/0"
    aliases = kombu.transport.TRANSPORT_ALIASES
    monkeypatch.setitem(aliases, "redis", "kombu.transport.redis:Transport")
    monkeypatch.setitem(kombu.transport._transport_cache, "redis", kombu.transport.redis.Transport)

    with make_app(make_settings(broker={"url": url})) as app:
        used = kombu.transport.get_transport_cls("redis")

        assert used is not kombu.transport.redis.Transport
        assert isinstance(app.connection_for_read().transport, used)
