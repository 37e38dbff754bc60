"""The rows of an input file, from any place on: a part of it is in memory at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from app.errors import ObjectMissing

PART_BYTES: Final = 1_000_000
"""Read at once."""

Read = Callable[[int, int], bytes]
"""Up to so many bytes (the second) from a place (the first) on."""


_BLANK: Final = re.compile(rb"(?:[ \t\r\v\f]*+\n)++")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of text, or blank rows, which take no time however many they are."""

    number: int  #: from 1; of several it is the last one's
    raw: bytes | None  #: without its end; None if it is longer than a row may be
    end: int  #: where the next one begins

    @property
    def is_blank(self) -> bool:
        return self.raw is not None and not self.raw.strip()


def rows(
    read: Read, size: int, *, start: int, number: int, longest: int, part: int = PART_BYTES
) -> Iterator[Row]:
    """Rows from `start` on, of which the first has this number, to the end of a file of this size.

    A row has up to `longest` bytes: of a longer one nothing is kept. Raises `ObjectMissing` if
    there is less than that.
    """
    held = bytearray()
    begin, at = start, start  #: of the row; of what is to be read
    is_long = False
    while at < size:
        piece = read(at, min(part, size - at))
        if not piece:
            raise ObjectMissing("A file is shorter than its row says.")
        at += len(piece)
        done = 0
        while True:
            if not (held or is_long) and (blank := _BLANK.match(piece, done)):
                number += piece.count(b"\n", done, blank.end())
                done = blank.end()
                begin = at - len(piece) + done
                yield Row(number - 1, b"", begin)
            newline = piece.find(b"\n", done)
            if newline < 0:
                break
            held += piece[done:newline]
            done = newline + 1
            end = at - len(piece) + done
            is_long = is_long or len(held) > longest
            yield Row(number, None if is_long else bytes(held), end)
            held.clear()
            number, begin, is_long = number + 1, end, False
        if not is_long:
            held += piece[done:]
            if len(held) > longest:
                held.clear()
                is_long = True
    if begin < size:
        yield Row(number, None if is_long else bytes(held), size)
