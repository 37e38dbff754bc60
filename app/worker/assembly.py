"""Puts a worker together: the one place where its parts are built and joined."""

from __future__ import annotations

import datetime as dt
import logging
import os
import platform
import shutil
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from app.broker.publisher import Publisher
from app.broker.queues import served_models
from app.broker.tally import Tally
from app.config.prices import price_of_worker
from app.config.settings import PriceSettings, Settings
from app.engines import registry
from app.engines.catalog import CatalogModel, load_catalog
from app.errors import ConfigError, EngineError
from app.jobs import new_id
from app.store import loads, prices
from app.store.database import Database
from app.store.workers import NewWorker
from app.worker.account import Account
from app.worker.batcher import Batcher, Limits
from app.worker.energy.meter import EnergyMeter, EnergyWatch
from app.worker.energy.source import choose
from app.worker.engine.host import EngineHost
from app.worker.engine.wire import LoadModels, ServedModel
from app.worker.engine.xid import Remedy, Xid, XidWatch
from app.worker.lease import LeaseKeeper
from app.worker.ledger import Ledger
from app.worker.registrar import Registrar
from app.worker.runner import Runner
from app.worker.settlement import Settlement
from app.worker.streams import TokenStreams
from app.worker.thread import RunnerThread
from app.worker.watchdog import Watchdog

log = logging.getLogger(__name__)

STILL_S: Final = 5.0
"""The runner turns every second; one that has not for so long waits for something."""


@dataclass(slots=True)
class Assembly:
    """A worker's parts, from start to stop."""

    worker_id: UUID
    models: Sequence[str]
    runner: RunnerThread
    lease: LeaseKeeper
    database: Database
    publisher: Publisher
    watchdog: Watchdog
    energy: EnergyMeter
    tally: Tally
    streams: TokenStreams
    load_timeout_s: float
    prices: Mapping[str, PriceSettings]
    energy_watch: EnergyWatch | None = None
    xid_watch: XidWatch | None = None

    def start(self) -> None:
        """Load the models, then register. Raises what kept the worker from being ready."""
        self.database.check_schema()
        with self.database.begin() as connection:
            prices.keep(connection, self.prices)
            loads.begin(connection, self.worker_id, self.models)
        self.energy.read()  # what was drawn before is not this worker's
        self.streams.start()
        self.runner.start()
        if self.energy_watch is not None:
            self.energy_watch.start()
        if not self.runner.ready.wait(self.load_timeout_s):
            raise EngineError(f"The models were not loaded within {self.load_timeout_s:.0f} s.")
        if self.runner.failure is not None:
            raise self.runner.failure
        with self.database.begin() as connection:
            loads.end(connection, self.worker_id)
        self._check_energy()
        self.lease.start(self.runner.facts())
        self.watchdog.start()
        if self.xid_watch is not None:
            self.xid_watch.start()

    def _check_energy(self) -> None:
        """A board that is here need not be what the models run on."""
        if self.energy.source.is_assumed and self.runner.facts()["device_index"] is None:
            if self.energy_watch is not None:
                self.energy_watch.stop()
            self.energy.forsake_counters()
            log.warning("The models run on no GPU: its energy is not theirs, and is not counted.")

    def trouble(self) -> str | None:
        """What keeps this worker from making progress now; None if nothing does."""
        facts = self.runner.facts()
        still_s = (time.monotonic_ns() - self.runner.turned_ns) / 1e9
        if facts["draining"] or not self.runner.is_alive():
            return "It is shutting down."
        if not facts["ready"]:
            return "The models are being loaded."
        if facts["slow"]:
            return "The engine shows no progress."
        if still_s > STILL_S:
            return "It stands still."
        return self.lease.trouble

    def stop(self, timeout_s: float) -> None:
        """End after the runner was told to drain. May be called again."""
        self.watchdog.stop()
        self.runner.join(timeout_s)
        if self.energy_watch is not None:
            self.energy_watch.stop()
        self.lease.stop()
        self.streams.stop()
        self.publisher.close()
        self.database.close()

    def facts(self) -> dict[str, Any]:
        """For `celery inspect stats`."""
        return {
            "worker_id": str(self.worker_id),
            "engine": self.runner.facts(),
            "energy": self.energy.facts(),
        }


def heed(xid: Xid, engine_pid: object) -> None:
    """Do what an error of the device asks for, from the watch's thread.

    A context that is lost goes with its process: the runner starts another and runs the jobs again,
    charging nobody. A device that needs a hand is left as at any shutdown: what cannot finish in
    the grace period goes back, uncharged.
    """
    match xid.remedy:
        case Remedy.RESTART if isinstance(engine_pid, int):
            os.kill(engine_pid, signal.SIGTERM)
        case Remedy.LEAVE:
            os.kill(os.getpid(), signal.SIGTERM)


