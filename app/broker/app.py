"""The Celery app that producers, worker, rescue and Flower share: its queues and settings."""

from __future__ import annotations

import os
from typing import Any, Final, NoReturn

from celery import Celery, signals
from kombu.transport import TRANSPORT_ALIASES, _transport_cache

from app import telemetry
from app.broker.message import TASKS
from app.broker.queues import queues_of, served_models
from app.config.broker_url import for_kombu, tls_of
from app.config.settings import BrokerSettings, Settings

_TRANSPORTS: Final = {
    "redis": "app.broker.transport:Transport",
    "rediss": "app.broker.transport:Transport",
    "sentinel": "app.broker.transport:SentinelTransport",
}
"""By the scheme of a URL. Celery's own setting of a transport is forgotten at a failover."""

_OVERRIDES: Final = (
    *("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL"),
    *("CELERY_RESULT_BACKEND", "CELERY_LOADER"),
)
"""Variables that Celery would heed before our settings: they are of another app of this machine."""


def make_app(settings: Settings) -> Celery:
    """The Celery app of producers, worker and Flower. Opens no connection."""
    TRANSPORT_ALIASES.update(_TRANSPORTS)
    for scheme in _TRANSPORTS:  # kombu keeps what a process has once used of its own
        _transport_cache.pop(scheme, None)
    for name in _OVERRIDES:
        os.environ.pop(name, None)
    app = Celery("gristmill", set_as_current=False)
    app.settings = settings
    app.events.dispatcher_cls = "app.worker.pool.events:EventDispatcher"
    app.conf.update(_celery_settings(settings))
    for name in TASKS:
        app.task(_never_run, name=name, lazy=False, Strategy="app.worker.pool.strategy:strategy")
    app.amqp.queues.select([*queues_of(served_models(settings)), settings.broker.default_queue])
    signals.setup_logging.connect(_setup_logging, weak=False)
    return app


def _celery_settings(settings: Settings) -> dict[str, Any]:
    broker, tls = settings.broker, tls_of(settings.broker.url)
    names = [*queues_of(settings.models), broker.default_queue]
    sizes = {name: settings.models[name].max_batch_size for name in served_models(settings)}
    return {
        "broker_url": for_kombu(broker.url),
        # kombu would take any certificate; ssl_cert_reqs in the URL says otherwise.
        "broker_use_ssl": None if tls is None else {"ssl_cert_reqs": "required"},
        "worker_pool": "app.worker.pool.pool:EnginePool",
        "worker_consumer": "app.worker.pool.consumer:Consumer",
        # Messages held, not threads: for each model one batch that runs and one that forms from
        # its own queue, and one batch that came by a queue of all.
        "worker_concurrency": 3 * sum(sizes.values()),
        "worker_prefetch_multiplier": 1,
        # Acknowledged after the commit. A failure is a row, and a retry is the database's decision.
        "task_acks_late": True,
        "task_acks_on_failure": True,
        "task_acks_on_timeout": True,
        "task_ignore_result": True,
        "task_serializer": "json",
        "accept_content": ["json"],
        "task_queues": {name: {"exchange": "", "routing_key": name} for name in names},
        "task_default_queue": broker.default_queue,
        "task_default_exchange": "",
        "task_create_missing_queues": False,
        "broker_transport_options": {
            "visibility_timeout": broker.visibility_timeout_s,
            "unacked_restore_interval": 10,
            "unacked_restore_throttle": 6,
            "socket_timeout": broker.socket_timeout_s,
            "socket_connect_timeout": 5,
            "priority_steps": list(broker.priority_steps),
            "sep": broker.sep,
            "global_keyprefix": broker.key_prefix,
            **_sentinel_options(broker, tls),
            "socket_keepalive": True,
            "health_check_interval": 25,
            "queue_budgets": {
                name: 2 * size for model, size in sizes.items() for name in queues_of([model])
            },
            "shared_budgets": {
                name: size for model, size in sizes.items() for name in queues_of([model])
            },
        },
        "broker_connection_retry_on_startup": True,
        "broker_connection_max_retries": None,
        # A lost connection does not stop the engine: the claim drops the message's second copy.
        "worker_cancel_long_running_tasks_on_connection_loss": False,
        "worker_send_task_events": True,
        "task_send_sent_event": False,
        "worker_disable_rate_limits": True,
        "worker_hijack_root_logger": False,
        "worker_redirect_stdouts": False,
        "worker_enable_remote_control": True,
        "worker_timer_precision": 10.0,  # longest sleep of the hub; it would wake every second
    }


def _sentinel_options(broker: BrokerSettings, tls: dict[str, str] | None) -> dict[str, Any]:
    """How to ask the Sentinels, which have a password of their own, for the master."""
    if not broker.sentinel_master:
        return {}
    asking: dict[str, Any] = {"socket_timeout": 5, "socket_connect_timeout": 5}
    if broker.sentinel_password:
        asking["password"] = broker.sentinel_password
    if broker.sentinel_username:
        asking["username"] = broker.sentinel_username
    if tls is not None:
        asking |= {"ssl": True, "ssl_cert_reqs": "required"} | tls
    return {"master_name": broker.sentinel_master, "sentinel_kwargs": asking}


def _never_run(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("Gristmill's tasks run in batches: start the worker with its own pool.")


def _setup_logging(loglevel: int | str | None = None, **_: object) -> None:
    telemetry.setup_logging(loglevel or "INFO")
