"""Files: rows of what lies in the storage of files.

A row is there before its bytes, and is removed after them: whatever ends in between, rescue finds
what is left, and nothing lies there that no row knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import Connection, Row, text

from app.errors import BatchStateConflict, NoSuchFile
from app.files import FileState, Purpose


@dataclass(frozen=True, slots=True)
class FileView:
    id: UUID
    tenant: str
    purpose: str
    filename: str
    state: FileState
    bytes: int
    created_at: datetime
    expires_at: datetime | None
    batch_id: UUID | None
    sha256: str | None


_SHOWN: Final = """
    id, tenant, purpose, filename, state, coalesce(bytes, 0) AS bytes, created_at, expires_at,
    batch_id, sha256
"""
_THERE: Final = "state IN ('growing', 'ready') AND (expires_at IS NULL OR expires_at > now())"

# A file whose bytes are under way, or will be. Stamps are whole seconds, as they are told.
_BEGIN: Final = text("""
    INSERT INTO files (id, tenant, purpose, filename, batch_id, state, created_at)
    VALUES (:id, :tenant, :purpose, :filename, :batch_id, :state, date_trunc('second', now()))
    ON CONFLICT (id) DO NOTHING
""")

# Its bytes are in the storage.
_READY: Final = text(f"""
    UPDATE files SET
        state = 'ready', bytes = :bytes, sha256 = :sha256, purpose = :purpose,
        filename = :filename, created_at = given.at,
        expires_at = given.at + CAST(:expires_s AS double precision) * interval '1 s'
    FROM (
        SELECT CASE state WHEN 'growing' THEN date_trunc('second', now()) ELSE created_at END AS at
        FROM files WHERE id = :id
    ) AS given
    WHERE id = :id AND state IN ('uploading', 'growing')
    RETURNING {_SHOWN}
""")

_FIND: Final = f"SELECT {_SHOWN} FROM files WHERE id = :id AND tenant = :tenant AND {_THERE}"

# Ids rise with time: a page begins after one, be it there or not any more.
_LIST: Final = """
    SELECT {shown} FROM files
    WHERE tenant = :tenant AND {there} {after} {purpose}
    ORDER BY id {order} LIMIT :limit
"""

_DELETE: Final = text(f"""
    UPDATE files SET state = 'deleted'
    WHERE id = :id AND tenant = :tenant AND {_THERE} AND state = 'ready'
    RETURNING id
""")

_DROP: Final = text("UPDATE files SET state = 'deleted' WHERE id = :id AND state <> 'deleted'")

# Files whose bytes may go: deleted, expired, or of an upload that never ended.
_UNREAD: Final = """
    NOT EXISTS (
        SELECT FROM job_batches WHERE input_file_id = files.id AND ended_at IS NULL
    )
"""
_GOING: Final = text(f"""
    SELECT id FROM (
        (SELECT id FROM files WHERE state = 'deleted' AND {_UNREAD} LIMIT :page)
        UNION ALL
        (SELECT id FROM files  -- a while after its end: batches that took it till then are seen
         WHERE state = 'ready' AND expires_at <= now() - interval '1 min' AND {_UNREAD}
         LIMIT :page)
        UNION ALL
        (SELECT id FROM files
         WHERE state = 'uploading' AND created_at < now() - :patience_s * interval '1 s'
         LIMIT :page)
    ) AS due
    LIMIT :page
""")

_FORGET: Final = text("DELETE FROM files WHERE id = ANY(CAST(:ids AS uuid[]))")


def begin(
    connection: Connection,
    file_id: UUID,
    *,
    tenant: str,
    purpose: str,
    filename: str,
    state: FileState = FileState.UPLOADING,
    batch_id: UUID | None = None,
) -> None:
    """A row for a file that is to come. May be repeated."""
    given = {"id": file_id, "tenant": tenant, "purpose": purpose, "filename": filename}
    connection.execute(_BEGIN, given | {"state": state, "batch_id": batch_id})


def ready(
    connection: Connection,
    file_id: UUID,
    *,
    num_bytes: int,
    sha256: str,
    purpose: str,
    filename: str,
    expires_s: float | None,
) -> FileView:
    """The file is there from now on, for so many seconds from when it was begun; None is for ever.

    Raises `NoSuchFile` if it was given up meanwhile.
    """
    row = connection.execute(
        _READY,
        {
            "id": file_id,
            "bytes": num_bytes,
            "sha256": sha256,
            "purpose": purpose,
            "filename": filename,
            "expires_s": expires_s,
        },
    ).one_or_none()
    if row is None:
        raise NoSuchFile()
    return _view(row)


def find(
    connection: Connection, file_id: UUID | None, *, tenant: str, name: str, hold: bool = False
) -> FileView:
    """Raises `NoSuchFile`, which tells `name`. With `hold` nobody deletes it before the transaction
    has ended."""
    given = {"id": file_id, "tenant": tenant}
    query = f"{_FIND} FOR SHARE" if hold else _FIND
    row = connection.execute(text(query), given).one_or_none()
    if row is None:
        raise NoSuchFile(f"No such File object: {name}")
    return _view(row)


def listed(
    connection: Connection,
    *,
    tenant: str,
    purpose: Purpose | None,
    after: UUID | None,
    newest_first: bool,
    limit: int,
) -> list[FileView]:
    query = _LIST.format(
        shown=_SHOWN,
        there=_THERE,
        after=f"AND id {'<' if newest_first else '>'} :after" if after else "",
        purpose="AND purpose = :purpose" if purpose else "",
        order="DESC" if newest_first else "ASC",
    )
    given = {"tenant": tenant, "after": after, "purpose": purpose, "limit": limit}
    asked = {name: it for name, it in given.items() if it is not None}
    return [_view(row) for row in connection.execute(text(query), asked)]


def delete(connection: Connection, file_id: UUID | None, *, tenant: str, name: str) -> None:
    """It is gone for its caller; its bytes go later. Raises `NoSuchFile`, and `BatchStateConflict`
    for one that a batch still adds to."""
    if connection.execute(_DELETE, {"id": file_id, "tenant": tenant}).one_or_none() is None:
        find(connection, file_id, tenant=tenant, name=name)
        raise BatchStateConflict("The file is still written by its batch: cancel that first.")


def give_up(connection: Connection, file_id: UUID) -> None:
    """An upload that failed."""
    connection.execute(_DROP, {"id": file_id})


def going(connection: Connection, page: int, patience_s: float) -> list[UUID]:
    """Files whose bytes are to be removed, and then forgotten; uploads after `patience_s`."""
    return list(connection.scalars(_GOING, {"page": page, "patience_s": patience_s}))


def forget(connection: Connection, ids: Sequence[UUID]) -> None:
    """Their bytes are removed."""
    connection.execute(_FORGET, {"ids": list(ids)})


def _view(row: Row[tuple[object, ...]]) -> FileView:
    given = row._mapping
    return FileView(**{**given, "state": FileState(given["state"])})
