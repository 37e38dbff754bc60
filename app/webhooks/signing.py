"""Standard Webhooks: secrets, bodies and signed headers.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from standardwebhooks import Webhook

PREFIX: Final = "whsec_"
SECRET_BYTES: Final = 32  #: from 24 to 64
_HINT: Final = 4


def new_secret() -> str:
    return PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()


def hint_of(secret: str) -> str:
    """What may be shown of a secret: enough to tell it from another."""
    return f"{PREFIX}...{secret.rstrip('=')[-_HINT:]}"


def body_of(event_id: str, type_: str, created_at: datetime, object_id: str) -> bytes:
    """The body of an event: who ended and how, and nothing of what was asked or answered. The same
    bytes at every attempt."""
    event = {
        "id": event_id,
        "object": "event",
        "type": type_,
        "created_at": int(created_at.timestamp()),
        "data": {"id": object_id},
    }
    return json.dumps(event, separators=(",", ":")).encode()


def headers_of(
    event_id: str, body: bytes, at: datetime, signed_with: Sequence[str]
) -> dict[str, str]:
    """The headers of one attempt: a signature by each secret that is valid."""
    stamp = at.astimezone(UTC)
    text = body.decode()
    signatures = [Webhook(secret).sign(event_id, stamp, text) for secret in signed_with]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(int(stamp.timestamp())),
        "webhook-signature": " ".join(signatures),
    }
