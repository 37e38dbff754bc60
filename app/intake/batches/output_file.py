"""The files of a batch, written from the rows of its lines: page by page, and there at the end.

Whoever dies meanwhile has written nothing; the next keeper begins this file anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Final
from uuid import UUID

from app.batches import LineFile
from app.files import FileState, Purpose, key_of
from app.intake.batches import told
from app.jobs import new_id
from app.objects import Objects
from app.store import batch_lines, batch_work, files
from app.store.database import Database
from app.store.isolation import Connection
from app.store.job_batches import BatchView

PAGE: Final = 500
PAGE_BYTES: Final = 1_000_000
"""Lines that are read at once, and what there is of their responses."""

NAMES: Final = {LineFile.OUTPUT: "output", LineFile.ERRORS: "errors"}


def file_id_of(batch: BatchView, file: LineFile) -> UUID | None:
    return batch.output_file_id if file is LineFile.OUTPUT else batch.error_file_id


def num_lines(batch: BatchView, file: LineFile) -> int:
    return batch.counts.output if file is LineFile.OUTPUT else batch.counts.errors


def begin_files(connection: Connection, batch: BatchView) -> None:
    """Rows for the files of a batch that have lines, so that these can be read while it runs."""
    for file in LineFile:
        if num_lines(batch, file) and file_id_of(batch, file) is None:
            file_id = new_id()
            files.begin(
                connection,
                file_id,
                tenant=batch.tenant,
                purpose=Purpose.BATCH_OUTPUT,
                filename=f"batch_{batch.id.hex}_{NAMES[file]}.jsonl",
                state=FileState.GROWING,
                batch_id=batch.id,
            )
            batch_work.begin_file(connection, batch, file, file_id)


def pages(database: Database, batch: BatchView, file: LineFile, after: int = 0) -> Iterator[bytes]:
    """The lines of a file that are there now, behind the first so many; some at a time."""
    last = num_lines(batch, file)
    while after < last:
        with database.begin() as connection:
            page = batch_lines.lines(
                connection,
                batch.id,
                file,
                after=after,
                page=min(PAGE, last - after),
                page_bytes=PAGE_BYTES,
            )
        if not page:
            return
        after = page[-1].place
        yield b"".join(told.line_of(batch.door, line) for line in page)


class Writing:
    """A batch's files on their way: `step` writes some of it."""

    def __init__(self, database: Database, objects: Objects, batch: BatchView) -> None:
        """`batch` has no open lines, and its `begin_files` are done."""
        self._database = database
        self._objects = objects
        self.batch = batch
        self._left = [file for file in LineFile if num_lines(batch, file)]
        self._sizes: dict[UUID, tuple[int, str]] = {}
        self._begin()

    def _begin(self) -> None:
        self._num_bytes = 0
        self._digest = hashlib.sha256()
        if self._left:
            file_id = file_id_of(self.batch, self._left[0])
            assert file_id is not None
            self._file_id = file_id
            self._writer = self._objects.open_writer(key_of(file_id))
            self._pages = pages(self._database, self.batch, self._left[0])

    def step(self) -> bool:
        """Write a page; whether all is there."""
        if not self._left:
            return True
        page = next(self._pages, None)
        if page is None:
            self._writer.close()
            self._sizes[self._file_id] = self._num_bytes, self._digest.hexdigest()
            del self._left[0]
            self._begin()
        else:
            self._writer.write(page)
            self._digest.update(page)
            self._num_bytes += len(page)
        return not self._left

    def settle(self, connection: Connection) -> None:
        """Say that the files are there, in the transaction that ends the batch."""
        for file in LineFile:
            file_id = file_id_of(self.batch, file)
            if file_id in self._sizes:
                num_bytes, sha256 = self._sizes[file_id]
                files.ready(
                    connection,
                    file_id,
                    num_bytes=num_bytes,
                    sha256=sha256,
                    purpose=Purpose.BATCH_OUTPUT,
                    filename=f"batch_{self.batch.id.hex}_{NAMES[file]}.jsonl",
                    expires_s=self.batch.output_expires_s,
                )
