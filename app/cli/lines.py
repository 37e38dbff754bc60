"""Lines of a file or pipe of any length, in bounded memory."""

from __future__ import annotations

import codecs
import json
import select
from collections.abc import Iterator
from typing import Any, Final, Protocol

from gristmill_client.errors import RequestError, RequestTooLarge

CHUNK_BYTES: Final = 1_000_000
MAX_LINE_BYTES: Final = 64_000_000
"""What no API takes is not kept."""


class Source(Protocol):
    """A binary file, as `sys.stdin.buffer` is one."""

    def read1(self, size: int, /) -> bytes: ...

    def fileno(self) -> int: ...


def numbered_lines(source: Source) -> Iterator[tuple[int, bytes] | None]:
    """Each line that is not blank, with its number from 1; None where nothing more is there yet.

    A line has at most one byte more than `MAX_LINE_BYTES`: the rest of a longer one is dropped. A
    byte order mark is taken off.
    """
    number = 0
    held = bytearray()
    while chunk := source.read1(CHUNK_BYTES):
        *ends, begun = chunk.split(b"\n")
        for end in ends:
            number += 1
            _keep(held, end)
            if line := _line(number, held):
                yield line
            held.clear()
        _keep(held, begun)
        if not _has_more(source):
            yield None
    if line := _line(number + 1, held):
        yield line


def text_of(line: bytes) -> str:
    """A line as text; raises `RequestError`, which quotes nothing of it."""
    if len(line) > MAX_LINE_BYTES:
        raise RequestTooLarge(f"The line is longer than {MAX_LINE_BYTES:,} bytes.")
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"The line is not UTF-8, at byte {error.start + 1}.") from None


def json_object(line: bytes) -> dict[str, Any]:
    """The JSON object on a line; raises `RequestError`, which quotes nothing of it."""
    text = text_of(line)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise RequestError(f"The line is not JSON: {error.msg}, column {error.colno}.") from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The line is not JSON ({type(error).__name__}).") from None
    if not isinstance(value, dict):
        raise RequestError("The line is not a JSON object.")
    return value


def _keep(held: bytearray, more: bytes) -> None:
    held += more[: MAX_LINE_BYTES + 1 - len(held)]


def _line(number: int, held: bytearray) -> tuple[int, bytes] | None:
    line = bytes(held).removeprefix(codecs.BOM_UTF8 if number == 1 else b"")
    return (number, line) if line.strip() else None


def _has_more(source: Source) -> bool:
    """Whether reading on would not wait. A file always has more, if only its end."""
    try:
        return bool(select.select([source.fileno()], [], [], 0)[0])
    except (OSError, ValueError):  # not of the system, as in tests
        return True
