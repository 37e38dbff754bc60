"""The events that webhooks tell: something ended, and how."""

from __future__ import annotations

from typing import Final

EVENT_TYPES: Final = (
    "job.completed",
    "job.failed",
    "job.cancelled",
    "job.expired",
    "response.completed",
    "response.incomplete",
    "response.failed",
    "response.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.cancelled",
    "batch.expired",
)
"""A job of /v1/responses is a response, and tells `response.*` instead of `job.*`: the names of
OpenAI's, which knows none for one that expired: it failed."""
