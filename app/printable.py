"""Text that others wrote, made harmless for a terminal, and short."""

from __future__ import annotations

import re
from typing import Final

_ACTS: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # that turn the direction of writing
    "\ud800-\udfff]"  # halves of characters, which no terminal can be sent
)

_LONGEST: Final = 300
"""Characters of what an error of a library says; some print whole tables."""


def printable(text: str) -> str:
    r"""The text with each character that acts, and does not show, written as in `\x1b`.

    A terminal takes these for commands: they move the cursor, write over what stands there, fill
    the clipboard, or let text read otherwise than it is.
    """
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def in_a_line(error: BaseException) -> str:
    """What a library's error says, with its name and without a full stop."""
    words = " ".join(str(error).split()).rstrip(".") or "no reason given"
    short = words if len(words) <= _LONGEST else f"{words[:_LONGEST]} .."
    return printable(f"{type(error).__name__}: {short}")
