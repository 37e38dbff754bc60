"""Server-sent events: what all streams of them have.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Any, Final

from pydantic_core import to_json

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Neither kept nor gathered on the way: nginx heeds the second."""
KEEP_ALIVE: Final = b": keep-alive\n\n"


def written(value: Any, name: str = "", id: object = None) -> bytes:
    """An event on the wire; its data is `value` as JSON, or JSON that is there as bytes."""
    data = value if isinstance(value, bytes) else to_json(value)  # either is one line
    lines = b"data: %b\n\n" % data
    if id is not None:
        lines = b"id: %b\n%b" % (str(id).encode(), lines)
    return b"event: %b\n%b" % (name.encode(), lines) if name else lines
