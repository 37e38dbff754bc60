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

_SPACE: Final = rb"[ \t\n\r]*"
_OPEN: Final = re.compile(_SPACE + rb"\{" + _SPACE)
_COLON: Final = re.compile(_SPACE + b":" + _SPACE)
_COMMA: Final = re.compile(_SPACE + b"," + _SPACE)
_SCALAR: Final = re.compile(rb"[^\s,\]}]+")
_STEP: Final = re.compile(rb'["\[\]{},]')
_PART: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_TEXT, _OPENING, _CLOSING = ord('"'), b"[{", b"]}"


def items_of(raw: bytes | bytearray, name: str, most: int) -> list[slice] | None:
    """Where the items are of the list that is the one field, `name`, of an object.

    None if it is no such object, or the list is longer than `most`. What lies between two commas
    may be no JSON. Raises `RequestError` if more than `MAX_PARTS` are in one item.
    """
    opening = re.compile(_SPACE.join([b"", rb"\{", f'"{name}"'.encode(), b":", rb"\["]))
    closing = re.compile(_SPACE.join([rb"\]", rb"\}", rb"\Z"]))
    begin = opening.match(raw)
    if begin is None:
        return None
    found: list[slice] = []
    start = at = begin.end()
    while (step := _STEP.search(raw, at)) and len(found) < most:
        at = step.end()
        match step[0]:
            case b"[" | b"{" | b'"':
                at = end_of_part(raw, step.start())
            case b",":
                found.append(slice(start, step.start()))
                start = at
            case _:
                if found or raw[start : step.start()].strip():
                    found.append(slice(start, step.start()))
                return found if closing.match(raw, step.start()) else None
    return None


def list_among(raw: bytes | bytearray, name: str, most: int) -> tuple[list[slice], slice] | None:
    """The same for a field among others: where its items are, and where the whole list is.

    None if the object has no such field, or it is no list, or a longer one than `most`.
    """
    wanted = f'"{name}"'.encode()
    at = _past(_OPEN, raw, 0)
    while at is not None and raw[at : at + 1] == b'"':
        key_end = end_of_part(raw, at)
        value = _past(_COLON, raw, key_end)
        if value is None:
            return None
        if raw[at:key_end] == wanted:
            return _list_at(raw, value, most)
        is_part = raw[value : value + 1] in (b'"', b"[", b"{")
        end = end_of_part(raw, value) if is_part else _past(_SCALAR, raw, value)
        at = None if end is None else _past(_COMMA, raw, end)
    return None


def _list_at(raw: bytes | bytearray, start: int, most: int) -> tuple[list[slice], slice] | None:
    if raw[start : start + 1] != b"[":
        return None
    found: list[slice] = []
    begin = at = start + 1
    while step := _STEP.search(raw, at):
        at = step.end()
        match step[0]:
            case b"[" | b"{" | b'"':
                at = end_of_part(raw, step.start())
            case b",":
                found.append(slice(begin, step.start()))
                begin = at
            case _:
                if found or raw[begin : step.start()].strip():
                    found.append(slice(begin, step.start()))
                is_list = step[0] == b"]" and len(found) <= most
                return (found, slice(start, at)) if is_list else None
        if len(found) > most:
            break
    return None


def _past(pattern: re.Pattern[bytes], raw: bytes | bytearray, at: int) -> int | None:
    found = pattern.match(raw, at)
    return found.end() if found else None


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
