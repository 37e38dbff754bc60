"""Keys of callers: the same key and request once more are the same job.

https://datatracker.ietf.org/doc/draft-ietf-httpapi-idempotency-key-header/
"""

from __future__ import annotations

import re
from typing import Annotated, Final

from fastapi import Header

from app.errors import RequestError

IdempotencyKey = Annotated[
    str | None,
    Header(
        description="The same key and request once more are the same job, as long as it is kept.",
        examples=["order-42-summary"],
    ),
]

_KEY: Final = re.compile(r'"(?P<quoted>[ !#-\[\]-~]{1,255})"|(?P<bare>[!#-~]{1,255})')


def parse_key(header: str) -> str:
    """The key of the header: a quoted string (a structured field), or bare."""
    match = _KEY.fullmatch(header.strip())
    if match is None:
        raise RequestError(
            "An Idempotency-Key has 1 to 255 visible ASCII characters.", param="Idempotency-Key"
        )
    return match["quoted"] or match["bare"]
