"""JSON text before values are made of it: how much is in it, and where one part ends.

Two megabytes of `{"a":[]}` become 60 MB of objects, and the thread that makes them keeps all
others waiting for a quarter of a second; 64 MB of it take ten seconds and 2 GB. Here it is only
looked through, which makes nothing and lets others go on.
"""

from __future__ import annotations

import re
from typing import Final

from app.errors import RequestError

MAX_PARTS: Final = 50_000
"""Most texts, objects and lists of one job: a thousand messages are 7,000, the largest schema is
some 20,000. Numbers do not count: prompts may be lists of them, and they are cheap."""

_PART: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_TEXT, _OPENING, _CLOSING = ord('"'), b"[{", b"]}"


def refuse_crowded(raw: bytes | bytearray) -> None:
    """Raises `RequestError` if more than `MAX_PARTS` are in it."""
    if raw.count(b'"') // 2 + raw.count(b"[") + raw.count(b"{") > MAX_PARTS:
        end_of_part(raw, 0)


def end_of_part(raw: bytes | bytearray, start: int) -> int:
    """Where the object, list or text ends that begins at `start`; at the end if it never does.

    Raises `RequestError` if more than `MAX_PARTS` are in it.
    """
    depth = num_parts = 0
    for found in _PART.finditer(raw, start):
        kind = raw[found.start()]
        if kind in _CLOSING:
            depth -= 1
        else:
            depth += kind in _OPENING
            num_parts += 1
        if num_parts > MAX_PARTS:
            raise RequestError(
                f"The body has more than {MAX_PARTS} texts, objects and lists.", param="body"
            )
        if depth <= 0:
            return found.end()
    return len(raw)
