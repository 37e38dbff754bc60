"""The keeper of files: what is deleted, over, or was never whole leaves the storage.

A thread of rescue. The bytes go first and the row after them, so that nothing is left that no row
knows, wherever it ends.
"""

from __future__ import annotations

import logging
import threading
from typing import Final

from app.config.settings import Settings
from app.errors import GristmillError
from app.files import key_of
from app.objects import Objects
from app.store import files
from app.store.database import Database

log = logging.getLogger(__name__)

LOOK_S: Final = 10.0
"""Between looks for what is to go."""

PAGE: Final = 100

PATIENCE_S: Final = 86_400.0
"""An upload that has not ended for so long never will: the slowest that is taken is through."""


class FileKeeper:
    """Not for several threads at once; several processes may each have one."""

    def __init__(self, settings: Settings) -> None:
        """Raises `ConfigError` if the storage cannot be."""
        given = settings.database
        self._objects = Objects.of(settings)
        self._database = Database(
            given.url,
            pool_size=1,
            application_name="gristmill files",
            connect_timeout_s=given.connect_timeout_s,
            statement_timeout_ms=given.statement_timeout_ms,
            lock_timeout_ms=given.lock_timeout_ms,
        )
        self._told = ""

    def keep(self, stop: threading.Event) -> None:
        """Look until it is to stop."""
        try:
            while not stop.wait(LOOK_S):
                self.look()
        finally:
            self.close()

    def close(self) -> None:
        self._database.close()

    def look(self) -> None:
        """Remove what is to go. What cannot be removed now is another time."""
        try:
            while self._remove_page() == PAGE:
                pass
        except GristmillError as error:
            self._tell(str(error))
        else:
            self._told = ""

    def _remove_page(self) -> int:
        with self._database.begin() as connection:
            ids = files.going(connection, PAGE, PATIENCE_S)
        for file_id in ids:
            self._objects.delete(key_of(file_id))
        if ids:
            with self._database.begin() as connection:
                files.forget(connection, ids)
            extra = {"action": "files_removed", "rows": len(ids)}
            log.info("Files that were deleted, or over, are removed.", extra=extra)
        return len(ids)

    def _tell(self, why: str) -> None:
        """Once, however often it is tried."""
        if why != self._told:
            log.warning("Files cannot be removed now: %s", why, extra={"action": "files_stay"})
        self._told = why