def assemble(
    settings: Settings, consumed: Callable[[], Sequence[str]], on_end: Callable[[], object]
) -> Assembly:
    """Build a worker. Prepares the models first: the longest step, and the likeliest to fail.

    `consumed` names the queues that it takes messages from now: an operator may cancel some.
    """
    source = choose(settings)
    log.info("Energy is %s: %s.", source.method, source.why, extra={"action": "energy_source"})
    price_id = price_of_worker(settings, dt.datetime.now(dt.UTC).date())
    if price_id is None:
        log.warning("The device has no price (worker.price): what jobs cost is not known.")
    names = served_models(settings)
    catalog = load_catalog(settings, names)
    worker_id = new_id()
    database = _database(settings)
    publisher = Publisher(settings)
    streams = TokenStreams(publisher.streams().write)
    host = _engine_host(settings, catalog, streams)
    energy = EnergyMeter(source, host.hours)
    per_hour = settings.prices[price_id].per_device_hour if price_id else None
    account = Account(worker_id, host.hours, energy, per_hour)
    limits: dict[str, Limits] = {name: Limits.of(model.settings) for name, model in catalog.items()}
    tally = Tally(publisher.layout)
    runner = Runner(
        models=names,
        registrar=Registrar(
            worker_id=worker_id,
            database=database,
            publisher=publisher,
            served=catalog,
            max_attempts=settings.worker.max_attempts,
            message_tenant=settings.broker.tenant,
        ),
        batcher=Batcher(limits),
        ledger=Ledger(
            worker_id=worker_id,
            database=database,
            engines={name: model.settings.engine for name, model in catalog.items()},
            settlement=Settlement(
                price_id, settings.prices, catalog, energy, settings.energy.carbon_grams_per_kwh
            ),
            account=account,
        ),
        host=host,
        note_used=tally.note,
        streams=streams,
    )
    thread = RunnerThread(runner, on_end)
    lease = LeaseKeeper(
        worker=_this_worker(worker_id, settings, price_id),
        database=database,
        hear_cancels=partial(publisher.hear_cancels, worker_id),
        runner=thread,
        account=account,
        lease_s=settings.worker.lease_s,
        heartbeat_s=settings.worker.heartbeat_s,
    )
    watchdog = Watchdog(
        backlog=lambda: publisher.backlog(consumed()),
        runner=thread,
        lease=lease,
        stall_timeout_s=settings.worker.stall_timeout_s,
        lease_s=settings.worker.lease_s,
    )
    return Assembly(
        *(worker_id, names, thread, lease, database, publisher, watchdog, energy, tally, streams),
        load_timeout_s=settings.worker.load_timeout_s,
        energy_watch=EnergyWatch(energy, settings.energy.reading_ms) if source.counters else None,
        prices=settings.prices,
        xid_watch=_xid_watch(settings, thread),
    )


def _database(settings: Settings) -> Database:
    return Database(
        settings.database.url,
        pool_size=1,
        spare=3,
        patience_s=1.0,
        application_name="gristmill-worker",
        connect_timeout_s=settings.database.connect_timeout_s,
        statement_timeout_ms=settings.database.statement_timeout_ms,
        lock_timeout_ms=settings.database.lock_timeout_ms,
        looks_up_only=True,
    )


def _xid_watch(settings: Settings, runner: RunnerThread) -> XidWatch | None:
    if not settings.worker.kernel_log:
        return None
    return XidWatch(
        Path(settings.worker.kernel_log),
        settings.worker.pci_address,
        lambda xid: heed(xid, runner.facts()["pid"]),
    )


def _engine_host(
    settings: Settings, catalog: dict[str, CatalogModel], streams: TokenStreams
) -> EngineHost:
    models = tuple(
        ServedModel(
            name, model.folder, model.settings, registry.find(model.settings.engine).factory
        )
        for name, model in catalog.items()
    )
    return EngineHost(
        LoadModels(
            models,
            settings.worker.device,
            settings.worker.threads,
            Path(settings.cache_dir) / "kernels",
        ),
        load_timeout_s=settings.worker.load_timeout_s,
        step_timeout_s=settings.worker.step_timeout_s,
        python=_python(catalog),
        hear_tokens=streams.hear,
    )


def _python(catalog: dict[str, CatalogModel]) -> str:
    """The interpreter of the one engine process; raises `ConfigError` if there is none such."""
    wanted = {name: registry.python_of(model.settings) for name, model in catalog.items()}
    for name, python in wanted.items():
        if shutil.which(python) is None:
            raise ConfigError(
                f"Model {name}: options.python names no program that can be run: {python}."
            )
    if len(set(wanted.values())) > 1:
        told = "; ".join(f"{name}: {python}" for name, python in wanted.items())
        raise ConfigError(
            "The models of one worker run in one interpreter; give each of these a worker of its "
            f"own (worker.models): {told}."
        )
    return next(iter(wanted.values()))


def _this_worker(worker_id: UUID, settings: Settings, price_id: str | None) -> NewWorker:
    """What the row of this process says."""
    price = settings.prices[price_id] if price_id else None
    return NewWorker(
        id=worker_id,
        name=f"gristmill@{socket.gethostname()}",
        host=socket.gethostname(),
        pid=os.getpid(),
        models=served_models(settings),
        device=settings.worker.device,
        price_id=price_id,
        currency=price.currency if price else None,
        price_per_device_hour=price.per_device_hour if price else None,
        engine={
            "python": platform.python_version(),
            "engines": {name: settings.models[name].engine for name in served_models(settings)},
        },
    )
