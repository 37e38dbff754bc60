"""Where large bodies lie: files and outputs, in a folder or in a bucket.

An object is written as a stream and is there when its writer was closed without an error, whole,
or not at all. Nothing of it is in memory but the part that is under way.

    folder       a file beside it, renamed at the end, once the disk has it
    S3 and like  the parts of an upload, put together at the end
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore, from_url

from app.config.settings import Settings
from app.errors import ConfigError, ObjectMissing, StorageUnavailable

PART_BYTES: Final = 8_000_000
"""Of an upload: it is what a writer holds. S3 takes 10,000 parts of an object."""

PIECE_BYTES: Final = 262_144
"""Handed out at once of an object that is read."""

SCHEMES: Final = ("file", "s3", "gs", "az", "azure", "abfs", "abfss")

_CLIENT: Final = {"connect_timeout": "3s", "timeout": "60s"}
_RETRY: Final = {"max_retries": 3, "retry_timeout": timedelta(seconds=10)}


class Writer(Protocol):
    def write(self, data: bytes) -> object: ...


class AsyncWriter(Protocol):
    async def write(self, data: bytes) -> object: ...


class Objects:
    """The storage of this deployment. Threads may share it; every call may raise
    `StorageUnavailable`."""

    def __init__(self, url: str, options: dict[str, str], folder: Path) -> None:
        """`folder` is taken where no `url` is set. Connects to nothing; raises `ConfigError`."""
        self._folder: Path | None = None
        if not url or url.startswith("file://"):
            self._folder = Path(url.removeprefix("file://")) if url else folder
            self._store: Any = None  # made with the folder, when it is needed
            return
        if url.partition("://")[0] not in SCHEMES:
            raise ConfigError(
                f"files.url must begin with one of {', '.join(f'{it}://' for it in SCHEMES)}."
            )
        is_plain = any(value.startswith("http://") for value in options.values())
        given: Any = {
            "config": dict(options),
            "client_options": _CLIENT | {"allow_http": is_plain},
            "retry_config": _RETRY,
        }
        try:
            self._store = from_url(url, **given)
        except (BaseError, ValueError, OSError) as error:
            raise ConfigError(f"files.url and files.options: {_first_line(error)}") from None

    @classmethod
    def of(cls, settings: Settings) -> Objects:
        given = settings.files
        return cls(given.url, given.options, Path(settings.cache_dir) / "files")

    @asynccontextmanager
    async def writing_async(self, key: str) -> AsyncIterator[AsyncWriter]:
        """A new object, or one in place of another: there after the block, unless it raises."""
        with _translated():
            opened = obstore.open_writer_async(
                self._opened(), key, buffer_size=PART_BYTES, max_concurrency=1
            )
        async with _leaving(opened) as writer:
            yield writer
        await asyncio.to_thread(self._settle, key)

    def open_writer(self, key: str) -> OpenWriter:
        """The same without a block, for work that is done in steps."""
        with _translated():
            opened = obstore.open_writer(
                self._opened(), key, buffer_size=PART_BYTES, max_concurrency=1
            )
        return OpenWriter(opened, lambda: self._settle(key))

    async def read_async(self, key: str) -> AsyncIterator[bytes]:
        """The object, piece by piece."""
        with _translated():
            found = await obstore.get_async(self._opened(), key)
            async for piece in found.stream(min_chunk_size=PIECE_BYTES):
                yield bytes(piece)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Up to so many bytes from a place on; none from its end on."""
        with _translated():
            return bytes(obstore.get_range(self._opened(), key, start=start, length=length))

    def delete(self, key: str) -> None:
        """What is not there is deleted, too. So is what an upload has left that never ended."""
        with _translated(), suppress(FileNotFoundError):
            obstore.delete(self._opened(), key)
        if self._folder is not None:
            path = self._folder / key
            for left in path.parent.glob(f"{path.name}#*"):
                left.unlink(missing_ok=True)

    def _opened(self) -> Any:
        if self._store is None:
            assert self._folder is not None
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._store = LocalStore(str(self._folder.absolute()), mkdir=True)
        return self._store

    def _settle(self, key: str) -> None:
        """A folder forgets at a power cut what it was not told to keep."""
        if self._folder is None:
            return
        with _translated():
            path = self._folder / key
            for each in (path, path.parent):
                handle = os.open(each, os.O_RDONLY)
                try:
                    os.fsync(handle)
                finally:
                    os.close(handle)


class OpenWriter:
    """An object that is being written. One that is dropped was never there."""

    def __init__(self, opened: Any, settle: Any) -> None:
        self._opened = opened
        self._settle = settle

    def write(self, data: bytes) -> None:
        with _translated():
            self._opened.write(data)

    def close(self) -> None:
        """It is there, whole, when this returns."""
        with _translated():
            self._opened.close()
        self._settle()


@asynccontextmanager
async def _leaving(opened: Any) -> AsyncIterator[AsyncWriter]:
    """Closed at the end, dropped on an error: errors of the block itself are left as they are."""

    class Translating:
        async def write(self, data: bytes) -> None:
            with _translated():
                await opened.write(data)

    yield Translating()
    with _translated():
        await opened.close()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ObjectMissing("An object is not in the storage of files.") from None
    except (BaseError, OSError) as error:
        raise StorageUnavailable(f"The storage of files: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    """Without what a library knows beside it, secrets of a URL perhaps."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]
