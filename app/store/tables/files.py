"""Files of callers, and outputs of batches: what is known of them. Their bytes lie elsewhere."""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Column, Index, Table, Text, Uuid, text

from app.files import FileState
from app.store.tables.columns import (
    AGEING,
    Stamp,
    in_range,
    metadata,
    not_negative,
    one_of,
    tenant_column,
)

files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True, comment="File id, after `file-`; rises with time."),
    tenant_column("Who owns the file; one tenant never sees another's."),
    Column("purpose", Text, nullable=False, comment="What it is for, as the caller says."),
    Column("filename", Text, nullable=False, comment="Its name at the caller's."),
    Column(
        "batch_id", Uuid, comment="Batch that writes it, or wrote it; null for a caller's own file."
    ),
    Column("created_at", Stamp, nullable=False, comment="Its upload began, in whole seconds."),
    Column("expires_at", Stamp, comment="Not there any more from then on; null is never."),
    Column(
        "state",
        Text,
        nullable=False,
        comment="uploading, growing (an output of a batch that runs), ready or deleted.",
    ),
    Column("bytes", BigInteger, comment="Its size; null before it is ready."),
    Column("sha256", Text, comment="Hex SHA-256 of its bytes; null before it is ready."),
    one_of("state", FileState),
    in_range("created_at", "expires_at"),
    not_negative("bytes"),
    CheckConstraint(
        "char_length(tenant) <= 200 AND char_length(purpose) <= 64"
        " AND char_length(filename) BETWEEN 1 AND 255",
        name="lengths",
    ),
    CheckConstraint("(state = 'ready') <= (num_nulls(bytes, sha256) = 0)", name="ready"),
    # Listing.
    Index("files_by_id", "tenant", "id", postgresql_where=text("state IN ('growing', 'ready')")),
    # Rescue: what is to go.
    Index("files_expire", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    Index("files_going", "id", postgresql_where=text("state IN ('uploading', 'deleted')")),
    postgresql_with=AGEING,
    comment="One row per file. Its bytes are in the storage of files, under its id.",
)
