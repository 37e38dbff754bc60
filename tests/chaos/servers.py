"""Embedded Postgres and Redis, and the tests' own connections to them, which no proxy disturbs."""

from __future__ import annotations

import contextlib
import json
import threading
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import psycopg
import redis
from psycopg.rows import dict_row

from app.local.servers import EmbeddedPostgres, EmbeddedRedis
from app.store.audit import audit
from app.store.database import Database
from app.store.migration import migrate

# Notes every change of a job's state in a table that the product does not know.
_WATCH: Final = """
    CREATE SCHEMA chaos;
    CREATE TABLE chaos.transitions (
        number bigserial PRIMARY KEY, job_id uuid NOT NULL, before text, after text NOT NULL,
        at timestamptz NOT NULL DEFAULT clock_timestamp()
    );
    CREATE INDEX ON chaos.transitions (job_id);
    CREATE FUNCTION chaos.note() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO chaos.transitions (job_id, after) VALUES (NEW.id, NEW.state);
        ELSIF OLD.state <> NEW.state THEN
            INSERT INTO chaos.transitions (job_id, before, after)
            VALUES (NEW.id, OLD.state, NEW.state);
        END IF;
        RETURN NULL;
    END $$;
    CREATE FUNCTION chaos.note_end() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
    BEGIN
        INSERT INTO chaos.transitions (job_id, before, after) VALUES (NEW.job_id, (
            SELECT after FROM chaos.transitions WHERE job_id = NEW.job_id
            ORDER BY number DESC LIMIT 1
        ), NEW.state);
        RETURN NULL;
    END $$;
    CREATE TRIGGER chaos_note AFTER INSERT OR UPDATE OF state ON public.open_jobs
        FOR EACH ROW EXECUTE FUNCTION chaos.note();
    CREATE TRIGGER chaos_note AFTER INSERT ON public.results
        FOR EACH ROW EXECUTE FUNCTION chaos.note_end();
"""


class Servers:
    """Both servers, the schema, and a table of every change of a job's state."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.logs = folder / "logs"
        self.postgres = EmbeddedPostgres(folder / "postgres", log=self.logs / "postgres.log")
        self.redis = EmbeddedRedis(folder / "redis", log=self.logs / "redis.log")
        self._connections = threading.local()  #: of each thread, for its questions
        self._held = contextlib.ExitStack()

    def start_servers(self) -> None:
        for server in (self.postgres, self.redis):
            self._held.enter_context(server)
        migrate(self.postgres.url)
        self.sql(_WATCH)
        # Nothing here takes the kernel down, and a killed server loses nothing by this; but
        # whoever else writes to this disk would decide how long a commit takes.
        self.sql("ALTER SYSTEM SET fsync = off")
        self.sql("SELECT pg_reload_conf()")

    def stop_servers(self) -> None:
        self._held.close()

    def admin(self, **options: Any) -> psycopg.Connection[dict[str, Any]]:
        """A connection to Postgres that no proxy disturbs; close it."""
        options = {"autocommit": True, "connect_timeout": 20} | options
        return psycopg.connect(
            self.postgres.url, row_factory=dict_row, application_name="chaos", **options
        )

    def redis_client(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis.url, socket_timeout=5)

    def sql(self, query: str, *values: Any) -> None:
        with self.admin() as connection:
            connection.execute(query, values or None)  # type: ignore[arg-type]

    def rows(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """What a query finds; raises `psycopg.OperationalError` while Postgres is away."""
        own = getattr(self._connections, "own", None)
        if own is not None:
            try:
                return own.execute(query, values or None).fetchall()  # type: ignore[no-any-return]
            except psycopg.OperationalError:  # it may be old, and Postgres a new one
                own.close()
        self._connections.own = None
        new = self._connections.own = self.admin()
        self._held.callback(new.close)
        return new.execute(query, values or None).fetchall()  # type: ignore[arg-type]

    def value(self, query: str, *values: Any) -> Any:
        [row] = self.rows(query, *values)
        [found] = row.values()
        return found

    def now(self) -> str:
        """The database's clock, as text."""
        return str(self.value("SELECT clock_timestamp()"))

    def dump(self, since: str) -> dict[str, list[dict[str, Any]]]:
        """Every row about jobs that were accepted from a time on; all workers."""
        jobs = "SELECT id FROM jobs WHERE created_at >= %s"
        tables = {
            "jobs": "SELECT * FROM jobs WHERE created_at >= %s",
            "results": f"SELECT * FROM results WHERE job_id IN ({jobs})",
            "attempts": f"SELECT * FROM attempts WHERE job_id IN ({jobs})",
            "batches": "SELECT * FROM batches WHERE id IN"
            f" (SELECT batch_id FROM attempts WHERE job_id IN ({jobs}))",
            "transitions": f"SELECT * FROM chaos.transitions WHERE job_id IN ({jobs})"
            " ORDER BY number",
        }
        found = {name: self._json(query, since) for name, query in tables.items()}
        return found | {"workers": self._json("SELECT * FROM workers"), "audit": self._audit()}

    def _audit(self) -> list[dict[str, Any]]:
        """What the audit of all there is has to say."""
        with (
            contextlib.closing(Database(self.postgres.url)) as database,
            database.begin() as connection,
        ):
            found = audit(connection, None, None)
        return [
            {"rule": each.rule.name, "row": row, "difference": difference}
            for each in found.differences
            for row, difference in each.rows
        ]

    def _json(self, query: str, *values: Any) -> list[dict[str, Any]]:
        """Rows as JSON has them, so that what is checked is what a file would hold."""
        found = self.rows(f"SELECT to_jsonb(found)::text AS row FROM ({query}) AS found", *values)
        return [json.loads(each["row"], parse_float=Decimal) for each in found]

    def texts(self) -> dict[str, str]:
        """All that may not hold a prompt: logs, and what Redis keeps beside its queues."""
        found = {file.name: file.read_text(errors="replace") for file in self.logs.iterdir()}
        with self.redis_client() as client:
            for key in client.scan_iter(count=1000):
                name = key.decode(errors="replace")
                if not name.startswith(("gristmill.", "celery", "unacked")):
                    found[f"redis key {name}"] = repr(_value(client, key))
        found["other columns"] = json.dumps(
            self._json(
                "SELECT to_jsonb(jobs) - 'request' AS job, to_jsonb(results) - 'response' AS result"
                " FROM jobs LEFT JOIN results ON job_id = jobs.id"
            ),
            default=str,
        )
        return found


def _value(client: redis.Redis, key: bytes) -> Any:
    match client.type(key):
        case b"string":
            return client.get(key)
        case b"list":
            return client.lrange(key, 0, -1)
        case b"hash":
            return client.hgetall(key)
        case b"set":
            return client.smembers(key)
        case b"zset":
            return client.zrange(key, 0, -1)
    return None
