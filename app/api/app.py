"""The HTTP application, put together, and the server that runs it."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from typing import Final

import uvicorn
from fastapi import Depends, FastAPI
from fastapi_offline import FastAPIOffline

from app import telemetry
from app.api import health, limits, models, openapi, problems, usage, webhook_deliveries
from app.api.anthropic import batches as message_batches
from app.api.anthropic import messages
from app.api.jobs import calls as jobs
from app.api.jobs import event_streams, lists, many, purge, timeline
from app.api.live.followers import Listeners
from app.api.live.waiting import Waiters
from app.api.metrics import Metrics, SystemCollector
from app.api.openai import batches, calls, files, responses, stored_chats, webhooks
from app.api.services import Services
from app.api.wire import connections, memory
from app.api.wire.callers import KnownCallers
from app.api.wire.middleware import RequestScope
from app.api.wire.query import only_declared
from app.broker.publisher import Publisher
from app.config.host import is_loopback
from app.config.settings import Settings
from app.engines.catalog import load_catalog
from app.errors import ConfigError, Unavailable
from app.intake.submit import Submitter
from app.objects import Objects
from app.store import keys, notices, tenancy
from app.store.database import Database
from app.store.tenancy import EVERYBODY
from app.threads import beside

log = logging.getLogger(__name__)

GRACE_S: Final = 5
"""At shutdown: time for requests to end. Long polls are answered at once."""

KEEP_ALIVE_S: Final = 75
"""How long a connection is kept that asks for nothing, if no other needs its place: longer than
clients keep theirs, so that none is closed just as it is used again."""

SWITCH_S: Final = 0.0001
"""How long a thread that computes keeps the event loop waiting each time that the loop has waited
for the system: Python's own 5 ms come to a tenth of a second in one submission."""

WAITING_CONNECTIONS: Final = 2_048
ACCEPTED_A_TURN: Final = 1
"""Connections that the system keeps until they are accepted, and how many are in a turn of the
loop: those who come by the hundred at once wait for each other, not the rest for them."""

SYSTEM_BUFFER_BYTES: Final = 262_144
"""What the system holds of a connection for us, each way. By itself it takes megabytes for each
that sends without end or does not read, and they count as memory of the container."""


def create_app(settings: Settings) -> FastAPI:
    """The application. Loads tokenizers, and connects to nothing before it is started.

    Raises `ConfigError` if a model's files are missing or unfit.
    """
    services = _services(settings)
    app = FastAPIOffline(
        title="Gristmill",
        version=version("gristmill"),
        summary="Submit prompts as jobs, and follow them.",
        redoc_url=None,
        redirect_slashes=False,  # it would lead to whatever host the request names
        lifespan=_lifespan,
        dependencies=[Depends(only_declared)],
    )
    app.state.services = services
    app.state.idle_connections = {}
    app.state.unread = connections.Unread(settings.api.max_unread_bytes)
    app.add_middleware(KnownCallers, settings=settings.api, keyring=services.keyring)
    app.add_middleware(RequestScope, metrics=services.metrics)  # around it: it counts refusals, too
    problems.install(app)
    for surface in (  # the more often it is called, the sooner
        jobs,
        health,
        event_streams,
        timeline,
        lists,
        many,
        purge,
        usage,
        calls,
        stored_chats,
        responses,
        messages,
        message_batches,
        files,
        webhooks,
        webhook_deliveries,
        batches,
        models,
        limits,
    ):
        app.include_router(surface.router)
    openapi.install(app)
    return app


