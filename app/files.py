"""Files: the vocabulary. Pure.

    uploading ──▶ ready ──▶ deleted        a caller's own
    growing ────▶ ready ──▶ deleted        an output of a batch

What is `deleted` is gone for its caller; its bytes go as soon as no batch reads them any more.
"""

from __future__ import annotations

import enum
from typing import Final
from uuid import UUID

from app import ids

PREFIX: Final = "file-"


class FileState(enum.StrEnum):
    UPLOADING = "uploading"  #: its bytes arrive; nobody sees it
    GROWING = "growing"  #: lines are added by a batch that runs; they are in their jobs' rows
    READY = "ready"  #: whole
    DELETED = "deleted"


class Purpose(enum.StrEnum):
    """What a file is for. Only those for batches are read here."""

    ASSISTANTS = "assistants"
    BATCH = "batch"
    FINE_TUNE = "fine-tune"
    VISION = "vision"
    USER_DATA = "user_data"
    EVALS = "evals"
    BATCH_OUTPUT = "batch_output"  #: not a caller's to give


UPLOADED: Final = tuple(each for each in Purpose if each is not Purpose.BATCH_OUTPUT)


def name_of(file_id: UUID) -> str:
    return ids.name_of(PREFIX, file_id)


def id_in(name: str) -> UUID | None:
    """The id in a name that `name_of` wrote; None in any other text."""
    return ids.id_in(PREFIX, name)


def key_of(file_id: UUID) -> str:
    """Where its bytes lie in the storage."""
    return f"files/{file_id.hex}"
