"""The real API for the tests: uvicorn in a thread, on a port of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import datetime, timedelta
from decimal import Decimal
from uuid import UUID, uuid4

import httpx

from app.api.app import Server, create_app, listen_on
from app.books.energy import EnergyMethod
from app.config.settings import Settings
from app.jobs import CloseReason, JobState
from app.keys import PREFIX, NewKey, Scope, _checksum, new_key
from app.store import claims, keys, notices, workers
from app.store.database import Database


@contextmanager
def running_api(settings: Settings, port: int = 0) -> Iterator[httpx.Client]:
    """A client of an API that runs with these settings; both end with the block."""
    app = create_app(settings)
    sock = listen_on("127.0.0.1", port)
    server = Server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        # The socket listens already, so the first request is answered once the API is up.
        with httpx.Client(base_url=url, timeout=120) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join()


def made_key(
    database_url: str, tenant: str, *scopes: Scope, expires_at: datetime | None = None
) -> NewKey:
    """A new API key; those of `submit` and `read` unless scopes are named."""
    key = new_key()
    with closing(Database(database_url, pool_size=1)) as database, database.begin() as connection:
        keys.create(
            connection,
            key,
            actor="test",
            name="test",
            scopes=scopes or (Scope.SUBMIT, Scope.READ),
            tenant=tenant,
            expires_at=expires_at,
        )
    return key


def with_another_secret(key: NewKey) -> str:
    """What somebody sends who knows the id of a key, and how keys are made."""
    begin = f"{PREFIX}_{key.id}_{'0' * 32}"
    return begin + _checksum(begin)


class Hands:
    """A worker without an engine: claims and finishes jobs in the store when a test says so."""

    def __init__(self, database_url: str) -> None:
        self._database = Database(database_url, pool_size=2)
        self.worker_id = uuid4()
        worker = workers.NewWorker(
            id=self.worker_id,
            name="hands",
            host="here",
            pid=1,
            models=["stub"],
            device="cpu",
            price_id="cpu",
            currency="USD",
            price_per_device_hour=Decimal("0.036"),
        )
        with self._database.begin() as connection:
            workers.register_worker(connection, worker, lease_s=60)

    def claim(self, job_id: str) -> claims.Claimed:
        batch = claims.NewBatch(
            id=uuid4(),
            worker_id=self.worker_id,
            model="stub",
            engine="stub",
            close_reason=CloseReason.WAIT,
            wait_ms=100.0,
        )
        with self._database.begin() as connection:
            [claimed] = claims.claim(connection, batch, [claims.Member(UUID(job_id), uuid4())])
        return claimed

    def finish(self, claimed: claims.Claimed, **given: object) -> None:
        """Complete a claimed job, or end it as `given` says."""
        ending = {
            "state": JobState.COMPLETED,
            "response": {"choices": [{"text": "done"}]},
            "input_tokens": 5,
            "cached_tokens": 2,
            "output_tokens": 7,
            "started_at": claimed.claimed_at,
            "first_token_at": claimed.claimed_at + timedelta(milliseconds=3),
            "batch_wait_ms": 100.0,
            "inference_ms": 12.5,
            "batch_size": 1,
            "device_ns": 12_000_000,
            "cost": Decimal("0.000000120"),
            "currency": "USD",
            "price_id": "cpu",
            "energy_nj": 31_500_000_000,
            "wasted_nj": 0,
            "energy_method": EnergyMethod.MEASURED,
            "energy_boundary": "gpu",
            "carbon_ug": 3_325,
            "price": Decimal("0.036"),
        }
        finished = claims.Finished(
            job_id=claimed.job_id,
            attempt_id=claimed.attempt_id,
            created_at=claimed.created_at,
            **(ending | given),
        )
        with self._database.autocommit(then=notices.ended([finished.job_id])) as connection:
            assert claims.finish(connection, [finished])

    def close(self) -> None:
        self._database.close()