def _services(settings: Settings) -> Services:
    database = Database(
        settings.database.url,
        pool_size=settings.database.pool_size,
        application_name="gristmill-api",
        connect_timeout_s=settings.database.connect_timeout_s,
        statement_timeout_ms=settings.database.statement_timeout_ms,
        lock_timeout_ms=settings.database.lock_timeout_ms,
        is_limited=settings.database.row_security,
    )
    publisher = Publisher(settings)
    submitter = Submitter(settings, database, publisher, load_catalog(settings))
    waiters = Waiters()
    listeners = Listeners(publisher.streams(), settings.api.max_streams)
    metrics = Metrics()
    metrics.register(
        SystemCollector(
            database,
            publisher,
            submitter.sender,
            submitter.outlook,
            waiters,
            listeners,
            settings.models,
        )
    )
    return Services(
        settings, database, publisher, submitter, waiters, listeners, metrics, Objects.of(settings)
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    settings = services.settings
    services.waiters.open()
    services.listeners.open()
    listen = partial(_listen, settings.database.news_url, services.waiters)
    outlook = services.submitter.outlook
    with (
        beside("trim", memory.keep_small),
        beside("listen", listen),
        beside("events", services.listeners.hear),
        beside("outlook", outlook.keep),
    ):
        yield
    await services.close()


def _listen(database_url: str, waiters: Waiters, stop: threading.Event) -> None:
    """Pass on every word of ended jobs to those who wait for them."""
    for job_ids in notices.listen(database_url, stop):
        if job_ids is None:
            waiters.look_again()
        else:
            waiters.jobs_are_done(job_ids)


class Server(uvicorn.Server):
    """Uvicorn, but long polls do not hold up its shutdown."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,  # as set up by telemetry
                access_log=False,  # /metrics has durations, and Postgres the jobs
                server_header=False,
                timeout_graceful_shutdown=GRACE_S,
                timeout_keep_alive=KEEP_ALIVE_S,
                http=connections.Connection,
                ws="none",
                backlog=ACCEPTED_A_TURN,  # to asyncio it means this, too
                loop="asyncio",  # whose transports can be told how much to read at once
            )
        )
        self._app = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for sock in sockets or ():
            sock.listen(WAITING_CONNECTIONS)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.services.waiters.close()
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Run the API until SIGTERM or SIGINT. Logs the address, with the port that was free for 0.

    Raises `ConfigError` if it cannot listen or may not open so many connections, or if a model's
    files are unfit; `SchemaError` if the database wants migrating. A database that is away is
    waited for: /readyz tells.
    """
    telemetry.setup_logging(settings.log_level)
    memory.give_back()
    connections.allow(settings.api.max_connections)
    app = create_app(settings)
    check_start(app.state.services.database, settings)
    openapi.text(app)  # now, and not while others wait for their answers
    memory.settle()
    sys.setswitchinterval(SWITCH_S)
    with listen_on(settings.api.host, settings.api.port) as sock:
        port = sock.getsockname()[1]
        host = f"[{settings.api.host}]" if ":" in settings.api.host else settings.api.host
        log.info("Listening on http://%s:%s; documentation under /docs.", host, port)
        Server(app).run(sockets=[sock])


def check_start(database: Database, settings: Settings) -> None:
    """Raises `SchemaError`, and `ConfigError` if others reach the API and nobody has a key. Says so
    if the database is away, and no more: keys are needed there in any case."""
    api = settings.api
    try:
        if settings.database.row_security:
            tenancy.check(settings.database.url)
        database.check_schema()
        with tenancy.acting_for(EVERYBODY), database.begin() as connection:
            if not is_loopback(api.host) and not keys.any_valid(connection):
                raise ConfigError(
                    f"api.host is {api.host}, where other machines reach the API, and there is no "
                    "API key. Make the first one: `gristmill keys create --name NAME`; or set "
                    "api.host to 127.0.0.1."
                )
    except Unavailable as error:
        log.warning("%s Starting all the same.", error, extra={"action": "database_away"})


def listen_on(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `ConfigError` if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        sock = socket.create_server((host, port), family=family, backlog=WAITING_CONNECTIONS)
    except OSError as error:
        raise ConfigError(
            f"api.host {host} and api.port {port}: cannot listen there ({error.strerror})."
        ) from None
    # Connections inherit it. Without it an answer in two writes waits 40 ms for the caller's ACK,
    # and asyncio only sets it on sockets that name their protocol, which this one does not.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for buffer in (socket.SO_RCVBUF, socket.SO_SNDBUF):
        sock.setsockopt(socket.SOL_SOCKET, buffer, SYSTEM_BUFFER_BYTES)
    return sock
