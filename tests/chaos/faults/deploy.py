"""Fault 30: two versions at once, around a migration of a live database."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from app.jobs import Kind
from app.store.schema import MIGRATIONS
from tests.chaos.faults.broker import expect_both_consume, submit_for
from tests.chaos.scene import Scene, fault
from tests.chaos.world import WORKERS

NEW_KIND: Final = "kind_of_the_next_version"
_KINDS: Final = ", ".join(f"'{kind}'" for kind in Kind)

# What a next version's migration does: it adds, and takes nothing away.
_EXPAND: Final = f"""
    SET LOCAL lock_timeout = '5s';
    ALTER TABLE open_jobs ADD COLUMN next_version text;
    ALTER TABLE open_jobs DROP CONSTRAINT open_jobs_kind_check;
    ALTER TABLE open_jobs ADD CONSTRAINT open_jobs_kind_check
        CHECK (kind IN ({_KINDS}, '{NEW_KIND}')) NOT VALID;
    CREATE TABLE next_versions (id uuid PRIMARY KEY);
    UPDATE alembic_version SET version_num = 'next';
"""
_CONTRACT: Final = f"""
    DELETE FROM jobs WHERE kind = '{NEW_KIND}';
    DROP TABLE next_versions;
    ALTER TABLE open_jobs DROP CONSTRAINT open_jobs_kind_check;
    ALTER TABLE open_jobs ADD CONSTRAINT open_jobs_kind_check
        CHECK (kind IN ({_KINDS})) NOT VALID;
    ALTER TABLE open_jobs DROP COLUMN next_version;
"""

# Jobs of a kind that only the next version knows, as its API writes them, never sent yet.
_NEW_JOBS: Final = f"""
    WITH key AS (
        INSERT INTO job_keys (id, created_at)
        SELECT gen_random_uuid(), now() - interval '1 hour' FROM generate_series(1, 3)
        RETURNING *
    ), asked AS (
        INSERT INTO requests (job_id, created_at, request)
        SELECT id, created_at, '{{"query": "x"}}' FROM key
    )
    INSERT INTO open_jobs (id, model, kind, source, state, not_before, created_at, queued_at)
    SELECT id, 'stub', '{NEW_KIND}', 'api', 'queued', now(), created_at, now() FROM key
    RETURNING id
"""


@fault(30, "deploy: a later schema and kind under load, two versions at once", checks=("I7",))
def deploy(scene: Scene) -> None:
    with _later_schema(scene):
        new_ids = [row["id"] for row in scene.world.rows(_NEW_JOBS)]
        submit_for(scene, 2.0)
        for part in (*WORKERS, "rescue", "api"):  # one that is started again meets it, too
            scene.world.restart(part)
        expect_both_consume(scene)
        kept = scene.world.value(
            "SELECT count(*) FROM jobs WHERE id = ANY(%s) AND state = 'queued'", new_ids
        )
        ended = len(new_ids) - kept
        scene.expect(not ended, "I1", f"{ended} jobs of a kind of the next version ended.")
    with _earlier_version(scene) as folder:
        if folder is not None:
            scene.world.prefix["worker-2"] = ["env", "-C", str(folder)]
            scene.world.restart("worker-2")
            expect_both_consume(scene)
            scene.world.prefix["worker-2"] = []
            scene.world.restart("worker-2")


@contextmanager
def _later_schema(scene: Scene) -> Iterator[None]:
    """The next version has migrated; each of the two moves is one transaction, under load."""
    revision = scene.world.value("SELECT version_num FROM alembic_version")
    scene.world.sql(f"BEGIN; {_EXPAND} COMMIT")
    try:
        yield
    finally:
        back = f"UPDATE alembic_version SET version_num = '{revision}'"
        scene.world.sql(f"BEGIN; {_CONTRACT} {back}; COMMIT")


@contextmanager
def _earlier_version(scene: Scene) -> Iterator[Path | None]:
    """A checkout of the version before this one; None where there is no history to take it from."""
    commit = _earlier_commit()
    if commit is None:
        scene.note("No earlier version that may run beside this one: this one played its part.")
        yield None
        return
    folder = scene.world.folder / "earlier"
    archive = folder.with_suffix(".zip")
    archive.write_bytes(_git("archive", "--format=zip", commit, "app", "migrations").stdout)
    shutil.unpack_archive(archive, folder)
    scene.note(f"worker-2 ran version {commit[:7]} beside this one.")
    yield folder


def _earlier_commit() -> str | None:
    """The last one with another schema, if its code takes later schemas; else the oldest that does.

    That code has `fits_from`; see `app.store.migration`.
    """
    commits = _git("rev-list", "--max-count=200", "HEAD", "--", "app", "migrations").stdout
    found = None
    for commit in commits.decode().split()[1:]:
        if _git("grep", "--quiet", "fits_from", commit, "--", "app/store").returncode:
            break
        changed = ("diff", "--name-only", "--diff-filter=a", commit, "HEAD", "--", "migrations")
        if _git(*changed).stdout:  # another line of schemas
            break
        found = commit
        if _git("diff", "--quiet", commit, "HEAD", "--", "migrations").returncode:
            break
    return found


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["git", "-C", str(MIGRATIONS.parent), *arguments], check=False, capture_output=True
    )
