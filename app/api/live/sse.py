"""Server-sent events: what all streams of them have.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

from typing import Final

HEADERS: Final = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Neither kept nor gathered on the way: nginx heeds the second."""
KEEP_ALIVE: Final = b": keep-alive\n\n"
